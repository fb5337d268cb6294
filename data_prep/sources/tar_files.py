"""Existing WebDataset tars as a source: images with their captions, read in place by offset.

A member's caption is the .txt, .caption or .json with the same name before its last dot (`photo v1.2.jpg`,
`photo v1.2.txt`), else, as webdataset groups members, before its first dot (`000.img.jpg`, `000.txt`). Masks are known by
their names as in folders (mask_files.py). The members of a sample need not stand side by side. A name that comes again
begins a new sample: nothing replaces anything.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO

from data_prep.images.formats import IMAGE_EXTENSIONS, unread
from data_prep.images.mask_files import mask_order, mask_stem
from data_prep.images.skip_reasons import (
    BAD_CAPTION,
    BAD_WEIGHT,
    BROKEN_LINK,
    BROKEN_TAR,
    MASK_UNUSABLE,
    NOT_REGULAR,
)
from data_prep.shard_format.tar_members import BrokenTar, readable, sparse_content, tar_members
from data_prep.sources import captions, weights
from data_prep.sources.captions import Found
from data_prep.sources.found_input import PLAIN, SPARSE, Input, MaskFile
from data_prep.sources.metadata_files import caption_columns
from data_prep.sources.regular_files import open_regular
from data_prep.sources.remarks import (
    BAD_AMONG_SEVERAL,
    HIDDEN,
    LONELY_CAPTIONS,
    LONELY_MASKS,
    NAMED_TWICE,
    OTHER_MEMBERS,
    SEVERAL_MASKS,
    WEIGHTS,
    Remarks,
)

TEXT_SUFFIXES = ("txt", "caption", "json")
HARD = "hard link"  # kind of a member until it is resolved
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)


@dataclass(frozen=True)
class Member:
    """One file of a tar: how its content is read, or why it can't be."""

    name: str
    offset: int
    size: int
    kind: str = PLAIN
    problem: tuple[str, str] | None = None


@dataclass
class Group:
    """Members of one name before its dot; `texts` by suffix."""

    images: list[tuple[int, Member]] = field(default_factory=list)
    texts: dict[str, Member] = field(default_factory=dict)
    used: bool = False


def members(
    path: str,
    relative: str,
    file: bytes,
    caption_column: str | None,
    caption_lines: bool,
    remarks: Remarks,
    weight_column: str | None = None,
    mask_names: bool = True,
) -> Iterator[Input]:
    """Inputs of one uncompressed tar, in the order of its images. `caption_lines`: each line of a text is a caption;
    `weight_column` as in metadata_files.rows; `mask_names`: masks are known by their names.

    What can't be read of the archive is one more input, with the problem, behind those that can.
    """
    try:
        with open_regular(path) as source:
            found, broken = _listed(source, relative, remarks)
            masks, asked = Masks({}), (caption_column, caption_lines, weight_column)
            if mask_names:
                found, masks = _apart(found, relative, file, remarks)
            for key, item in _inputs(source, found, relative, file, asked, remarks):
                if item.weight != 1:
                    remarks.add(WEIGHTS, item.path)
                yield masks.put(item, key)
    except OSError as error:
        broken = error.strerror or str(error)
    if broken:
        yield Input(relative, file, 0, -1, None, (BROKEN_TAR, broken))


def _listed(source: IO[bytes], relative: str, remarks: Remarks) -> tuple[list[Member], str]:
    """All files of the archive, links resolved, and what is wrong with it where not all of it could be read."""
    found: list[Member] = []
    links: dict[int, str] = {}  # place in `found` -> the target's name
    broken = ""
    try:
        for member in tar_members(source):
            name = _normal(member.name)
            if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
                remarks.add(HIDDEN, f"{relative}/{readable(name)}")
            elif member.type in _LINKS:
                hard = member.type == tarfile.LNKTYPE
                links[len(found)] = _normal(
                    member.linkname if hard else posixpath.join(posixpath.dirname(name), member.linkname)
                )
                found.append(Member(name, 0, 0, HARD if hard else PLAIN))
            elif member.issparse():
                found.append(Member(name, member.offset, member.size, SPARSE))
            elif member.isreg():
                found.append(Member(name, member.offset_data, member.size))
            elif not member.isdir():
                found.append(Member(name, 0, 0, PLAIN, (NOT_REGULAR, "a device, FIFO or unknown member")))
    except BrokenTar as error:
        broken = str(error)
    return _resolved(found, links), broken


