"""The pictures that the demo's LoRA learns from: a subject and a style that the drawing model has never seen.

    python demo/draw_pictures.py --output_path pictures

Laid out as users have them: `name.png` with its caption in `name.txt`. Half show the blorb, a one-eyed monster, half
show known things as blueprints.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Write the folder from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write pictures and captions into")
    parser.add_argument("--count", type=int, default=36, help="pictures, half of each kind (36)")
    parser.add_argument("--side", type=int, default=128, help="of the square pictures in pixels (128)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.count < 2 or arguments.side < 32:
            raise ValueError(f"--count starts at 2 and --side at 32, got {arguments.count} and {arguments.side}")
        from demo.pictures.new_things import write_new_things

        written = write_new_things(arguments.output_path, arguments.count, arguments.side)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"drew {len(written)} pictures with captions into {arguments.output_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
