"""A JSON file of somebody else's that should hold an object: read it, or say in one line what is wrong with it."""

import json
from pathlib import Path
from typing import Any

from files.shown import shown


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, and ValueError for a file that is no JSON or holds something else than an object."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is no readable JSON ({shown(error)}); download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{shown(path)} holds a {type(found).__name__} and should hold an object; download it again")
    return found


def check_class(config: dict[str, Any], path: Path, expected: str, part: str) -> None:
    """Raise ValueError unless a configuration in diffusers' layout is of the class `expected`: Qwen-Image's `part`.

    Says what the file is instead, as far as it tells.
    """
    name, kind = config.get("_class_name"), config.get("model_type")
    if name == expected:
        return
    if name:
        found = f"it is a {shown(name)}"
    elif kind:
        found = f"it has no _class_name, but the model_type {shown(kind)}: it is a model of transformers"
    else:
        names = ", ".join(map(shown, sorted(config)[:5])) or "nothing"
        found = f"it has no _class_name, only {names}"
    raise ValueError(f"{shown(path)} is not of Qwen-Image's {part}, whose _class_name is {expected}: {found}")
