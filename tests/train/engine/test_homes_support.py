"""Every feature with every home of the base: the curve of the resident base, or refused by name before weights are read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.random_model import write_random_encoded
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.home_runs import rows, train_all

HOMES: dict[str, tuple[str, ...]] = {
    "resident": ("zero2",),
    "some on the host": ("zero2", "--resident_blocks", "2"),
    "ranks": ("zero3",),
}
# A tenth of the learning rate: AdamW divides a gradient by its own size, so in one near its ε (1e-8) rounding shows whole.
ATOL = 2e-4
OFFLOADED = {
    "resident": ("zero2_offload",),
    "ranks' hosts": ("zero3_offload",),
}  # AdamW on the CPU rounds in its own way
FEATURES: dict[str, tuple[str, ...]] = {
    "modulation": ("--lora_target_modules", "to_q,modulation"),
    "offload_activations": ("--offload_activations", "true", "--activation_checkpointing", "full"),
    "dropout": ("--lora_dropout", "0.2", "--activation_checkpointing", "3"),
    "deterministic": ("--deterministic", "true"),
}


def all_homes(common: list[str], folder: Path, homes: dict[str, tuple[str, ...]], *more: str) -> None:
    """The same curve and LoRA, bit for bit, from each."""
    jobs = [(common, folder / name, config, 2, *more, *own) for name, (config, *own) in homes.items()]
    assert run_ranks(2, train_all, jobs) == [0] * len(jobs)
    expected, weights = rows(folder / "resident"), load_file(folder / "resident" / "lora.safetensors")
    assert len([row for row in expected if row[1] is not None]) == 2
    for name in homes:
        assert rows(folder / name) == expected, name
        found = load_file(folder / name / "lora.safetensors")
        assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights), name


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_the_same_at_every_home(common, tmp_path, feature):
    all_homes(common, tmp_path / "gpu", HOMES, *FEATURES[feature])
    if feature == "modulation":
        all_homes(common, tmp_path / "cpu", OFFLOADED, *FEATURES[feature])


def test_presets_are_merged_at_every_home(common, tmp_path):
    assert run_ranks(1, train_all, [(common, tmp_path / "first", "zero2", 2)]) == [0]
    preset = ["--preset_lora_path", f"{tmp_path / 'first' / 'lora.safetensors'}:0.7"]
    all_homes(common, tmp_path / "with", HOMES, *preset)
    assert rows(tmp_path / "with" / "resident")[0] != rows(tmp_path / "first")[0]  # validation before the first step


REFUSED = {
    "host": (1, "zero2", "--resident_blocks", "0"),
    "some on the host": (1, "zero2", "--resident_blocks", "4"),
    "host, by the JSON": (1, "zero3_offload"),
    "int8": (1, "zero2", "--base_precision", "int8"),
    "float8": (1, "zero2", "--base_precision", "float8"),
    "ranks": (2, "zero3"),
}


@pytest.mark.parametrize("home", REFUSED)
def test_a_dora_is_refused_by_name_before_weights_are_read(common, tmp_path, monkeypatch, capfd, home):
    world, config, *more = REFUSED[home]

    def read(*arguments, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr("train.base_model.load_pipeline.load_pipeline", read)
    job = (common, tmp_path / "run", config, 2, "--lora_dora", "true", *more)
    assert run_ranks(world, train_all, [job]) == [2]
    error = capfd.readouterr().err
    assert "lora_dora" in error and "exact weights" in error and not (tmp_path / "run").exists()


def test_a_dora_runs_where_the_base_is_whole(common, tmp_path):
    jobs = [(common, tmp_path / name, name, 2, "--lora_dora", "true") for name in ("zero2", "zero2_offload")]
    assert run_ranks(2, train_all, jobs) == [0, 0]
    assert rows(tmp_path / "zero2")[1][1] == pytest.approx(rows(tmp_path / "zero2_offload")[1][1], rel=1e-5)


@pytest.fixture(scope="module")
def one_bucket(common, tmp_path_factory) -> list[str]:
    """The model's flags with data enough for a global batch of 12."""
    folder = tmp_path_factory.mktemp("bucket") / "data"
    data = write_random_encoded(folder, 28, 32, 32, prompt_tokens=6, text_dim=64)
    place = common.index("--data") + 1
    return [*common[:place], str(data), *common[place + 1 :]]


@pytest.mark.parametrize("worlds", [(1, 3), pytest.param((1, 2, 3, 4), marks=pytest.mark.slow)], ids=str)
def test_one_curve_on_any_number_of_ranks_at_every_home(one_bucket, tmp_path, worlds):
    """zero2, zero2_offload, zero3, zero3_offload, all or some blocks on the host: losses and LoRA files; a batch of 12."""
    curves: dict[int, list[float]] = {}
    files: dict[int, dict[str, torch.Tensor]] = {}
    for world in worlds:
        common = [*one_bucket, "--gradient_accumulation_steps", str(12 // world)]
        all_homes_of(world, common, tmp_path / str(world))
        curves[world] = [row[1] for row in rows(tmp_path / str(world) / "resident") if row[1] is not None]
        files[world] = load_file(tmp_path / str(world) / "resident" / "lora.safetensors")
        assert curves[world] == pytest.approx(curves[1], rel=1e-6) and len(curves[1]) == 2
        for key, weight in files[1].items():
            torch.testing.assert_close(files[world][key], weight, rtol=1e-4, atol=ATOL)


def all_homes_of(world: int, common: list[str], folder: Path) -> None:
    homes = HOMES | {"offloaded": ("zero2_offload",), "ranks' hosts": ("zero3_offload",)}
    jobs = [(common, folder / name, config, 2, *own) for name, (config, *own) in homes.items()]
    assert run_ranks(world, train_all, jobs) == [0] * len(jobs)
    for names in (tuple(HOMES), ("offloaded", "ranks' hosts")):
        expected, weights = rows(folder / names[0]), load_file(folder / names[0] / "lora.safetensors")
        for name in names[1:]:
            assert rows(folder / name) == expected, (world, name)
            found = load_file(folder / name / "lora.safetensors")
            assert all(torch.equal(found[key], weights[key]) for key in weights), (world, name)
    one, other = (load_file(folder / name / "lora.safetensors") for name in ("resident", "offloaded"))
    for key, weight in one.items():
        torch.testing.assert_close(other[key], weight, rtol=1e-4, atol=ATOL)
