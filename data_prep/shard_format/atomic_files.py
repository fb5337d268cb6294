"""Whole files: written under a temporary name, made durable, then renamed; never seen half written."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

PARTIAL = ".partial-"  # prefix of every file that is not finished yet


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is renamed; names host and process so that writers never meet."""
    return path.with_name(f"{PARTIAL}{path.name}.{socket.gethostname()}.{os.getpid()}")


def commit(partial: Path, path: Path) -> None:
    """Rename a finished, fsynced file into place and make the rename durable."""
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole small file so that readers see the old one or the new one, never half of it."""
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_row_groups(path: Path, batches: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write a parquet file, one row group a batch; a batch maps every column of the schema to a sequence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = partial_path(path)
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for columns in batches:
                arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
                writer.write_table(pa.table(arrays, schema=schema))
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """JSON whose bytes depend on the value alone: UTF-8, sorted keys, two spaces, newline at the end."""
    return (json.dumps(value, ensure_ascii=False, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def remove_abandoned(folder: Path) -> None:
    """Delete the partial files in `folder` that processes of this host left when they were killed."""
    for partial in folder.glob(f"{PARTIAL}*"):
        _, _, owner = partial.name.rpartition(f".{socket.gethostname()}.")
        if owner.isdigit() and int(owner) != os.getpid() and not _alive(int(owner)):
            partial.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
