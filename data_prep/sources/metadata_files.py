"""Metadata files (csv, tsv, jsonl, json, parquet) as a stream of rows: an image cell and a caption cell, or what is wrong.

A new kind of metadata file is a function here that yields its rows, and a line in READERS.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.sources import captions, weights
from data_prep.sources.regular_files import open_regular
from data_prep.sources.remarks import SEVERAL_COLUMNS, UNREAD_MASKS, Remarks
from files.shown import shown

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.parquet")
# DiffSynth: image, prompt; Hugging Face imagefolder: file_name, text or caption; musubi-tuner: image_path, caption.
IMAGE_COLUMNS = ("image", "file_name", "image_path", "filename", "file_path", "filepath", "file", "path", "img")
CAPTION_COLUMNS = ("prompt", "text", "caption", "captions")  # whose cells may be lists
# Of the source images of edits, with a number for the second and further ones: ours; DiffSynth's, whose cell may be a list;
# musubi-tuner's, which begins with _0. The first kind that a row has is taken.
SOURCE_COLUMNS = ("source_image", "edit_image", "control_path")
MASK_COLUMNS = ("mask", "mask_path", "mask_image", "mask_file")
MOST_SOURCES = 3  # what any model takes
REPEATED = object()  # in the cells of a column whose name the header holds more than once
LONGEST_CELL = 1 << 24  # characters: long captions; the csv module's own limit is 128 KiB


@dataclass(frozen=True)
class MetadataRow:
    """One row. `problem` says why it cannot be read; then there are no cells."""

    where: str  # "metadata.csv line 7": for messages
    image: Any = None
    captions: tuple[Any, ...] = ()  # cells, each of which may be a list
    problem: str = ""
    sources: tuple[Any, ...] = ()  # cells of source images; a pair if there are any
    weight: Any = None
    weight_column: str = ""  # as the file spells it
    mask: Any = None  # cell of the image's mask


class BadRow(ValueError):
    """A row that cannot be read, while others can."""


Cells = tuple[str, Mapping[str, Any] | BadRow]  # where, and {column: cell}


def rows(
    path: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    remarks: Remarks | None = None,
    source_columns: tuple[str, ...] | None = (),
    weight_column: str | None = None,
    mask_column: str | None = "none",
) -> Iterator[MetadataRow]:
    """Yield the rows; the columns are found by name (in any case, spaces around them aside) where they aren't given.

    `caption_column`: or several with commas between them. `source_columns`: of source images; None: SOURCE_COLUMNS, where
    there are any. `weight_column`: None: one of weights.COLUMNS, where there is one; "none": none. JSON's objects may each
    have other names.
    Raises ValueError for an unknown file type, a column that no row has, and
    what isn't of the file's type as a whole; OSError for what is no regular file.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{shown(path)}: metadata must be one of {', '.join(READERS)}")
    objects = path.suffix.lower() in (".jsonl", ".json")
    names: list[str] = []
    missing: set[str] | None = None  # of the caption columns that were asked for; None: no row has any yet
    images = several = pairs = weighted = masked = False
    with open_regular(path) as file:
        for where, cells in reader(file, path):
            if isinstance(cells, BadRow):
                yield MetadataRow(where, problem=str(cells))
                continue
            names = names or [str(name) for name in cells]
            image = find_column(image_column, IMAGE_COLUMNS, cells)
            texts, absent = caption_columns(caption_column, cells)
            weight = weights.column_of(cells, weight_column)
            weighted = weighted or weight is not None
            for name in (image, *texts, weight):
                if name is not None and cells[name] is REPEATED:
                    raise ValueError(f"{shown(path)} has {shown(name)} more than once in its header: rename the others")
            images = images or image is not None
            missing = absent if missing is None else missing & absent
            if remarks is not None and not several and (said := ambiguous(cells, image_column, caption_column)):
                several = True
                remarks.add(SEVERAL_COLUMNS, f"{path.name}: {said}")
            if not objects and (missing or not images):
                break
            sources = source_cells(cells, source_columns)
            pairs = pairs or bool(sources)
            captions_found = tuple(cells[name] for name in texts)
            told = {} if weight is None else {"weight": cells[weight], "weight_column": weight}
            others = {
                name: cells[name] for name in cells if str(name).lower() not in map(str.lower, source_columns or ())
            }
            mask, there = mask_cell(others, mask_column, where, remarks)
            masked = masked or there
            yield MetadataRow(where, cells.get(image or ""), captions_found, sources=sources, mask=mask, **told)
    if names and source_columns and not pairs:
        raise ValueError(
            f"{shown(path)} has no column {' or '.join(map(shown, source_columns))} (--source_columns), only "
            f"{shown(', '.join(names))}"
        )
    if names and mask_column not in (None, "none") and not masked:
        raise ValueError(
            f"{shown(path)} has no column {shown(mask_column)} (--mask_column), only {shown(', '.join(names))}"
        )
    if names and weight_column not in (None, "none") and not weighted:
        raise ValueError(
            f"{shown(path)} has no column {shown(weight_column)} (--weight_column), only {shown(', '.join(names))}"
        )
    for kind, lacking in (
        ("image", () if images else [image_column] if image_column else IMAGE_COLUMNS),
        ("caption", sorted(missing or ()) if caption_column else missing and CAPTION_COLUMNS),
    ):
        if names and lacking:
            candidates = list(lacking)
            header = "" if objects else " (the first line must name the columns)"
            raise ValueError(
                f"{shown(path)} has no column {' or '.join(map(shown, candidates))}, only "
                f"{shown(', '.join(names))}{header}: name it with --{kind}_column"
            )


