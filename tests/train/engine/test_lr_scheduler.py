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
