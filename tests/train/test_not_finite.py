"""Steps that are not finite: what the stop says, when skipping gives up, and a learning rate that can't be meant."""

import pytest

from tests.helpers.training_run import train
from train.engine.optimizer import Optimizer
from train.watching.loss_watch import IN_A_ROW, SHARE, WINDOW, LossWatch

NO_TRIALS = ("--activation_checkpointing", "full", "--cuda_graphs", "off")


def spoil(monkeypatch: pytest.MonkeyPatch, spoiled) -> None:
    """NaN in the target of these micro-batches, counted from 1."""
    from train.step import flow_matching_module as module

    original, calls = module.velocity_target, [0]

    def target(latents, noise):
        calls[0] += 1
        return original(latents, noise) * (float("nan") if spoiled(calls[0]) else 1.0)

    monkeypatch.setattr(module, "velocity_target", target)


def test_the_stop_says_everything(small_model, small_data, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, lambda call: call == 3)
    more = ("--max_steps", "6", "--save_steps", "2", "--learning_rate", "5e-4", *NO_TRIALS)
    assert train(small_model, small_data, tmp_path / "run", *more) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: step 3 is not finite")
    for part in (
        "samples 0000",
        " at σ ",
        "learning rate 0.0005, gradient norm inf",
        "ended, as --on_nonfinite stop says, exit code 3",
        "newest checkpoint: step 2",
        "try --learning_rate 5e-05",
        "--on_nonfinite skip",
    ):
        assert part in last, last


def test_skipping_gives_up(small_model, small_data, tmp_path, monkeypatch, capsys):
    """9 of 10 steps left out are no training: no LoRA, exit code 3."""
    spoil(monkeypatch, lambda call: call > 1)
    more = ("--max_steps", "10", "--save_steps", "0", "--on_nonfinite", "skip", *NO_TRIALS)
    assert train(small_model, small_data, tmp_path / "run", *more) == 3
    said = capsys.readouterr().err
    assert said.count("is not finite and was left out") == IN_A_ROW + 1  # each step's line, and the last
    assert "too many steps were left out, exit code 3; no checkpoint yet, no LoRA written" in said
    assert not (tmp_path / "run" / "lora.safetensors").exists()


def test_a_share_of_the_last_steps_is_too_much_as_well():
    watch = LossWatch.__new__(LossWatch)
    from collections import deque

    watch._latest = deque(maxlen=WINDOW)
    for step in range(1, 200):
        watch._latest.append(step % 4 == 0)  # a quarter: just borne
        assert not watch.gave_up
    gave_up = []
    for step in range(WINDOW):
        watch._latest.append(step % 3 == 0)
        gave_up.append(watch.gave_up)
    assert any(gave_up) and SHARE == 0.25


@pytest.mark.parametrize("rate,warned", [(1e-4, False), (0.1, False), (0.5, True)])
def test_a_learning_rate_that_cannot_be_meant(rate, warned):
    assert bool(Optimizer(rate).warnings()) == warned


def test_what_a_run_says_at_its_start_at_each_save_and_at_its_end(small_model, small_data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(small_model, small_data, run, "--save_steps", "2", "--learning_rate", "0.5", *NO_TRIALS) == 0
    said = capsys.readouterr().err
    assert f"run folder: {run} (Ctrl-C saves and ends; the same command goes on)" in said
    assert "warning: learning rate 0.5 is far above" in said
    assert f"LoRA of step 2: {run / 'lora-2.safetensors'}" in said
    for step in (2, 4):
        assert f"checkpoint of step {step}: {run / 'checkpoints' / f'step-0000000{step}'}" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("done: 4 steps in 0:00:") and f"--lora {run} --compare" in said
