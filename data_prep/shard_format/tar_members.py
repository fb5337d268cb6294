"""Every member of an uncompressed tar, or a word about why there are no more: nothing behind a damaged header is lost silently.

tarfile alone stops at the first header that it can't read, and at the first end mark, as if the archive ended there.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import IO, Self

PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
    b"Rar!": "rar",
}
SCAN_BYTES = 1 << 20


class BrokenTar(ValueError):
    """What is wrong with an archive, and where."""


class Header(tarfile.TarInfo):
    """GNU's old format keeps times (`tar --incremental`) where POSIX has the name's first part, and tarfile joins them."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if buf[257:265] == b"ustar  \0":
            member.name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
        return member


def tar_members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Members of any type, in their order; of archives that were put one behind another (`cat a.tar b.tar`), too.

    `offset_data` and `size` are those within `file`; where `issparse()` they are not the content's. Raises BrokenTar, after
    the last member that could be read, when the file is no tar, ends early, or holds anything else.
    """
    size = os.fstat(file.fileno()).st_size
    start: int | None = 0
    while start is not None:
        stop = start
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # the list that tarfile keeps would grow with the archive
                    if tar.offset <= stop or member.size < 0:  # a negative size leads back, for ever
                        raise BrokenTar(f"no valid header at byte {stop}")
                    stop = tar.offset
                    if not member.issparse() and member.isreg() and member.offset_data + member.size > size:
                        raise BrokenTar(f"ends at byte {size}, within {_name(member)}: the file is cut off")
                    yield member
        except BrokenTar:
            raise
        except Exception as error:  # its parser on hostile bytes: TarError, ValueError, OverflowError, …
            raise BrokenTar(_what(file, start, stop, error)) from None
        start = _next_archive(file, stop, size)


def _next_archive(file: IO[bytes], stop: int, size: int) -> int | None:
    """Where the next archive begins behind this one's end mark at `stop`; None at the end of the file."""
    file.seek(stop)
    mark = file.read(tarfile.BLOCKSIZE)
    if any(mark):
        raise BrokenTar(f"no valid header at byte {stop} of {size}: what follows could not be read")
    if len(mark) < tarfile.BLOCKSIZE:
        raise BrokenTar(f"ends at byte {size} without an end mark: it may have been cut off")
    while block := file.read(SCAN_BYTES):
        if any(block):
            first = file.tell() - len(block) + next(place for place, value in enumerate(block) if value)
            return first // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


def _what(file: IO[bytes], start: int, stop: int, error: Exception) -> str:
    file.seek(start)
    head = file.read(8)
    if stop == 0:
        packed = next((name for mark, name in PACKED.items() if head.startswith(mark)), None)
        return f"not a tar but {packed}: unpack it first" if packed else f"not a tar: {error}"
    said = str(error) if isinstance(error, tarfile.TarError) else "a member's header cannot be read"
    return f"{said}, after byte {stop}: what follows is lost"


def _name(member: tarfile.TarInfo) -> str:
    return repr(readable(member.name))[1:-1]


def readable(name: str) -> str:
    """A member's name as text: bytes that are no UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def sparse_content(file: IO[bytes], header: int) -> bytes:
    """Content of the sparse member whose header stands at byte `header`, with its holes as zeros."""
    file.seek(header)
    with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar:
        member = tar.next()
        content = tar.extractfile(member) if member is not None else None
        if content is None:
            raise BrokenTar(f"no file at byte {header}")
        return content.read()
