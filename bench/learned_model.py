"""A Qwen-Image transformer of middle size that was trained from scratch on real photographs: what float8 is judged on.

    python bench/learned_model.py --output_path learned
    python bench/learned_model.py --output_path learned --layers 12 --heads 8 --side 256 --learning_steps 1200

Random weights say nothing about rounding: nothing in them is fine-tuned to anything. Here all parameters learn flow
matching on random crops of the demo's photographs, through the project's own shards, encoded shards, loader and loss.
Photographs of four subjects are left out and encoded apart: there a LoRA finds something to learn.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from qwen_image.model.transformer import QwenImageTransformer
    from train.data.worker_loader import Batches
    from train.step.flow_matching_module import FlowMatchingModule

LEFT_OUT = ("skimage/chelsea.png", "skimage/coffee.png", "sklearn/flower.jpg", "skimage/rocket.jpg")
CROPS = 16  # of each photograph
SMALLEST_CROP = 0.6  # of its shorter side
TEXT_DIM = 64
PEAK_RATE = 1e-3  # of AdamW at a width of 256, falling with the width's root
WARM_UP = 50
FIRST, LAST = 20, 100  # steps whose mean is the loss before and after learning
DONE = "learned.json"


@dataclass(frozen=True)
class Recipe:
    """What the learned model depends on. `heads` have 128 channels, `side` is that of the square pictures in pixels."""

    layers: int
    heads: int
    side: int
    learning_steps: int
    batch: int
    dtype: str

    @classmethod
    def for_device(cls, cuda: bool, **given: int | None) -> Recipe:
        """`given`, and defaults where it says None. Raises ValueError for what can't be built."""
        large = {"layers": 12, "heads": 8, "side": 256, "learning_steps": 1200}
        small = {"layers": 4, "heads": 2, "side": 128, "learning_steps": 1000}
        defaults = large if cuda else small
        chosen = {name: given.get(name) or default for name, default in defaults.items()}
        if chosen["side"] % 16:
            raise ValueError(f"side must be a multiple of 16, got {chosen['side']}")
        if chosen["learning_steps"] < FIRST:
            raise ValueError(f"learning_steps must be at least {FIRST}, got {chosen['learning_steps']}")
        return cls(**chosen, batch=16 if cuda else 8, dtype="bfloat16" if cuda else "float32")


def write_crops(folder: Path, left_out: bool, side: int, crops: int = CROPS) -> int:
    """Random square crops, side × side PNGs with captions, of the demo's photographs: LEFT_OUT, or all others; how many."""
    from PIL import Image

    from demo.photos import PHOTOS, write_photo_folder

    written = 0
    originals = folder / "originals"
    photos = {path.stem: path for path in write_photo_folder(originals)}
    generator = random.Random(0)
    for photo in PHOTOS:
        if (photo.source in LEFT_OUT) != left_out:
            continue
        with Image.open(photos[photo.name]) as opened:
            image = opened.convert("RGB")
        for number in range(crops):
            edge = round(min(image.size) * generator.uniform(SMALLEST_CROP, 1))
            left, top = (generator.randint(0, length - edge) for length in image.size)
            target = folder / f"{photo.name}-{number:02d}.png"
            image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS).save(target)
            target.with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")
            written += 1
    shutil.rmtree(originals)
    return written


def encode_crops(output: Path, side: int) -> None:
    """Crops → shards → encoded shards by the real commands: `output`/base/encoded and `output`/lora/encoded."""
    from demo.run import stage

    for name in ("base", "lora"):
        here = output / name
        print(f"{write_crops(here / 'crops', left_out=name == 'lora', side=side)} crops for {name}", flush=True)
        crops, shards = here / "crops", here / "shards"
        stage(
            f"shards for {name}",
            "data_prep/make_shards.py",
            dataset_base_path=crops,
            output_path=shards,
            height=side,
            width=side,
            image_format="png",
            num_workers=0,
        )
        stage(
            f"encoded shards for {name}",
            "data_prep/encode_shards.py",
            model=output / "model",
            data=shards,
            output_path=here / "encoded",
            dtype="float32",
        )


def fresh_transformer(recipe: Recipe, device: torch.device) -> QwenImageTransformer:
    """Initialised for learning: blocks begin as the identity (adaLN-Zero, Peebles & Xie 2022), all others 1 / fan-in."""
    import torch

    from qwen_image.model.transformer import QwenImageTransformer, TransformerConfig

    config = TransformerConfig(num_layers=recipe.layers, num_attention_heads=recipe.heads, joint_attention_dim=TEXT_DIM)
    with torch.device(device):
        transformer = QwenImageTransformer(config)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif any(part in name for part in ("img_mod", "txt_mod", "norm_out", "proj_out")):
                parameter.zero_()
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return transformer


