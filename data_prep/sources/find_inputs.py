"""Where images and captions come from: a folder tree of images, caption files, metadata files, tars and parquet, in one order.

The order is canonical (directories and files sorted by name, metadata rows as they stand in their file, tar members as
they stand in their tar), and nothing is kept in memory but the names of one directory and one tar. Nothing is passed over
in silence: what is no input is counted in `remarks` and `ignored`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.images.formats import IMAGE_EXTENSIONS, unread
from data_prep.images.mask_files import MaskFiles
from data_prep.images.mask_files import split as _split
from data_prep.images.skip_reasons import (
    BAD_CAPTION,
    BAD_METADATA,
    BAD_ROW,
    BAD_WEIGHT,
    BROKEN_PARQUET,
    FILE_MISSING,
    MASK_MISSING,
    MASK_UNUSABLE,
    NO_IMAGE_PATH,
    NOT_REGULAR,
    OUTSIDE,
    SOURCE_MISSING,
    SOURCE_UNUSABLE,
    UNREADABLE_FOLDER,
)
from data_prep.shard_format.shards import MANIFEST
from data_prep.sources import caption_map, captions, missing_files, parquet_images, remarks, tar_files, weights
from data_prep.sources import metadata_files as metadata
from data_prep.sources.caption_map import CaptionMap
from data_prep.sources.captions import Found
from data_prep.sources.found_input import Input, MaskFile, Partner
from data_prep.sources.pair_folders import PairFolders
from data_prep.sources.regular_files import NotRegular, check_regular, open_regular
from data_prep.sources.remarks import Remarks
from files.shown import one_line, shown

CAPTION_EXTENSIONS = ("txt", "caption")  # the first that exists is taken
ARCHIVES = frozenset(["zip", "gz", "tgz", "bz2", "tbz", "xz", "txz", "zst", "7z", "rar"])
# Files by which a folder shows that this program wrote a data set there, or has begun to; and what they hold.
OWN_FILES = {
    MANIFEST: ("format_version", "payload", "shards"),
    "plan/plan.json": ("fingerprint", "shard_rows"),  # packing/plan.py
    "encoding.json": ("fingerprint", "text_encoder"),  # encoding/encoded_set.py
}


@dataclass
class Sources:
    """Iterable over the inputs of a base folder; the counters are of the last iteration.

    Raises ValueError or FileNotFoundError, with one line for the user, for paths and metadata that cannot be meant.
    """

    base: Path
    metadata_path: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    exclude: Path | None = None  # the output folder, which may lie within the base
    allow_links: bool = False  # follow links that lead out of the base folder
    on_duplicate_stem: str = "warn"  # warn | error
    source_columns: tuple[str, ...] | None = (
        None  # of source images; None: those that are known by name; empty: no pairs
    )
    caption_lines: bool = False  # each line of a caption file is a caption
    weight_column: str | None = None  # of repeats an epoch; None: those that are known by name; "none": none
    kohya_folders: bool = True  # the images of a folder 10_name come ten times an epoch
    mask_names: bool = True  # x-masklabel.png and x.mask.png beside x.jpg are its mask, no pictures of their own
    mask_folder: Path | None = None  # of masks with the stems (and subfolders) of the images
    mask_column: str | None = None  # of metadata; None: one that is known by name; "none": none
    files_seen: int = 0
    ignored: Counter[str] = field(default_factory=Counter)  # by extension
    remarks: Remarks = field(default_factory=Remarks)
    empty_listings: list[str] = field(default_factory=list)  # metadata files without rows

    def __post_init__(self) -> None:
        if not self.base.exists():
            raise FileNotFoundError(f"--dataset_base_path {shown(self.base)}: no such folder")
        if not self.base.is_dir():
            raise ValueError(f"--dataset_base_path {shown(self.base)}: not a folder")
        if self.metadata_path is not None and not self.metadata_path.exists():
            raise FileNotFoundError(f"--dataset_metadata_path {shown(self.metadata_path)}: no such file")
        if self.exclude and os.path.realpath(self.exclude) == os.path.realpath(self.base):
            raise ValueError(
                f"--output_path {shown(self.exclude)} is --dataset_base_path: its tars would be the next run's inputs"
            )
        self.base = Path(os.path.abspath(self.base))
        self._real_base = os.path.realpath(self.base)
        self._excluded = os.path.realpath(self.exclude) if self.exclude else None
        folder = None if self.mask_folder is None else os.path.abspath(self.mask_folder)
        if folder is not None and not os.path.isdir(folder):
            raise FileNotFoundError(f"--mask_folder {shown(self.mask_folder)}: no such folder")
        if folder is not None and _contains(os.path.realpath(folder), self._real_base):
            raise ValueError(
                f"--mask_folder {shown(self.mask_folder)} holds the images: masks of equal stems need their own"
            )
        self._masks = MaskFiles(str(self.base), folder, self.mask_names)

    def __iter__(self) -> Iterator[Input]:
        self.files_seen, self.ignored, self.remarks, self.empty_listings = 0, Counter(), Remarks(), []
        found: Iterator[Input]
        if self.metadata_path is not None:
            found = self._listed(Path(os.path.abspath(self.metadata_path)), self.base)
        else:
            found = self._folder(str(self.base))
        for item in found:
            if item.sources:
                self.remarks.add(remarks.PAIRS_FOUND, item.path)
            if item.more_captions:
                self.remarks.add(remarks.SEVERAL_CAPTIONS, item.path)
            for caption in (item.caption, *item.more_captions):
                if caption:
                    self._remark_caption(item.path, caption)
            yield item
        for lonely in self._masks.lonely():
            self.remarks.add(remarks.LONELY_MASKS, self._relative(lonely))

    def _remark_caption(self, path: str, caption: str) -> None:
        if "\ufffd" in caption:
            self.remarks.add(remarks.LOST_CHARACTERS, path)
        if captions.holds_placeholder(caption):
            self.remarks.add(remarks.PLACEHOLDERS, path)
        if (tokens := captions.about_tokens(caption)) > captions.LONG_TOKENS:
            raised = tokens <= captions.MOST_TOKENS
            self.remarks.add(
                remarks.CUT_UNLESS_RAISED if raised else remarks.CUT_ANYWAY, f"{path} (about {tokens} tokens)"
            )

    # ── a folder tree ────────────────────────────────────────────────────────────────────────────────────────────────

    def _folder(
        self,
        folder: str,
        beside: tuple[str, ...] = (),
        pairs: PairFolders | None = None,
        maps: tuple[CaptionMap, ...] = (),
        weight: float = 1.0,
    ) -> Iterator[Input]:
        """Inputs of one directory, then of those in it. A metadata file speaks for the whole tree below it.

        `beside`: the other folders of its parent, where captions may lie that people expect to be found; `pairs`: the
        folder is target/ or lies in it; `maps`: the captions.json of the folders around it, the nearest first; `weight`: of
        the nearest folder above that has one.
        """
        repeats = weights.of_folder(os.path.basename(folder)) if self.kohya_folders else None
        weight = weight if repeats is None else repeats
        names: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):  # .git, .ipynb_checkpoints, macOS's ._photo.jpg
                        self.remarks.add(remarks.HIDDEN, self._relative(entry.path))
                    elif os.path.isdir(entry):  # False for a link to itself, of which entry.is_dir() makes an error
                        folders.append(entry.name)
                    else:
                        names.append(entry.name)
        except OSError as error:
            if folder == str(self.base):
                raise
            problem = (UNREADABLE_FOLDER, error.strerror or str(error))
            yield Input(self._relative(folder), self._file(folder), 0, -1, None, problem)
            return
        listing = sorted(name for name in names if name.lower() in metadata.NAMES)
        if listing and not (len(listing) == 1 and self._holds_images(os.path.join(folder, listing[0]))):
            self.files_seen += len(names) - 1
            for item in self._found_listing(folder, listing):
                yield self._weighted(item, folder, weight)
            return
        own = self._caption_map(caption_map.find(names, folder))
        maps = (*own, *maps)
        for item in self._files(folder, names, [*folders, *beside], maps):
            yield self._weighted(item if pairs is None else self._with_partners(item, pairs), folder, weight)
        below = PairFolders.among(folder, folders) if pairs is None and self.source_columns != () else None
        for name in sorted(folders, key=os.fsencode):
            path = os.path.join(folder, name)
            if below is not None and path in below.sources:
                continue
            if os.path.realpath(path) == self._excluded or self._masks.is_folder(path):
                continue
            if os.path.islink(path):
                if self._outside(path):
                    yield self._link_out(path)
                    continue
                if not self.allow_links or _contains(os.path.realpath(path), os.path.realpath(folder)):
                    self.remarks.add(remarks.LINKED_FOLDERS, self._relative(path))
                    continue  # its target is walked anyway, or it is a loop
            if _is_own_set(path):
                self.remarks.add(remarks.OWN_FOLDERS, self._relative(path))
                continue
            if self.kohya_folders and self._is_regularization(path, folders):
                continue
            others = tuple(f"../{other}" for other in folders if other != name)
            inner = below if below is not None and path == below.target else pairs
            yield from self._folder(path, others, inner, maps, weight)
        if below is not None:
            for lonely in below.lonely():
                self.remarks.add(remarks.LONELY_SOURCES, self._relative(lonely))
        for each in own:
            if unused := each.unused():
                self.remarks.add(remarks.UNUSED_CAPTIONS, f"{self._relative(each.path)}: {unused[0]}", len(unused))

    def _caption_map(self, path: str | None) -> tuple[CaptionMap, ...]:
        """A folder's captions.json; none where there is none that can be read, which is remarked."""
        if path is None or self._outside(path):
            return ()
        try:
            return (CaptionMap.read(path),)
        except (ValueError, OSError) as error:
            self.remarks.add(remarks.BROKEN_MAP, f"{self._relative(path)} ({one_line(error)})")
            return ()

    def _weighted(self, item: Input, folder: str, weight: float) -> Input:
        """The input of a folder whose images come `weight` times an epoch."""
        if self.kohya_folders and weights.numbered(os.path.basename(folder)):
            self.remarks.add(remarks.NUMBERED, item.path)
        if weight == 1.0:
            return item
        self.remarks.add(remarks.REPEATS, item.path)
        return dataclasses.replace(item, weight=item.weight * weight)

    def _is_regularization(self, path: str, beside: list[str]) -> bool:
        """Whether the folder at `path` is kohya's regularization set, which is no part of the training set; told."""
        name = os.path.basename(path)
        if name.lower() not in weights.REGULARIZATION:
            return False
        found: list[str] = []
        for root, folders, names in os.walk(path):
            folders.sort()
            found += [
                os.path.join(root, each) for each in sorted(names) if _split(each)[1] in (*IMAGE_EXTENSIONS, "tar")
            ]
        if not found or not weights.is_regularization(name, os.listdir(path), beside):
            return False
        text = remarks.REGULARIZATION.format(self._relative(path))
        self.remarks.add(text, self._relative(found[0]), len(found))
        return True

    def _with_partners(self, item: Input, pairs: PairFolders) -> Input:
        """The image of target/ as a pair, with the images of equal stem in source/, source_2/ …"""
        if item.problem is not None or item.kind or item.offset:  # images in tars and parquet have no folders
            return item
        try:
            return self._pair(item, pairs.partners(os.path.join(str(self.base), os.fsdecode(item.file))))
        except FileNotFoundError as error:
            return dataclasses.replace(item, problem=(SOURCE_MISSING, str(error)))

    def _pair(self, item: Input, paths: list[str]) -> Input:
        """`item` with these files as its source images; with the problem of the first that can't be one."""
        partners, changed = [], item.changed
        for path in paths:
            found = self._input(path, Found(("",)), unread(_split(path)[1]))
            if found.problem is not None:
                reason, detail = found.problem
                kind = SOURCE_MISSING if reason == FILE_MISSING else SOURCE_UNUSABLE
                return dataclasses.replace(item, problem=(kind, f"{found.path}: {reason}: {detail}".rstrip(": ")))
            partners.append(Partner(found.path, found.file, found.size))
            changed = max(changed, found.changed)
        return dataclasses.replace(item, sources=tuple(partners), changed=changed)

    def _masked(self, item: Input, path: str, named: str | None = None) -> Input:
        """The image at `path` with its mask, if it has one: that `named` by its row, else what its name leads to."""
        places = [named] if named is not None else self._masks.of(path)
        if not places or item.problem is not None:
            return item
        if len(places) > 1:
            self.remarks.add(remarks.SEVERAL_MASKS, self._relative(places[1]))
        found = self._input(places[0], Found(), unread(_split(places[0])[1]))
        if found.problem is not None:
            reason, detail = found.problem
            kind = MASK_MISSING if reason == FILE_MISSING else MASK_UNUSABLE
            return dataclasses.replace(item, problem=(kind, f"{found.path}: {reason}: {detail}".rstrip(": ")))
        mask = MaskFile(found.path, found.file, 0, found.size)
        return dataclasses.replace(item, mask=mask, changed=max(item.changed, found.changed))

    def _found_listing(self, folder: str, names: list[str]) -> Iterator[Input]:
        """Rows of a folder's metadata file. One that can't be read is an error in the base folder, and counted elsewhere."""
        path = os.path.join(folder, names[0])
        try:
            if len(names) > 1:
                listed = " and ".join(map(shown, names))
                raise ValueError(f"{shown(folder)} holds {listed}: say which with --dataset_metadata_path")
            if self._outside(path):
                raise ValueError(self._leads_out(path))
            yield from self._listed(Path(path), Path(folder))
        except (ValueError, OSError) as error:
            if folder == str(self.base):
                raise
            yield Input(self._relative(path), self._file(path), 0, -1, None, (BAD_METADATA, one_line(error)))

    def _holds_images(self, path: str) -> bool:
        """Whether a metadata.parquet is one of the images themselves."""
        return path.lower().endswith(".parquet") and self._image_column(path) is not None

    def _image_column(self, path: str) -> parquet_images.ImageColumn | None:
        try:
            return parquet_images.image_column(path, self.image_column)
        except Exception:  # what is no parquet is told when it is read
            return None

    def _files(
        self, folder: str, names: list[str], folders: list[str], maps: tuple[CaptionMap, ...]
    ) -> Iterator[Input]:
        near = missing_files.Names(names, folders)
        tars = {stem for stem, extension in map(_split, names) if extension == "tar"}
        last_stem = None
        used: set[str] = set()
        masks, lonely_masks = self._masks.enter(folder, names)
        for name in sorted(names, key=lambda name: (os.fsencode(_split(name)[0]), os.fsencode(name))):
            stem, extension = _split(name)
            self.files_seen += 1
            path = os.path.join(folder, name)
            if extension == "tar":
                yield from self._tar(path)
            elif name in masks:
                pass  # read with its image
            elif name in lonely_masks and not near.sidecar(stem, CAPTION_EXTENSIONS):
                self.remarks.add(remarks.LONELY_MASKS, self._relative(path))
            elif extension in IMAGE_EXTENSIONS:
                if stem == last_stem:
                    self._same_stem(path)
                last_stem = stem
                found, problem, hint = None, None, ""
                sidecar = near.sidecar(stem, CAPTION_EXTENSIONS)
                if sidecar:
                    used.add(sidecar)
                    found, problem = self._read_caption(os.path.join(folder, sidecar))
                else:
                    found, problem = self._mapped(path, maps)
                if found is None:
                    hint = near.hint(stem, name, CAPTION_EXTENSIONS)
                yield self._masked(self._input(path, found or Found(), unread(extension) or problem, hint), path)
            elif extension == "parquet":
                yield from self._parquet(path, stem in tars)
            elif extension in ARCHIVES:
                self.remarks.add(remarks.PACKED_ARCHIVES, self._relative(path))
            elif extension not in CAPTION_EXTENSIONS and not any(path == each.path for each in maps):
                self.ignored[extension and f".{extension}"] += 1
        stems = {_split(name)[0] for name in names if _split(name)[1] in IMAGE_EXTENSIONS}
        for name in sorted(names, key=os.fsencode):
            stem, extension = _split(name)
            if extension in CAPTION_EXTENSIONS and name not in used and stem not in stems:
                self.remarks.add(remarks.LONELY_CAPTIONS, self._relative(os.path.join(folder, name)))

    def _tar(self, path: str) -> Iterator[Input]:
        if self._outside(path):
            yield self._link_out(path)
            return
        changed = _changed(os.stat(path)) if os.path.isfile(path) else 0
        options = self.caption_column, self.caption_lines, self.remarks, self.weight_column, self.mask_names
        found = tar_files.members(path, self._relative(path), self._file(path), *options)
        for item in found:
            yield dataclasses.replace(item, changed=changed)

    def _parquet(self, path: str, beside_tar: bool) -> Iterator[Input]:
        """A file of images; others (the rows that img2dataset and this program write beside their tars) are passed over."""
        if self._outside(path):
            yield self._link_out(path)
            return
        try:
            column = parquet_images.image_column(path, self.image_column)
        except NotRegular as error:
            yield Input(self._relative(path), self._file(path), 0, -1, None, (NOT_REGULAR, str(error.strerror)))
            return
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield Input(self._relative(path), self._file(path), 0, -1, None, (BROKEN_PARQUET, line))
            return
        if column is None:
            if not beside_tar:
                self.remarks.add(remarks.OTHER_PARQUET, self._relative(path))
            return
        changed, relative = _changed(os.stat(path)), self._relative(path)
        columns = column, self.caption_column, self.remarks, self.weight_column
        for item in parquet_images.rows(path, relative, self._file(path), *columns):
            yield dataclasses.replace(item, changed=changed)

    def _mapped(self, path: str, maps: tuple[CaptionMap, ...]) -> tuple[Found | None, tuple[str, str] | None]:
        """The captions that the nearest captions.json has for the image at `path`."""
        for each in maps:
            try:
                if (found := each.of(path)) is not None:
                    self._remark_bad(self._relative(path), found)
                    return found, None
            except ValueError as error:
                return Found(), (BAD_CAPTION, f"{self._relative(path)} in {self._relative(each.path)}: {error}")
        return None, None

    def _remark_bad(self, path: str, found: Found) -> None:
        for why in found.bad:
            self.remarks.add(remarks.BAD_AMONG_SEVERAL, f"{path}: {why}")

    def _read_caption(self, path: str) -> tuple[Found | None, tuple[str, str] | None]:
        if self._outside(path):
            return None, (OUTSIDE, self._leads_out(path))
        try:
            with open_regular(path) as file:
                data = file.read(captions.MAX_BYTES + 1)
            if not self.caption_lines:
                return Found((captions.decode(data),)), None
            found = captions.lines(data)
            self._remark_bad(self._relative(path), found)
            return found, None
        except ValueError as error:
            return None, (BAD_CAPTION, f"{self._relative(path)}: {error}")
        except OSError as error:
            return None, (BAD_CAPTION, f"{self._relative(path)}: {error.strerror}")

    def _same_stem(self, path: str) -> None:
        relative = self._relative(path)
        if self.on_duplicate_stem == "error":
            raise ValueError(f"{shown(relative)}: another image of this folder has the same name but for its extension")
        self.remarks.add(remarks.SAME_STEM, relative)

    # ── a metadata file ──────────────────────────────────────────────────────────────────────────────────────────────

    def _listed(self, path: Path, folder: Path) -> Iterator[Input]:
        """Rows of a metadata file. Their paths are relative to it, or to the base folder where no file is there."""
        self.files_seen += 1
        if self._holds_images(str(path)):
            yield from self._parquet(str(path), False)
            return
        within = _contains(str(self.base), str(path))
        roots = list(dict.fromkeys([str(path.parent), str(self.base)] if within else [str(self.base)]))
        listed: set[int] = set()  # hashes, of 10 M paths still no more than half a GB
        empty = True
        try:
            columns = self.image_column, self.caption_column, self.remarks, self.source_columns
            for cells in metadata.rows(path, *columns, self.weight_column, self.mask_column):
                empty = False
                item, place = self._row(cells, roots)
                if place is not None and cells.sources:
                    item, partners = self._row_of_pair(item, cells, roots)
                    listed.update(map(hash, partners))
                if place is not None:
                    item = self._masked_row(item, cells, place, roots, listed)
                    if hash(place) in listed:
                        self.remarks.add(remarks.LISTED_TWICE, f"{cells.where}: {item.path}")
                    listed.add(hash(place))
                yield item
        except NotRegular as error:
            raise ValueError(f"{shown(path)}: {error.strerror}") from None
        if empty:
            self.empty_listings.append(str(path))
        for unlisted in missing_files.unlisted(folder, listed, self._excluded):
            if unlisted != str(path) and not self._masks.is_mask(unlisted):
                self.remarks.add(_unlisted_kind(unlisted), self._relative(unlisted))

    def _row(self, row: metadata.MetadataRow, roots: list[str]) -> tuple[Input, str | None]:
        """The input of one row, and the path that it names."""

        def failed(reason: str, detail: str) -> tuple[Input, None]:
            return Input(row.where, b"", 0, -1, None, (reason, detail)), None

        if row.problem:
            return failed(BAD_ROW, row.problem)
        try:
            name, places = self._named(row.image, row.where, roots)
        except _BadCell as error:
            return failed(*error.problem)
        place = next((place for place in places if os.path.exists(place)), places[0])
        found, problem = Found(), None
        try:
            found = captions.several(row.captions)
            self._remark_bad(row.where, found)
        except ValueError as error:
            problem = (BAD_CAPTION, f"{row.where}: {error}")
        weight = 1.0
        try:
            weight = weights.from_cell(row.weight, row.weight_column)
        except ValueError as error:
            problem = (BAD_WEIGHT, f"{row.where}: {error}")
        problem = unread(_split(place)[1]) or problem
        item = self._input(place, found, problem, f"the caption column of {row.where} is empty")
        if weight != 1:
            self.remarks.add(remarks.WEIGHTS, item.path)
            item = dataclasses.replace(item, weight=weight)
        if item.problem and item.problem[0] == FILE_MISSING:
            detail = missing_files.advice(name, places)
            item = dataclasses.replace(item, problem=(FILE_MISSING, f"{item.problem[1]} ({row.where}); {detail}"))
        return item, place

    def _row_of_pair(self, item: Input, row: metadata.MetadataRow, roots: list[str]) -> tuple[Input, list[str]]:
        """The input of a row with its source images, and the paths that it names for them."""
        chosen: list[str] = []
        if item.problem is not None:
            return item, chosen
        if len(row.sources) > metadata.MOST_SOURCES:
            detail = f"{row.where} names {len(row.sources)} source images, models take {metadata.MOST_SOURCES} at most"
            return dataclasses.replace(item, problem=(SOURCE_UNUSABLE, detail)), chosen
        for number, cell in enumerate(row.sources, start=1):
            try:
                name, places = self._named(cell, row.where, roots)
            except _BadCell as error:
                problem = (SOURCE_MISSING, f"source image {number} of {row.where}: {error.problem[1]}")
                return dataclasses.replace(item, problem=problem), chosen
            found = [place for place in places if os.path.exists(place)]
            if not found:
                advice = missing_files.advice(name, places)
                problem = (SOURCE_MISSING, f"{shown(name)}, source image {number} of {row.where}; {advice}")
                return dataclasses.replace(item, problem=problem), chosen
            chosen.append(found[0])
        return self._pair(item, chosen), chosen

    def _masked_row(
        self, item: Input, row: metadata.MetadataRow, place: str, roots: list[str], listed: set[int]
    ) -> Input:
        """The input of a row with the mask that it names, or that lies where masks do; a named one is added to `listed`."""
        if item.problem is not None or row.mask is None or row.mask == "":
            return self._masked(item, place)
        try:
            name, places = self._named(row.mask, row.where, roots, "mask")
        except _BadCell as error:
            return dataclasses.replace(item, problem=(MASK_UNUSABLE, f"mask of {row.where}: {error.problem[1]}"))
        found = next((path for path in places if os.path.exists(path)), None)
        if found is None:
            detail = f"{shown(name)}, the mask of {row.where}; {missing_files.advice(name, places)}"
            return dataclasses.replace(item, problem=(MASK_MISSING, detail))
        listed.add(hash(found))
        return self._masked(item, place, found)

    def _named(self, cell: Any, where: str, roots: list[str], what: str = "image") -> tuple[str, list[str]]:
        """The file name in a cell and the places where it may lie. Raises _BadCell for what is no name within the base."""
        if not isinstance(cell, str) or not cell.strip():
            raise _BadCell(NO_IMAGE_PATH, f"the {what} column holds {shown(repr(cell))}")
        name = cell.strip()
        try:
            if b"\0" in os.fsencode(name):
                raise _BadCell(NO_IMAGE_PATH, f"a NUL in {shown(name)}")
        except UnicodeEncodeError:
            raise _BadCell(NO_IMAGE_PATH, f"not valid Unicode: {shown(name)}") from None
        spellings = [name] + ([name.replace("\\", "/")] if "\\" in name else [])
        places = [os.path.normpath(os.path.join(root, spelling)) for spelling in spellings for root in roots]
        place = next((place for place in places if os.path.exists(place)), places[0])
        if not _contains(str(self.base), place):
            detail = f"{where}: {what} {shown(repr(name))} lies outside of --dataset_base_path {shown(self.base)}"
            raise _BadCell(OUTSIDE, detail)
        return name, places

    # ── paths ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _input(self, path: str, found: Found, problem: tuple[str, str] | None, hint: str = "") -> Input:
        relative = self._relative(path)
        file = self._file(path)
        if self._outside(path):
            return self._link_out(path)
        try:
            status = os.stat(path)
            check_regular(status, path)
        except NotRegular as error:
            return Input(relative, file, 0, -1, found.first, (NOT_REGULAR, str(error.strerror)))
        except OSError as error:
            return Input(relative, file, 0, -1, found.first, (FILE_MISSING, error.strerror or ""))
        texts = found.first, problem, _changed(status)
        return Input(relative, file, 0, status.st_size, *texts, hint=hint, more_captions=found.more)

    def _relative(self, path: str) -> str:
        return self._file(path).decode("utf-8", "backslashreplace").replace(os.sep, "/")

    def _file(self, path: str) -> bytes:
        return os.fsencode(os.path.relpath(path, self.base))

    def _outside(self, path: str) -> bool:
        """Whether a path leads out of the folders that were given: the images', and for masks theirs."""
        own = self._masks.folder if self._masks.is_folder(path) else None
        real = os.path.realpath(path)
        inside = _contains(self._real_base, real) or (own is not None and _contains(os.path.realpath(own), real))
        return not self.allow_links and not inside

    def _link_out(self, path: str) -> Input:
        """A link that leads out of the base folder: an input that is left out, whatever lies there."""
        return Input(self._relative(path), self._file(path), 0, -1, None, (OUTSIDE, self._leads_out(path)))

    def _leads_out(self, path: str) -> str:
        return (
            f"{shown(self._relative(path))} is a link to {shown(os.path.realpath(path))}, outside of --dataset_base_path"
            f" {shown(self.base)}: copy the files in, or allow it with --allow_links"
        )


class _BadCell(Exception):
    """A cell that names no image: `problem` as in Input."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = reason, detail


def _unlisted_kind(path: str) -> str:
    """Which remark a file is that lies below a metadata file and isn't in it."""
    name = os.path.basename(path).lower()
    if name in metadata.NAMES:
        return remarks.NESTED_LISTINGS
    return remarks.UNLISTED_TARS if name.endswith((".tar", ".parquet")) else remarks.UNLISTED


def _is_own_set(folder: str) -> bool:
    """Whether a folder holds, or is on the way to hold, a data set that this program wrote."""
    return any(_has_keys(os.path.join(folder, name), keys) for name, keys in OWN_FILES.items())


def _has_keys(path: str | Path, keys: tuple[str, ...]) -> bool:
    try:
        with open_regular(str(path)) as file:
            fields: Any = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and all(key in fields for key in keys)


def _changed(status: os.stat_result) -> int:
    """ctime too: a file that was put in another's place may bring its old mtime along."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _contains(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
