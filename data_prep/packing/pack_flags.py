"""make_shards.py's command line: its flags, and the typed options that they make."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import platform
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image.model.family import SOURCE_AREA, SOURCE_STEP

if TYPE_CHECKING:
    from data_prep.images.header import ImageOptions
    from data_prep.packing.plan import PlanOptions
    from data_prep.sources.find_inputs import Sources

# Packages that the bytes of a set may depend on.
TOOLS = ("pillow", "simplejpeg", "torch", "numpy", "pyarrow", "pillow-heif", "pillow-jxl-plugin")


def parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """Read make_shards.py's command line."""
    parser = argparse.ArgumentParser(
        prog="make_shards.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("input").add_argument
    add(
        "--dataset_base_path",
        type=Path,
        required=True,
        help="folder of images, tars or parquet, with all its subfolders",
    )
    add("--dataset_metadata_path", type=Path, help="csv, jsonl, json or parquet; else metadata.* in the folder is used")
    add("--image_column", help="default: image, file_name or image_path")
    add(
        "--caption_column",
        help="default: prompt, text, caption or captions; several, with commas, are several captions",
    )
    add("--caption_lines", action="store_true", help="each line of a caption file is a caption of its own")
    add(
        "--weight_column",
        help="repeats an epoch of training, fractions too (default: weight, num_repeats or repeats); none",
    )
    add(
        "--kohya_folders",
        choices=("on", "off"),
        default="on",
        help="on: images of a folder 10_name come ten times an epoch (default); off: folders' names mean nothing",
    )
    add(
        "--source_columns",
        help="columns of source images of edits, with commas; none: pack no pairs (default: source_image, source_image_2 …, "
        "edit_image or control_path, where there are any, and folders target/ and source/, source_2/ … with equal names)",
    )
    add("--allow_links", action="store_true", help="follow links that lead out of the folder")
    add = parser.add_argument_group("masks (for train_lora.py --masked_loss)").add_argument
    add(
        "--masks",
        choices=("auto", "off"),
        default="auto",
        help="auto: x-masklabel.png or x.mask.png beside x.jpg (in tars too), and a column mask or mask_path of metadata; off: "
        "none, such files are pictures like others",
    )
    add("--mask_folder", type=Path, help="folder of masks with the stems and subfolders of the images; white: learn")
    add("--mask_column", help="of metadata; none: no column is read for masks")
    add("--mask_from_alpha", action="store_true", help="the alpha channel is the mask of images that have no other")
    add("--on_missing_mask", choices=("whole", "skip", "error"), default="whole", help="whole: all of the image counts")
    add = parser.add_argument_group("output").add_argument
    add("--output_path", type=Path, required=True, help="folder for the shards; made if it isn't there")
    add("--image_format", choices=("jpg", "png"), default="jpg")
    add("--quality", type=int, default=95, help="of jpg, 4:4:4 (default: %(default)s)")
    add("--samples_per_shard", type=int, default=10_000, help="at most (default: %(default)s)")
    add("--shard_megabytes", type=int, default=1000, help="about (default: %(default)s)")
    add = parser.add_argument_group("size").add_argument
    add("--height", type=int, help="one fixed size, with --width; multiples of 16")
    add("--width", type=int)
    add("--max_pixels", type=int, help="area of the buckets (default: 1048576)")
    add("--resolutions", help="several areas by the side of their square, as in 512,768,1024; the largest that fits")
    add(
        "--each_image",
        choices=("largest", "all"),
        default="largest",
        help="of several --resolutions: largest stores an image once (default); all once for each that it fills",
    )
    add("--bucket_step", type=int, default=16, choices=(16, 32, 64), help="sides are multiples of it")
    add(
        "--source_pixels",
        type=int,
        default=SOURCE_AREA,
        help="area of source images of edits; another than the default of 1048576 is not what inference gives the model",
    )
    add("--max_upscale", type=_fraction, default=Fraction(1), help="images are never enlarged by more (default: 1)")
    add(
        "--resize", choices=("auto", "torch", "pillow"), default="auto", help="auto: torch where it has the fast kernel"
    )
    add = parser.add_argument_group("filters").add_argument
    add("--min_pixels", type=int, default=0, help="width x height of the source, at least")
    add("--max_aspect_ratio", type=_fraction, default=Fraction(4), help="long side : short side (default: 4)")
    add("--max_image_pixels", type=int, default=200_000_000, help="refuse larger ones unread (default: %(default)s)")
    add("--on_missing_caption", choices=("skip", "empty", "error"), default="skip")
    add("--on_duplicate_stem", choices=("warn", "error"), default="warn", help="a.jpg and a.png share a.txt")
    add("--on_animation", choices=("first", "reject"), default="first", help="take the first frame, or leave it out")
    add(
        "--on_corrupt",
        choices=("fail", "keep"),
        default="fail",
        help="damaged image data fails, or is kept as a forgiving decoder shows it (half grey, say)",
    )
    add("--background", default="255,255,255", help="behind transparent pixels, R,G,B (default: white)")
    add("--remove_duplicates", choices=("none", "exact", "perceptual"), default="none", help="keep the first of equals")
    add("--duplicate_distance", type=int, default=4, help="differing bits of 64 for perceptual (default: %(default)s)")
    add("--max_failed_ratio", type=float, default=0.5, help="stop above this share of failures (default: %(default)s)")
    add = parser.add_argument_group("running").add_argument
    add("--num_workers", type=int, help="processes; 0 works in this one (default: one a core)")
    add("--task_id", type=int, default=0, help="this task of a Slurm array, from 0")
    add("--num_tasks", type=int, default=1)
    add("--plan_only", action="store_true", help="decide what goes where, and stop; tasks of an array then share it")
    add("--dry_run", action="store_true", help="print what would come out, and write nothing")
    return parser.parse_args(argv)


def image_options(args: argparse.Namespace) -> ImageOptions:
    """How images are judged and stored; `resize` is still to be set. Raises ValueError."""
    from data_prep.images.buckets import BucketOptions
    from data_prep.images.header import ImageOptions

    chosen = [flag for flag in ("max_pixels", "resolutions") if getattr(args, flag) is not None]
    if (args.height is None) != (args.width is None):
        raise ValueError("--height and --width belong together: give both or neither")
    if args.height is not None:
        chosen.insert(0, "height --width")
    if len(chosen) > 1:
        raise ValueError(f"--{' and --'.join(chosen)} exclude each other: choose one")
    areas: tuple[int, ...] = (args.max_pixels if args.max_pixels is not None else 1024 * 1024,)
    if args.resolutions is not None:
        areas = tuple(sorted({side * side for side in _integers("resolutions", args.resolutions)}, reverse=True))
    if args.each_image == "all" and args.resolutions is None:
        raise ValueError(
            "--each_image all stores an image at several sizes: give them, as in --resolutions 512,768,1024"
        )
    fixed = (args.width, args.height) if args.height is not None else None
    background = _integers("background", args.background)
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise ValueError(f"--background {args.background}: must be three numbers from 0 to 255, as in 255,255,255")
    return ImageOptions(
        buckets=BucketOptions(
            areas,
            args.bucket_step,
            fixed,
            args.max_upscale,
            args.max_aspect_ratio,
            every_area=args.each_image == "all",
        ),
        format=args.image_format,
        quality=args.quality,
        background=(background[0], background[1], background[2]),
        max_image_pixels=args.max_image_pixels,
        min_pixels=args.min_pixels,
        on_animation=args.on_animation,
        on_corrupt=args.on_corrupt,
        source_pixels=_source_pixels(args.source_pixels),
        mask_from_alpha=args.mask_from_alpha,
    )


def _source_pixels(value: int) -> int:
    if not SOURCE_STEP**2 <= value <= 1 << 24:
        raise ValueError(f"--source_pixels {value}: must be from {SOURCE_STEP**2} to {1 << 24}")
    return value


def plan_options(args: argparse.Namespace) -> PlanOptions:
    """What the plan decides beyond single images. Raises ValueError."""
    from data_prep.packing.plan import PlanOptions

    if args.remove_duplicates == "perceptual" and importlib.util.find_spec("imagehash") is None:
        raise ValueError("--remove_duplicates perceptual needs ImageHash: pip install ImageHash")
    return PlanOptions(
        on_missing_caption=args.on_missing_caption,
        on_missing_mask=args.on_missing_mask,
        remove_duplicates=args.remove_duplicates,
        duplicate_distance=args.duplicate_distance,
        samples_per_shard=args.samples_per_shard,
        shard_bytes=args.shard_megabytes * 10**6,
    )


def sources(args: argparse.Namespace) -> Sources:
    """Where the images come from. Raises FileNotFoundError or ValueError."""
    from data_prep.sources.find_inputs import Sources

    if args.masks == "off":
        flags = ("mask_folder", "mask_column", "mask_from_alpha", "on_missing_mask")
        given = [flag for flag in flags if getattr(args, flag) not in (None, False, "whole")]
        if given:
            raise ValueError(f"--masks off and --{given[0]} contradict each other: give one of them")
    return Sources(
        args.dataset_base_path,
        args.dataset_metadata_path,
        image_column=args.image_column,
        caption_column=args.caption_column,
        weight_column=args.weight_column,
        kohya_folders=args.kohya_folders == "on",
        exclude=args.output_path,
        allow_links=args.allow_links,
        on_duplicate_stem=args.on_duplicate_stem,
        source_columns=_source_columns(args.source_columns),
        caption_lines=args.caption_lines,
        mask_names=args.masks == "auto",
        mask_folder=args.mask_folder,
        mask_column=args.mask_column if args.masks == "auto" else "none",
    )


def _source_columns(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


def manifest_options(images: ImageOptions, planning: PlanOptions) -> dict[str, Any]:
    """Everything that decides over the bytes of the shards, as it stands in the manifest.

    The optional plugins are in it: a machine that reads HEIC and one that doesn't would not pack the same set.
    """
    from data_prep.images.formats import installed_plugins

    options = dataclasses.asdict(images) | dataclasses.asdict(planning)
    buckets = options.pop("buckets")
    buckets.pop("stretch")  # of pairs, by their nature
    if buckets.pop("every_area"):
        options["each_image"] = "all"
    if options["source_pixels"] == SOURCE_AREA:
        options.pop("source_pixels")
    for name, default in (("mask_from_alpha", False), ("on_missing_mask", "whole")):
        if options[name] == default:  # as plans were before there were masks
            options.pop(name)
    ratios = {name: float(buckets.pop(name)) for name in ("max_upscale", "max_aspect_ratio")}
    buckets = {name: list(value) if isinstance(value, tuple) else value for name, value in buckets.items()}
    options["background"] = list(options["background"])
    options["image_plugins"] = list(installed_plugins())
    return options | {"bucket_" + name if name == "step" else name: value for name, value in buckets.items()} | ratios


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for tool in TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _fraction(text: str) -> Fraction:
    """argparse tells ValueErrors to the user, others not."""
    try:
        return Fraction(text)
    except ZeroDivisionError:
        raise ValueError(text) from None


def _integers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{flag} {text}: must be whole numbers with commas between them") from None
