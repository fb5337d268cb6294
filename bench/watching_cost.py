"""What watching costs: steps of train_lora.py with and without the metrics that look into them, in turns in one process.

    python bench/watching_cost.py --out cost.json             # full size, 1024² batch 1, bf16, ZeRO-2, W&B offline: 5 minutes
    python bench/watching_cost.py --base_precision float8
    python bench/watching_cost.py --tiny                      # 2 narrow blocks: to try the script, on the CPU too

Watched: marks within steps, σ and losses by σ, tokens, arithmetic, norms of the LoRA. Blocks of --log_steps steps, a row of
metrics each, go on, off, off, on, so that a slow drift cancels. A block's time lies between time stamps of the device's own,
from its second step to the next block's second, since a row is written a step late. Wanted: less than 0.5 % of a step.
"""

import argparse
import importlib.util
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.out_file import out_file, write_numbers

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 4  # blocks that don't count
TURNS = (True, False, False, True)


def main(argv: list[str] | None = None) -> int:
    return run(argv, __doc__, Switch)


def run(argv: list[str] | None, description: str | None, kind: "type[Switch]", more: Sequence[str] = ()) -> int:
    """The script: what a switch of this `kind` turns on and off, in a run with `more` flags, costs a step."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="that count, half of them with it on (default 240)")
    parser.add_argument("--log_steps", type=int, default=10, help="as train_lora.py's (default 10)")
    parser.add_argument("--base_precision", default="dtype", help="as train_lora.py's (default dtype)")
    parser.add_argument("--side", type=int, default=1024, help="of the images in pixels (default 1024)")
    parser.add_argument("--text", type=int, default=128, help="text tokens (default 128)")
    parser.add_argument("--layers", type=int, default=60, help="blocks of the transformer (default 60)")
    parser.add_argument("--tiny", action="store_true", help="2 narrow blocks, 32 pixels")
    parser.add_argument("--folder", type=Path, help="for data and run folder; removed (default: a temporary one)")
    parser.add_argument("--out", type=out_file, help="JSON file for all numbers")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="watching_cost_", dir=options.folder))
    try:
        switch = kind(options.log_steps)
        blocks, host = measure(options, folder, switch, more)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = compare(blocks, host, options.log_steps)
    for name, value in found.items():
        print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    if options.out:
        write_numbers(options.out, {**found, "blocks": blocks})
    return 0


def measure(
    options: argparse.Namespace, folder: Path, switch: "Switch", more: Sequence[str]
) -> tuple[list[dict[str, Any]], float]:
    """Seconds a step of each block, on or off; and seconds a step that the host spends on it."""
    from bench.random_transformer import drawn_instead_of_read
    from demo.random_model import write_random_encoded, write_random_model
    from train import train_lora

    side, text, dim = (32, 8, 64) if options.tiny else (options.side, options.text, 3584)
    shape: dict[str, Any] = {"layers": 2, "heads": 1} if options.tiny else {"layers": options.layers}
    write_random_model(folder / "model", **shape, text_dim=dim, hollow=not options.tiny)
    data = write_random_encoded(folder / "data", 8, side, side, [text] * 8, dim, masks="--masked_loss" in more)
    steps = options.steps + WARM_UP * options.log_steps + 2
    flags = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--model", str(folder / "model")]
    flags += ["--data", str(data), "--output_path", str(folder / "run"), "--max_steps", str(steps), "--save_steps", "0"]
    wandb = "disabled" if importlib.util.find_spec("wandb") is None else "offline"
    flags += ["--log_steps", str(options.log_steps), "--wandb_mode", wandb, "--checkpoint_minutes", "0"]
    flags += ["--activation_checkpointing", "full"] if options.tiny else ["--cuda_graphs", "on"]
    flags += ["--base_precision", options.base_precision, "--report", "off", *more]
    with switch.installed(), nullcontext() if options.tiny else drawn_instead_of_read():
        if code := train_lora.main(flags):
            raise RuntimeError(f"train_lora.py ended with {code}")
    return switch.blocks(), switch.host_seconds / max(1, switch.steps_on)


class Switch:
    """Turns watching on and off from block to block, and marks where blocks begin on the device's own clock.

    A subclass turns something else: before each step it is asked to `turn` it.
    """

    def __init__(self, block_steps: int) -> None:
        import torch

        from train.watching.step_clock import GpuClock, HostClock

        self.block_steps, self.step = block_steps, 0
        self.clock = GpuClock() if torch.cuda.is_available() else HostClock()
        self.marks: list[object] = []
        self.host_seconds, self.steps_on = 0.0, 0

    def on(self, step: int) -> bool:
        """Whether it is on in the step after `step` ones."""
        return TURNS[step // self.block_steps % len(TURNS)]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, train_lora.main is watched or not, step by step."""
        from train.train_lora import Loop

        optimizer_step = Loop.optimizer_step

        def stepped(loop: Any, batches: Any) -> None:
            self.turn(loop, self.on(self.step))
            if self.step % self.block_steps == 1:  # the row of the block before was written after the first step
                self.marks.append(self.clock.mark())
            self.steps_on += self.on(self.step)
            optimizer_step(loop, batches)
            self.step += 1

        with patch.object(Loop, "optimizer_step", stepped), self.patches():
            yield

    def turn(self, loop: Any, on: bool) -> None:
        """Before each step; watching is turned by `patches` alone."""

    @contextmanager
    def patches(self) -> Iterator[None]:
        """Inside, what looks into steps does so in those that are watched."""
        from train.train_lora import Loop
        from train.watching.step_clock import TimeSplit
        from train.watching.step_statistics import StepStatistics

        begin, reached = TimeSplit.begin, TimeSplit.reached
        saw, parts = StepStatistics.saw, Loop.parts

        def only_if_on(call: Callable[..., Any], otherwise: Any = None, late: int = 0) -> Callable[..., Any]:
            def switched(*arguments: Any) -> Any:
                if not self.on(self.step - late):
                    return otherwise
                began = time.perf_counter()
                try:
                    return call(*arguments)
                finally:
                    self.host_seconds += time.perf_counter() - began

            return switched

        with (
            patch.object(Loop, "parts", only_if_on(parts, [], late=1)),  # of the steps done
            patch.object(TimeSplit, "begin", only_if_on(begin)),
            patch.object(TimeSplit, "reached", only_if_on(reached)),
            patch.object(StepStatistics, "saw", only_if_on(saw)),
        ):
            yield

    def blocks(self) -> list[dict[str, Any]]:
        """Those after the warm-up: `on`, and seconds a step."""
        found = []
        for number in range(WARM_UP, len(self.marks) - 1):
            seconds = self.clock.seconds(self.marks[number], self.marks[number + 1]) / self.block_steps
            found.append({"on": self.on(number * self.block_steps), "seconds": seconds})
        return found


def compare(blocks: list[dict[str, Any]], host: float, log_steps: int) -> dict[str, Any]:
    """Medians and means of both kinds, and what it adds, in percent of a step."""
    on = [block["seconds"] for block in blocks if block["on"]]
    off = [block["seconds"] for block in blocks if not block["on"]]
    median = statistics.median(off)
    return {
        "steps on / off": f"{len(on) * log_steps} / {len(off) * log_steps}",
        "median seconds a step, on": statistics.median(on),
        "median seconds a step, off": median,
        "added, medians, %": 100 * (statistics.median(on) / median - 1),
        "added, means, %": 100 * (statistics.mean(on) / statistics.mean(off) - 1),
        "spread of blocks with it off, %": 100 * (max(off) - min(off)) / median,
        "the host's own work, seconds a step": host,
        "the same in % of a step": 100 * host / median,
    }


if __name__ == "__main__":
    sys.exit(main())
