"""Metadata files (csv, jsonl, json, parquet) as a stream of (image, caption) cells."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import captions

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.parquet")
# DiffSynth: image, prompt; Hugging Face imagefolder: file_name, text or caption; musubi-tuner: image_path, caption.
IMAGE_COLUMNS = ("image", "file_name", "image_path")
CAPTION_COLUMNS = ("prompt", "text", "caption")


def rows(path: Path, image_column: str | None = None, caption_column: str | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield the image cell and the caption cell of each row; the columns are found by name where they aren't given.

    Raises ValueError for an unknown file type, a column that isn't there, and text that isn't of the file's type.
    """
    readers = {".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: metadata must be one of {', '.join(readers)}")
    image = caption = None
    try:
        for row in reader(path):
            if image is None or caption is None:
                image = _column("image", image_column, IMAGE_COLUMNS, row, path)
                caption = _column("caption", caption_column, CAPTION_COLUMNS, row, path)
            yield row.get(image), row.get(caption)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not {error.encoding} at byte {error.start}: save it as UTF-8") from None


def _column(kind: str, wanted: str | None, known: tuple[str, ...], row: Mapping[str, Any], path: Path) -> str:
    candidates = (wanted,) if wanted else known
    for name in candidates:
        if name in row:
            return name
    raise ValueError(
        f"{path} has no column {' or '.join(candidates)}, only {', '.join(map(str, row))}: name it with --{kind}_column"
    )


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        return captions.encoding_of(file.read(4))


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(1 << 24)  # long captions; the module's own limit is 128 KiB
    with path.open(encoding=_encoding(path), newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path} line {reader.line_num}: more cells than columns:"
                        " put captions that hold commas into double quotes"
                    )
                yield row
        except csv.Error as error:
            raise ValueError(f"{path}: not valid csv: {error}") from None


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding=_encoding(path)) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(_parse(line, f"{path} line {number}"), f"{path} line {number}")


def _json(path: Path) -> Iterator[Mapping[str, Any]]:
    values = _parse(path.read_text(encoding=_encoding(path)), str(path))
    if not isinstance(values, list):
        raise ValueError(f"{path}: must be a list of objects, not {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        yield _object(value, f"{path} entry {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object, not {type(value).__name__}")
    return value


def _parquet(path: Path) -> Iterable[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not valid parquet: {str(error).splitlines()[0]}") from None
