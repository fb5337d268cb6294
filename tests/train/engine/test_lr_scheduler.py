"""The learning rate of a step: warm-up from 0, then the course asked for, a function of the step alone."""

import pytest
import torch

from train.engine.lr_scheduler import LearningRate


@pytest.mark.parametrize(
    "course,expected",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_warm_up_then_the_course(course: str, expected: list[float]) -> None:
    rate = LearningRate(1.0, course, warmup_steps=2, total_steps=6)  # type: ignore[arg-type]
    assert [rate.at(step) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_never_below_zero_after_the_end() -> None:
    assert LearningRate(1.0, "linear", 0, 4).at(9) == 0.0


def test_a_run_without_a_step_left_is_told_nothing_of_its_learning_rate() -> None:
    before = {"steps": 4, "config": {"learning_rate": 1.0, "lr_scheduler": "cosine", "lr_warmup_steps": 0}}
    assert LearningRate(1.0, "cosine", 0, 3).lines_on_resuming(4, before) == []
    assert "from step 5 on" in LearningRate(1.0, "cosine", 0, 5).lines_on_resuming(4, before)[0]


def test_bounded_below_by_an_absolute_rate() -> None:
    """lr_min: warm-up begins at 0 all the same, the last step is above it, what comes after stays there."""
    for course in ("cosine", "linear", "cosine_with_restarts"):
        rate = LearningRate(1.0, course, 2, 6, lowest=0.2)  # type: ignore[arg-type]
        plain = LearningRate(1.0, course, 2, 6)  # type: ignore[arg-type]
        assert rate.at(0) == 0.5 and rate.at(2) == 1.0
        assert [rate.at(s) for s in range(2, 9)] == pytest.approx([0.2 + 0.8 * plain.at(s) for s in range(2, 9)])
        assert rate.at(6) == rate.at(99) == 0.2


@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup,total", [(0, 21), (4, 25), (3, 1000), (0, 1)])
def test_warm_restarts_are_those_of_transformers(cycles: int, warmup: int, total: int) -> None:
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup as theirs

    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    schedule = theirs(optimizer, warmup, total, cycles)
    ours = LearningRate(0.3, "cosine_with_restarts", warmup, total, cycles=cycles)
    for step in range(total):
        expected = schedule.get_last_lr()[0]
        if step < warmup:  # ours begins above 0: its first step does something
            assert ours.at(step) == pytest.approx(expected + 0.3 / warmup)
        else:
            at_a_restart = (step - warmup) * cycles % (total - warmup) == 0  # where theirs may round to the end before
            assert ours.at(step) == pytest.approx(0.3 if at_a_restart else expected, rel=1e-9, abs=1e-12)
        optimizer.step()
        schedule.step()
    assert ours.at(total) == 0.0


def test_constant_with_warmup_is_constant() -> None:
    ours, other = LearningRate(1.0, "constant_with_warmup", 5, 20), LearningRate(1.0, "constant", 5, 20)
    assert [ours.at(step) for step in range(30)] == [other.at(step) for step in range(30)]


def test_resuming_under_another_course_is_told() -> None:
    before = {"steps": 8, "config": {"learning_rate": 1.0, "lr_scheduler": "cosine", "lr_warmup_steps": 0}}
    assert LearningRate(1.0, "cosine", 0, 8).lines_on_resuming(4, before) == []
    assert LearningRate(1.0, "cosine_with_restarts", 0, 8).lines_on_resuming(4, before) == []
    (line,) = LearningRate(1.0, "cosine", 0, 8, lowest=0.5).lines_on_resuming(4, before)
    assert "learning rate: 0.75 from step 5 on (cosine, 8 steps)" in line
    (line,) = LearningRate(1.0, "cosine_with_restarts", 0, 8, cycles=2).lines_on_resuming(4, before)
    assert line.startswith("learning rate: 1 from step 5 on (cosine_with_restarts, 8 steps)")
    before["config"] |= {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2, "lr_min": 0.25}  # type: ignore[operator]
    assert LearningRate(1.0, "cosine_with_restarts", 0, 8, 0.25, 2).lines_on_resuming(4, before) == []
