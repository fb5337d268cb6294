"""Captions say what is in the picture, in more than one way, and never the word that a LoRA is to learn."""

from __future__ import annotations

import random

from demo.pictures.captions import caption
from demo.pictures.new_things import STYLE, SUBJECT
from demo.pictures.random_scenes import random_scene
from demo.pictures.scene import SCENERY


def test_a_full_caption_leaves_nothing_out():
    for seed in range(200):
        scene = random_scene(seed)
        words = caption(scene, random.Random(seed), full=True)
        for thing in scene.things:
            assert thing.shape in words
            assert thing.color in words
            assert thing.texture == "plain" or thing.texture in words
            assert thing.size == "medium" or thing.size in words
        assert SCENERY.get(scene.background, scene.background).split()[0] in words
        if len(scene.things) == 1 and scene.things[0].position != "middle":
            assert scene.things[0].position in words


def test_a_pair_is_told_so_that_left_and_right_are_clear():
    for seed in range(200):
        left, right = (scene := random_scene(seed, things=2)).things
        words = caption(scene, random.Random(seed), full=True)
        if left.shape == right.shape or "to the right of" in words:
            continue
        assert words.index(left.shape) < words.index(right.shape)


def test_a_scene_is_told_in_many_ways():
    told = {caption(random_scene(5), random.Random(i)) for i in range(100)}
    assert len(told) > 10


def test_new_words_stay_new():
    for seed in range(2000):
        words = caption(random_scene(seed), random.Random(seed))
        assert SUBJECT not in words
        assert STYLE not in words
