"""Images from prompts, with the base model and a LoRA.

    python train/sample.py --model Qwen/Qwen-Image --lora RUN/lora.safetensors --prompt "a lighthouse at dusk" --output_path OUT
    python train/sample.py --model MODEL --lora RUN --prompt "a lighthouse" --num_images 4 --compare --output_path OUT
    python train/sample.py --model MODEL --lora a.safetensors:0.8 --lora b.safetensors:0.5 --prompt "…" --output_path OUT
    python train/sample.py --model Qwen/Qwen-Image-Edit-2511 --source_image cup.jpg --prompt "make it blue" --output_path OUT
    python train/sample.py --model MODEL --lora RUN --prompt prompts.yaml --output_path OUT
    python train/sample.py --model MODEL --checkpoints RUN --strengths 0 0.5 1 --prompt prompts.yaml --output_path OUT

Every image is a PNG with its parameters inside; grid.png shows them side by side, with --compare also without the LoRA.
A file of prompts may say size, guidance, steps, seed, negative prompt and strength for each: train/config/sample_prompts.py.
With --checkpoints or --strengths there is a sheet for each image, a row a LoRA, a column a strength; the base is loaded once.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from files.shown import one_line, shown, tolerant_output
from qwen_image.loading.model_flags import add_model_flags
from qwen_image.model.family import SOURCE_AREA, SOURCE_STEP
from qwen_image.out_of_memory import memory_ran_out
from train.config.check_paths import LARGEST_WEIGHT, check_apart, split_weight
from train.config.sample_prompts import HIGHEST_SEED, SamplePrompt, read_prompts, tell

if TYPE_CHECKING:
    from PIL import Image

    from qwen_image.encoders.source_images import SourceImage
    from qwen_image.pipeline import QwenImagePipeline
    from train.lora.lora_file import LoraFile


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
    add = parser.add_argument
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA file (ours, diffusers', DiffSynth's, ComfyUI's or kohya's) or run folder; repeat for several, which add up",
    )
    add("--lora_strength", type=float, default=1.0, help="what all their updates are multiplied with")
    add(
        "--checkpoints",
        nargs="+",
        default=[],
        metavar="FILE|RUN",
        help="LoRA files, each by itself a row of the sheets; a run folder stands for all of its files",
    )
    add(
        "--strengths",
        nargs="+",
        type=float,
        default=[],
        metavar="X",
        help="each a column of the sheets; 0 is the base",
    )
    add("--prompt", action="append", required=True, help="repeat the flag for several; or a file, .yaml or .jsonl")
    add("--negative_prompt", default=" ", help='what guidance leads away from (default " ")')
    add("--output_path", required=True, type=Path, help="folder for the images")
    add(
        "--source_image",
        action="append",
        default=[],
        metavar="FILE",
        help="edit models: what the prompts are to change; repeat for a second and third one (-2509, -2511)",
    )
    add(
        "--source_pixels",
        type=int,
        default=SOURCE_AREA,
        help="area that source images are stretched to; another than 1048576 (default) is for LoRAs that were trained so",
    )
    add("--height", type=int, help="pixels, a multiple of 16 (default 1024; of edits as the source image)")
    add("--width", type=int, help="pixels, a multiple of 16 (default 1024; of edits as the source image)")
    add("--num_inference_steps", type=int, default=50, help="denoising steps (default 50)")
    add("--true_cfg_scale", type=float, default=4.0, help="guidance; 1 = none (default 4)")
    add("--seed", type=int, default=0, help="seed of a prompt's first image (default 0)")
    add("--num_images", type=int, default=1, help="images a prompt, seeds counting up (default 1)")
    add("--batch_size", type=int, default=4, help="so many images of one size are made together (default 4)")
    add("--compare", action="store_true", help="make each image without the LoRA too")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    add("--device", help="default: cuda if there is one, else cpu")
    add(
        "--base_precision",
        choices=("auto", "dtype", "float8", "int8"),
        default="auto",
        help="of the transformer's blocks; auto: as --dtype says, or what is fastest where that does not fit (default)",
    )
    add(
        "--resident_blocks",
        type=blocks_to_keep,
        metavar="N",
        help="blocks that stay on the GPU, the others come from host memory; auto: as many as fit (default)",
    )
    add("--gpu_memory_limit", type=float, metavar="GIB", help="take the card for one of so many GiB")
    return parser


def blocks_to_keep(text: str) -> int | None:
    """For argparse: a number, or None for auto."""
    if text == "auto":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"say auto or a number of blocks, not {shown(text, 40)}")
    return int(text)


class Shot(NamedTuple):
    """A LoRA at a strength: `lora` is its place among those given, or None for the base."""

    lora: int | None
    strength: float


def sample(arguments: argparse.Namespace) -> int:
    """Generate the images that the arguments describe and write them with a grid."""
    jobs = images_asked(arguments)
    sets = lora_sets(arguments)
    shots = shots_asked(arguments, len(sets))
    check_apart(arguments.output_path, model=arguments.model)
    arguments.output_path.mkdir(parents=True, exist_ok=True)

    from tqdm import tqdm

    from qwen_image.free_memory import peak_bytes
    from train.watching.image_grid import save_png

    pipeline, read = load(arguments, sets, jobs)
    found: dict[Shot, list[Image.Image]] = {}
    total = len(shots) * sum(job.num_inference_steps for job in jobs)
    with tqdm(total=total, unit="step", disable=None) as progress:
        for place in dict.fromkeys(shot.lora for shot in shots):
            with_lora = None if place is None else read(place)
            for shot in (shot for shot in shots if shot.lora == place):
                attach = [replace(job, lora_strength=job.lora_strength * shot.strength) for job in jobs]
                with worn(pipeline, with_lora):
                    found[shot] = draw(pipeline, attach, arguments.batch_size, progress.update)
                for number, (job, image) in enumerate(zip(attach, found[shot], strict=True)):
                    parameters = image_parameters(arguments, job, None if place is None else sets[place])
                    save_png(arguments.output_path / file_name(arguments, number, job, shot, sets), image, parameters)
    sheets = write_sheets(arguments, jobs, sets, shots, found)
    print(f"{sum(map(len, found.values()))} images and {sheets}: {arguments.output_path}")
    assert pipeline.vae is not None
    if (device := pipeline.vae.device).type == "cuda":
        print(f"peak memory {peak_bytes(device) / 2**30:.2f} GiB on the GPU")
    return 0


def images_asked(arguments: argparse.Namespace) -> list[SamplePrompt]:
    """Every image, prompt by prompt, the seeds of one prompt counting up. Raises ValueError, FileNotFoundError."""
    from qwen_image.model.sizes import check_image_size

    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("--height and --width belong together: give both or neither")
    check_numbers(arguments)
    names = ["negative_prompt", "num_inference_steps", "true_cfg_scale", "seed", "source_pixels"]
    if arguments.height is not None:
        check_image_size(arguments.height, arguments.width)
        names += ["height", "width"]
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    defaults = SamplePrompt(prompt="", source_image=tuple(arguments.source_image), **given)
    prompts = read_prompts(arguments.prompt, defaults, sized=arguments.height is not None)
    return [
        replace(prompt, seed=(prompt.seed + number) % (HIGHEST_SEED + 1))
        for prompt in prompts
        for number in range(arguments.num_images)
    ]


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a number that no image can be made with, naming the flag and the limits."""
    if arguments.num_images < 1 or arguments.num_inference_steps < 1 or arguments.batch_size < 1:
        raise ValueError("--num_images, --num_inference_steps and --batch_size start at 1")
    for flag in ("lora_strength", "true_cfg_scale", "strengths"):
        for number in getattr(arguments, flag) if flag == "strengths" else [getattr(arguments, flag)]:
            if not math.isfinite(number):
                raise ValueError(f"--{flag} must be a finite number, got {number}")
            if abs(number) > LARGEST_WEIGHT:
                limits = f"-{LARGEST_WEIGHT:g} … {LARGEST_WEIGHT:g}"
                raise ValueError(f"--{flag} must lie in {limits}, got {number:g}: images are lost long before")
    if arguments.source_pixels < SOURCE_STEP**2:
        raise ValueError(f"--source_pixels must be at least {SOURCE_STEP**2}, got {arguments.source_pixels}")
    highest = HIGHEST_SEED + 1 - arguments.num_images
    if not 0 <= arguments.seed <= highest:
        raise ValueError(
            f"--seed must lie in 0 … {highest} (seeds count up to 2^63 - 1), got {shown(arguments.seed, 40)}"
        )


