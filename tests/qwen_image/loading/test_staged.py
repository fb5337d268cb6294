"""Loading tensor by tensor: the same model as loading whole, and never much of it unquantized in memory."""

import weakref

import pytest
import torch

from demo.random_model import write_random_model
from qwen_image.float8.linear import FLOAT8, quantize_blocks
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.loading.safetensors_ranges import RangeReader
from qwen_image.loading.staged import load_staged
from qwen_image.model.modulation import replace_by_table
from qwen_image.pipeline import load_transformer

GRID = [k / 1000 for k in range(1, 1001, 7)]


@pytest.fixture
def files(tiny_model):
    return resolve_model(ModelSource(str(tiny_model)), ("transformer",))


def tensors_of(transformer):
    named = [*transformer.named_parameters(), *transformer.named_buffers()]
    return {name: tensor.view(torch.uint8) if tensor.dtype == FLOAT8 else tensor for name, tensor in named}


@pytest.mark.parametrize("base_float8", [False, True], ids=["bfloat16", "float8"])
@pytest.mark.parametrize("sigmas", [None, GRID], ids=["layers", "table"])
def test_equal_to_loading_whole_bit_for_bit(files, base_float8, sigmas):
    whole = load_transformer(files, torch.bfloat16)
    if sigmas is not None:
        replace_by_table(whole, sigmas)
    if base_float8:
        quantize_blocks(whole)
    staged = load_staged(files, torch.bfloat16, "cpu", base_float8=base_float8, sigmas=sigmas)
    expected, found = tensors_of(whole), tensors_of(staged)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(tensor.dtype == torch.uint8 for tensor in found.values()) == base_float8
    assert not any(parameter.requires_grad for parameter in staged.parameters()) and not staged.training
    if sigmas is not None:
        assert torch.equal(staged.modulation_table.rows, whole.modulation_table.rows)
        assert staged.modulation_table.places == whole.modulation_table.places
        assert staged.modulation_table.replaced == whole.modulation_table.replaced > 0


def test_little_is_unquantized_at_any_time(tmp_path, monkeypatch):
    """Counted: every destination that threads read into, until nobody holds it."""
    alive, peak = {}, 0

    def read(self, stored, destination, first=0):
        nonlocal peak
        storage = destination.untyped_storage()
        alive[storage.data_ptr()] = storage.nbytes()
        weakref.finalize(destination, alive.pop, storage.data_ptr())
        peak = max(peak, sum(alive.values()))
        return plain(self, stored, destination, first)

    plain = RangeReader.read
    monkeypatch.setattr(RangeReader, "read", read)
    write_random_model(tmp_path / "model", layers=10, heads=1, text_dim=64)
    files = resolve_model(ModelSource(str(tmp_path / "model")), ("transformer",))
    transformer = load_staged(files, torch.bfloat16, "cpu", base_float8=True, sigmas=GRID)
    kept = sum(p.nbytes for p in transformer.parameters() if p.dtype != FLOAT8)
    whole = load_transformer(files, torch.bfloat16)
    sizes = {name: p.nbytes for name, p in whole.named_parameters()}
    block = sum(size for name, size in sizes.items() if name.startswith("transformer_blocks.0."))
    outside = sum(size for name, size in sizes.items() if "transformer_blocks" not in name)
    assert (
        peak <= max(kept, outside) + 3 * block
    )  # one is made into what it becomes, one is read, one may not be freed yet
    assert peak < 0.4 * sum(sizes.values())  # else this says nothing


def test_a_change_comes_before_rounding(files):
    names = []

    def change(name, weight):
        names.append(name)
        assert weight.dtype == torch.bfloat16
        return weight * 4 if name.endswith(("to_q", "img_mod.1", "proj_out")) else weight

    plain = load_staged(files, torch.bfloat16, "cpu", base_float8=True, sigmas=GRID)
    changed = load_staged(files, torch.bfloat16, "cpu", base_float8=True, sigmas=GRID, change=change)
    query, other = (model.transformer_blocks[0].attn.to_q for model in (changed, plain))
    assert torch.equal(query.scale, 4 * other.scale) and torch.equal(query.weight.float(), other.weight.float())
    assert torch.equal(changed.proj_out.weight, 4 * plain.proj_out.weight)
    assert not torch.equal(changed.modulation_table.rows, plain.modulation_table.rows)
    assert len(names) == len(set(names)) and "norm_out.linear" in names and "txt_norm" not in names


def test_a_damaged_file_is_one_error(files, tmp_path):
    source = files["transformer"].weights[0]
    cut = tmp_path / source.name
    cut.write_bytes(source.read_bytes()[:-1000])
    damaged = resolve_model(ModelSource(str(source.parent.parent), transformer_path=str(cut)), ("transformer",))
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_staged(damaged, torch.bfloat16, "cpu", base_float8=True)
