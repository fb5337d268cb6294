"""Why an input is left out: every reason there is, in one place. A reason is short, because it is counted.

`failed` is broken and counts against --max_failed_ratio; `filtered` is fine and not wanted, or not readable here. They
stand, with the details of each input, in NNNNNN.parquet, in the manifest's totals and in check_shards.py's report.
"""

from __future__ import annotations

from typing import Any

FAILED, FILTERED = "failed", "filtered"

# Of a file, before anything is decoded.
EMPTY_FILE = "empty file"
FILE_MISSING = "file missing"
UNREADABLE = "unreadable"
SOURCE_MISSING = "source image missing"  # of a pair
SOURCE_UNUSABLE = "source image not usable"
MASK_MISSING = "mask missing"  # a row names one that isn't there
MASK_UNUSABLE = "mask not usable"
OUTSIDE = "outside of the folder"  # a link or a path that leads out; --allow_links follows links
NOT_REGULAR = "not a regular file"  # a FIFO, device, socket or folder
CHANGED = "changed since the plan"
# Of the image in it.
NOT_AN_IMAGE = "not an image"
TOO_MANY_PIXELS = "too many pixels"
TRUNCATED = "truncated image"
CORRUPT = "corrupt data"  # its checksums, codes or marks say so; --on_corrupt keep takes it as far as it decodes
CANNOT_DECODE = "cannot decode"
KILLED = "killed its process"
NO_READER = "no reader for this format"  # filtered: an optional plugin, or another program, could read it
ANIMATED = "animated"
TOO_FEW_PIXELS = "too few pixels"
EXTREME_ASPECT_RATIO = "extreme aspect ratio"
TOO_SMALL = "too small"
MASK_SIZE = "of another shape than its image"
DUPLICATE = "duplicate"
# Of its caption, its row or its archive.
NO_CAPTION = "no caption"
NO_WEIGHT = "weight 0"
BAD_WEIGHT = "weight not usable"
NO_MASK = "no mask"  # and --on_missing_mask skip
BAD_CAPTION = "caption not readable"
BAD_ROW = "metadata row not readable"
BAD_METADATA = "metadata file not readable"  # of a subfolder; that of the whole set is an error
NO_IMAGE_PATH = "no image path"
BROKEN_TAR = "broken tar"
BROKEN_LINK = "link to nothing in its tar"
BROKEN_PARQUET = "broken parquet"
UNREADABLE_FOLDER = "unreadable folder"


class BadImage(Exception):
    """An image that is left out. `status` is FAILED or FILTERED, `reason` one of those above."""

    def __init__(self, status: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.status, self.reason, self.detail = status, reason, detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str, str]]:
        return BadImage, (self.status, self.reason, self.detail)


def one_line(error: BaseException) -> str:
    """What a decoder says, short and on one line."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:200]


def of_decoder(error: BaseException) -> BadImage:
    """Any exception of a codec as a failure: they raise OSError, SyntaxError, KeyError, struct.error, … on hostile bytes.

    What ends a program on purpose (Ctrl-C, exit) is raised again.
    """
    if isinstance(error, BadImage):
        return error
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    if isinstance(error, MemoryError):
        return BadImage(FAILED, CANNOT_DECODE, "out of memory")
    line = one_line(error)
    cut = any(word in line.lower() for word in ("truncated", "premature end", "eof", "broken data stream"))
    return BadImage(FAILED, TRUNCATED if cut else CANNOT_DECODE, _typed(error, line))


def _typed(error: Any, line: str) -> str:
    """`KeyError: 273` says more than `273`."""
    speaks = isinstance(error, OSError | SyntaxError | ValueError | RuntimeError) and line != type(error).__name__
    return line if speaks else f"{type(error).__name__}: {line}"
