"""Which learning rate, and how many steps, a LoRA on the drawing model wants: what the demo's settings were chosen by.

    python bench/drawing_lora.py --model demo/drawing_model
    python bench/drawing_lora.py --model demo/drawing_model --rates 1e-3,2e-3,4e-3 --steps 150,300 --pictures trials

Each pair of rate and steps learns from the demo's 36 pictures, in this process and without shards, and is then judged as
the demo's LoRA is: what the pictures show of the new subject and the new style, and whether other captions suffered.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from qwen_image.pipeline import QwenImagePipeline

BATCH = 8  # the demo's two ranks of 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that demo/train_drawing_model.py wrote")
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3", help="learning rates (1e-3,2e-3,4e-3)")
    parser.add_argument("--steps", default="150,300", help="numbers of steps (150,300)")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (16)")
    parser.add_argument("--pictures", type=Path, help="folder for a grid of each trial")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    arguments = parser.parse_args(argv)
    try:
        rates = [float(rate) for rate in arguments.rates.split(",")]
        steps = [int(number) for number in arguments.steps.split(",")]
        return compare(arguments.model, rates, steps, arguments.rank, arguments.pictures, arguments.device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(
    model: Path, rates: list[float], steps: list[int], rank: int, pictures: Path | None, device: str | None
) -> int:
    """Print a line for each trial."""
    import torch
    from PIL import Image

    from demo.drawing.classifier import FILE, load
    from demo.drawing.scoring import load_pipeline
    from demo.drawing.trial import STRENGTHS, measure
    from demo.pictures.new_things import WISHES
    from demo.run import SIDE
    from train.watching.image_grid import make_grid

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    judge = load(model / FILE)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    for rate in rates:
        for number in steps:
            start = time.perf_counter()
            pipeline = load_pipeline(model, where)
            loss = learn(pipeline, rate, number, rank, SIDE)
            trial = measure(pipeline, judge, SIDE)
            seconds = time.perf_counter() - start
            print(
                f"rate {rate:g}, {number} steps, rank {rank}: loss {loss:.3f}, {seconds:.0f} s; "
                + "; ".join(trial.lines())
            )
            if pictures is not None:
                grid = [[Image.fromarray(picture) for picture in row] for row in trial.grid]
                labels = [f"strength {strength:g}" for strength in STRENGTHS]
                make_grid(grid, labels, [wish.prompt for wish in WISHES]).save(pictures / f"{rate:g}-{number}.png")
    return 0


def learn(pipeline: QwenImagePipeline, rate: float, steps: int, rank: int, side: int) -> float:
    """Train a LoRA in place, as the demo's command does in what matters; returns the mean loss of the last 50 steps."""
    import numpy as np
    import torch

    from demo.drawing.denoiser import draw_sigma
    from demo.pictures.new_things import new_things
    from demo.pictures.painting import paint
    from demo.run import TARGETS
    from qwen_image.encoders.vae import pixels_from_uint8
    from qwen_image.model.conditioning import Prompt, pack_latents
    from qwen_image.pipeline import predict_velocity
    from train.flow.objective import add_noise, flow_matching_loss, velocity_target
    from train.lora.inject import inject_lora, lora_parameters
    from train.lora.spec import LoraSpec

    transformer, vae, encoder = pipeline.transformer, pipeline.vae, pipeline.text_encoder
    assert transformer is not None and vae is not None and encoder is not None
    device = vae.device
    things = new_things()
    drawn = torch.from_numpy(np.stack([paint(thing.scene, side) for thing in things])).permute(0, 3, 1, 2)
    latents = vae.encode(pixels_from_uint8(drawn)).to(device)
    prompt = encoder.encode([thing.caption for thing in things])
    inject_lora(transformer, LoraSpec(tuple(TARGETS.split(",")), rank, rank))
    parameters = list(lora_parameters(transformer).values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    generator = torch.Generator(device).manual_seed(0)
    rows = side // 16
    losses: list[torch.Tensor] = []
    for step in range(steps):
        index = torch.randint(len(things), (BATCH,), device=device, generator=generator)
        clean = latents[index]
        noise = torch.randn(clean.shape, device=device, generator=generator)
        sigma = draw_sigma(BATCH, rows * rows, device, generator)
        mask = None if prompt.mask is None else prompt.mask[index]
        told = Prompt(prompt.embeds[index], mask)
        velocity = predict_velocity(transformer, pack_latents(add_noise(clean, noise, sigma)), sigma, told, rows, rows)
        target = pack_latents(velocity_target(clean, noise))
        loss = flow_matching_loss(velocity, target, torch.ones_like(sigma)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses[-50:]).mean().item()


if __name__ == "__main__":
    sys.exit(main())
