"""What a class loses to a subject that is trained under its name, and what prior preservation keeps of it.

    python bench/prior_preservation.py --model demo/drawing_model
    python bench/prior_preservation.py --model demo/drawing_model --shares 0.2,0.5 --prior_prompt "a cat"

A LoRA learns the blorb from drawn pictures that call it "a zimi cat". Asked for a cat afterwards, with colors and sceneries of
its own, the base draws a cat; the LoRA without prior preservation tends to draw the blorb. Each share of micro-batches that
train `--prior_prompt` (0: none), or with `--pictures` the base's own pictures of these prompts as `--prior_data` would, is one
trial, judged by the drawing model's classifier: how often the subject is shown when it is asked for, how often a cat is when a
cat is, and how right other captions stay.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

    from demo.drawing.classifier import Classifier
    from demo.pictures.scene import Scene
    from qwen_image.pipeline import QwenImagePipeline
    from train.base_model.prior_prompt import PriorPrompt

CLASS, NAME = "cat", "zimi"
PRIOR_PROMPTS = (
    "a red cat on a blue background",
    "a large green cat in the night sky",
    "a picture of a yellow cat on the left, green meadow",
    "a purple cat at the sea",
    "a small orange cat at the top right on a white background",
    "sunset: a black cat",
    "a drawing of a blue cat on a red background, on the right",
    "a pink cat in front of a brick wall",
)
DRAWN = 3  # pictures of each class prompt, with --pictures
BATCH, RANK, RATE = 8, 16, 2e-3
PICTURES = 18  # of the subject
ASKED = 16  # pictures of each kind that are judged
SEED = 7 * 10**9  # of the scenes that are asked for


class Kept(NamedTuple):
    """Shares of pictures: that show the subject where it is asked for; a cat where a cat is, and the subject there;
    and of the classifier's answers on other captions that are right."""

    subject: float
    class_: float
    leaked: float
    others: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that demo/train_drawing_model.py wrote")
    parser.add_argument("--shares", default="0,0.35", help="shares of micro-batches (0,0.35)")
    parser.add_argument("--prior_prompt", action="append", help="class prompts (eight, worded as the captions are)")
    parser.add_argument(
        "--pictures", action="store_true", help="train pictures that the base drew of the class prompts"
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a trial (200)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    arguments = parser.parse_args(argv)
    prompts = arguments.prior_prompt or list(PRIOR_PROMPTS)
    try:
        shares = [float(share) for share in arguments.shares.split(",")]
        for share in [None, *shares]:
            start = time.perf_counter()
            kept = try_share(arguments.model, share, prompts, arguments.pictures, arguments.steps, arguments.device)
            told = ", ".join(f"{name.strip('_')} {part:.0%}" for name, part in kept._asdict().items())
            what = "base" if share is None else f"share {share:g}"
            print(f"{what}: {told} ({time.perf_counter() - start:.0f} s)", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def try_share(
    model: Path, share: float | None, prompts: list[str], pictures: bool, steps: int, device: str | None
) -> Kept:
    """What is shown after `steps` of which `share` train the class prompts; None: by the base, without any."""
    import torch

    from demo.drawing.classifier import FILE, load
    from demo.drawing.probe import fit_probe
    from demo.drawing.scoring import draw, load_pipeline
    from demo.run import SIDE
    from train.base_model.prior_prompt import PriorPrompt

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline, judge = load_pipeline(model, where), load(model / FILE)
    assert pipeline.transformer is not None and pipeline.text_encoder is not None
    blobs = draw(pipeline, [asked_for(i, f"{NAME} {CLASS}")[1] for i in range(ASKED)], SIDE, steps=16)
    shows = fit_probe(judge, SIDE, blobs).shows
    if share is not None:
        embeds = pipeline.text_encoder.encode_list(prompts)
        drawn = drawn_by_base(pipeline, prompts, SIDE) if pictures and share else None
        learn(pipeline, PriorPrompt(embeds, share, seed=0), drawn, steps, SIDE)
    return judged(pipeline, judge, shows, SIDE)


def asked_for(number: int, noun: str) -> tuple[Scene, str]:
    """A scene with one cat, and its caption with `noun` for "cat"."""
    from demo.pictures.captions import caption
    from demo.pictures.random_scenes import place
    from demo.pictures.scene import BACKGROUNDS, COLOR_NAMES, POSITIONS, Scene

    chance = random.Random(f"{SEED}/{number}")
    background = chance.choice(list(BACKGROUNDS))
    color = chance.choice([name for name in COLOR_NAMES if name != background])
    thing = place(
        CLASS, color, "plain", chance.choice(("medium", "large")), chance.choice(("middle", *POSITIONS)), chance
    )
    scene = Scene((thing,), background, number)
    told = Scene((replace(thing, shape=noun),), background, number)
    return scene, caption(told, random.Random(number), full=True)


def judged(pipeline: QwenImagePipeline, judge: Classifier, shows: Any, side: int) -> Kept:
    """Of the pipeline as it is."""
    from demo.drawing.classifier import score
    from demo.drawing.scoring import draw, wanted_scenes

    def drawn(prompts: list[str]) -> np.ndarray:
        return draw(pipeline, prompts, side, steps=16)

    scenes, cats = zip(*(asked_for(i, CLASS) for i in range(ASKED)), strict=True)
    pictures = drawn(list(cats))
    subjects = drawn([asked_for(i, f"{NAME} {CLASS}")[1] for i in range(ASKED)])
    others, captions = wanted_scenes(ASKED, held_out=False)
    return Kept(
        float(shows(subjects).mean()),
        score(judge, pictures, list(scenes))["shape"],
        float(shows(pictures).mean()),
        score(judge, drawn(captions), others)["mean"],
    )


def drawn_by_base(pipeline: QwenImagePipeline, prompts: list[str], side: int) -> torch.Tensor:
    """Latents of three pictures of each prompt, prompt by prompt."""
    import torch

    from demo.drawing.scoring import draw
    from qwen_image.encoders.vae import pixels_from_uint8

    assert pipeline.vae is not None
    asked = [prompt for prompt in prompts for _ in range(DRAWN)]
    pictures = torch.from_numpy(draw(pipeline, asked, side, steps=16)).permute(0, 3, 1, 2)
    return pipeline.vae.encode(pixels_from_uint8(pictures)).to(pipeline.vae.device)


def learn(pipeline: QwenImagePipeline, prior: PriorPrompt, drawn: torch.Tensor | None, steps: int, side: int) -> None:
    """Train a LoRA in place as the trainer does: its module, its loss, its prior prompts; batches made here.

    `drawn`: latents of DRAWN pictures of each class prompt, which are trained where the prompts alone would be.
    """
    import numpy as np
    import torch

    from demo.drawing.denoiser import draw_sigma
    from demo.pictures.captions import caption
    from demo.pictures.new_things import subject
    from demo.pictures.painting import paint
    from demo.run import TARGETS
    from qwen_image.encoders.vae import pixels_from_uint8
    from qwen_image.model.conditioning import Prompt
    from train.lora.inject import inject_lora, lora_parameters
    from train.lora.spec import LoraSpec
    from train.step.flow_matching_module import FlowMatchingModule

    transformer, vae, encoder = pipeline.transformer, pipeline.vae, pipeline.text_encoder
    assert transformer is not None and vae is not None and encoder is not None
    device = vae.device
    scenes = [subject(number).scene for number in range(PICTURES)]
    named = [replace(s, things=(replace(s.things[0], shape=f"{NAME} {CLASS}"),)) for s in scenes]
    pictures = torch.from_numpy(np.stack([paint(scene, side) for scene in scenes])).permute(0, 3, 1, 2)
    latents = vae.encode(pixels_from_uint8(pictures)).to(device)
    embeds = encoder.encode_list([caption(s, random.Random(f"name/{s.seed}"), full=True) for s in named])
    inject_lora(transformer, LoraSpec(tuple(TARGETS.split(",")), RANK, RANK))
    module = FlowMatchingModule(transformer, "none", torch.float32)
    parameters = list(lora_parameters(transformer).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0)
    generator = torch.Generator(device).manual_seed(0)
    for step in range(steps):
        index = torch.randint(len(scenes), (BATCH,), device=device, generator=generator)
        clean = latents[index]
        noise = torch.randn(clean.shape, device=device, generator=generator)
        sigma = draw_sigma(BATCH, (side // 16) ** 2, device, generator).cpu()
        told = Prompt.from_list([embeds[int(i)] for i in index])
        if drawn is None:
            clean, noise, told, _ = prior(module, step, clean, noise, sigma, told)
        elif prior.drawn(step) is not None:
            index = torch.randint(len(drawn), (BATCH,), device=device, generator=generator)
            clean, told = drawn[index], Prompt.from_list([prior.embeds[int(i) // DRAWN] for i in index])
        module(clean, noise, sigma, told).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(main())
