"""How well a model draws what its captions say: it draws scenes, the classifier names what it sees."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from demo.drawing.classifier import Classifier, score
from demo.pictures.captions import caption
from demo.pictures.random_scenes import random_scene
from demo.pictures.scene import Scene
from qwen_image.kernel_check import distrust_kernels
from qwen_image.pipeline import QwenImagePipeline

if TYPE_CHECKING:
    pass

SEED = 2 * 10**9  # of the scenes that the model is asked for
BATCH = 64
STEPS, GUIDANCE = 20, 3.0  # a picture's denoising steps and guidance
SHOWN = 24  # pictures of the preview


def load_pipeline(model: str | Path, device: torch.device | str = "cpu") -> QwenImagePipeline:
    """The model in float32, by the loading code of the real one."""
    pipeline = QwenImagePipeline.from_pretrained(str(model), dtype=torch.float32, device=device)
    assert pipeline.transformer is not None
    for line in distrust_kernels(
        pipeline.transformer.config, torch.float32, torch.device(device), float8=False, trains=False
    ):
        print(line)
    return pipeline


def draw(
    pipeline: QwenImagePipeline,
    prompts: list[str],
    side: int,
    seeds: list[int] | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> np.ndarray:
    """uint8 [N, side, side, 3]: one picture a prompt, from seeds that count up where none are given."""
    seeds = list(range(len(prompts))) if seeds is None else seeds
    parts = [
        pipeline.generate(
            prompts[first : first + BATCH],
            height=side,
            width=side,
            num_inference_steps=steps,
            true_cfg_scale=guidance,
            seeds=seeds[first : first + BATCH],
        ).numpy()
        for first in range(0, len(prompts), BATCH)
    ]
    return np.concatenate(parts)


def wanted_scenes(count: int, held_out: bool) -> tuple[list[Scene], list[str]]:
    """Scenes that nothing learned from and full captions of them."""
    scenes = [random_scene(SEED + i, wanted_held_out=held_out) for i in range(count)]
    return scenes, [caption(scene, random.Random(f"score/{scene.seed}"), full=True) for scene in scenes]


def score_model(
    model: str | Path, judge: Classifier, count: int, side: int, device: torch.device | str, preview: Path | None = None
) -> dict[str, Any]:
    """Scores over `count` captions of held-out pairs and half as many of seen ones; a sheet of the first pictures."""
    pipeline = load_pipeline(model, device)
    facts: dict[str, Any] = {"score_pictures": count, "score_steps": STEPS, "score_guidance": GUIDANCE}
    for name, held_out, number in (("held_out", True, count), ("seen", False, max(1, count // 2))):
        scenes, prompts = wanted_scenes(number, held_out)
        pictures = draw(pipeline, prompts, side)
        facts[name] = score(judge, pictures, scenes)
        if preview is not None and held_out:
            sheet(pictures[:SHOWN], prompts[:SHOWN]).save(preview, quality=88)  # PNG has none and ignores it
    return facts


def sheet(pictures: np.ndarray, prompts: list[str], columns: int = 8) -> Image.Image:
    """Pictures with their captions above, in rows."""
    from train.watching.image_grid import make_grid

    rows = [
        make_grid([[Image.fromarray(p) for p in pictures[i : i + columns]]], [""], prompts[i : i + columns])
        for i in range(0, len(pictures), columns)
    ]
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page
