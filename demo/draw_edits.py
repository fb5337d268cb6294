"""Pairs for the demo of edits: a drawn picture, an instruction, and the picture as it is told to become.

    python demo/draw_edits.py --output_path pairs

Laid out as users have them: source/NAME.png, target/NAME.png and the instruction in target/NAME.txt. Two kinds take turns:
"make the … blue" and "mirror the picture". With --identity the target is the source and the instruction "change nothing".
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Write the folders from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write source/ and target/ into")
    parser.add_argument("--count", type=int, default=48, help="pairs, half of each kind (48)")
    parser.add_argument("--side", type=int, default=96, help="of the square pictures in pixels (96)")
    parser.add_argument("--first_seed", type=int, default=0, help="of the pictures (0); others give others")
    parser.add_argument("--identity", action="store_true", help="targets that are their sources")
    arguments = parser.parse_args(argv)
    try:
        if arguments.count < 1 or arguments.side < 32:
            raise ValueError(f"--count starts at 1 and --side at 32, got {arguments.count} and {arguments.side}")
        write_edits(arguments.output_path, arguments.count, arguments.side, arguments.first_seed, arguments.identity)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"drew {arguments.count} pairs into {arguments.output_path}")
    return 0


def write_edits(folder: Path, count: int, side: int, first_seed: int = 0, identity: bool = False) -> None:
    """Write so many pairs of side × side pixels; the same seed draws the same ones."""
    from PIL import Image

    from demo.pictures.painting import paint
    from demo.pictures.random_scenes import random_scene

    for name in ("source", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        scene = random_scene(first_seed + number, things=1)
        before = paint(scene, side)
        if identity:
            instruction, after = "change nothing", before
        elif number % 2:
            instruction, after = "mirror the picture", before[:, ::-1]
        else:
            (thing,) = scene.things
            instruction = f"make the {thing.shape} blue"
            after = paint(replace(scene, things=(replace(thing, color="blue"),)), side)
        Image.fromarray(before).save(folder / "source" / f"{number:03d}.png")
        Image.fromarray(after).save(folder / "target" / f"{number:03d}.png")
        (folder / "target" / f"{number:03d}.txt").write_text(instruction)


if __name__ == "__main__":
    sys.exit(main())
