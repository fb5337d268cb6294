"""What --masked_loss costs a step: with and without it, in turns in one process, on shards with masks.

    python bench/mask_cost.py --out cost.json             # full size, 1024² batch 1, bf16, ZeRO-2: 5 minutes
    python bench/mask_cost.py --base_precision float8
    python bench/mask_cost.py --tiny                      # 2 narrow blocks: to try the script, on the CPU too

Turns and clocks are those of bench/watching_cost.py. Both kinds of steps have CUDA graphs of their own. Wanted: at most 1 %.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.watching_cost import Switch, run

MIN_WEIGHT = 0.1


class MaskSwitch(Switch):
    """Lets the loss have masks in the blocks that are on; nothing else is changed."""

    def turn(self, loop: Any, on: bool) -> None:
        loop.engine.module.mask_min_weight = MIN_WEIGHT if on else None

    @contextmanager
    def patches(self) -> Iterator[None]:
        yield


def main(argv: list[str] | None = None) -> int:
    return run(argv, __doc__, MaskSwitch, ["--masked_loss", "--mask_min_weight", str(MIN_WEIGHT)])


if __name__ == "__main__":
    sys.exit(main())
