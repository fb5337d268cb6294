"""A LoRA step with the frozen base at different homes: on the device, in host memory, spread over ranks.

    python bench/stream.py --homes device-float8,host-float8,host --profile --out stream.json
    torchrun --nproc_per_node 4 bench/stream.py --homes device,ranks,fully_shard,deepspeed_leaf --recompute 60,0

Full-size random weights, drawn by name, so that every home has the same ones; one batch of 1024² a rank, rank 32 on the six
q/k/v projections; compiled blocks, fused projections, the LoRA as one flat parameter whose gradient is averaged over the
ranks. Homes: device | host | ranks | ranks_host, then -float8 or -int8, then -N for N resident blocks; auto@G: what the trainer
chooses for a card of G GiB, under that limit; fully_shard | fully_shard_host | deepspeed_leaf | deepspeed_leaf_host: what
other libraries make of it (bench/other_streams.py). Prints medians, the peak, the card's memory as a monitor shows it, the
losses of the steps, and with --profile what the card waited for in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.out_file import out_file, write_numbers

if TYPE_CHECKING:
    import torch

    from bench.stream_homes import Model
    from train.step.flow_matching_module import FlowMatchingModule


def build_step_at(home: str, model: Model, recompute: int) -> FlowMatchingModule:
    """The step's module with its base at `home`. Raises ValueError for a home that there isn't."""
    from bench.other_streams import build_other
    from bench.stream_homes import OTHERS, build

    return build_other(home, model, recompute) if home in OTHERS else build(home, model, recompute)


def measure(module: FlowMatchingModule, size: int, repeats: int, profile: bool, device: torch.device) -> dict[str, Any]:
    """Seconds and losses of steps with AdamW; the peak of memory; the share of a step that waited for weights."""
    import torch
    import torch.distributed as dist

    from bench.stream_homes import batch_of, train_step
    from bench.waiting import profile_step

    batch = batch_of(module, size, device, seed=dist.get_rank() if dist.is_initialized() else 0)
    step, wait = train_step(module, device), synchronized(device)
    start, losses = time.perf_counter(), [step(batch) for _ in range(2)]
    wait()
    result: dict[str, Any] = {"warm_up_seconds": time.perf_counter() - start}
    if device.type == "cuda":
        result["reserved_gib"] = torch.cuda.memory_reserved() / 2**30
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        losses.append(step(batch))
        wait()
        times.append(time.perf_counter() - start)
    result |= {"seconds": statistics.median(times), "all": times, "losses": [loss.item() for loss in losses]}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["card_gib"] = (total - free) / 2**30  # with context and libraries, as a user's monitor shows it
    stream: Any = module.transformer.block_stream
    if stream is not None and module.graphs is None:
        with stream.pause():  # whatever the slots hold: what is left is the weights' way
            step(batch)
            wait()
            start = time.perf_counter()
            step(batch)
            wait()
        result["without_fetching"] = time.perf_counter() - start
    if profile:
        result["profile"] = profile_step(lambda: step(batch))
    return result


def synchronized(device: torch.device) -> Callable[[], None]:
    """A function that returns when the device has done all that it was given."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def row_of(home: str, recompute: int, model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """What one home gives; out of memory is an answer too."""
    import torch

    start = time.perf_counter()
    row: dict[str, Any] = {"home": home, "recomputed": recompute}
    try:
        module = build_step_at(home, model, recompute)
        row["build_seconds"] = time.perf_counter() - start
        row["recomputed"] = module.transformer.checkpointed_blocks
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if options.graphs:
            module.use_graphs()
        row |= measure(module, options.size, options.repeats, options.profile, model.device)
    except torch.cuda.OutOfMemoryError as error:
        row["failed"] = str(error).splitlines()[0]
    return row


def rows_of(options: argparse.Namespace, model: Model, rank: int) -> list[dict[str, Any]]:
    """All homes with all numbers of recomputed blocks, told and kept as they come."""
    import gc

    import torch

    from qwen_image.free_memory import limit_device

    rows: list[dict[str, Any]] = []
    for home in options.homes.split(","):
        for recompute in map(int, options.recompute.split(",")):
            rows.append(row_of(home, recompute, model, options))
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
                whole = torch.cuda.get_device_properties(model.device).total_memory
                limit_device(model.device, whole / 2**30)  # after auto@G
            if rank == 0:
                print(json.dumps({key: value for key, value in rows[-1].items() if key != "all"}), flush=True)
                if options.out:
                    write_numbers(options.out, {"rows": rows})
    return rows


def model_here(layers: int, heads: int) -> Model:
    """On this rank's device, in the process group that torchrun asks for."""
    import torch
    import torch.distributed as dist

    from bench.stream_homes import Model
    from train.step.speedups import choose_workspaces

    group, device = None, torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = dist.new_group(list(range(dist.get_world_size())))
    choose_workspaces(device, deterministic=False)
    return Model(layers, heads, device, group)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--homes", default="device,host", help="comma list, see above")
    parser.add_argument("--recompute", default="60", help="comma list of numbers of recomputed blocks (default 60)")
    parser.add_argument("--layers", type=int, default=60, help="blocks of the transformer (default 60)")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels (default 24)")
    parser.add_argument("--size", type=int, default=1024, help="side of the square image in pixels (default 1024)")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="profile one more step: what the GPU waited for")
    parser.add_argument("--repeats", type=int, default=5, help="steps to take the median of (default 5)")
    parser.add_argument("--out", type=out_file, help="JSON file for all numbers")
    options = parser.parse_args(argv)

    import torch.distributed as dist

    try:
        rows = rows_of(options, model_here(options.layers, options.heads), int(os.environ.get("RANK", "0")))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
