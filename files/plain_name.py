"""Names that come from a file (a manifest, a weight index) and are joined to a folder: they must not lead out of it."""

from __future__ import annotations

import os
from typing import Any

from files.shown import shown


def plain_name(name: Any, where: object) -> str:
    """`name`, if it names a file in a folder and nothing else; `where` is the file that gave it, for the message.

    Raises ValueError for what is no text, is empty, `.` or `..`, or holds a separator (either system's) or NUL: joined to
    a folder, an absolute name would replace it, and `../x` would leave it.
    """
    problem = None
    if not isinstance(name, str):
        problem = f"is a {type(name).__name__}, not text"
    elif name in ("", os.curdir, os.pardir):
        problem = "names no file"
    elif "/" in name or "\\" in name:
        problem = "leads to another folder"
    elif "\0" in name:
        problem = "holds a NUL character"
    if problem is not None:
        raise ValueError(
            f"{shown(where)} is damaged or not to be trusted: the file name {shown(repr(name))} in it {problem}; "
            "get it again from where it was made"
        )
    return name
