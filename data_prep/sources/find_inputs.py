"""Where images and captions come from: a folder tree of images, caption files, metadata files and tars, in one order.

The order is canonical (directories and files sorted by name, metadata rows as they stand in their file, tar members as
they stand in their tar), and nothing is kept in memory but the names of one directory.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.sources import captions
from data_prep.sources import metadata_files as metadata
from data_prep.sources import tar_files as tar_source
from data_prep.sources.found_input import Input
from files.shown import shown

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
CAPTION_EXTENSIONS = ("txt", "caption")  # the first that exists is taken


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
    files_seen: int = 0
    ignored: Counter[str] = field(default_factory=Counter)  # by extension
    duplicate_stems: list[str] = field(default_factory=list)
    empty_listings: list[str] = field(default_factory=list)  # metadata files without rows

    def __post_init__(self) -> None:
        if not self.base.exists():
            raise FileNotFoundError(f"--dataset_base_path {self.base}: no such folder")
        if not self.base.is_dir():
            raise ValueError(f"--dataset_base_path {self.base}: not a folder")
        if self.metadata_path is not None and not self.metadata_path.is_file():
            raise FileNotFoundError(f"--dataset_metadata_path {self.metadata_path}: no such file")
        if self.exclude and os.path.realpath(self.exclude) == os.path.realpath(self.base):
            raise ValueError(
                f"--output_path {self.exclude} is --dataset_base_path: its tars would be the next run's inputs"
            )
        self.base = self.base.absolute()
        self._real_base = os.path.realpath(self.base)
        self._excluded = os.path.realpath(self.exclude) if self.exclude else None

    def __iter__(self) -> Iterator[Input]:
        self.files_seen, self.ignored, self.duplicate_stems, self.empty_listings = 0, Counter(), [], []
        if self.metadata_path is not None:
            yield from self._listed(Path(os.path.abspath(self.metadata_path)))
        else:
            yield from self._folder(str(self.base))

    # ── a folder tree ────────────────────────────────────────────────────────────────────────────────────────────────

    def _folder(self, folder: str) -> Iterator[Input]:
        """Inputs of one directory, then of those in it. A metadata file speaks for the whole tree below it."""
        names, folders = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):  # .git, .ipynb_checkpoints, macOS's ._photo.jpg
                    continue
                if os.path.isdir(entry):  # False for a link to itself, of which entry.is_dir() makes an error
                    folders.append(entry.name)
                else:
                    names.append(entry.name)
        listing = sorted(name for name in names if name.lower() in metadata.NAMES)
        if len(listing) > 1:
            raise ValueError(f"{folder} holds {' and '.join(listing)}: say which with --dataset_metadata_path")
        if listing:
            self.files_seen += len(names) - 1
            yield from self._listed(Path(folder, listing[0]))
            return
        yield from self._files(folder, names)
        for name in sorted(folders, key=os.fsencode):
            path = os.path.join(folder, name)
            if os.path.realpath(path) == self._excluded:
                continue
            if os.path.islink(path):
                if self._outside(path):
                    self._refuse_link(path)
                elif not self.allow_links or _contains(os.path.realpath(path), os.path.realpath(folder)):
                    continue  # its target is walked anyway, or it is a loop
            yield from self._folder(path)

    def _files(self, folder: str, names: list[str]) -> Iterator[Input]:
        present = set(names)
        other_case = {name.lower(): name for name in names if name != name.lower()}
        last_stem = None
        for name in sorted(names, key=lambda name: (os.fsencode(_split(name)[0]), os.fsencode(name))):
            stem, extension = _split(name)
            self.files_seen += 1
            path = os.path.join(folder, name)
            if extension == "tar":
                self._refuse_if_outside(path)
                changed = _changed(os.stat(path)) if os.path.isfile(path) else 0
                for item in tar_source.members(
                    path, self._relative(path), self._file(path), IMAGE_EXTENSIONS, self.caption_column
                ):
                    yield dataclasses.replace(item, changed=changed)
            elif extension in IMAGE_EXTENSIONS:
                self._refuse_if_outside(path)
                if stem == last_stem:
                    self._duplicate_stem(path)
                last_stem = stem
                caption, problem = None, None
                for suffix in CAPTION_EXTENSIONS:
                    sidecar = f"{stem}.{suffix}"
                    sidecar = sidecar if sidecar in present else other_case.get(sidecar.lower(), "")
                    # The stem must match exactly (A.jpg is not a.txt's image), the extension in any case.
                    if _split(sidecar)[0] == stem:
                        caption, problem = self._read_caption(os.path.join(folder, sidecar))
                        break
                yield self._input(path, caption, problem)
            elif extension not in CAPTION_EXTENSIONS:
                self.ignored[extension and f".{extension}"] += 1

    def _read_caption(self, path: str) -> tuple[str | None, tuple[str, str] | None]:
        self._refuse_if_outside(path)
        try:
            with open(path, "rb") as file:
                return captions.decode(file.read()), None
        except ValueError as error:
            return None, ("caption not readable", f"{self._relative(path)}: {error}")
        except OSError as error:
            return None, ("caption not readable", f"{self._relative(path)}: {error.strerror}")

    def _duplicate_stem(self, path: str) -> None:
        relative = self._relative(path)
        if self.on_duplicate_stem == "error":
            raise ValueError(f"{shown(relative)}: another image of this folder has the same name but for its extension")
        self.duplicate_stems.append(relative)

    # ── a metadata file ──────────────────────────────────────────────────────────────────────────────────────────────

    def _listed(self, path: Path) -> Iterator[Input]:
        """Rows of a metadata file. Their paths are relative to it, or to the base folder where no file is there."""
        self.files_seen += 1
        within = _contains(str(self.base), str(path))
        roots = list(dict.fromkeys([str(path.parent), str(self.base)] if within else [str(self.base)]))
        row = 0
        for row, (image, caption) in enumerate(metadata.rows(path, self.image_column, self.caption_column), start=1):
            where = f"{path.name} row {row}"
            if not isinstance(image, str) or not image.strip():
                yield Input(where, b"", 0, -1, None, ("no image path", f"the image column holds {shown(repr(image))}"))
                continue
            places = [os.path.normpath(os.path.join(root, image.strip())) for root in roots]
            place = next((place for place in places if os.path.exists(place)), places[0])
            if not _contains(str(self.base), place):
                raise ValueError(f"{where}: image {shown(repr(image))} lies outside of --dataset_base_path {self.base}")
            self._refuse_if_outside(place)
            try:
                yield self._input(place, captions.from_cell(caption), None)
            except ValueError as error:
                yield self._input(place, None, ("caption not readable", f"{where}: {error}"))

        if not row:
            self.empty_listings.append(str(path))

    # ── paths ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _input(self, path: str, caption: str | None, problem: tuple[str, str] | None) -> Input:
        relative = self._relative(path)
        file = self._file(path)
        try:
            status = os.stat(path)
        except OSError as error:
            return Input(relative, file, 0, -1, caption, ("file missing", error.strerror or ""))
        if not os.path.isfile(path):
            return Input(relative, file, 0, -1, caption, ("file missing", "not a regular file"))
        return Input(relative, file, 0, status.st_size, caption, problem, _changed(status))

    def _relative(self, path: str) -> str:
        return self._file(path).decode("utf-8", "backslashreplace").replace(os.sep, "/")

    def _file(self, path: str) -> bytes:
        return os.fsencode(os.path.relpath(path, self.base))

    def _outside(self, path: str) -> bool:
        return not self.allow_links and not _contains(self._real_base, os.path.realpath(path))

    def _refuse_if_outside(self, path: str) -> None:
        if self._outside(path):
            self._refuse_link(path)

    def _refuse_link(self, path: str) -> None:
        raise ValueError(
            f"{shown(self._relative(path))} is a link to {os.path.realpath(path)}, outside of --dataset_base_path {self.base}:"
            " copy the files in, or allow it with --allow_links"
        )


def _changed(status: os.stat_result) -> int:
    """ctime too: a file that was put in another's place may bring its old mtime along."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _split(name: str) -> tuple[str, str]:
    """'photo v1.2.JPG' -> ('photo v1.2', 'jpg')."""
    stem, dot, extension = name.rpartition(".")
    return (stem, extension.lower()) if dot else (name, "")


def _contains(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
