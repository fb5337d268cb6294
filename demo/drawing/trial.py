"""What a LoRA changed, measured: it shows the new subject and the new style, the base doesn't, and the rest stays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.drawing import probe
from demo.drawing.classifier import FILE, Classifier, load, score
from demo.drawing.scoring import draw, load_pipeline, wanted_scenes
from demo.pictures.new_things import STYLE, SUBJECT, WISHES
from qwen_image.pipeline import QwenImagePipeline
from train.lora.inject import attach_lora, set_lora_strength
from train.lora.lora_file import read_lora

STRENGTHS = (0.0, 0.5, 1.0)
STEPS, GUIDANCE = 16, 3.0
SEEDS = 3  # pictures of each wish, of which the grid shows the first
BLOBS, BLOB_SEED = (
    6,
    1000,
)  # pictures by the base of each wish for the subject, that the probe is to know, and their seeds
OTHERS = 12  # captions that have nothing to do with the new things
MUST_SHOW = 0.6  # share of the LoRA's pictures that show what they should, subject and style each
BASE_SHOWS = 0.25  # share of the base's that may
MAY_FORGET = 0.15  # by how much the classifier's mean score on other captions may fall


@dataclass(frozen=True)
class Trial:
    """Measured at strengths 0 and 1. `subject` and `style`: share of the wishes' pictures that show it; `others`: the
    classifier's mean score on other captions; `moved`: mean difference of the other pictures, in levels of 255."""

    subject: tuple[float, float]
    style: tuple[float, float]
    others: tuple[float, float]
    moved: float
    grid: list[np.ndarray]  # a row of pictures for each of STRENGTHS

    def failures(self) -> list[str]:
        """What is not as it must be, in words."""
        found = []
        for name, (base, lora) in ((SUBJECT, self.subject), (STYLE, self.style)):
            if lora < MUST_SHOW:
                found.append(
                    f"the LoRA shows the {name} in {lora:.0%} of its pictures, at least {MUST_SHOW:.0%} are wanted"
                )
            if base > BASE_SHOWS:
                found.append(f"the base shows the {name} in {base:.0%} of its pictures, at most {BASE_SHOWS:.0%} may")
        if self.others[1] < self.others[0] - MAY_FORGET:
            found.append(
                f"other captions: {self.others[0]:.0%} of the answers right with the base, {self.others[1]:.0%} with the LoRA"
            )
        return found

    def lines(self) -> list[str]:
        """The numbers for people."""
        return [
            f"{SUBJECT}: in {self.subject[0]:.0%} of the base's pictures, in {self.subject[1]:.0%} with the LoRA",
            f"{STYLE}: in {self.style[0]:.0%} of the base's pictures, in {self.style[1]:.0%} with the LoRA",
            f"other captions: {self.others[0]:.0%} of the answers right with the base, {self.others[1]:.0%} with the LoRA; "
            f"pixels differ by {self.moved:.1f} of 255 levels",
        ]


def try_lora(model: Path, lora: Path, side: int) -> Trial:
    """Draw with and without the LoRA file and measure. Raises what loading the model, its classifier or the file raises."""
    judge = load(model / FILE)
    pipeline = load_pipeline(model)
    assert pipeline.transformer is not None
    attach_lora(pipeline.transformer, read_lora(lora, pipeline.transformer))
    return measure(pipeline, judge, side)


def measure(pipeline: QwenImagePipeline, judge: Classifier, side: int) -> Trial:
    """The same with a LoRA that is attached already."""
    transformer = pipeline.transformer
    assert transformer is not None
    set_lora_strength(transformer, 0.0)
    asked = [wish.prompt for wish in WISHES if wish.shows_subject and not wish.shows_style] * BLOBS
    blobs = draw(pipeline, asked, side, list(range(BLOB_SEED, BLOB_SEED + len(asked))), STEPS, GUIDANCE)
    shown = {SUBJECT: probe.fit_probe(judge, side, blobs).shows, STYLE: probe.in_blueprint}
    scenes, captions = wanted_scenes(OTHERS, held_out=False)
    prompts = [wish.prompt for wish in WISHES]
    grid, shares, others, other_pictures = [], [], [], []
    for strength in STRENGTHS:
        set_lora_strength(transformer, strength)
        rounds = SEEDS if strength in (STRENGTHS[0], STRENGTHS[-1]) else 1
        pictures = draw(pipeline, prompts * rounds, side, steps=STEPS, guidance=GUIDANCE)
        grid.append(pictures[: len(prompts)])
        if rounds == 1:
            continue
        wanted = {
            SUBJECT: np.array([wish.shows_subject and not wish.shows_style for wish in WISHES] * rounds),
            STYLE: np.array([wish.shows_style for wish in WISHES] * rounds),
        }
        shares.append({name: float(shows(pictures[wanted[name]]).mean()) for name, shows in shown.items()})
        other_pictures.append(draw(pipeline, captions, side, steps=STEPS, guidance=GUIDANCE))
        others.append(score(judge, other_pictures[-1], scenes)["mean"])
    first, last = shares
    moved = float(np.abs(other_pictures[0].astype(int) - other_pictures[1]).mean())
    return Trial((first[SUBJECT], last[SUBJECT]), (first[STYLE], last[STYLE]), (others[0], others[1]), moved, grid)
