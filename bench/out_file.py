"""The file that a benchmark writes its numbers to: looked at before hours of a GPU are spent, never left half written."""

import argparse
import json
from pathlib import Path
from typing import Any

from files.atomic_files import write_file


def out_file(text: str) -> Path:
    """A type for argparse: a file that can be written later. Raises ArgumentTypeError where no file can be."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}: make it first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file in it")
    return path


def write_numbers(path: Path, numbers: dict[str, Any]) -> None:
    """Replace what the file told before by `numbers`, as JSON."""
    write_file(path, json.dumps(numbers, indent=1))
