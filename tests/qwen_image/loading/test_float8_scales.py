"""float8 model files: with scales they are the weights again, without they are told of or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.loading.safetensors_ranges import RangeReader, read_headers
from qwen_image.loading.weights import float8_warning, load_weights, match_weights

FLOAT8 = torch.float8_e4m3fn


class Model(nn.Module):
    """Two linear layers, built without memory."""

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 8, bias=False)


def quantized(weight: torch.Tensor, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
    largest = weight.abs().amax(1, keepdim=True) if rows else weight.abs().amax()
    scale = (largest / 448).float()
    return (weight / scale).to(FLOAT8), scale


def write(path, rows=False, style="scale_weight", mark=True):
    """Returns the weights that the file stands for."""
    generator = torch.Generator().manual_seed(0)
    state, expected = {"first.bias": torch.randn(40, generator=generator)}, {}
    expected["first.bias"] = state["first.bias"]
    for name, shape in (("first", (40, 24)), ("second", (8, 40))):
        stored, scale = quantized(torch.randn(shape, generator=generator) * 0.02, rows)
        state |= {f"{name}.weight": stored, f"{name}.{style}": scale, f"{name}.scale_input": torch.ones(())}
        expected[f"{name}.weight"] = stored.float() * scale
    if mark:
        state["scaled_fp8"] = torch.empty(0, dtype=FLOAT8)
    save_file(state, path)
    return expected


@pytest.mark.parametrize("rows", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("style", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scales_are_multiplied_in(tmp_path, rows, style, dtype):
    expected = write(tmp_path / "x.safetensors", rows, style)
    model = Model()
    load_weights(model, (tmp_path / "x.safetensors",), dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].to(dtype)), "one rounding, from the exact product"


def test_a_part_of_a_tensor_takes_its_own_rows_scales(tmp_path):
    expected = write(tmp_path / "x.safetensors", rows=True)["first.weight"].flatten()
    stored = match_weights(Model(), (tmp_path / "x.safetensors",))["first.weight"]
    for first, count in ((0, 960), (5, 30), (23, 2), (24, 24), (959, 1)):
        part = torch.empty(count)
        with RangeReader() as reader:
            reader.read(stored, part, first)
        assert torch.equal(part, expected[first : first + count])


def without(path, *names):
    save_file({name: tensor for name, tensor in load_file(path).items() if name not in names}, path)


def test_a_missing_scale_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    without(path, "second.scale_weight")
    with pytest.raises(ValueError, match=r"second.weight is scaled float8, but its scale is not in the file"):
        match_weights(Model(), (path,))
    without(path, "first.scale_weight")  # the mark alone says that there were some
    with pytest.raises(ValueError, match=r"first.weight is scaled float8, but its scale is not in the file"):
        match_weights(Model(), (path,))


def test_scales_of_another_form_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    save_file(load_file(path) | {"first.scale_weight": torch.ones(3, 2)}, path)
    with pytest.raises(ValueError, match=r"first.scale_weight has shape \[3, 2\]; read are scales with one number"):
        match_weights(Model(), (path,))


def test_unscaled_float8_is_refused_or_told(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, mark=False)
    without(path, "first.scale_weight", "second.scale_weight", "first.scale_input", "second.scale_input")
    with pytest.raises(ValueError, match=r"first.weight is float8 without a scale"):
        load_weights(Model(), (path,), torch.float32)
    load_weights(Model(), (path,), torch.float32, unscaled_float8=True)


def test_the_transformers_file_in_unscaled_float8_is_told_of_in_one_line(tiny_model, tmp_path):
    path = tmp_path / "fp8.safetensors"
    file = tiny_model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: t.to(FLOAT8) if t.ndim == 2 else t for name, t in load_file(file).items()}, path)
    lines = float8_warning(resolve_model(ModelSource(str(tiny_model), transformer_path=str(path)), ("transformer",)))
    assert len(lines) == 1 and str(path) in lines[0] and "lost precision" in lines[0]
    assert float8_warning(resolve_model(ModelSource(str(tiny_model)), ("transformer",))) == []


def test_integers_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"first.weight": torch.ones(40, 24).char(), "first.bias": torch.ones(40)}
              | {"second.weight": torch.ones(8, 40)}, path)  # fmt: skip
    with pytest.raises(ValueError, match=r"first.weight holds int8 numbers: a quantized file of another program"):
        match_weights(Model(), (path,))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_refused_with_its_name(tmp_path, value, stored, dtype):
    path = tmp_path / "x.safetensors"
    write(path, mark=False)
    state = {"first.weight": torch.ones(40, 24), "first.bias": torch.ones(40), "second.weight": torch.ones(8, 40)}
    state["second.weight"][7, 39] = value
    save_file({name: tensor.to(stored) for name, tensor in state.items()}, path)
    with pytest.raises(ValueError, match=r"x.safetensors: second.weight has values that are NaN or infinite"):
        load_weights(Model(), (path,), dtype)


def test_large_finite_values_are_taken(tmp_path):
    """Their norm overflows, they do not."""
    path = tmp_path / "x.safetensors"
    state = {
        "first.weight": torch.full((40, 24), 3e38),
        "first.bias": torch.ones(40),
        "second.weight": torch.ones(8, 40),
    }
    save_file(state, path)
    model = Model()
    load_weights(model, (path,), torch.float32)
    assert torch.equal(model.first.weight, state["first.weight"])


def test_one_tensor_in_two_files_is_refused(tmp_path):
    for name in "ab":
        save_file({"first.bias": torch.ones(40)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"both hold first.bias"):
        read_headers((tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
