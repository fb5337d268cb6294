"""Pairs by folders: target/ and source/ (source_2/, source_3/ for further source images) with files of equal stems."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_prep.images.formats import IMAGE_EXTENSIONS
from files.shown import shown

TARGET, SOURCES = "target", ("source", "source_2", "source_3")


@dataclass
class PairFolders:
    """A folder of targets and the folders of their source images, each with the same subfolders."""

    target: str
    sources: tuple[str, ...]
    used: set[str] = field(default_factory=set)
    _names: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # of each folder: stem -> file names

    @classmethod
    def among(cls, folder: str, names: list[str]) -> PairFolders | None:
        """Of the folders in `folder`; None where they are no target/ and source/."""
        if TARGET not in names or SOURCES[0] not in names:
            return None
        sources = tuple(os.path.join(folder, name) for name in SOURCES if name in names)
        return cls(os.path.join(folder, TARGET), sources)

    def partners(self, path: str) -> list[str]:
        """The source images of the target at `path`. Raises FileNotFoundError, naming the first that isn't one file."""
        inner, name = os.path.split(os.path.relpath(path, self.target))
        stem = name.rpartition(".")[0]
        found = []
        for source in self.sources:
            folder = os.path.join(source, inner) if inner else source
            names = self._images(folder).get(stem, [])
            self.used.update(os.path.join(folder, name) for name in names)
            if len(names) != 1:
                where = shown(os.path.join(os.path.basename(source), inner, stem))
                raise FileNotFoundError(f"{where}.* is missing" if not names else f"{where} is {' and '.join(names)}")
            found.append(os.path.join(folder, names[0]))
        return found

    def lonely(self) -> Iterator[str]:
        """Images in the source folders that belong to no target."""
        for source in self.sources:
            for root, folders, names in os.walk(source):
                folders.sort()
                for name in sorted(names, key=os.fsencode):
                    path = os.path.join(root, name)
                    if _is_image(name) and path not in self.used:
                        yield path

    def _images(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._names:
            names: dict[str, list[str]] = {}
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
                if _is_image(name):
                    names.setdefault(name.rpartition(".")[0], []).append(name)
            self._names[folder] = names
        return self._names[folder]


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
