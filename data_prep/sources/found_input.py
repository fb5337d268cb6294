"""One image that was found, before anything of it was read."""

from __future__ import annotations

from dataclasses import dataclass

# How `offset` and `size` lead to an image's bytes.
PLAIN = ""  # `size` bytes at `offset` of the file
SPARSE = "sparse"  # a sparse member of a tar, whose header stands at `offset`
ROW = "row"  # row `offset` of a parquet file of `size` bytes


@dataclass(frozen=True)
class Partner:
    """A source image of a pair: what an edit starts from."""

    path: str  # as Input's
    file: bytes
    size: int  # bytes


@dataclass(frozen=True)
class MaskFile:
    """A picture that tells which part of an image is to be learned."""

    path: str  # this and what follows: as Input's
    file: bytes
    offset: int
    size: int
    kind: str = PLAIN


@dataclass(frozen=True)
class Input:
    """An image and its caption. `problem` is (reason, detail) when it is known already that it cannot be used."""

    path: str  # relative to the base folder, '/' between parts; for messages and the json member
    file: bytes  # relative path of the file on disk: bytes, because names need not be Unicode
    offset: int  # bytes into that file (an image within a tar), else 0
    size: int  # bytes; -1 when unknown because the file is missing
    caption: str | None  # None: there is none
    problem: tuple[str, str] | None = None
    changed: int = 0  # ns since 1970: the file's last change of any kind; no part of a data set's identity
    kind: str = PLAIN
    hint: str = ""  # where a caption was looked for; no part of a data set's identity
    data: bytes | None = None  # of a ROW, while it is on its way to a worker
    more_captions: tuple[str, ...] = ()  # behind the first, where there are several
    area: int = 0  # of the target it is stored for, where there are several; no part of a data set's identity
    weight: float = 1.0  # repeats an epoch; 0: left out
    sources: tuple[Partner, ...] = ()  # the image is then the target of an edit, the caption its instruction
    mask: MaskFile | None = None
