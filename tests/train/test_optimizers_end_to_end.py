"""`--optimizer` through the whole command: resumed to the bit, what is logged, saved, validated, refused and told."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.training_run import ROOT, losses, train
from train.config import optimizer_args
from train.lora.checkpoint_lora import checkpoint_spelling
from train.saving.checkpoint_folder import read_checkpoint

FLAGS: dict[str, list[str]] = {
    "adamw-lora+": ["--lora_plus_ratio", "4", "--learning_rate", "5e-3"],
    "adafactor": ["--optimizer", "adafactor", "--learning_rate", "0.05"],
    "muon": ["--optimizer", "muon", "--learning_rate", "1e-2", "--optimizer_args", "momentum=0.9", "ns_steps=4"],
    "prodigy": ["--optimizer", "prodigy", "--optimizer_args", "d0=1e-3", "--lr_warmup_steps", "2"],
    "schedulefree": ["--optimizer", "schedulefree", "--learning_rate", "1e-2"],
}
WATCHED = ["--validation_samples", "2", "--validation_steps", "2", "--keep_best", "--save_steps", "2"]


def train_all(model: Path, data: Path, runs: list[tuple[Path, list[str]]]) -> list[int]:
    return [train(model, data, output, *more) for output, more in runs]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(small_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each optimizer a run of four steps, and one in two halves."""
    folder = tmp_path_factory.mktemp("runs")
    commands = []
    for name, flags in FLAGS.items():
        commands += [(folder / name, [*flags, *WATCHED])]
        commands += [(folder / f"{name}-halves", [*flags, *WATCHED, *more]) for more in (["--max_steps", "2"], [])]
    assert run_ranks(1, train_all, small_model, small_data, commands) == [0] * len(commands)
    return folder


@pytest.mark.parametrize("name", FLAGS)
def test_two_halves_are_the_whole(runs: Path, name: str) -> None:
    assert losses(runs / name) == losses(runs / f"{name}-halves") and len(set(losses(runs / name))) == 4
    for file in ("lora.safetensors", "lora-2.safetensors", "lora-best.safetensors"):
        one, two = load_file(runs / name / file), load_file(runs / f"{name}-halves" / file)
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items()), file
    measured = [
        {r["step"]: r["validation_loss"] for r in rows(run) if "validation_loss" in r}
        for run in (runs / name, runs / f"{name}-halves")
    ]
    assert measured[0] == measured[1] and measured[0].keys() == {0, 2, 4} and len(set(measured[0].values())) > 1


def test_prodigy_s_logged_rate_is_times_its_estimate(runs: Path) -> None:
    logged = {row["step"]: row["lr"] for row in rows(runs / "prodigy") if "lr" in row}
    for step in (2, 4):
        (group,) = read_checkpoint(runs / "prodigy" / "checkpoints" / f"step-{step:08d}").groups
        assert logged[step] == group["d"] and group["k"] == step
    assert logged[1] < logged[4] != 1.0


def test_schedule_free_saves_and_measures_its_average(
    runs: Path, small_model: Path, small_data: Path, tmp_path: Path
) -> None:
    """The files and the norms are those of x; a run that starts from the file begins with the loss that this one ended with."""
    run = runs / "schedulefree"
    state = load_file(run / "checkpoints" / "step-00000004" / "state.safetensors")
    saved = load_file(run / "lora.safetensors")
    for key, tensor in saved.items():
        name = f"{key.removesuffix('.weight')}.default.weight"
        assert torch.equal(tensor, state[f"average/{name}"])
    assert any((state[f"average/{key[7:]}"] != state[key]).any() for key in state if key.startswith("weight/"))
    last = [row for row in rows(run) if row["step"] == 4 and "loss" in row][-1]
    norm = math.sqrt(sum(value**2 for key, value in last.items() if key.startswith("weight_norm/")))
    assert norm == pytest.approx(math.sqrt(sum(t.double().square().sum().item() for t in saved.values())), rel=1e-6)
    for name, prefix in (("schedulefree", "average/"), ("prodigy", "weight/")):
        spelling = checkpoint_spelling(runs / name / "checkpoints" / "step-00000004" / "state.safetensors")
        assert spelling is not None and spelling.prefix == prefix  # what sample.py and the others read of a checkpoint
    more = ["--lora_checkpoint", str(run / "lora.safetensors"), "--validation_samples", "2", "--max_steps", "1"]
    assert run_ranks(1, train_all, small_model, small_data, [(tmp_path / "next", more)]) == [0]
    measured = [
        {r["step"]: r["validation_loss"] for r in rows(r) if "validation_loss" in r} for r in (run, tmp_path / "next")
    ]
    assert measured[0][4] == pytest.approx(measured[1][0], rel=1e-6)
    best = min((2, 4), key=lambda step: measured[0][step])
    kept = load_file(run / "lora-best.safetensors")
    there = load_file(run / ("lora-2.safetensors" if best == 2 else "lora.safetensors"))
    assert all(torch.equal(tensor, there[key]) for key, tensor in kept.items())


