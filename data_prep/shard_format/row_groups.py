"""Parquet files that are written as their rows come: whole or not at all, one row group a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from files.atomic_files import whole_file


def write_row_groups(path: Path, batches: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write a parquet file, one row group a batch; a batch maps every column of the schema to a sequence."""
    with whole_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for columns in batches:
            arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
            writer.write_table(pa.table(arrays, schema=schema))
