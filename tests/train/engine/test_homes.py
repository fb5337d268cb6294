"""One curve wherever the frozen base lies on one rank: on the device, some blocks or all of them on the host, in 8 bits too."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.home_runs import rows, train

HOMES = {
    "resident": ("zero2",),
    "host": ("zero2", "--resident_blocks", "0"),
    "some": ("zero2", "--resident_blocks", "2"),
    "none": ("zero2", "--resident_blocks", "0", "--activation_checkpointing", "full"),
}


@pytest.mark.parametrize("precision", ["dtype", "float8"])
def test_every_home_gives_the_same_run_bit_for_bit(common, tmp_path, precision):
    for name, (config, *more) in HOMES.items():
        assert train(common, tmp_path / name, config, 6, "--base_precision", precision, *more) == 0
    expected = rows(tmp_path / "resident")
    weights = load_file(tmp_path / "resident" / "lora.safetensors")
    assert len(expected) >= 8 and any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    for name in HOMES:
        assert rows(tmp_path / name) == expected, name
        found = load_file(tmp_path / name / "lora.safetensors")
        assert all(torch.equal(found[key], weights[key]) for key in weights), name


def test_int8_is_the_same_from_every_home_and_near_the_exact_base(common, tmp_path):
    for name, (config, *more) in HOMES.items():
        assert train(common, tmp_path / name, config, 3, "--base_precision", "int8", *more) == 0
        assert rows(tmp_path / name) == rows(tmp_path / "resident")
    assert train(common, tmp_path / "exact", "zero2", 3) == 0
    exact, rounded = (rows(tmp_path / name)[1][1] for name in ("exact", "resident"))
    assert rounded == pytest.approx(exact, rel=1e-2) and rounded != exact


@pytest.mark.parametrize("precision", ["dtype", "float8", "int8"])
def test_a_lokr_is_the_same_from_every_home(common, tmp_path, precision):
    """Its layers multiply with what lies where the base lies."""
    more = ["--base_precision", precision, "--lora_type", "lokr", "--lokr_factor", "4"]
    for name, (config, *home) in HOMES.items():
        assert train(common, tmp_path / name, config, 3, *more, *home) == 0
    weights = load_file(tmp_path / "resident" / "lora.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if "lokr_w2_b" in name)
    for name in HOMES:
        assert rows(tmp_path / name) == rows(tmp_path / "resident"), name
        found = load_file(tmp_path / name / "lora.safetensors")
        assert all(torch.equal(found[key], weights[key]) for key in weights), name
