"""Caption bytes and cells to clean text: one encoding, one line ending, one Unicode form, never a NaN or a float."""

from __future__ import annotations

import codecs
import math
import unicodedata
from typing import Any

# UTF-32's little-endian mark begins with UTF-16's, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(start: bytes) -> str:
    """The encoding that a file's first bytes name by their byte-order mark; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """Text of a caption file, cleaned. Raises ValueError when it isn't text in the encoding that its start names."""
    encoding = encoding_of(data)
    try:
        return clean(data.decode(encoding))
    except UnicodeDecodeError as error:
        raise ValueError(f"not {encoding} at byte {error.start}: save it as UTF-8") from None


def clean(text: str) -> str:
    """LF line ends, Unicode NFC, no white space or NUL at either end. Raises ValueError for half surrogate pairs."""
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can spell them, UTF-8 cannot
        raise ValueError("not valid Unicode: half of a surrogate pair")
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip().strip("\0").strip()


def from_cell(value: Any) -> str | None:
    """Caption in a cell of csv, JSON or parquet; None when it is null or NaN. "None", "NA" and 12 are text.

    Raises ValueError for a list or an object.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str | int | float):
        return clean(str(value))
    raise ValueError(f"a caption must be text, not {type(value).__name__}")
