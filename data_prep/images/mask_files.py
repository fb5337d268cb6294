"""Which file is the mask of an image: `x-masklabel.png` or `x.mask.png` beside x.jpg, or one of equal stem in a mask folder.

The extension may be any image's, in any case; stems must match exactly. A file with such a name and no image of the stem
beside it is a picture if it has a caption of its own, else a mask that lost its image.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data_prep.images.formats import IMAGE_EXTENSIONS

SUFFIXES = (".mask", "-masklabel")  # of stems: ours (and that of our shards' members), OneTrainer's; the first is taken
KEPT = 256  # folders whose masks are remembered


def mask_stem(stem: str) -> str | None:
    """The stem of the image that a file of this stem would be the mask of; None for a name that is no mask's."""
    suffix = next((suffix for suffix in SUFFIXES if stem.lower().endswith(suffix)), None)
    return stem[: -len(suffix)] or None if suffix is not None else None


def masks_among(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The masks among the file names of one folder, by the stem of their image, the best first; and those without an image."""
    stems, masks = set[str](), defaultdict[str, list[str]](list)
    for name in sorted(names, key=os.fsencode):
        stem, extension = split(name)
        if extension not in IMAGE_EXTENSIONS:
            continue
        image = mask_stem(stem)
        if image is None:
            stems.add(stem)
        else:
            masks[image].append(name)
    lonely = [name for image, found in masks.items() if image not in stems for name in found]
    ordered = {
        image: sorted(found, key=lambda name: mask_order(split(name)[0]))
        for image, found in masks.items()
        if image in stems
    }
    return ordered, lonely


def mask_order(stem: str) -> int:
    """Which comes first of several masks of one image."""
    return next(place for place, suffix in enumerate(SUFFIXES) if stem.lower().endswith(suffix))


def split(name: str) -> tuple[str, str]:
    """'photo v1.2.JPG' -> ('photo v1.2', 'jpg')."""
    stem, dot, extension = name.rpartition(".")
    return (stem, extension.lower()) if dot else (name, "")


@dataclass
class MaskFiles:
    """Masks of the images of a folder tree.

    Args:
        base: the images' folder.
        folder: of masks with the same subfolders and equal stems, looked at first; None: there is none.
        beside: masks beside their images are known by their names.
    """

    base: str
    folder: str | None = None
    beside: bool = True
    _used: set[int] = field(default_factory=set)  # hashes of paths
    _names: dict[tuple[str, bool], dict[str, list[str]]] = field(default_factory=dict)  # of each folder: stem -> files

    def of(self, path: str) -> list[str]:
        """Paths of what could be the mask of the image at `path`, the best first."""
        folder, name = os.path.split(path)
        stem, found = split(name)[0], []
        if self.folder is not None:
            inner = os.path.relpath(folder, self.base)
            place = os.path.normpath(os.path.join(self.folder, inner))
            found = [os.path.join(place, other) for other in self._masks(place, equal=True).get(stem, [])]
            self._used.update(map(hash, found))
        if self.beside:
            found += [os.path.join(folder, other) for other in self._masks(folder).get(stem, [])]
        return found

    def enter(self, folder: str, names: list[str]) -> tuple[set[str], set[str]]:
        """Of the file names of a folder those of its images' masks, and those like masks that belong to no image."""
        if not self.beside:
            return set(), set()
        masks, lonely = masks_among(names)
        self._remember(folder, False, masks)
        return {name for found in masks.values() for name in found}, set(lonely)

    def is_mask(self, path: str) -> bool:
        """Whether a file below the base is the mask of an image beside it, or lies in the mask folder."""
        folder, name = os.path.split(path)
        if self.is_folder(folder):
            return True
        image = mask_stem(split(name)[0]) if self.beside else None
        return image is not None and name in self._masks(folder).get(image, [])

    def is_folder(self, path: str) -> bool:
        """Whether a folder is the mask folder or lies in it."""
        return self.folder is not None and (path == self.folder or path.startswith(self.folder + os.sep))

    def lonely(self) -> Iterator[str]:
        """Images in the mask folder that were no image's mask."""
        for root, folders, names in os.walk(self.folder) if self.folder is not None else ():
            folders.sort()
            for name in sorted(names, key=os.fsencode):
                path = os.path.join(root, name)
                if not name.startswith(".") and split(name)[1] in IMAGE_EXTENSIONS and hash(path) not in self._used:
                    yield path

    def _masks(self, folder: str, equal: bool = False) -> dict[str, list[str]]:
        """The masks in a folder by their image's stem; `equal`: of a mask folder, whose pictures have the stems themselves."""
        if (folder, equal) not in self._names:
            try:
                names = [name for name in os.listdir(folder) if not name.startswith(".")]
            except OSError:  # missing: no mask of its images is there
                names = []
            found = masks_among(names)[0]
            if equal:
                found = {}
                for name in sorted(names, key=os.fsencode):
                    if split(name)[1] in IMAGE_EXTENSIONS:
                        found.setdefault(split(name)[0], []).append(name)
            self._remember(folder, equal, found)
        return self._names[folder, equal]

    def _remember(self, folder: str, equal: bool, found: dict[str, list[str]]) -> None:
        if len(self._names) >= KEPT:
            self._names.clear()
        self._names[folder, equal] = found