def lora_sets(arguments: argparse.Namespace) -> list[list[str]]:
    """The LoRAs that are tried one after the other, each as the files that add up to it. Raises ValueError, OSError."""
    if arguments.checkpoints and arguments.lora:
        raise ValueError("--checkpoints are LoRAs each by itself, --lora adds up: give one of the two")
    if not arguments.lora and not arguments.checkpoints and (arguments.compare or arguments.strengths):
        flag = "--compare shows images with and without a LoRA" if arguments.compare else "--strengths are a LoRA's"
        raise ValueError(f"{flag}: give one with --lora")
    sets = [[str(path)] for text in arguments.checkpoints for path in files_of(Path(text).expanduser())]
    if arguments.lora:
        sets = [arguments.lora]
    for text in (text for each in sets for text in each):
        if not split_weight(text)[0].is_file():
            flag = "--lora" if arguments.lora else "--checkpoints"
            raise FileNotFoundError(f"{flag}: no file at {shown(split_weight(text)[0])}")
    return sets


def files_of(path: Path) -> list[Path]:
    """A LoRA file; or all of a run folder's, in the order in which they were written. Raises FileNotFoundError for none."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("lora*.safetensors"), key=lambda file: (file.stat().st_mtime, file.name))
    if not found:
        raise FileNotFoundError(f"--checkpoints: {shown(path)} is a folder without LoRA files")
    return found


def shots_asked(arguments: argparse.Namespace, sets: int) -> list[Shot]:
    """What each image is made with: the base at most once, first."""
    strengths = arguments.strengths or [arguments.lora_strength]
    asked = [Shot(place, strength) for place in range(sets) for strength in strengths]
    base = Shot(None, 0.0)
    if not sets or arguments.compare:
        asked.insert(0, base)
    if arguments.strengths:  # each LoRA at 0 is the same picture
        asked = [base if shot.strength == 0 else shot for shot in asked]
    return sorted(dict.fromkeys(asked), key=lambda shot: shot.lora is not None)


def load(
    arguments: argparse.Namespace, sets: Sequence[Sequence[str]], jobs: Sequence[SamplePrompt]
) -> tuple["QwenImagePipeline", Callable[[int], "LoraFile"]]:
    """The pipeline, and a function that reads the LoRA of a place in `sets`; all are looked at before the model is read.

    The text encoder has encoded every prompt and left the room to the transformer. Raises ValueError for what doesn't fit.
    """
    import torch

    from qwen_image.encoders.vae import VAE
    from qwen_image.free_memory import limit_device
    from qwen_image.kernel_check import distrust_kernels
    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.loading.weights import empty_transformer, float8_warning
    from qwen_image.noise_schedule import SigmaSchedule
    from qwen_image.pipeline import QwenImagePipeline
    from train.fit.sampling_plan import ImageWork, SamplingPlan
    from train.lora.preset_loras import Preset, as_one

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    limit_device(device, arguments.gpu_memory_limit)
    dtype = getattr(torch, arguments.dtype)
    source = ModelSource.from_options(arguments)
    alone = resolve_model(
        source, ("transformer",)
    )  # a LoRA that doesn't fit is told before an encoder that isn't there
    for job in jobs:
        alone.member.check_sources(len(job.source_image), f"the prompt {shown(repr(job.prompt), 60)}")
    empty = empty_transformer(alone)

    def parts(place: int) -> list[Preset]:
        return [Preset.read(text, empty) for text in sets[place]]

    def read(place: int) -> "LoraFile":
        return as_one(parts(place))

    work = ImageWork.of(jobs, dtype, arguments.base_precision, arguments.resident_blocks)
    notes = list(float8_warning(alone))
    for place in range(len(sets)):
        loras = parts(place)
        notes += [note for each in loras for note in each.notes(alone.member)]
        work = work.wearing(as_one(loras))  # refuses what can't be added up
    files = resolve_model(source)
    plan = SamplingPlan.of(files, work, device)
    notes += plan.lines + tuple(distrust_kernels(empty.config, dtype, device, plan.base.float8, trains=False))
    for note in notes:
        print(one_line(note), file=sys.stderr)
    schedule = SigmaSchedule.from_config_file(files["scheduler"].folder / "scheduler_config.json")
    known = plan.encode(files, dict.fromkeys(told for job in jobs for told in tell(job)), device)
    transformer = plan.load_transformer(files, schedule, device)
    return QwenImagePipeline(transformer, known, VAE.from_files(files["vae"], dtype, device), schedule, files), read


@contextmanager
def worn(pipeline: "QwenImagePipeline", lora: "LoraFile | None") -> Iterator[None]:
    """Inside, the transformer carries `lora`; then it is the base again."""
    from train.lora.inject import attach_lora, detach_lora

    assert pipeline.transformer is not None
    if lora is not None:
        attach_lora(pipeline.transformer, lora)
    try:
        yield
    finally:
        if lora is not None:
            detach_lora(pipeline.transformer)


def draw(
    pipeline: "QwenImagePipeline", jobs: Sequence[SamplePrompt], batch_size: int, stepped: Callable[[int], object]
) -> list["Image.Image"]:
    """The images of `jobs`, those of one size, schedule, guidance and strength together, so many at once.

    Halves a batch that runs out of memory, which is said. `stepped` is told denoising steps, each image's by itself.
    """
    from PIL import Image

    from train.lora.inject import set_lora_strength

    assert pipeline.transformer is not None
    alike: dict[SamplePrompt, list[int]] = {}
    for place, job in enumerate(jobs):
        alike.setdefault(replace(job, prompt="", seed=0), []).append(place)
    found: dict[int, Image.Image] = {}
    for settings, places in alike.items():
        set_lora_strength(pipeline.transformer, settings.lora_strength)
        waiting = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
        while waiting:
            batch = waiting.pop(0)
            pixels = generate(pipeline, settings, [jobs[place] for place in batch], stepped)
            if pixels is None:
                half = len(batch) // 2
                print(f"{len(batch)} images at once don't fit into memory: {half} at a time", file=sys.stderr)
                waiting = [batch[:half], batch[half:], *waiting]
                continue
            found |= {place: Image.fromarray(image.numpy()) for place, image in zip(batch, pixels, strict=True)}
    return [found[place] for place in range(len(jobs))]


def generate(
    pipeline: "QwenImagePipeline",
    settings: SamplePrompt,
    batch: Sequence[SamplePrompt],
    stepped: Callable[[int], object],
) -> Any:
    """uint8 [B, H, W, 3]; None where several images ran out of memory. A single one that does raises."""
    done = 0

    def count(step: int, steps: int) -> None:
        nonlocal done
        done += 1
        stepped(len(batch))

    try:
        return pipeline.generate(
            [job.prompt for job in batch],
            negative_prompt=settings.negative_prompt,
            sources=[sources_of(settings)] * len(batch) if settings.source_image else (),
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            true_cfg_scale=settings.true_cfg_scale,
            seeds=[job.seed for job in batch],
            on_step=count,
            only_finite=True,
        )
    except RuntimeError as error:
        if len(batch) == 1 or not memory_ran_out(error):
            raise
    stepped(-done * len(batch))
    return None


def sources_of(job: SamplePrompt) -> list["SourceImage"]:
    """Its source images, read. Raises OSError and ValueError, naming the file."""
    from qwen_image.encoders.source_images import read_source

    return [read_source(Path(name).expanduser(), job.source_pixels) for name in job.source_image]


# ── names and sheets ──────────────────────────────────────────────────────────────────────────────────────────────────


def file_name(
    arguments: argparse.Namespace, number: int, job: SamplePrompt, shot: Shot, sets: Sequence[Sequence[str]]
) -> str:
    """`003-seed7.png`, `003-seed7-base.png`; of sheets `003-seed7-lora-500-0.5.png`."""
    ending = ""
    if shot.lora is None:
        ending = "-base" if sets else ""
    elif is_sheet(arguments):
        ending = f"-{lora_names(sets)[shot.lora]}-{shot.strength:g}"
    return f"{number:03d}-seed{job.seed}{ending}.png"


def is_sheet(arguments: argparse.Namespace) -> bool:
    return bool(arguments.checkpoints or arguments.strengths)


def lora_names(sets: Sequence[Sequence[str]]) -> list[str]:
    """Short names of the LoRAs, each once: the files', with their folders' where two are called alike."""
    paths = [[split_weight(text)[0] for text in each] for each in sets]
    names = ["+".join(path.stem for path in each) for each in paths]
    if len(set(names)) == len(names):
        return names
    return [
        f"{place}-{each[0].parent.name}-{name}" for place, (each, name) in enumerate(zip(paths, names, strict=True))
    ]


def write_sheets(
    arguments: argparse.Namespace,
    jobs: Sequence[SamplePrompt],
    sets: Sequence[Sequence[str]],
    shots: Sequence[Shot],
    found: dict[Shot, list["Image.Image"]],
) -> str:
    """Write grid.png of all images; or for --checkpoints and --strengths a sheet for each image. Returns what was written."""
    from train.watching.image_grid import make_grid
    from train.watching.sample_images import source_rows

    titles = [f"{shown(job.prompt)} (seed {job.seed})" for job in jobs]
    if not is_sheet(arguments):
        names = ", ".join(Path(text).name for each in sets for text in each)
        labels = ["base" if shot.lora is None else f"with {names}, strength {shot.strength:g}" for shot in shots]
        given = source_rows(jobs)
        labels = [f"source image {n + 1}" for n in range(len(given))] + labels
        make_grid([*given, *(found[shot] for shot in shots)], labels, titles).save(arguments.output_path / "grid.png")
        return "grid.png"
    strengths = sorted({shot.strength for shot in shots})
    columns = [f"strength {strength:g}" if strength else "base" for strength in strengths]
    for number, title in enumerate(titles):
        rows = []
        for place in range(len(sets)):
            row = [found.get(Shot(place, s) if s else Shot(None, 0.0)) for s in strengths]
            rows.append([None if images is None else images[number] for images in row])
        name = "grid.png" if len(titles) == 1 else f"grid-{number:03d}.png"
        labels = [f"{label}: {title}" if not place else label for place, label in enumerate(lora_names(sets))]
        make_grid(rows, labels, columns).save(arguments.output_path / name)
    return "grid.png" if len(titles) == 1 else f"{len(titles)} sheets"


def image_parameters(arguments: argparse.Namespace, job: SamplePrompt, lora: Sequence[str] | None) -> dict[str, Any]:
    """What is needed to make the image again."""
    return job.facts() | {
        "model": arguments.model,
        "lora": None if lora is None else ", ".join(lora),
        "lora_strength": None if lora is None else job.lora_strength,
        "dtype": arguments.dtype,
    }


if __name__ == "__main__":
    sys.exit(main())
