"""Scenes: repeatable, whole within the picture, and no pair of shape and color that is held out, unless that is wanted."""

from __future__ import annotations

from demo.pictures.random_scenes import held_out, random_scene
from demo.pictures.scene import COLOR_NAMES, SHAPE_NAMES


def test_a_seed_is_a_scene():
    assert [random_scene(i) for i in range(20)] == [random_scene(i) for i in range(20)]
    assert len({random_scene(i) for i in range(200)}) == 200


def test_one_pair_in_ten_is_held_out():
    pairs = [(shape, color) for shape in SHAPE_NAMES for color in COLOR_NAMES]
    assert 0.05 < sum(held_out(*pair) for pair in pairs) / len(pairs) < 0.15
    for wanted in (False, True):
        things = [thing for i in range(300) for thing in random_scene(i, wanted_held_out=wanted).things]
        assert all(held_out(thing.shape, thing.color) == wanted for thing in things)


def test_training_sees_every_shape_and_every_color():
    things = [thing for i in range(600) for thing in random_scene(i).things]
    assert {thing.shape for thing in things} == set(SHAPE_NAMES)
    assert {thing.color for thing in things} == set(COLOR_NAMES)


def test_things_lie_within_the_picture_and_apart():
    for seed in range(300):
        scene = random_scene(seed)
        for thing in scene.things:
            assert thing.radius < thing.x < 1 - thing.radius
            assert thing.radius < thing.y < 1 - thing.radius
            assert thing.color != scene.background
        if len(scene.things) == 2:
            left, right = scene.things
            assert left.x + left.radius < right.x - right.radius
    assert len(random_scene(7, things=1).things) == 1
    assert len(random_scene(7, things=2).things) == 2
