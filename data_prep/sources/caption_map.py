"""captions.json: a map from file names to captions, for the images of its folder and of those below it.

    {"cat.jpg": "a cat", "dogs/rex": ["a dog", "a dog named Rex"]}

Names are paths from its folder, with or without their extension. A caption file beside an image goes before it.
"""

from __future__ import annotations

import json
import os
import posixpath
import unicodedata
from pathlib import Path
from typing import Any

from data_prep.sources import captions
from data_prep.sources.captions import Found
from data_prep.sources.metadata_files import caption_columns
from data_prep.sources.regular_files import open_regular

NAME = "captions.json"
MAX_BYTES = 1 << 30


class CaptionMap:
    """The captions of one captions.json by the normal form of their names."""

    def __init__(self, path: str, values: dict[str, Any]) -> None:
        self.path, self.folder = path, os.path.dirname(path)
        self._values = {_normal(name): value for name, value in values.items()}
        self._unused = set(self._values)

    @classmethod
    def read(cls, path: str) -> CaptionMap:
        """Raises ValueError for what is no map, OSError for what is no regular file."""
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        try:
            values = json.loads(data.decode(captions.encoding_of(data)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"a map of file names to captions begins with a brace, this is a {type(values).__name__}")
        return cls(path, values)

    def of(self, path: str) -> Found | None:
        """The captions of the image at `path`; None where it isn't listed. Raises ValueError for what is no text."""
        name = _normal(os.path.relpath(path, self.folder))
        found = next((key for key in (name, posixpath.splitext(name)[0]) if key in self._values), None)
        if found is None:
            return None
        self._unused.discard(found)
        value = self._values[found]
        if isinstance(value, dict):  # kohya's {"caption": …, "tags": …}
            columns, _ = caption_columns(None, value)
            return captions.several([value[column] for column in columns])
        return captions.several([value])

    def unused(self) -> list[str]:
        """Names that no image has had so far."""
        return sorted(self._unused)


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def find(names: list[str], folder: str) -> str | None:
    """Path of a folder's captions.json among the names in it, in any case."""
    name = next((name for name in sorted(names, reverse=True) if name.lower() == NAME), None)
    return None if name is None else str(Path(folder) / name)
