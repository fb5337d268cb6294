"""Parquet files that hold the images themselves, as the Hugging Face hub serves them: a source like a tar.

A row's image is a struct of `bytes` and `path`, or plain binary. Finding the rows reads paths and captions alone; the
images are read in the parent, streaming and in order, when they are judged and when they are packed (`with_bytes`), so
that a row group is read once and no worker needs pyarrow.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

from data_prep.images.skip_reasons import BAD_CAPTION, BAD_WEIGHT, BROKEN_PARQUET
from data_prep.sources import captions, weights
from data_prep.sources.captions import Found
from data_prep.sources.found_input import ROW, Input
from data_prep.sources.metadata_files import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MASK_COLUMNS,
    ambiguous,
    caption_columns,
    cells_of,
    find_column,
)
from data_prep.sources.regular_files import open_regular
from data_prep.sources.remarks import BAD_AMONG_SEVERAL, SEVERAL_COLUMNS, UNREAD_MASKS, WEIGHTS, Remarks

BYTE_COLUMNS = (*IMAGE_COLUMNS, "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
BATCH_ROWS = 16  # images that are read at once
BUFFER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ImageColumn:
    """Where a file's image bytes and their names stand: columns as parquet spells nested ones."""

    bytes: str
    path: str | None


def image_column(path: str | bytes, wanted: str | None) -> ImageColumn | None:
    """The column of image bytes; None when there is none. Raises OSError or pyarrow's errors for what is no parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_regular(path) as file:
        schema = pq.ParquetFile(file).schema_arrow
    name = find_column(wanted, BYTE_COLUMNS, dict.fromkeys(schema.names))
    found = [name] if name is not None else [] if wanted else list(schema.names)
    for candidate in found:
        kind = schema.field(candidate).type
        if pa.types.is_struct(kind):
            fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
            if "bytes" in fields and _is_binary(fields["bytes"]):
                return ImageColumn(f"{candidate}.bytes", f"{candidate}.path" if "path" in fields else None)
        elif name is not None and _is_binary(kind):
            return ImageColumn(candidate, None)
    return None


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def rows(
    path: str | bytes,
    relative: str,
    file: bytes,
    column: ImageColumn,
    caption_column: str | None,
    remarks: Remarks | None = None,
    weight_column: str | None = None,
) -> Iterator[Input]:
    """Inputs of one file. What cannot be read of it is one input with the problem, after those that can."""
    import pyarrow.parquet as pq

    number = 0
    try:
        with open_regular(path) as source:
            size = os.fstat(source.fileno()).st_size
            table = pq.ParquetFile(source)
            names = table.schema_arrow.names
            texts, absent = caption_columns(caption_column, dict.fromkeys(names))
            if remarks is not None and (said := ambiguous(names, column.bytes, caption_column)):
                remarks.add(SEVERAL_COLUMNS, f"{relative}: {said}")
            if remarks is not None and (masks := find_column(None, MASK_COLUMNS, dict.fromkeys(names))):
                remarks.add(UNREAD_MASKS, f"{relative}: {masks}")
            hint = ""
            if absent:
                looked = ", ".join(sorted(absent) if caption_column else CAPTION_COLUMNS)
                hint, texts = f"no column {looked}, only {', '.join(names)}: name it with --caption_column", []
            weight = weights.column_of(dict.fromkeys(names), weight_column)
            wanted = [name for name in (column.path, *texts, weight) if name is not None]
            if not wanted:  # no names and no captions: count the rows
                for number in range(table.metadata.num_rows):
                    yield Input(f"{relative}/{number:06d}", file, number, size, None, kind=ROW, hint=hint)
                return
            for batch in table.iter_batches(1024, columns=wanted, use_threads=False):
                for row in cells_of(batch):
                    item, bad = _input(row, number, relative, file, size, column, texts)
                    for why in bad:
                        (remarks or Remarks()).add(BAD_AMONG_SEVERAL, f"{item.path}: {why}")
                    item = _weighted(item, row, weight)
                    if remarks is not None and item.weight != 1:
                        remarks.add(WEIGHTS, item.path)
                    yield dataclasses.replace(item, hint=hint) if hint else item
                    number += 1
    except Exception as error:  # arrow's many, on hostile bytes
        detail = f"after row {number}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        yield Input(relative, file, 0, -1, None, (BROKEN_PARQUET, detail))


def _input(
    row: dict[str, Any], number: int, relative: str, file: bytes, size: int, column: ImageColumn, texts: list[str]
) -> tuple[Input, tuple[str, ...]]:
    """The input of a row, and what is wrong with those of its captions that were left out."""
    name = (row.get(column.path.partition(".")[0]) or {}).get("path") if column.path else None
    path = f"{relative}/{number:06d}" + (f"/{os.path.basename(name)}" if isinstance(name, str) and name else "")
    path = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    found, problem = Found(), None
    try:
        found = captions.several([row.get(name) for name in texts])
    except ValueError as error:
        problem = (BAD_CAPTION, f"{path}: {error}")
    return Input(path, file, number, size, found.first, problem, kind=ROW, more_captions=found.more), found.bad


def _weighted(item: Input, row: dict[str, Any], column: str | None) -> Input:
    """With the weight in this column of the row."""
    if column is None:
        return item
    try:
        return dataclasses.replace(item, weight=weights.from_cell(row.get(column), column))
    except ValueError as error:
        return dataclasses.replace(item, problem=item.problem or (BAD_WEIGHT, f"{item.path}: {error}"))


# ── their bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def with_bytes(base: bytes, items: Iterable[Input], image_column_name: str | None) -> Iterator[Input]:
    """The same inputs, in order, those of parquet rows with their bytes. Memory is that of a few images."""
    reader: _RowReader | None = None
    for item in items:
        if item.kind != ROW or item.problem:
            yield item
            continue
        try:
            if reader is None or reader.file != item.file:
                reader = _RowReader(base, item.file, image_column_name)
            yield dataclasses.replace(item, data=reader.read(item.offset) or b"")
        except Exception as error:
            reader = None
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield dataclasses.replace(item, problem=(BROKEN_PARQUET, line))


class _RowReader:
    """Image bytes of one file by row; rows that follow one another are read once."""

    def __init__(self, base: bytes, file: bytes, image_column_name: str | None) -> None:
        import pyarrow.parquet as pq

        path = os.path.join(base, file)
        column = image_column(path, image_column_name)
        if column is None:
            raise ValueError("its image column is gone")
        self.file, self._column = file, column
        self._table = pq.ParquetFile(open_regular(path), buffer_size=BUFFER_BYTES, pre_buffer=False)
        counts = [self._table.metadata.row_group(group).num_rows for group in range(self._table.num_row_groups)]
        self._starts = [sum(counts[:group]) for group in range(len(counts) + 1)]
        self._batches: Iterator[Any] = iter(())
        self._batch: list[bytes | None] = []
        self._first = 0  # row of the batch's first one
        self._end = 0  # of the row group at work

    def read(self, row: int) -> bytes | None:
        if not self._first <= row < self._end:
            group = max(group for group, start in enumerate(self._starts[:-1]) if start <= row)
            self._batches = self._table.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[self._column.bytes], use_threads=False
            )
            self._batch, self._first, self._end = [], self._starts[group], self._starts[group + 1]
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            column = next(self._batches).column(0)
            self._batch = (column.field("bytes") if "." in self._column.bytes else column).to_pylist()
        return self._batch[row - self._first]
