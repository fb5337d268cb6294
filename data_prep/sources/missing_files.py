"""Files that were looked for: which caption belongs to an image, and what to tell of one, or of an image, that isn't there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.images.formats import IMAGE_EXTENSIONS
from data_prep.sources.metadata_files import NAMES
from files.shown import shown

CAPTION_TABLES = (
    "metadata.tsv",
    "captions.tsv",
    "captions.csv",
    "captions.json",
    "captions.jsonl",
    "captions.txt",
    "metadata.txt",
    "prompts.txt",
)
CAPTION_FOLDERS = ("captions", "caption", "texts", "txt", "labels", "prompts")


class Names:
    """The names of one folder, by case and without."""

    def __init__(self, names: list[str], folders: list[str]) -> None:
        self._present = set(names)
        self._other_case = {name.lower(): name for name in sorted(names, reverse=True)}
        self._folders = {name.rpartition("/")[2].lower(): name for name in folders}

    def sidecar(self, stem: str, extensions: tuple[str, ...]) -> str | None:
        """The caption file of an image. The stem must match exactly (A.jpg is not a.txt's image), the extension in any case."""
        for extension in extensions:
            name = f"{stem}.{extension}"
            name = name if name in self._present else self._other_case.get(name.lower(), "")
            if name.rpartition(".")[0] == stem:
                return name
        return None

    def hint(self, stem: str, image: str, extensions: tuple[str, ...]) -> str:
        """Where the caption of an image was looked for, and what there is that could be it."""
        looked = " and ".join(f"{stem}.{extension}" for extension in extensions)
        near = [f"{image}.{extension}" for extension in extensions] + [f"{stem}.json", f"{stem}.md", f"{stem}.tags"]
        near += [f"{stem}.{extension}" for extension in extensions] + list(CAPTION_TABLES)
        found = [self._other_case[name.lower()] for name in near if name.lower() in self._other_case]
        found += [f"a folder {self._folders[name]}/" for name in CAPTION_FOLDERS if name in self._folders]
        return f"looked for {looked}" + (f"; there is {', '.join(found[:3])}" if found else "")


def advice(name: str, places: list[str]) -> str:
    """What to tell of an image that a metadata file names and that isn't there: where it was looked for, what is like it."""
    if "://" in name:
        return "an address, not a file: download it first (img2dataset does)"
    looked = " and ".join(shown(place) for place in dict.fromkeys(places))
    folder, _, wanted = places[0].rpartition(os.sep)
    try:
        there = os.listdir(folder or os.sep)[:100_000]
    except (OSError, ValueError):
        there = []
    like = [other for other in there if other.lower() == wanted.lower() or other.rpartition(".")[0] == wanted]
    return f"looked for {looked}" + (f"; there is {shown(sorted(like)[0])}" if like else "")


def unlisted(folder: Path, listed: set[int], excluded: str | None) -> Iterator[str]:
    """Images, tars, parquet and metadata files below `folder` whose paths' hashes are not in `listed`.

    Folders of links and hidden ones aside.
    """
    extensions = IMAGE_EXTENSIONS | {"tar", "parquet"}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) != excluded
        )  # fmt: skip
        for name in sorted(names, key=os.fsencode):
            known = name.rpartition(".")[2].lower() in extensions or name.lower() in NAMES
            if known and not name.startswith(".") and hash(path := os.path.join(root, name)) not in listed:
                yield path
