"""A course ends by steps or by time; its rate warms up and falls to 0."""

from __future__ import annotations

import pytest

from demo.drawing.course import Course


def test_steps_end_it():
    rates = list(Course("x", 0, steps=100, warm_up=10).rates(2.0))
    assert len(rates) == 100
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) < 2.0
    assert rates[-1] < 0.01


def test_time_ends_it():
    course = Course("x", 0.05, warm_up=1)
    assert len(list(course.rates(1.0))) == course.done > 10
    assert course.share() == 1


def test_without_time_one_step_is_done():
    course = Course("x", -3.0)
    assert len(list(course.rates(1.0))) == 1
