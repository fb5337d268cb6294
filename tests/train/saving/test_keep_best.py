"""What is best is chosen among losses that were measured in the same way."""

import json
from pathlib import Path
from typing import Any

import pytest

from train.saving.keep_best import Best, measured_otherwise


@pytest.mark.parametrize(
    "before, now, changed",
    [
        ({}, {"masked_loss": False}, []),  # a checkpoint of before the option existed
        ({"seed": 0}, {"masked_loss": False, "mask_min_weight": 0.5}, []),
        ({"seed": 0}, {"masked_loss": True}, ["masked_loss", "mask_min_weight"]),
        (
            {"masked_loss": True, "mask_min_weight": 0.1},
            {"masked_loss": True, "mask_min_weight": 0.2},
            ["mask_min_weight"],
        ),
        ({"trigger_word": "zwx"}, {"trigger_word": None}, ["trigger_word"]),
        ({"caption_shuffle_tags": True}, {"caption_shuffle_tags": False}, []),  # validation has no part in it
        (None, {"masked_loss": True}, []),
    ],
)
def test_what_validation_is_measured_by(before: Any, now: Any, changed: list[str]) -> None:
    assert measured_otherwise(before, now) == changed


def test_a_loss_of_another_kind_is_no_rival(tmp_path: Path) -> None:
    best, said = Best(enabled=True), list[str]()
    best.improves(0, 0.3, None)
    best.improves(10, 0.2, None)
    state = json.loads(json.dumps(best.state()))
    again = Best.resumed(True, state, tmp_path, said.append, ["masked_loss"])
    assert again.step is None and again.before is None and "(masked_loss changed)" in said[0]
    assert again.improves(20, 3.0, None), "measured without masks it is larger, and still the best of its kind"