def _normal(name: str) -> str:
    """'./a//b' and '/a/b' are 'a/b'."""
    return posixpath.normpath("/" + name).lstrip("/")


def _resolved(found: list[Member], links: dict[int, str]) -> list[Member]:
    """Links replaced by what they lead to within the archive: a hard link to what came before, a symbolic one to anything."""
    last: dict[str, int] = {}
    before: dict[int, int] = {}  # place of a link -> of the member that had its target's name then
    for place, member in enumerate(found):
        if place not in links:
            last[member.name] = place
        elif member.kind == HARD and links[place] in last:
            before[place] = last[links[place]]
    on_from = {found[place].name: target for place, target in links.items()}
    resolved = list(found)
    for place, target in links.items():
        end = before.get(place, last.get(target))
        steps = 0
        while end is None and steps < 40 and (on := on_from.get(target)) is not None:
            target, steps = on, steps + 1
            end = last.get(target)
        source = found[end] if end is not None else None
        if source is None:
            problem = (BROKEN_LINK, readable(target))
            resolved[place] = Member(found[place].name, 0, 0, PLAIN, problem)
        else:
            resolved[place] = Member(found[place].name, source.offset, source.size, source.kind, source.problem)
    return resolved


def _split(name: str) -> tuple[str, str, str]:
    """'d/photo v1.2.JPG' -> ('d/photo v1.2', 'd/photo v1', 'jpg'): before its last dot, its first dot, behind the last."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    if not dot:
        return name, name, ""
    return folder + slash + stem, folder + slash + base.partition(".")[0], suffix.lower()


Mask = tuple[MaskFile, tuple[str, str] | None]  # and why it can't be read


@dataclass
class Masks:
    """By the name of their image before its last dot, then by their own; a name may come several times, as the image's may."""

    found: dict[str, dict[str, list[Mask]]]
    _taken: Counter[str] = field(default_factory=Counter)

    def put(self, item: Input, key: str) -> Input:
        """The image of this name with its mask; of images of one name each has the mask of its turn."""
        number = self._taken[key]
        self._taken[key] += 1
        if key not in self.found or item.problem is not None:
            return item
        masks = min(self.found[key].items(), key=lambda named: mask_order(named[0]))[1]
        mask, problem = masks[min(number, len(masks) - 1)]
        if problem is not None:
            return replace(item, problem=(MASK_UNUSABLE, f"{mask.path}: {': '.join(problem)}"))
        return replace(item, mask=mask)


def _apart(found: list[Member], relative: str, file: bytes, remarks: Remarks) -> tuple[list[Member], Masks]:
    """The members that are no masks, and the masks."""
    pictures, named = set[str](), set[str]()
    for member in found:
        key, _, suffix = _split(member.name)
        if suffix in IMAGE_EXTENSIONS and mask_stem(key) is None:
            pictures.add(key)
        elif suffix in TEXT_SUFFIXES:
            named.add(key)
    others: list[Member] = []
    masks: dict[str, dict[str, list[Mask]]] = defaultdict(lambda: defaultdict(list))
    for member in found:
        key, _, suffix = _split(member.name)
        image = mask_stem(key) if suffix in IMAGE_EXTENSIONS else None
        path = f"{relative}/{readable(member.name)}"
        if image in pictures:
            mask = MaskFile(path, file, member.offset, member.size, member.kind)
            masks[image][key].append((mask, member.problem or unread(suffix)))
            if len(masks[image]) > 1:
                remarks.add(SEVERAL_MASKS, path)
        elif image is not None and key not in named:
            remarks.add(LONELY_MASKS, path)
        else:
            others.append(member)
    return others, Masks(masks)


