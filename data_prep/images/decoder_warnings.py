"""What decoders complain of, collected for the image at hand instead of printed without its name."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

MOST = 3  # of one image that are kept


@contextlib.contextmanager
def collected(found: list[str], native: bool = False) -> Iterator[None]:
    """Append what is warned of within the block to `found`: Python's warnings, and (`native`) lines that C libraries
    write to the process's error stream, as libtiff does. `native` is for one thread at a time."""
    with warnings.catch_warnings(record=True) as caught, _error_stream(found) if native else contextlib.nullcontext():
        warnings.simplefilter("always")
        try:
            yield
        finally:
            found += [" ".join(str(warning.message).split())[:200] for warning in caught]
            found[:] = list(dict.fromkeys(found))[:MOST]


@contextlib.contextmanager
def _error_stream(found: list[str]) -> Iterator[None]:
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # a process without an error stream
        yield
        return
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)
                file.seek(0)
                text = file.read(1 << 14).decode("utf-8", "replace")
                found += [" ".join(line.split())[:200] for line in text.splitlines() if line.strip()]
    finally:
        os.close(saved)
