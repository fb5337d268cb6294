"""How names, paths, keys and captions are shown to people: on one line, of bounded length, without commands to the terminal.

print(f"left out: {shown(path)}")                   # a name with a newline or an escape sequence can do no harm
tolerant_output()                                   # at a command's start: any character can be printed anywhere
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import unicodedata
from typing import Any

LONGEST = 200  # characters of one name
LONGEST_LINE = 4000  # of a whole message
ELLIPSIS = "…"
# Cc control (newline, ESC, C1), Cf format (text direction, zero width), Cs lone surrogate (a byte that is no UTF-8),
# Co private use, Cn not assigned, Zl and Zp separators of lines and paragraphs.
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def shown(text: object, longest: int = LONGEST) -> str:
    r"""`text` for a message: what can't be seen is escaped (`\n`, `\x1b`, `\u202e`), the middle of a long one is left out.

    Begin and end stay, since a path's end says most. An escape is never cut in two.
    """
    whole = str(text)
    half = longest // 2
    if len(whole) <= 4 * longest:  # else the middle need not be looked at
        pieces = [_visible(character) for character in whole]
        if sum(map(len, pieces)) <= longest:
            return "".join(pieces)
    begin, end = "", ""
    for character in whole:
        piece = _visible(character)
        if len(begin) + len(piece) > longest - half - 1:
            break
        begin += piece
    for character in reversed(whole):
        piece = _visible(character)
        if len(end) + len(piece) > half:
            break
        end = piece + end
    return f"{begin}{ELLIPSIS}{end}"


def one_line(message: object) -> str:
    """A whole message (an exception's, say) as the one line that a command prints."""
    return shown(message, LONGEST_LINE)


def shown_bytes(size: float) -> str:
    """A number of bytes for people, with three digits: '512 B', '3.25 MB', '41 GB'; 1 MB is 10^6."""
    thousands = 0
    while size >= 999.5 and thousands < 4:
        size, thousands = size / 1000, thousands + 1
    return f"{size:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[thousands]}"


def tolerant_output() -> None:
    """Let this process print characters that its terminal's encoding lacks (LC_ALL=C, latin-1): as escapes, not a crash.

    Nor does it crash when nobody takes what it prints (`Forgiving`), unless a test or a notebook has put its own streams there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened, a checkpoint perhaps, would take what is written to it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed at the start (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, Forgiving(stream))


class Forgiving:
    """A text stream whose reader may go (a terminal that is closed, `| head`): what can't be written is left out."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: of a closed file
            return int(self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape").decode("ascii")
