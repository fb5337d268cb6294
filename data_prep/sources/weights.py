"""How often a sample comes in an epoch of training: numbers in metadata, and kohya's folders.

A weight of 2 is twice, of 0.5 in every other epoch on average; 0 leaves the sample out. All weights of a sample multiply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from data_prep.shard_format.weight_limits import LEAST, MOST
from files.shown import shown

COLUMNS = ("weight", "num_repeats", "repeats")  # ours; musubi-tuner's; others'
REGULARIZATION = ("reg", "reg_data", "reg_images", "regularization", "regularisation")  # kohya's, and others' spellings
# kohya's repeat folders: 10_name. A number with a leading zero (01_intro) or above MOST (2023_summer) is a name's part.
_FOLDER = re.compile(r"(0|[1-9][0-9]{0,3})_.+")


def from_cell(value: Any, column: str) -> float:
    """The weight in a cell of csv, JSON or parquet; 1 where it is empty. Raises ValueError for what is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return 1.0
    number = math.nan
    if isinstance(value, str | int | float | Decimal) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if number != 0 and not LEAST <= number <= MOST:  # NaN is neither
        raise ValueError(
            f"{column} is {shown(repr(value))}, not a number from {LEAST:g} to {MOST:g}, or 0 to leave it out"
        )
    return abs(number)


def column_of(cells: Mapping[str, Any], wanted: str | None) -> str | None:
    """The column of weights as `cells` spell it; None without one, and where `wanted` is "none"."""
    if wanted == "none":
        return None
    spelled: dict[str, str] = {}
    for name in cells:
        spelled.setdefault(str(name).strip().lower(), name)
    return next((spelled[name] for name in ([wanted.lower()] if wanted else COLUMNS) if name in spelled), None)


def of_folder(name: str) -> float | None:
    """The repeats that a folder's name says; None for a name that says none."""
    found = _FOLDER.fullmatch(name)
    return float(found[1]) if found and int(found[1]) <= MOST else None


def is_regularization(name: str, below: list[str], beside: list[str]) -> bool:
    """Whether a folder is kohya's regularization set, by its name, and the names of the folders in it and beside it."""
    if name.lower() not in REGULARIZATION:
        return False
    return any(of_folder(each) is not None for each in [*below, *beside]) or "img" in beside


def numbered(name: str) -> bool:
    """Whether a folder's name begins like one of kohya's, but is taken as a name."""
    return re.fullmatch(r"[0-9]+_.+", name) is not None and of_folder(name) is None
