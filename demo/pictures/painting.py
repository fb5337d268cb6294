"""Scenes to pixels: a background, things with texture and outline on it, drawn at twice the size and averaged down."""

from __future__ import annotations

import functools
import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from demo.pictures.scene import COLORS, PLAIN_BACKGROUNDS, Color, Scene, Thing
from demo.pictures.shapes import BLORB, SHAPES, Shape

OVERSAMPLED = 2
REACH = 1.25  # half the side of the tile that a thing is drawn on, in its radius

FIXED_PAINTS: dict[str, Color] = {
    "white": (252, 252, 252),
    "black": (24, 24, 28),
    "cream": (250, 232, 192),
    "brown": (120, 76, 44),
}
VARIANTS = 16  # of each background with chance in it
BLUEPRINT_PAPER: Color = (24, 62, 138)
BLUEPRINT_GRID: Color = (52, 96, 174)
BLUEPRINT_INK: Color = (236, 244, 255)


def paint(scene: Scene, side: int) -> np.ndarray:
    """The picture, uint8 [side, side, 3]."""
    blueprint = scene.style == "blueprint"
    name = "blueprint" if blueprint else scene.background
    picture = background(name, scene.seed % VARIANTS, side * OVERSAMPLED).copy()
    for thing in scene.things:
        paint_thing(picture, thing, side, scene.seed, blueprint)
    return np.asarray(picture.reduce(OVERSAMPLED))


def mix(color: Color, other: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(color, other, strict=True))
    return red, green, blue


def paint_thing(picture: Image.Image, thing: Thing, side: int, seed: int, blueprint: bool) -> None:
    """Draw one thing onto the oversampled picture."""
    scale = side * OVERSAMPLED
    radius = thing.radius * scale
    half = round(REACH * radius)
    shape = BLORB if thing.shape == "blorb" else SHAPES[thing.shape]
    color = COLORS[thing.color]
    paints = FIXED_PAINTS | {
        "body": color,
        "dark": mix(color, (0, 0, 0), 0.5) if thing.color != "black" else (110, 110, 116),
        "light": mix(color, (255, 255, 255), 0.62) if thing.color != "white" else (176, 182, 190),
    }
    size = (2 * half, 2 * half)
    silhouette, colors, ink = Image.new("L", size), Image.new("RGB", size, color), Image.new("L", size)
    if thing.texture != "plain":
        mask = texture(thing.texture, 2 * half, radius, seed)
        colors.paste(paints["light"], mask=mask)
    filled = colors.copy()
    for part in shape.parts:
        points = [(half + x * radius, half + y * radius) for x, y in part.points]
        draw_part(part.kind, points, part.width * radius, ImageDraw.Draw(silhouette), 0 if part.kind == "hole" else 255)
        if part.kind == "hole":
            continue
        one = Image.new("L", size)
        draw_part(part.kind, points, part.width * radius, ImageDraw.Draw(one), 255)
        colors.paste(filled if part.paint == "body" else paints[part.paint], mask=one)
        if blueprint and part.inner:
            ink = ImageChops.lighter(ink, ImageChops.subtract(one, one.filter(ImageFilter.MinFilter(3))))
    if shape.word is not None:
        draw_word(silhouette, shape, radius)
    width = max(3, round(scale / 128) * 2 + 1)
    outline = silhouette.filter(ImageFilter.MaxFilter(width))
    left, top = round(thing.x * scale) - half, round(thing.y * scale) - half
    if blueprint:
        edge = ImageChops.lighter(ImageChops.subtract(outline, silhouette.filter(ImageFilter.MinFilter(5))), ink)
        picture.paste(BLUEPRINT_INK, (left, top), edge)
        return
    picture.paste(paints["dark"], (left, top), outline)
    picture.paste(colors, (left, top), silhouette)


def draw_part(
    kind: str, points: list[tuple[float, float]], width: float, draw: ImageDraw.ImageDraw, value: int
) -> None:
    if kind == "polygon":
        draw.polygon(points, fill=value)
    elif kind == "line":
        draw.line(points, fill=value, width=max(2, round(width)), joint="curve")
    else:
        draw.ellipse([points[0], points[1]], fill=value)


def draw_word(mask: Image.Image, shape: Shape, radius: float) -> None:
    """Letters as wide as the thing."""
    assert shape.word is not None
    widest = letters(100).getlength(shape.word)
    font = letters(max(8, round(min(1.9 * radius * 100 / widest, 1.3 * radius))))
    ImageDraw.Draw(mask).text(
        (mask.width / 2, mask.height / 2), shape.word, fill=255, font=font, anchor="mm", stroke_width=round(radius / 30)
    )


