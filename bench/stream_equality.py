"""Is a LoRA step the same wherever the frozen base lies: losses and LoRA weights of each home against the resident base.

    python bench/stream_equality.py --homes host,host-2,auto@6,host-float8,host-int8 --out one.json
    torchrun --nproc_per_node 4 bench/stream_equality.py --homes ranks,ranks_host,ranks-float8,host --against one.json
    torchrun --nproc_per_node 2 bench/stream_equality.py --layers 3 --heads 1 --size 64 --steps 3       # on CPUs

Four blocks of full width, one process group; each home's model is built in turn and makes the same steps of AdamW on the same
global batch, whatever the number of ranks. Slots are filled with NaN before each refill, so that a stale weight shows. Homes as
in bench/stream.py; each is compared with `device` in the same precision, and with the losses of another run (--against).
Prints the largest differences over all steps and ranks, and for auto@G the peak beside the cap.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.out_file import out_file, write_numbers

if TYPE_CHECKING:
    import torch

    from bench.stream_homes import Model


class Curve(NamedTuple):
    """What the steps gave: the global batch's loss of each, the trained weights [n] on the CPU, GiB at the most."""

    losses: list[float]
    weights: torch.Tensor
    peak_gib: float | None


def curve(home: str, model: Model, recompute: int, options: argparse.Namespace) -> Curve:
    """Train from the same start. A collective."""
    import torch
    import torch.distributed as dist

    from bench.stream import build_step_at
    from bench.stream_homes import SIGMAS, batch_of, train_step

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cuda = model.device.type == "cuda"
    module = build_step_at(home, model, recompute)
    if module.transformer.block_stream is not None:
        module.transformer.block_stream.poisoned = True  # type: ignore[attr-defined]
    if options.graphs:
        module.use_graphs()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step, losses = train_step(module, model.device), []
    for number in range(options.steps):
        seeds = range(number * options.batch + rank, (number + 1) * options.batch, world)
        samples = [batch_of(module, options.size, model.device, seed, SIGMAS[seed % len(SIGMAS)]) for seed in seeds]
        loss = step(*samples)
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
    assert module.flat is not None
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return Curve(losses, module.flat.detach().cpu(), peak)


def difference(one: Curve, other: Curve) -> dict[str, Any]:
    """The largest over all ranks. NaN counts as infinite. A collective."""
    import torch
    import torch.distributed as dist

    losses = torch.tensor(one.losses, dtype=torch.float64) - torch.tensor(other.losses, dtype=torch.float64)
    weights = one.weights.double() - other.weights.double()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest = torch.stack([each.abs().nan_to_num(torch.inf, torch.inf).max() for each in (losses, weights)]).to(device)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    of_losses, of_weights = largest.tolist()
    return {"losses": of_losses, "weights": of_weights, "bit_equal": of_losses == of_weights == 0}


def reference_of(home: str, model: Model) -> str:
    """The resident base in the precision of `home`."""
    from bench.stream_homes import OTHERS, choose_for_card, parse

    if home in OTHERS:
        return "device"
    chosen = choose_for_card(float(home[5:]), model)[0] if home.startswith("auto@") else parse(home, model, 0)
    return {"computed": "device"}.get(chosen.precision, f"device-{chosen.precision}")


def compare(options: argparse.Namespace, model: Model, rank: int) -> list[dict[str, Any]]:
    """A row for each home and number of recomputed blocks, told as it comes."""
    rows: list[dict[str, Any]] = []
    resident: dict[tuple[str, int], Curve] = {}
    earlier = json.loads(options.against.read_text())["rows"] if options.against else []
    for home in options.homes.split(","):
        for recompute in map(int, options.recompute.split(",")):
            start = time.perf_counter()
            reference = reference_of(home, model)
            clear(model)
            if (reference, recompute) not in resident:
                resident[reference, recompute] = curve(reference, model, recompute, options)
                clear(model)
            found = curve(home, model, recompute, options)
            clear(model)
            row = {"home": home, "recomputed": recompute, "against": reference}
            row |= difference(found, resident[reference, recompute])
            row |= {"peak_gib": found.peak_gib, "seconds": time.perf_counter() - start, "all_losses": found.losses}
            for other in earlier:
                if (other["home"], other["recomputed"]) == (home, recompute) or other["against"] == reference:
                    pairs = zip(found.losses, other["all_losses"], strict=True)
                    row["from_earlier_run"] = max(abs(a - b) / abs(b) for a, b in pairs)
            rows.append(row)
            if rank == 0:
                print(json.dumps({key: value for key, value in row.items() if key != "all_losses"}), flush=True)
                if options.out:
                    write_numbers(options.out, {"rows": rows})
    return rows


def clear(model: Model) -> None:
    """Give back what the last model held, and lift the cap of auto@G."""
    import gc

    import torch

    from qwen_image.free_memory import limit_device

    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        limit_device(model.device, torch.cuda.get_device_properties(model.device).total_memory / 2**30)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--homes", default="device,host,ranks,host-float8,ranks-float8", help="comma list, see above")
    parser.add_argument("--recompute", default="0,4", help="comma list of numbers of recomputed blocks (default 0,4)")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the transformer (default 4)")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels (default 24)")
    parser.add_argument("--size", type=int, default=1024, help="side of the square images in pixels (default 1024)")
    parser.add_argument("--steps", type=int, default=20, help="of AdamW (default 20)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step, of all ranks together (default 4)")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument(
        "--tolerance", type=float, help="largest difference of losses that is no failure (default: any)"
    )
    parser.add_argument("--against", type=Path, help="JSON file of another run, on another number of ranks")
    parser.add_argument("--out", type=out_file, help="JSON file for all numbers")
    options = parser.parse_args(argv)

    import torch.distributed as dist

    from bench.stream import model_here

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch % world:
        parser.error(f"--batch {options.batch} can't be shared by {world} ranks: say a multiple")
    try:
        rows = compare(options, model_here(options.layers, options.heads), int(os.environ.get("RANK", "0")))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return int(options.tolerance is not None and any(row["losses"] > options.tolerance for row in rows))


if __name__ == "__main__":
    sys.exit(main())
