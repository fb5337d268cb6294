"""Scenes by chance, and which combinations training leaves out."""

from __future__ import annotations

import hashlib
import random

from demo.pictures.scene import BACKGROUNDS, COLOR_NAMES, POSITIONS, SHAPE_NAMES, SIZES, TEXTURES, Scene, Thing

ROOM = 0.02  # between a thing and the picture's edge
JITTER = 0.02  # of a position, in sides of the picture
HELD_OUT_OF = 10  # one pair of shape and color in so many is never drawn for training
TWO_THINGS = 0.25  # share of pictures


def held_out(shape: str, color: str) -> bool:
    """Whether no picture for training shows this shape in this color."""
    return hashlib.blake2b(f"{shape}/{color}".encode(), digest_size=8).digest()[0] % HELD_OUT_OF == 0


def place(shape: str, color: str, texture: str, size: str, position: str, chance: random.Random) -> Thing:
    """The thing near its position, whole within the picture."""
    radius = SIZES[size] * chance.uniform(0.94, 1.06)
    low, high = radius + ROOM, 1 - radius - ROOM
    x, y = (min(max(center + chance.uniform(-JITTER, JITTER), low), high) for center in POSITIONS[position])
    return Thing(shape, color, texture, size, position, x, y, radius)


def random_thing(chance: random.Random, wanted_held_out: bool, background: str, size: str, position: str) -> Thing:
    """Shape, color and texture by chance; the pair of shape and color is held out or not, as wanted."""
    while True:
        shape, color = chance.choice(SHAPE_NAMES), chance.choice(COLOR_NAMES)
        if held_out(shape, color) == wanted_held_out and color != background:
            break
    textured = not shape.startswith("word") and chance.random() < 0.45
    texture = chance.choice(TEXTURES[1:]) if textured else "plain"
    return place(shape, color, texture, size, position, chance)


def random_scene(seed: int, wanted_held_out: bool = False, things: int | None = None) -> Scene:
    """The scene of a seed, of one thing or two (`things`; not given: by chance).

    With `wanted_held_out` each thing is a pair of shape and color that training never shows.
    """
    chance = random.Random(f"scene/{seed}")
    background = chance.choice(BACKGROUNDS)
    two = chance.random() < TWO_THINGS
    if two if things is None else things == 2:
        size = chance.choice(("small", "medium"))
        pair = [random_thing(chance, wanted_held_out, background, size, side) for side in ("left", "right")]
        return Scene(tuple(pair), background, seed)
    size, position = chance.choice(tuple(SIZES)), chance.choice(tuple(POSITIONS))
    return Scene((random_thing(chance, wanted_held_out, background, size, position),), background, seed)
