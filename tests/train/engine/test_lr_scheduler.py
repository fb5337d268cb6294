"""The learning rate of a step: warm-up from 0, then the course asked for, a function of the step alone."""

import pytest

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
