"""Does a picture show the new subject, the new style? Linear probes on the classifier's features, fitted on drawn pictures.

The classifier knows neither. Its convolutions see enough of both: ridge regression on what they give for a few hundred
pictures with and without the new thing tells them apart (`accuracy` says how well, on pictures that it was not fitted on).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch

from demo.drawing.classifier import Classifier, worn
from demo.drawing.vae import to_pixels
from demo.pictures.new_things import STYLE, SUBJECT
from demo.pictures.painting import paint
from demo.pictures.random_scenes import place, random_scene
from demo.pictures.scene import Scene

FITTED, CHECKED = 384, 128  # pictures, half of them with the new thing
FIRST_SEED = 3 * 10**9
RIDGE = 10.0


@dataclass(frozen=True)
class Probe:
    """w · features + b > 0 where the new thing is. `accuracy`: on drawn pictures that it was not fitted on."""

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


def in_style(scene: Scene) -> Scene:
    return replace(scene, style=STYLE)


@torch.no_grad()
def fit_probe(judge: Classifier, what: str, side: int) -> Probe:
    """A probe for `what`, SUBJECT or STYLE."""
    change = {SUBJECT: with_subject, STYLE: in_style}[what]
    scenes = [random_scene(FIRST_SEED + i, things=1) for i in range(FITTED + CHECKED)]
    there = np.arange(len(scenes)) % 2 == 0
    drawn = np.stack([paint(change(s) if yes else s, side) for s, yes in zip(scenes, there, strict=True)])
    features = judge.features(worn(torch.from_numpy(drawn), torch.Generator().manual_seed(0))).flatten(1).double()
    wanted = torch.from_numpy(there).double() * 2 - 1
    known, target = features[:FITTED], wanted[:FITTED]
    center, middle = known.mean(0), target.mean()
    gram = (known - center) @ (known - center).T + RIDGE * torch.eye(FITTED, dtype=torch.float64)
    weight = (known - center).T @ torch.linalg.solve(gram, target - middle)
    bias = middle - center @ weight
    right = ((features[FITTED:] @ weight + bias > 0) == (wanted[FITTED:] > 0)).double().mean().item()
    return Probe(judge, weight.float(), bias.float(), right)