def train_under_each_home(model: Path, data: Path, folder: Path) -> list[int]:
    homes = ("zero2", "zero2_offload", "zero3", "zero3_offload")
    short = ["--max_steps", "3", "--save_steps", "0", "--activation_checkpointing", "full"]
    return [
        train(model, data, folder / f"{name}-{home}", *flags, *short, "--deepspeed", f"{ROOT}/ds_configs/{home}.json")
        for name, flags in FLAGS.items()
        for home in homes
    ]


def test_the_same_losses_wherever_the_base_and_the_state_lie(
    small_model: Path, small_data: Path, tmp_path: Path
) -> None:
    assert run_ranks(1, train_under_each_home, small_model, small_data, tmp_path) == [0] * 20
    for name in FLAGS:
        expected = losses(tmp_path / f"{name}-zero2")
        assert len(expected) == 3
        for home in ("zero2_offload", "zero3", "zero3_offload"):
            assert losses(tmp_path / f"{name}-{home}") == pytest.approx(expected, rel=1e-4), (name, home)


def test_a_lokr_under_each_optimizer(
    small_model: Path, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In halves as whole; LoRA+ is about lora_A and lora_B, and refused."""
    commands = []
    for name, flags in FLAGS.items():
        lokr = [*flags, "--lora_type", "lokr", "--save_steps", "0", "--checkpoint_steps", "1"]
        commands += [
            (tmp_path / name, [*lokr, "--max_steps", "3"]),
            (tmp_path / f"{name}-2", [*lokr, "--max_steps", "2"]),
        ]
        commands += [(tmp_path / f"{name}-2", [*lokr, "--max_steps", "3"])]
    codes = run_ranks(1, train_all, small_model, small_data, commands)
    assert codes == [2] * 3 + [0] * (len(commands) - 3)
    assert "lora_plus_ratio is about lora_A and lora_B, which only lora_type lora has" in capfd.readouterr().err
    for name in list(FLAGS)[1:]:
        one, two = (load_file(tmp_path / folder / "lora.safetensors") for folder in (name, f"{name}-2"))
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items()), name
        assert any(tensor.any() for key, tensor in one.items() if key.endswith(("lokr_w2", "lokr_w2_b"))), name


def test_another_optimizer_can_t_go_on(
    runs: Path, small_model: Path, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused with what to do, which works; so is a change within AdamW's two layouts, which are one, not refused."""
    longer = ["--max_steps", "5", "--save_steps", "0"]
    commands = [
        (runs / "muon", [*FLAGS["adafactor"], *longer]),
        (runs / "muon", ["--learning_rate", "1e-2", *longer]),
        (tmp_path / "new", [*longer, "--lora_checkpoint", str(runs / "muon")]),
        (runs / "adamw-lora+", ["--learning_rate", "5e-3", *longer, "--validation_samples", "2"]),
    ]
    assert run_ranks(1, train_all, small_model, small_data, commands) == [2, 2, 0, 0]
    said = capfd.readouterr()
    both = said.out + said.err
    assert "holds the state of optimizer muon, which adafactor can't go on with" in both
    assert (
        "which adamw can't go on with: go on with that one, or begin a new run in another --output_path with its"
        in both
    )
    assert "resuming with another option: config.lora_plus_ratio is 4.0 in the checkpoint, null in this run" in both


def test_a_missing_package_is_told_before_anything_is_read(
    small_model: Path,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(optimizer_args, "find_spec", lambda name: None)
    for name, package in (("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")):
        assert train(small_model, small_data, tmp_path / "run", "--optimizer", name) == 2
        said = capsys.readouterr().err
        assert said == (
            f"error: optimizer {name} needs the package {package}: pip install {package} (this project's extra [{name}])\n"
        )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_and_the_start_s_table_name_it(
    runs: Path, small_model: Path, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    commands = [
        (tmp_path / "dry", [*FLAGS["prodigy"], "--dry_run"]),
        (tmp_path / "short", ["--optimizer", "prodigy", "--learning_rate", "1e-4", "--max_steps", "1"]),
    ]
    assert run_ranks(1, train_all, small_model, small_data, commands) == [0, 0]
    said = capfd.readouterr()
    dry, _, short = (said.out + said.err).partition("done: nothing was written")
    assert "optimizer: Prodigy, learning rate 1 times its own estimate, weight decay 0.01, d_coef 1.0, d0 0.001" in dry
    assert "Prodigy 0.00" in dry  # the memory plan
    assert "  by       Prodigy, learning rate 0.0001 times its own estimate" in short
    assert "warning: learning rate 0.0001 is far below Prodigy's usual 1: little will be learned" in short
