"""Existing WebDataset tars as a source: images with their captions, read in place by offset."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator

from data_prep.sources import captions
from data_prep.sources.found_input import Input
from data_prep.sources.metadata_files import CAPTION_COLUMNS

MAX_TEXT_BYTES = 1 << 24  # captions and json members; anything larger isn't a caption


def members(
    path: str, relative: str, file: bytes, extensions: frozenset[str], caption_column: str | None
) -> Iterator[Input]:
    """Inputs of one uncompressed tar. Adjacent members that agree up to the first dot of their name are one sample.

    The caption is KEY.txt, else KEY.caption, else a text field of KEY.json. A tar that ends early gives what it holds,
    then one input with the problem.
    """
    problem = None
    group: dict[str, tarfile.TarInfo] = {}
    key = None
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # the list that tarfile keeps would grow with the archive
                if not member.isreg():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if folder + slash + stem != key:
                    yield from _sample(tar, group, relative, file, extensions, caption_column)
                    group, key = {}, folder + slash + stem
                group[suffix.lower()] = member
            yield from _sample(tar, group, relative, file, extensions, caption_column)
            group = {}
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = ("broken tar", str(error))
    if problem:
        yield Input(relative, file, 0, -1, None, problem)


def _sample(
    tar: tarfile.TarFile,
    group: dict[str, tarfile.TarInfo],
    relative: str,
    file: bytes,
    extensions: frozenset[str],
    caption_column: str | None,
) -> Iterator[Input]:
    images = [member for suffix, member in group.items() if suffix.rpartition(".")[2] in extensions]
    if not images:
        return
    caption, problem = None, None
    try:
        caption = _caption(tar, group, caption_column)
    except ValueError as error:
        problem = ("caption not readable", f"{relative}/{images[0].name}: {error}")
    for member in images:
        yield Input(f"{relative}/{_readable(member.name)}", file, member.offset_data, member.size, caption, problem)


def _caption(tar: tarfile.TarFile, group: dict[str, tarfile.TarInfo], caption_column: str | None) -> str | None:
    for suffix in () if caption_column else ("txt", "caption"):
        if suffix in group:
            return captions.decode(_content(tar, group[suffix]))
    if "json" not in group:
        return None
    fields = json.loads(_content(tar, group["json"]))  # its errors are ValueErrors
    if not isinstance(fields, dict):
        raise ValueError(f"the json member is a {type(fields).__name__}, not an object")
    for name in (caption_column,) if caption_column else CAPTION_COLUMNS:
        if name in fields:
            return captions.from_cell(fields[name])
    return None


def _readable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"{member.name} has {member.size} bytes: too long for a caption")
    file = tar.extractfile(member)
    assert file is not None, "only regular files are asked for"
    return file.read()
