"""`--data` and `--prior_data`: addresses of data sets, each with a weight, `ADDRESS` or `ADDRESS:WEIGHT`."""

import re
from pathlib import Path
from typing import NamedTuple

from data_prep.shard_format.weight_limits import LEAST, MOST
from files.shown import shown

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII)


class DataSource(NamedTuple):
    """A folder or an address (s3://, hf://, http:// …), and how often each of its samples comes in an epoch."""

    address: str
    weight: float = 1.0

    @property
    def is_remote(self) -> bool:
        return "://" in self.address


def read_sources(option: str, texts: tuple[str, ...]) -> list[DataSource]:
    """The sources that an option names. Raises ValueError for a weight that is none."""
    return [_source(option, text) for text in texts]


def _source(option: str, text: str) -> DataSource:
    """A weight is a number behind the last colon, in the last part of the path; a folder of the whole name goes before.

    `http://host:8080` names a port, `C:` and `C:\\photos` drives: addresses all of them.
    """
    address, colon, number = text.rpartition(":")
    scheme, _, rest = text.rpartition("://")
    of_server = bool(scheme) and "/" not in rest and number.isdecimal()
    if not colon or not address or of_server or not _NUMBER.fullmatch(number) or Path(text).expanduser().is_dir():
        return DataSource(text)
    weight = float(number)
    if not LEAST <= weight <= MOST:
        raise ValueError(
            f"{option}: {shown(text)}: what follows the last colon is a weight and must be from {LEAST:g} to {MOST:g}, got "
            f"{number}"
        )
    return DataSource(address, weight)