def _inputs(
    source: IO[bytes],
    found: list[Member],
    relative: str,
    file: bytes,
    asked: tuple[str | None, bool, str | None],
    remarks: Remarks,
) -> Iterator[tuple[str, Input]]:
    """Each image with its name before its last dot."""
    groups: dict[str, list[Group]] = defaultdict(lambda: [Group()])
    images: list[tuple[Member, str, Group]] = []
    seen: set[str] = set()
    for place, member in enumerate(found):
        key, _, suffix = _split(member.name)
        if suffix in IMAGE_EXTENSIONS:
            if member.name in seen:
                remarks.add(NAMED_TWICE, f"{relative}/{readable(member.name)}")
                groups[key].append(Group())
            seen.add(member.name)
            groups[key][-1].images.append((place, member))
            images.append((member, suffix, groups[key][-1]))
        elif suffix in TEXT_SUFFIXES:
            if suffix in groups[key][-1].texts:
                groups[key].append(Group())
            groups[key][-1].texts[suffix] = member
        elif suffix and member.problem is None:
            remarks.add(OTHER_MEMBERS, f"{relative}/{readable(member.name)}")
    for member, suffix, group in images:
        texts = group.texts
        group.used = True
        if not texts:
            first = _split(member.name)[1]
            if first in groups:
                groups[first][-1].used = True
                texts = groups[first][-1].texts
        item, bad = _input(source, member, suffix, texts, relative, file, asked[:2])
        for why in bad:
            remarks.add(BAD_AMONG_SEVERAL, f"{item.path}: {why}")
        item = _weighted(item, source, texts, asked[2]) if "json" in texts else item
        yield _split(member.name)[0], item
    for name, several in groups.items():
        for group in several:
            if not group.used and group.texts and not group.images:
                remarks.add(LONELY_CAPTIONS, f"{relative}/{readable(name)}")


def _input(
    source: IO[bytes],
    member: Member,
    suffix: str,
    texts: dict[str, Member],
    relative: str,
    file: bytes,
    asked: tuple[str | None, bool],
) -> tuple[Input, tuple[str, ...]]:
    """The input of an image, and what is wrong with those of its captions that were left out."""
    path = f"{relative}/{readable(member.name)}"
    found, problem = Found(), member.problem or unread(suffix)
    if problem is None:
        try:
            found = _captions(source, texts, *asked)
        except (ValueError, RecursionError, OSError) as error:
            problem = (BAD_CAPTION, f"{path}: {error}")
    looked = (
        f"looked for {', '.join(readable(_split(member.name)[0]) + '.' + text for text in TEXT_SUFFIXES)} in the tar"
    )
    place = member.offset, member.size, found.first
    item = Input(path, file, *place, problem, kind=member.kind, hint=looked, more_captions=found.more)
    return item, found.bad


def _weighted(item: Input, source: IO[bytes], texts: dict[str, Member], wanted: str | None) -> Input:
    """With the weight in the image's json member, if it has one."""
    try:
        fields = json.loads(_content(source, texts["json"]))
    except (ValueError, RecursionError, OSError):
        return item  # only told where the caption would stand in it
    column = weights.column_of(fields, wanted) if isinstance(fields, dict) else None
    if column is None:
        return item
    try:
        return dataclasses.replace(item, weight=weights.from_cell(fields[column], column))
    except ValueError as error:
        return dataclasses.replace(item, problem=item.problem or (BAD_WEIGHT, f"{item.path}: {error}"))


def _captions(source: IO[bytes], texts: dict[str, Member], caption_column: str | None, caption_lines: bool) -> Found:
    for suffix in () if caption_column else ("txt", "caption"):
        if suffix in texts:
            data = _content(source, texts[suffix])
            if caption_lines:
                return captions.lines(data)
            first = captions.decode(data)
            return _own(source, texts, first) or Found((first,))
    if "json" not in texts:
        return Found()
    fields = json.loads(_content(source, texts["json"]))  # its errors are ValueErrors, and RecursionError
    if not isinstance(fields, dict):
        raise ValueError(f"the json member is a {type(fields).__name__}, not an object")
    columns, _ = caption_columns(caption_column, fields)
    return captions.several([fields[column] for column in columns])


def _own(source: IO[bytes], texts: dict[str, Member], first: str) -> Found | None:
    """All captions of a sample that make_shards.py packed: its json has them, and the text member the first."""
    try:
        data = _content(source, texts["json"])
        listed = json.loads(data)["captions"] if b'"captions"' in data else None
        found = captions.several([listed]) if isinstance(listed, list) else Found()
        return found if len(found.captions) > 1 and found.first == first else None
    except (KeyError, TypeError, ValueError, RecursionError, OSError):  # then the text is what there is
        return None


def _content(source: IO[bytes], member: Member) -> bytes:
    if member.problem is not None:
        raise ValueError(f"{readable(member.name)}: {': '.join(member.problem)}")
    if member.size > captions.MAX_BYTES:
        raise ValueError(f"{readable(member.name)} has {member.size} bytes: too long for a caption")
    if member.kind == SPARSE:
        return sparse_content(source, member.offset)
    source.seek(member.offset)
    return source.read(member.size)
