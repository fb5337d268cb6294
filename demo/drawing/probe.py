"""Does a picture show the new subject, the new style?

The subject: a linear probe on the classifier's features, fitted on drawn pictures. The classifier doesn't know the subject,
but its convolutions see enough of it: ridge regression on what they give for a few hundred pictures with and without it tells
them apart (`accuracy` says how well, on pictures that it was not fitted on). What the base makes of the new word, a blob of
some kind, is among those without.

The style: its paper. A picture is in it if the color of most of it is nearer to the blueprint's paper than to any background.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch

from demo.drawing.classifier import Classifier, worn
from demo.drawing.vae import to_pixels
from demo.pictures.new_things import SUBJECT
from demo.pictures.painting import BLUEPRINT_PAPER, paint
from demo.pictures.random_scenes import place, random_scene
from demo.pictures.scene import BACKGROUNDS, Scene

FITTED, CHECKED = 384, 128  # pictures, half of them with the subject
FIRST_SEED = 3 * 10**9
RIDGE = 10.0
BASE_WEIGHT = 4  # a picture of the base's counts as so many drawn ones


@dataclass(frozen=True)
class Probe:
    """w · features + b > 0 where the subject is. `accuracy`: on drawn pictures that it was not fitted on."""

    judge: Classifier
    weight: torch.Tensor  # [features]
    bias: torch.Tensor
    accuracy: float

    def shows(self, pictures: np.ndarray) -> np.ndarray:
        """bool [N] for uint8 pictures [N, H, W, 3]."""
        features = self.judge.features(to_pixels(torch.from_numpy(pictures))).flatten(1)
        return (features @ self.weight + self.bias > 0).numpy()


def with_subject(scene: Scene) -> Scene:
    """The scene with the blorb in the place of its thing."""
    thing = scene.things[0]
    chance = random.Random(f"probe/{scene.seed}")
    size = "medium" if thing.size == "small" else thing.size  # the set shows no small one either
    return replace(scene, things=(place(SUBJECT, thing.color, thing.texture, size, thing.position, chance),))


@torch.no_grad()
def fit_probe(judge: Classifier, side: int, of_base: np.ndarray | None = None) -> Probe:
    """A probe for SUBJECT. `of_base`: uint8 pictures [N, side, side, 3] by the base, which can't show it."""
    scenes = [random_scene(FIRST_SEED + i, things=1) for i in range(FITTED + CHECKED)]
    there = np.arange(len(scenes)) % 2 == 0
    drawn = np.stack([paint(with_subject(s) if yes else s, side) for s, yes in zip(scenes, there, strict=True)])
    features = judge.features(worn(torch.from_numpy(drawn), torch.Generator().manual_seed(0))).flatten(1).double()
    wanted = torch.from_numpy(there).double() * 2 - 1
    known, target = features[:FITTED], wanted[:FITTED]
    if of_base is not None:
        without = judge.features(to_pixels(torch.from_numpy(of_base))).flatten(1).double().repeat(BASE_WEIGHT, 1)
        known, target = torch.cat([known, without]), torch.cat([target, -torch.ones(len(without)).double()])
    center, middle = known.mean(0), target.mean()
    gram = (known - center) @ (known - center).T + RIDGE * torch.eye(len(known), dtype=torch.float64)
    weight = (known - center).T @ torch.linalg.solve(gram, target - middle)
    bias = middle - center @ weight
    right = ((features[FITTED:] @ weight + bias > 0) == (wanted[FITTED:] > 0)).double().mean().item()
    return Probe(judge, weight.float(), bias.float(), right)


def in_blueprint(pictures: np.ndarray) -> np.ndarray:
    """bool [N]: the median color of uint8 pictures [N, H, W, 3] is nearer to the blueprint's paper than to any background."""
    middle = np.median(pictures.reshape(len(pictures), -1, 3), axis=1)[:, None]
    side = pictures.shape[1]
    others = [np.median(paint(Scene((), name, 0), side).reshape(-1, 3), axis=0) for name in BACKGROUNDS]
    distances = np.abs(middle - np.stack([BLUEPRINT_PAPER, *others])).sum(-1)
    return distances.argmin(1) == 0
