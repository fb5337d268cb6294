"""What the demo's LoRA changed: pictures at strengths 0, 0.5 and 1, and scores of the new subject, the new style and the rest.

    python demo/compare_strengths.py --model demo/drawing_model --lora demo_output/run/lora.safetensors --output_path samples

grid.png has a column for each prompt: pictures like those of the training set, the new things in combinations that the set
does not have, and prompts that have nothing to do with it. Exits with 1 when the LoRA does not show what it learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

ENLARGED = 2  # the grid shows a pixel as so many, squared


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that demo/train_drawing_model.py wrote")
    parser.add_argument(
        "--lora", type=Path, required=True, help="LoRA file trained on demo/draw_pictures.py's pictures"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="folder for grid.png and scores.json")
    parser.add_argument("--side", type=int, default=128, help="of the pictures in pixels (128)")
    arguments = parser.parse_args(argv)
    try:
        return compare(arguments.model, arguments.lora, arguments.output_path, arguments.side)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(model: Path, lora: Path, output: Path, side: int) -> int:
    """Write the grid and the scores; 0, or 1 when they are not as they must be."""
    if not lora.is_file():
        raise FileNotFoundError(f"--lora: no file at {lora}")
    from PIL import Image

    from demo.drawing.trial import STRENGTHS, try_lora
    from demo.pictures.new_things import WISHES
    from train.watching.image_grid import make_grid

    trial = try_lora(model, lora, side)
    output.mkdir(parents=True, exist_ok=True)
    size = (side * ENLARGED, side * ENLARGED)
    rows = [[Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in row] for row in trial.grid]
    kinds = {"trained": "as trained", "new": "new combination", "both": "both at once", "other": "something else"}
    columns = [f"{kinds[wish.kind]}: {wish.prompt}" for wish in WISHES]
    labels = ["base" if s == 0 else f"LoRA, strength {s:g}" for s in STRENGTHS]
    make_grid(rows, labels, columns).save(output / "grid.png")
    scores = {name: value for name, value in asdict(trial).items() if name != "grid"}
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    print("\n".join(trial.lines()))
    for failure in trial.failures():
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(trial.failures()))


if __name__ == "__main__":
    sys.exit(main())