@functools.cache
def letters(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OSError(
            "this Pillow was built without FreeType, which drawing words needs: pip install --force-reinstall pillow"
        )
    return font


def texture(name: str, size: int, radius: float, seed: int) -> Image.Image:
    """Where the second shade goes: a mask [size, size] whose pattern is as coarse as the thing is large."""
    period = radius * 0.44
    rows, columns = np.mgrid[0:size, 0:size] / period
    rows, columns = rows + (seed % 97) / 97, columns + (seed % 89) / 89
    if name == "striped":
        pattern = (rows + columns) * 0.75 % 1 < 0.5
    elif name == "checkered":
        pattern = (np.floor(rows * 1.2) + np.floor(columns * 1.2)) % 2 < 1
    else:
        pattern = (rows % 1 - 0.5) ** 2 + (columns % 1 - 0.5) ** 2 < 0.075
    return Image.fromarray(pattern.astype(np.uint8) * 255)


@functools.cache
def background(name: str, variant: int, size: int) -> Image.Image:
    """An oversampled background [size, size]; `variant` is its chance."""
    if name in PLAIN_BACKGROUNDS:
        return Image.new("RGB", (size, size), PLAIN_BACKGROUNDS[name])
    return SCENERIES[name](size, random.Random(f"{name}/{variant}"))


def gradient(size: int, top: Color, bottom: Color) -> Image.Image:
    share = np.linspace(0, 1, size)[:, None, None]
    column = np.array(top) * (1 - share) + np.array(bottom) * share
    return Image.fromarray(np.broadcast_to(column.round(), (size, size, 3)).astype(np.uint8))


def night(size: int, chance: random.Random) -> Image.Image:
    picture = gradient(size, (14, 18, 52), (44, 40, 98))
    draw = ImageDraw.Draw(picture)
    for _ in range(26):
        x, y = chance.uniform(0, size), chance.uniform(0, size)
        radius = chance.uniform(0.6, 1.7) * size / 128
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(250, 246, 214))
    return picture


def meadow(size: int, chance: random.Random) -> Image.Image:
    picture = gradient(size, (138, 200, 250), (214, 238, 254))
    draw = ImageDraw.Draw(picture)
    horizon = size * 0.58
    hills = [(x, horizon + size * 0.035 * np.sin(x / size * 7 + chance.uniform(0, 1))) for x in range(0, size + 8, 8)]
    draw.polygon([*hills, (size, size), (0, size)], fill=(104, 186, 84))
    for _ in range(34):
        x, y = chance.uniform(0, size), chance.uniform(horizon + size * 0.07, size)
        draw.line([(x, y), (x + size * 0.012, y - size * 0.04)], fill=(58, 140, 56), width=max(1, size // 110))
    return picture


def sea(size: int, chance: random.Random) -> Image.Image:
    picture = gradient(size, (206, 234, 250), (160, 214, 244))
    draw = ImageDraw.Draw(picture)
    phase = chance.uniform(0, 6)
    for number, color in enumerate([(64, 150, 206), (44, 124, 188), (28, 98, 164)]):
        level = size * (0.5 + 0.17 * number)
        wave = [(x, level + size * 0.025 * np.sin(x / size * 20 + phase + 2 * number)) for x in range(0, size + 4, 4)]
        draw.polygon([*wave, (size, size), (0, size)], fill=color)
    return picture


def bricks(size: int, chance: random.Random) -> Image.Image:
    picture = Image.new("RGB", (size, size), (222, 208, 196))
    draw = ImageDraw.Draw(picture)
    height, width = size / 8, size / 4
    for row in range(9):
        for column in range(-1, 5):
            left, top = (column + 0.5 * (row % 2)) * width, row * height
            color = mix((182, 92, 70), (150, 72, 56), chance.random())
            gap = size / 90
            draw.rectangle([left + gap, top + gap, left + width - gap, top + height - gap], fill=color)
    return picture


def sunset(size: int, chance: random.Random) -> Image.Image:
    picture = gradient(size, (92, 60, 132), (252, 150, 92))
    draw = ImageDraw.Draw(picture)
    x = size * chance.uniform(0.3, 0.7)
    draw.ellipse([x - size * 0.16, size * 0.64, x + size * 0.16, size * 0.96], fill=(254, 222, 128))
    draw.rectangle([0, size * 0.82, size, size], fill=(66, 40, 86))
    return picture


def blueprint(size: int, chance: random.Random) -> Image.Image:
    picture = Image.new("RGB", (size, size), BLUEPRINT_PAPER)
    draw = ImageDraw.Draw(picture)
    step = size // 8
    for place in range(step // 2, size, step):
        draw.line([(place, 0), (place, size)], fill=BLUEPRINT_GRID, width=max(1, size // 128))
        draw.line([(0, place), (size, place)], fill=BLUEPRINT_GRID, width=max(1, size // 128))
    return picture


SCENERIES = {"night": night, "meadow": meadow, "sea": sea, "bricks": bricks, "sunset": sunset, "blueprint": blueprint}
