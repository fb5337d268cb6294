"""Caption bytes and cells to clean text: one encoding, one line ending, one Unicode form, never a NaN or a float."""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# UTF-32's little-endian mark begins with UTF-16's, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MAX_BYTES = 1 << 24  # anything larger isn't a caption
LONG_TOKENS = 512  # train_lora.py's --max_prompt_tokens, unless told otherwise
MOST_TOKENS = 1024  # that it can be raised to
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot
_INVISIBLE = "\ufeff\u200b\u2060"  # white space that Python's strip leaves
_PLACEHOLDER = re.compile(r"\[trigger\]|\{[^{}|]*\|[^{}]*\}")
# A token is about four characters of English; of scripts without spaces nearly each character is one.
_DENSE = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u2e80-\ud7ff\uf900-\ufaff\U0001f000-\U0003ffff]")


def encoding_of(start: bytes) -> str:
    """The encoding that a file's first bytes name by their byte-order mark; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """Text of a caption file, cleaned. Raises ValueError when it isn't text in the encoding that its start names."""
    return clean(characters(data))


def characters(data: bytes) -> str:
    """The same as it stands."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes are too long for a caption: at most {MAX_BYTES}")
    encoding = encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"not {encoding} at byte {error.start}: save it as UTF-8") from None


def clean(text: str) -> str:
    """LF line ends, Unicode NFC, no white space or NUL at either end.

    Raises ValueError for what is no text: half surrogate pairs, NUL within, terminal commands and other control characters.
    """
    if _SURROGATE.search(text):
        raise ValueError("not valid Unicode: half of a surrogate pair, or bytes that are no UTF-8: save it as UTF-8")
    text = _LINE_ENDS.sub("\n", text)
    text = text.strip().strip("\0").strip().strip(_INVISIBLE).strip()
    if found := _CONTROL.search(text):
        if "\0" in text:
            place = text.index("\0")
            raise ValueError(f"a NUL at character {place}, as in UTF-16 without a byte-order mark: save it as UTF-8")
        code, place = ord(found[0]), found.start()
        raise ValueError(f"a control character (code {code}) at character {place}: not text; remove it")
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Found:
    """The captions of one image, in their order; none where it has none. `bad` tells of each that was left out why."""

    captions: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()

    @property
    def first(self) -> str | None:
        return self.captions[0] if self.captions else None

    @property
    def more(self) -> tuple[str, ...]:
        return self.captions[1:]


def several(values: Iterable[Any]) -> Found:
    """Captions in cells, each of which may be a list of them. Empty ones count only where there is no other.

    A bad one is left out where others are good. Raises ValueError, of the first bad one, where none is.
    """
    good: list[str] = []
    bad: list[str] = []
    cells = [cell for value in values for cell in (value if isinstance(value, list | tuple) else [value])]
    for number, cell in enumerate(cells, start=1):
        try:
            text = from_cell(cell)
        except ValueError as error:
            if len(cells) == 1:
                raise
            bad.append(f"caption {number} of {len(cells)}: {error}")
            continue
        if text is not None:
            good.append(text)
    if bad and not any(good):
        raise ValueError(bad[0])
    return Found(tuple(filter(None, good)) or tuple(good[:1]), tuple(bad))


def lines(data: bytes) -> Found:
    """Of a caption file each line that isn't empty as a caption. Raises ValueError as `decode` and `several` do."""
    return several(_LINE_ENDS.sub("\n", characters(data)).split("\n"))


def from_cell(value: Any) -> str | None:
    """Caption in a cell of csv, JSON or parquet; None when it is null or NaN. "None", "NA" and 12 are text.

    Raises ValueError for a list, an object, true or false.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and math.isinf(value):  # JSON's 1e999
        raise ValueError("a caption must be text, not an infinite number")
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return clean(str(value))
    raise ValueError(f"a caption must be text, not {type(value).__name__}")


def holds_placeholder(text: str) -> bool:
    """Whether other trainers would replace a part of it: `[trigger]`, `{one|another}`."""
    return ("[" in text or "{" in text) and _PLACEHOLDER.search(text) is not None


def about_tokens(text: str) -> int:
    """Roughly how many tokens a caption has, without a tokenizer."""
    if len(text) < LONG_TOKENS:
        return len(text) // 4
    dense = len(_DENSE.findall(text))
    return dense + (len(text) - dense) // 4
