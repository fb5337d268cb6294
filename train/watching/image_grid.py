"""Sample images on disk: PNG files that carry their parameters, and labelled grids of them."""

import json
from bisect import bisect_right
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


def make_grid(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """Images of one size in rows and columns on white, rows labelled on their left edge above, columns on top."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=max(11, min(28, width // 24)))
    line = int(font.getbbox("Ag")[3]) + 3
    header = LABEL_LINES * line + MARGIN
    columns = max(len(row) for row in rows)
    size = (MARGIN + columns * (width + MARGIN), header + len(rows) * (line + height + MARGIN) + MARGIN)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        text = wrap(label, font, width, LABEL_LINES)
        draw.multiline_text((MARGIN + column * (width + MARGIN), MARGIN // 2), text, fill="black", font=font, spacing=3)
    for number, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = header + number * (line + height + MARGIN)
        draw.text((MARGIN, top), wrap(label, font, size[0] - 2 * MARGIN, 1), fill="#555555", font=font)
        for column, image in enumerate(row):
            grid.paste(image, (MARGIN + column * (width + MARGIN), top + line))
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
