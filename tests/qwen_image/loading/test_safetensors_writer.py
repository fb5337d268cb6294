"""The one safetensors writer against the library's reader."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from qwen_image.loading.safetensors_ranges import DTYPES, read_headers
from qwen_image.loading.safetensors_writer import data_bytes, safetensors_blocks, safetensors_header


def layout_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(bytes(block) for block in safetensors_blocks(layout_of(tensors), tensors.values(), metadata))


def test_the_library_reads_every_type_shape_and_text():
    tensors = {f"{name} – ü": torch.arange(24).reshape(2, 3, 4).to(dtype) for name, dtype in DTYPES.items()} | {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    found = load(written(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))


def test_the_bytes_are_the_librarys_where_it_has_no_choice():
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    assert written(tensors, {"format": "pt"}) == save(tensors, {"format": "pt"})
    assert written(tensors) == save(tensors)


def test_our_reader_finds_what_was_written(tmp_path: Path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()}
    (tmp_path / "x.safetensors").write_bytes(written(tensors, {"note": "ü"}))
    assert {n: (s.dtype, s.shape) for n, s in read_headers((tmp_path / "x.safetensors",)).items()} == layout_of(tensors)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"note": "ü"}


def test_one_flat_tensor_may_hold_several():
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    blocks = [bytes(block) for block in safetensors_blocks(layout_of(tensors), [flat])]
    assert b"".join(blocks) == written(tensors)
    assert len(blocks) == 2 and blocks[0] == safetensors_header(layout_of(tensors))
    assert len(blocks[1]) == data_bytes(layout_of(tensors)) == 4 * 22


def test_values_that_are_not_the_layouts_are_a_mistake_of_the_program():
    with pytest.raises(AssertionError, match="8 bytes came, the layout has 12"):
        list(safetensors_blocks({"a": (torch.float32, (3,))}, [torch.zeros(2)]))