def find_column(wanted: str | None, known: tuple[str, ...], cells: Mapping[str, Any]) -> str | None:
    """Name of the column as the file spells it; None when it has none of them."""
    if wanted is not None and wanted in cells:
        return wanted
    spelled: dict[str, str] = {}
    for name in cells:  # of equals the first
        spelled.setdefault(str(name).strip().lower(), name)
    return next((spelled[name] for name in ([wanted.lower()] if wanted else known) if name in spelled), None)


def caption_columns(wanted: str | None, cells: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """The caption columns of a row as the file spells them, and of those that are wanted which it hasn't.

    `wanted`: one, or several with commas between them; None: the first of CAPTION_COLUMNS, where "" stands for one missing.
    """
    known: tuple[str, ...] = CAPTION_COLUMNS
    asked: list[str | None] = [None]
    if wanted is not None:
        whole = find_column(wanted, (), cells)  # a name may hold commas
        parts = dict.fromkeys(part.strip() for part in wanted.split(","))
        asked = [wanted] if whole is not None else [part for part in parts if part]
    found = {name or "": find_column(name, known, cells) for name in asked}
    return [name for name in found.values() if name is not None], {n for n, column in found.items() if column is None}


def source_cells(cells: Mapping[str, Any], wanted: tuple[str, ...] | None) -> tuple[Any, ...]:
    """The cells of a row's source images in order, lists taken apart, empty ones at the end left out.

    Where the columns are there and all of them empty, one cell is left, so that the row is no image without sources.
    """
    spelled = {str(name).strip().lower(): name for name in cells}
    names = [spelled[name.lower()] for name in wanted or () if name.lower() in spelled]
    if wanted is None:
        numbered = ([name for name in spelled if re.fullmatch(rf"{base}(_\d+)?", name)] for base in SOURCE_COLUMNS)
        kind = next((names for names in numbered if names), [])
        names = [spelled[name] for name in sorted(kind, key=_number)]
    found: list[Any] = []
    for name in names:
        cell = cells[name]
        found += cell if isinstance(cell, list) else [cell]
    while len(found) > 1 and (found[-1] is None or found[-1] == ""):
        found.pop()
    return tuple(found)


def mask_cell(cells: Mapping[str, Any], wanted: str | None, where: str, remarks: Remarks | None) -> tuple[Any, bool]:
    """The cell of a row's mask, None where it has none, and whether there is a column of masks.

    Under a name that nobody gave, what is no text (polygons, numbers, bytes) is something else's mask: told, not read.
    """
    name = None if wanted == "none" else find_column(wanted, MASK_COLUMNS, cells)
    if name is None:
        return None, False
    if wanted is None and not isinstance(cells[name], str | None):
        if remarks is not None:
            remarks.add(UNREAD_MASKS, f"{where}: {name}")
        return None, True
    return cells[name], True


def _number(column: str) -> int:
    digits = column.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def ambiguous(cells: Iterable[str], image_column: str | None, caption_column: str | None) -> str:
    """The columns that could be meant where none is named and there are several; the first of them is taken."""
    found = []
    for wanted, known in ((image_column, IMAGE_COLUMNS), (caption_column, CAPTION_COLUMNS)):
        there = {str(name).strip().lower() for name in cells}
        names = [name for name in known if name in there] if wanted is None else []
        found += [" and ".join(names)] if len(names) > 1 else []
    return ", ".join(found)


def cells_of(batch: Any) -> list[dict[str, Any]]:
    """Rows of an arrow RecordBatch. Text that is no UTF-8 fails its own cell alone: half surrogate pairs, as in csv."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [_tolerant(column) for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _tolerant(column: Any) -> list[Any]:
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            return _tolerant(column.dictionary_decode())
        if pa.types.is_struct(column.type):
            names = [column.type.field(number).name for number in range(column.type.num_fields)]
            fields = zip(*(_tolerant(column.field(name)) for name in names), strict=True)
            valid = column.is_valid().to_pylist()
            return [
                dict(zip(names, row, strict=True)) if there else None for row, there in zip(fields, valid, strict=True)
            ]
        cells = column.cast(pa.large_binary()).to_pylist()
        return [None if cell is None else cell.decode("utf-8", "surrogateescape") for cell in cells]


# ── kinds of files ───────────────────────────────────────────────────────────────────────────────────────────────────


def _text(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    """The file as text. Bytes that are no UTF-8 become half surrogate pairs, which a caption is refused for."""
    encoding = captions.encoding_of(file.read(4))
    file.seek(0)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return io.TextIOWrapper(file, encoding, errors, newline)


def _csv(file: IO[bytes], path: Path) -> Iterator[Cells]:
    csv.field_size_limit(LONGEST_CELL)
    text = _text(file, newline="")
    first = text.readline(1 << 16)
    text.seek(0)
    delimiter = next((mark for mark in ",\t;" if mark in first), ",")
    line = 1
    try:
        reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
        header = [name.strip() for name in next(reader, [])]
        repeated = _repeated(header)
        line = reader.line_num + 1
        for cells in reader:
            where, line = f"{path.name} line {line}", reader.line_num + 1
            if not cells or not any(cells):
                continue
            if len(cells) > len(header):
                advice = "put captions that hold commas into double quotes"
                yield where, BadRow(f"{len(cells)} cells and {len(header)} columns: {advice}")
                continue
            yield where, dict.fromkeys(header) | dict(zip(header, cells, strict=False)) | repeated
    except csv.Error as error:
        yield f"{path.name} line {line}", BadRow(f"not valid csv ({error}): nothing from there on could be read")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)}: not {error.encoding} at byte {error.start}: save it as UTF-8") from None


def _repeated(header: Iterable[str]) -> dict[str, Any]:
    return {name: REPEATED for name, count in Counter(header).items() if count > 1}


def _jsonl(file: IO[bytes], path: Path) -> Iterator[Cells]:
    try:
        for number, line in enumerate(_text(file), start=1):
            where = f"{path.name} line {number}"
            if not line.strip():
                continue
            try:
                yield where, _object(_parse(line))
            except BadRow as error:
                yield where, error
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)}: not {error.encoding} at byte {error.start}: save it as UTF-8") from None


def _json(file: IO[bytes], path: Path) -> Iterator[Cells]:
    try:
        values = _parse(_text(file).read())
    except (BadRow, UnicodeDecodeError) as error:
        raise ValueError(f"{shown(path)}: {error}") from None
    if isinstance(values, dict) and values and all(isinstance(value, str | list) for value in values.values()):
        values = [{"image": name, "captions": value} for name, value in values.items()]  # as captions.json has them
    if not isinstance(values, list):
        raise ValueError(f"{shown(path)}: must be a list of objects, not {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        where = f"{path.name} entry {number}"
        try:
            yield where, _object(value)
        except BadRow as error:
            yield where, error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error}") from None
    except RecursionError:
        raise BadRow("not valid JSON: nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadRow(f"not valid JSON: {error}") from None


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(f"must be an object, not {type(value).__name__}")
    return value


def _parquet(file: IO[bytes], path: Path) -> Iterator[Cells]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            repeated = _repeated(table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024):
                for row in cells_of(batch):
                    number += 1
                    yield f"{path.name} row {number}", row | repeated
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, BadRow):
            raise
        what = f"{shown(path)}: not valid parquet: {str(error).splitlines()[0]}"
        if not number:
            raise ValueError(what) from None
        yield f"{path.name} row {number + 1}", BadRow(f"{what}: nothing from there on could be read")


READERS: dict[str, Callable[[IO[bytes], Path], Iterator[Cells]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
