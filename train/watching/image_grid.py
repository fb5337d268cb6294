"""Sample images on disk: PNG files that carry their parameters, and labelled grids of them."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from files.folder_lock import require_owned

MARGIN = 8
LABEL_LINES = 2


def save_png(path: Path, image: Image.Image, parameters: dict[str, Any]) -> None:
    """Write a PNG with `parameters` as JSON in its text chunk `parameters` (where most viewers look for them)."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    require_owned(path)
    image.save(path, pnginfo=info)


def read_parameters(path: Path) -> dict[str, Any]:
    """What `save_png` wrote beside the pixels."""
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        return json.loads(image.info["parameters"])


def make_grid(
    rows: Sequence[Sequence[Image.Image | None]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Images in rows and columns on white, rows labelled on their left edge above, columns on top.

    Sizes may differ: a column is as wide as its widest image, a row as high as its highest. None leaves a place empty.
    """
    count = max(len(row) for row in rows)
    images = [[(place, image) for place, image in enumerate(row) if image is not None] for row in rows]
    widths = [
        max([image.width for row in images for at, image in row if at == place] or [64]) for place in range(count)
    ]
    heights = [max([image.height for _, image in row] or [0]) for row in images]
    font = ImageFont.load_default(size=max(11, min(28, min(widths) // 24)))
    line = int(font.getbbox("Ag")[3]) + 3
    header = LABEL_LINES * line + MARGIN
    lefts = [MARGIN + sum(widths[:place]) + place * MARGIN for place in range(count)]
    size = (lefts[-1] + widths[-1] + MARGIN, header + sum(line + height + MARGIN for height in heights) + MARGIN)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for left, width, label in zip(lefts, widths, column_labels, strict=False):
        text = wrap(label, font, width, LABEL_LINES)
        draw.multiline_text((left, MARGIN // 2), text, fill="black", font=font, spacing=3)
    top = header
    for row, height, label in zip(images, heights, row_labels, strict=True):
        draw.text((MARGIN, top), wrap(label, font, size[0] - 2 * MARGIN, 1), fill="#555555", font=font)
        for place, image in row:
            grid.paste(image, (lefts[place], top + line))
        top += line + height + MARGIN
    return grid


def wrap(text: str, font: Any, width: int, lines: int) -> str:
    """Break `text` into at most `lines` lines of at most `width` pixels; what is cut off becomes an ellipsis."""
    broken: list[str] = []
    rest = text[: lines * width].split()  # no letter is narrower than a pixel
    while rest and len(broken) < lines:
        count = 1
        while count < len(rest) and font.getlength(" ".join(rest[: count + 1])) <= width:
            count += 1
        broken.append(" ".join(rest[:count]))
        rest = rest[count:]
    if broken and (rest or font.getlength(broken[-1]) > width):
        last = broken[-1]
        fits = bisect_right(range(1, len(last) + 1), width, key=lambda length: font.getlength(last[:length] + "…"))
        broken[-1] = last[:fits] + "…"
    return "\n".join(broken)
