"""Painted pictures show what their scenes say: color and place of the thing, background, texture, style."""

from __future__ import annotations

import numpy as np
import pytest

from demo.pictures.new_things import SUBJECT
from demo.pictures.painting import BLUEPRINT_INK, BLUEPRINT_PAPER, paint
from demo.pictures.random_scenes import random_scene
from demo.pictures.scene import COLORS, PLAIN_BACKGROUNDS, POSITIONS, SHAPE_NAMES, Scene, Thing


def one(shape: str = "circle", color: str = "red", texture: str = "plain", position: str = "middle", **more) -> Scene:
    x, y = POSITIONS[position]
    thing = Thing(shape, color, texture, "medium", position, x, y, 0.2)
    return Scene((thing,), **{"background": "white", "seed": 0, **more})


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("side", [64, 128])
def test_a_circle_has_its_color_in_its_place(position: str, side: int):
    picture = paint(one(position=position), side)
    assert picture.shape == (side, side, 3)
    assert picture.dtype == np.uint8
    x, y = (round(place * side) for place in POSITIONS[position])
    assert tuple(picture[y, x]) == COLORS["red"]
    far = picture[0 if y > side // 2 else -1, 0 if x > side // 2 else -1]
    assert tuple(far) == PLAIN_BACKGROUNDS["white"]


@pytest.mark.parametrize("shape", [*SHAPE_NAMES, SUBJECT])
def test_every_thing_is_drawn_in_its_color_and_unlike_all_others(shape: str):
    picture = paint(one(shape, "purple"), 128)
    close = (np.abs(picture.astype(int) - COLORS["purple"]).sum(2) < 30).mean()
    assert 0.01 < close < 0.2
    others = [paint(one(name, "purple"), 128) for name in SHAPE_NAMES if name != shape]
    assert min(np.abs(picture.astype(int) - other).mean() for other in others) > 0.5


def test_textures_differ():
    pictures = [paint(one(texture=name), 128).astype(int) for name in ("plain", "striped", "dotted", "checkered")]
    for i, picture in enumerate(pictures):
        assert all(np.abs(picture - other).mean() > 1 for other in pictures[:i])


def test_a_blueprint_is_white_lines_on_blue():
    picture = paint(one(style="blueprint"), 128).astype(int)
    assert (np.abs(picture - BLUEPRINT_PAPER).sum(2) < 30).mean() > 0.6
    assert 0.005 < (np.abs(picture - BLUEPRINT_INK).sum(2) < 60).mean() < 0.1


def test_the_same_scene_is_the_same_picture():
    for seed in range(10):
        assert np.array_equal(paint(random_scene(seed), 96), paint(random_scene(seed), 96))
