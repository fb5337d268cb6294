"""Sample images of a run as a timeline: some steps, some prompts, as small pictures for the page."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.reporting.run_record import RunRecord

THUMBNAIL = 384  # pixels of the longer side
PICTURES = 160  # on the page, base and LoRA together; about 5 MB
PROMPTS = 8
LONGEST_PROMPT = 600  # characters
LARGEST = 64_000_000  # pixels of a picture that is opened
STEP = re.compile(r"step-(\d+)")
SHEETS = ("grid", "sheet")  # pictures of pictures


def timeline(run: RunRecord, pictures: int = PICTURES) -> dict[str, Any] | None:
    """What the page shows: `steps`, and for each prompt its `text`, `base` and `images`, one a step or None.

    The base is the picture in samples/base, or that of step 0. None for a run without pictures. `note` tells what is left out.
    """
    folders = step_folders(run.folder / "samples")
    names = prompt_names(folders)
    if not names:
        return None
    shown_names = [names[i] for i in spread(len(names), min(PROMPTS, max(1, pictures // 2)))]
    base: Path | None = run.folder / "samples" / "base"
    if base is not None and not base.is_dir():
        base = folders.pop(0) if 0 in folders and len(folders) > 1 else None
    steps = sorted(folders)
    most = max(1, pictures // len(shown_names) - (base is not None))
    shown_steps = [steps[i] for i in spread(len(steps), most)]
    damaged: list[str] = []
    prompts = []
    for name in shown_names:
        images = [thumbnail(folders[step] / name, damaged) for step in shown_steps]
        first = None if base is None else thumbnail(base / base_name(base, name), damaged)
        text = next((prompt_of(folder / name) for folder in folders.values() if (folder / name).is_file()), "")
        kind = re.sub(r"^\d+|[^\w]+|_+$", " ", Path(name).stem).strip()
        prompts.append(
            {"text": f"{text} ({kind})" if kind and text else text, "base": first, "images": images, "name": name}
        )
    notes = []
    if len(shown_steps) < len(steps):
        notes.append(f"{len(shown_steps)} of {len(steps):,} steps, evenly spread")
    if len(shown_names) < len(names):
        notes.append(f"{len(shown_names)} of {len(names):,} prompts")
    if damaged:
        notes.append(f"{len(damaged)} pictures can't be read, first {damaged[0]}")
    return {"steps": shown_steps, "prompts": prompts, "note": "; ".join(notes)}


def step_folders(samples: Path) -> dict[int, Path]:
    """The folders of a run's samples by step, in order."""
    if not samples.is_dir():
        return {}
    found = {int(match[1]): path for path in samples.iterdir() if (match := STEP.fullmatch(path.name[:30]))}
    return {step: found[step] for step in sorted(found) if found[step].is_dir()}


def prompt_names(folders: dict[int, Path]) -> list[str]:
    """Names of single pictures in the first and the last folders, in order."""
    ends = [*folders.values()]
    found = {path.name for folder in {*ends[:2], *ends[-2:]} for path in folder.glob("*.png")}
    return sorted(name for name in found if not name.startswith(SHEETS))


def base_name(folder: Path, name: str) -> str:
    """The base's picture for one called `name`: of the same name, or (of the average's, 00-ema.png) of the same number."""
    number = re.match(r"\d+", name)
    return f"{number[0]}.png" if number and not (folder / name).is_file() else name


def spread(count: int, most: int) -> list[int]:
    """At most so many places of `count`, evenly spread, the last and (of two or more) the first among them."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return [int(place) for place in np.linspace(0, count - 1, most).round()]


def prompt_of(path: Path) -> str:
    """The prompt that a picture carries; "" where it carries none."""
    from train.watching.image_grid import read_parameters

    try:
        return str(read_parameters(path).get("prompt", ""))[:LONGEST_PROMPT]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SyntaxError):
        return ""


def thumbnail(path: Path, damaged: list[str]) -> dict[str, Any] | None:
    """A small JPEG as a data URL with its width and height; None, and its name in `damaged`, where it can't be read."""
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > LARGEST:
                raise ValueError
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=3.0)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        damaged.append(f"{path.parent.name}/{path.name}")
        return None
    out = io.BytesIO()
    small.save(out, "JPEG", quality=84)
    url = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
    return {"url": url, "width": small.width, "height": small.height}
