"""The judge: right answers to its questions, its score, its file; it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from demo.drawing.classifier import NOTHING, QUESTIONS, Classifier, learn, load, right_answers, save, score
from demo.drawing.course import Course
from demo.pictures.painting import paint
from demo.pictures.random_scenes import random_scene


class Knows(Classifier):
    """Answers as it is told, whatever it sees."""

    def __init__(self, answers: torch.Tensor):
        super().__init__()
        self.told = answers

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hot = [torch.nn.functional.one_hot(self.told[:, i], len(q)) for i, q in enumerate(QUESTIONS.values())]
        return torch.cat(hot, 1).float()


def test_right_answers_are_the_scene():
    one, two = random_scene(3, things=1), random_scene(3, things=2)
    answers = right_answers([one, two])
    named = [[choices[i] for choices, i in zip(QUESTIONS.values(), row, strict=True)] for row in answers.tolist()]
    first = one.things[0]
    assert named[0] == [first.shape, first.color, first.texture, first.size, first.position, one.background] + 3 * [
        NOTHING
    ]
    assert named[1][6:] == [two.things[1].shape, two.things[1].color, two.things[1].texture]


def test_score_counts_what_is_right():
    scenes = [random_scene(i, things=1 + i % 2) for i in range(10)]
    pictures = np.zeros((10, 32, 32, 3), np.uint8)
    answers = right_answers(scenes)
    assert set(score(Knows(answers), pictures, scenes).values()) == {1.0}
    wrong = answers.clone()
    wrong[0, 0] = (wrong[0, 0] + 1) % 5
    wrong[0, -1] = 0  # the texture of a second thing that isn't there: not asked
    shares = score(Knows(wrong), pictures, scenes)
    assert shares["shape"] == pytest.approx(0.9)
    assert shares["second texture"] == 1
    assert shares["all"] == pytest.approx(0.9)
    assert 0.95 < shares["mean"] < 1


def test_it_learns_and_its_file_answers_alike(tmp_path: Path):
    scenes = [random_scene(i) for i in range(12)]
    pictures = np.stack([paint(scene, 32) for scene in scenes])
    judge = learn(torch.from_numpy(pictures), scenes, Course("classifier", 0, steps=40, warm_up=5), batch=12, seed=0)
    assert score(judge, pictures, scenes)["mean"] > 0.6
    save(judge, tmp_path / "classifier.safetensors")
    assert (tmp_path / "classifier.safetensors").stat().st_size < 600_000
    again = load(tmp_path / "classifier.safetensors")
    assert score(again, pictures, scenes)["mean"] == pytest.approx(score(judge, pictures, scenes)["mean"], abs=0.03)
    with pytest.raises(FileNotFoundError, match="train_drawing_model"):
        load(tmp_path / "absent.safetensors")
