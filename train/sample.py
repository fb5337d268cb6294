"""Images from prompts, with the base model and a LoRA.

    python train/sample.py --model Qwen/Qwen-Image --lora RUN/lora.safetensors --prompt "a lighthouse at dusk" --output_path OUT
    python train/sample.py --model MODEL --lora RUN --prompt "a lighthouse" --num_images 4 --compare --output_path OUT
    python train/sample.py --model MODEL --lora a.safetensors:0.8 --lora b.safetensors:0.5 --prompt "…" --output_path OUT

Every image is a PNG with its parameters inside; grid.png shows them side by side, with --compare also without the LoRA.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from files.shown import one_line, shown, tolerant_output
from qwen_image.loading.model_flags import add_model_flags
from train.config.check_paths import check_apart, split_weight

SEEDS = 2**63  # torch.Generator takes no more


def main(argv: list[str] | None = None) -> int:
    tolerant_output()
    try:
        return sample(build_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_flags(parser, "transformer", "text_encoder", "vae", "tokenizer")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA file (ours, diffusers', DiffSynth's, ComfyUI's or kohya's) or run folder; repeat for several, which add up",
    )
    parser.add_argument("--lora_strength", type=float, default=1.0, help="what all their updates are multiplied with")
    parser.add_argument("--prompt", action="append", required=True, help="repeat the flag for several prompts")
    parser.add_argument("--negative_prompt", default=" ", help='what guidance leads away from (default " ")')
    parser.add_argument("--output_path", required=True, type=Path, help="folder for the images")
    parser.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 16 (default 1024)")
    parser.add_argument("--width", type=int, default=1024, help="pixels, a multiple of 16 (default 1024)")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--true_cfg_scale", type=float, default=4.0, help="guidance; 1 = none (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of a prompt's first image (default 0)")
    parser.add_argument("--num_images", type=int, default=1, help="images a prompt, seeds counting up (default 1)")
    parser.add_argument("--compare", action="store_true", help="make each image without the LoRA too")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser


def sample(arguments: argparse.Namespace) -> int:
    """Generate the images that the arguments describe and write them with a grid."""
    from qwen_image.model.sizes import check_image_size

    check_image_size(arguments.height, arguments.width)
    check_numbers(arguments)
    if arguments.compare and not arguments.lora:
        raise ValueError("--compare shows images with and without a LoRA: give one with --lora")
    for path, _ in map(split_weight, arguments.lora):
        if not path.is_file():
            raise FileNotFoundError(f"--lora: no file at {shown(path)}")
    check_apart(arguments.output_path, model=arguments.model)
    arguments.output_path.mkdir(parents=True, exist_ok=True)

    import torch
    from PIL import Image
    from tqdm import tqdm

    from qwen_image.kernel_check import distrust_kernels
    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.loading.weights import empty_transformer, float8_warning
    from qwen_image.pipeline import QwenImagePipeline
    from train.lora.inject import attach_lora, set_lora_enabled
    from train.lora.preset_loras import Preset
    from train.lora.several_loras import as_one
    from train.watching.image_grid import make_grid, save_png

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source, lora = ModelSource.from_options(arguments), None
    files = resolve_model(source, ("transformer",))
    notes = float8_warning(files)
    if arguments.lora:  # before the model is read
        empty = empty_transformer(files)
        lora = as_one([Preset.read(text, empty) for text in arguments.lora])
        notes += lora.notes
    for note in notes:
        print(one_line(note), file=sys.stderr)
    pipeline = QwenImagePipeline.from_pretrained(
        source,
        dtype=getattr(torch, arguments.dtype),
        device=device,
        progress=True,
    )
    assert pipeline.transformer is not None
    config, dtype = pipeline.transformer.config, getattr(torch, arguments.dtype)
    for line in distrust_kernels(config, dtype, torch.device(device), float8=False, trains=False):
        print(line, file=sys.stderr)
    if lora is not None:
        attach_lora(pipeline.transformer, lora, arguments.lora_strength)

    with_lora = [False, True] if arguments.compare else [lora is not None]
    jobs = [(prompt, arguments.seed + i) for prompt in arguments.prompt for i in range(arguments.num_images)]
    rows: list[list[Image.Image]] = []
    with tqdm(total=len(with_lora) * len(jobs) * arguments.num_inference_steps, unit="step", disable=None) as progress:
        for use_lora in with_lora:
            if lora is not None:
                set_lora_enabled(pipeline.transformer, use_lora)
            rows.append([])
            for number, (prompt, seed) in enumerate(jobs):
                pixels = pipeline.generate(
                    [prompt],
                    negative_prompt=arguments.negative_prompt,
                    height=arguments.height,
                    width=arguments.width,
                    num_inference_steps=arguments.num_inference_steps,
                    true_cfg_scale=arguments.true_cfg_scale,
                    seeds=[seed],
                    on_step=lambda step, steps: progress.update(),
                )
                image = Image.fromarray(pixels[0].numpy())
                name = f"{number:03d}-seed{seed}{'' if use_lora or not arguments.compare else '-base'}.png"
                save_png(arguments.output_path / name, image, image_parameters(arguments, prompt, seed, use_lora))
                rows[-1].append(image)
    names = ", ".join(Path(text).name for text in arguments.lora)
    labels = [f"with {names}, strength {arguments.lora_strength:g}" if use else "base" for use in with_lora]
    make_grid(rows, labels, [f"{prompt} (seed {seed})" for prompt, seed in jobs]).save(
        arguments.output_path / "grid.png"
    )
    print(f"{sum(map(len, rows))} images and grid.png: {arguments.output_path}")
    return 0


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a number that no image can be made with, naming the flag and the limits."""
    if arguments.num_images < 1 or arguments.num_inference_steps < 1:
        raise ValueError("--num_images and --num_inference_steps start at 1")
    for flag in ("lora_strength", "true_cfg_scale"):
        if not math.isfinite(getattr(arguments, flag)):
            raise ValueError(f"--{flag} must be a finite number, got {getattr(arguments, flag)}")
    highest = SEEDS - arguments.num_images
    if not 0 <= arguments.seed <= highest:
        raise ValueError(
            f"--seed must lie in 0 … {highest} (seeds count up to 2^63 - 1), got {shown(arguments.seed, 40)}"
        )


def image_parameters(arguments: argparse.Namespace, prompt: str, seed: int, use_lora: bool) -> dict[str, Any]:
    """What is needed to make the image again."""
    return {
        "prompt": prompt,
        "negative_prompt": arguments.negative_prompt,
        "seed": seed,
        "height": arguments.height,
        "width": arguments.width,
        "num_inference_steps": arguments.num_inference_steps,
        "true_cfg_scale": arguments.true_cfg_scale,
        "model": arguments.model,
        "lora": ", ".join(arguments.lora) if use_lora else None,
        "lora_strength": arguments.lora_strength if use_lora else None,
        "dtype": arguments.dtype,
    }


if __name__ == "__main__":
    sys.exit(main())
