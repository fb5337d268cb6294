"""Measure how well the drawing model draws: it draws what captions say, a classifier names what it sees.

python demo/score_drawings.py --model demo/drawing_model
python demo/score_drawings.py --model demo/drawing_model --pictures 64 --preview preview.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that demo/train_drawing_model.py wrote")
    parser.add_argument("--pictures", type=int, default=128, help="of held-out pairs; half as many of seen ones (128)")
    parser.add_argument("--side", type=int, default=128, help="of the pictures in pixels (128)")
    parser.add_argument("--preview", type=Path, help="PNG file for the first pictures with their captions")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    arguments = parser.parse_args(argv)
    try:
        return measure(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(arguments: argparse.Namespace) -> int:
    """Print both scores."""
    if arguments.pictures < 1:
        raise ValueError(f"--pictures must be at least 1, got {arguments.pictures}")
    import torch

    from demo.drawing.classifier import FILE, load
    from demo.drawing.scoring import score_model

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    judge = load(arguments.model / FILE, device)
    facts = score_model(arguments.model, judge, arguments.pictures, arguments.side, device, arguments.preview)
    for name in ("held_out", "seen"):
        shares = ", ".join(f"{question} {share:.1%}" for question, share in facts[name].items())
        print(f"{name.replace('_', ' ')} pairs: {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