def batches(encoded: Path, batch_size: int, seed: int, device: torch.device) -> Batches:
    """The micro-batches that train_lora.py draws with these options and its defaults, on one rank."""
    from train.data.indexed_loader import BatchLoader
    from train.data.shard_dataset import ShardDataset
    from train.data.worker_loader import Reading
    from train.flow.timestep_sampling import SigmaSampling

    dataset = ShardDataset(encoded)
    text_multiple = 32 if device.type == "cuda" else 1
    workers = 4 if device.type == "cuda" else 0
    reading = Reading(device=device, text_multiple=text_multiple, num_workers=workers)
    return BatchLoader(dataset, dataset.order(batch_size, seed), SigmaSampling(), reading)


def losses(module: FlowMatchingModule, loader: Batches) -> Iterator[torch.Tensor]:
    """The mean loss of one batch after the other, endlessly."""
    from qwen_image.encoders.text_encoder import Prompt

    for batch in loader:
        assert batch.latents is not None and batch.prompt_embeds is not None
        yield module(batch.latents, batch.noise, batch.sigma, Prompt(batch.prompt_embeds, batch.prompt_mask)).mean()


def learn(recipe: Recipe, encoded: Path, device: torch.device) -> tuple[QwenImageTransformer, list[float]]:
    """Train all parameters; the transformer and the loss of each step.

    The model computes in `recipe.dtype`, AdamW on float32 copies of its weights; the rate warms up, then falls to 0.
    """
    import torch

    from train.step.flow_matching_module import FlowMatchingModule

    dtype = getattr(torch, recipe.dtype)
    transformer = fresh_transformer(recipe, device)
    masters = [parameter.detach().clone().requires_grad_() for parameter in transformer.parameters()]
    transformer.to(dtype)
    parameters: list[torch.Tensor] = list(transformer.parameters())
    peak = PEAK_RATE * (256 / transformer.config.inner_dim) ** 0.5
    optimizer = torch.optim.AdamW(masters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    module = FlowMatchingModule(transformer, "none", dtype)
    course: list[torch.Tensor] = []
    began = time.perf_counter()
    with batches(encoded, recipe.batch, seed=0, device=device) as loader:
        for step, loss in enumerate(losses(module, loader)):
            loss.backward()
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            done = max(0, step - WARM_UP) / max(1, recipe.learning_steps - WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = peak * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
            course.append(loss.detach())
            if step % 100 == 99:
                recent = torch.stack(course[-FIRST:]).mean().item()
                seconds = (time.perf_counter() - began) / (step + 1)
                print(f"step {step + 1}/{recipe.learning_steps}  loss {recent:.4f}  {seconds:.3f} s/step", flush=True)
            if len(course) == recipe.learning_steps:
                break
    return transformer, torch.stack(course).tolist()


def write_transformer(transformer: QwenImageTransformer, folder: Path) -> None:
    """Weights and config.json in the Hugging Face layout."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = {"_class_name": "QwenImageTransformer2DModel", **asdict(transformer.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in transformer.named_parameters()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def write_learned_model(output: Path, recipe: Recipe) -> list[float]:
    """`output`/model and both encoded sets, unless they are there already; the losses of learning.

    Raises FileExistsError when `output` holds anything else.
    """
    import torch

    from demo.run import clear
    from demo.tiny_model import build_tiny_model

    done = output / DONE
    if done.is_file() and (known := json.loads(done.read_text(encoding="utf-8")))["recipe"] == asdict(recipe):
        print(f"the model in {output} has learned already", flush=True)
        return known["losses"]
    clear(output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build_tiny_model(output / "model", layers=1, heads=1, text_dim=TEXT_DIM, blur_vae=True)  # all but the transformer
    encode_crops(output, recipe.side)
    transformer, course = learn(recipe, output / "base" / "encoded", device)
    write_transformer(transformer, output / "model" / "transformer")
    done.write_text(json.dumps({"recipe": asdict(recipe), "losses": course}), encoding="utf-8")
    return course


def describe(recipe: Recipe, course: list[float]) -> str:
    """One line about the model: its size, and how its loss fell."""
    width = 128 * recipe.heads
    # a block's 36·D² weights: 8 attention projections, two MLPs of 8, two modulations of 6
    millions = recipe.layers * 36 * width**2 / 1e6
    first, last = sum(course[:FIRST]) / FIRST, sum(course[-LAST:]) / len(course[-LAST:])
    return (
        f"{recipe.layers} blocks of {recipe.heads} × 128 channels, {millions:.0f} M parameters, {recipe.side}² pictures, "
        f"{recipe.dtype}: loss {first:.3f} → {last:.4f} in {len(course)} steps of {recipe.batch} pictures from scratch"
    )


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, help="blocks (default 12 on a GPU, 4 on a CPU)")
    parser.add_argument("--heads", type=int, help="attention heads of 128 channels (default 8, 2)")
    parser.add_argument("--side", type=int, help="of the square pictures in pixels (default 256, 128)")
    parser.add_argument("--learning_steps", type=int, help="steps of training from scratch (default 1200, 1000)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder for the model and the encoded shards")
    add_recipe_flags(parser)
    options = vars(parser.parse_args(argv))
    import torch

    from demo.run import StageFailed

    output = options.pop("output_path").resolve()
    try:
        recipe = Recipe.for_device(torch.cuda.is_available(), **options)
        print(describe(recipe, write_learned_model(output, recipe)))
    except (StageFailed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
