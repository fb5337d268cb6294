"""A LoRA step with the frozen base at different homes: on the device, in host memory, spread over ranks.

    python bench/stream.py --homes device-float8,host-float8,host --out stream.json
    torchrun --nproc_per_node 4 bench/stream.py --homes device,ranks --recompute 60,0

Full-size random weights, drawn by name, so that every home has the same ones; one batch of 1024² a rank, rank 32 on the six
q/k/v projections; compiled blocks, fused projections, the LoRA as one flat parameter whose gradient is averaged over the
ranks. Homes: device | host | ranks | ranks_host, then -float8 or -int8, then -N for N resident blocks; auto@G: what the trainer
chooses for a card of G GiB, under that limit. Prints medians, the peak, the card's memory as a monitor shows it, and the
losses of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.out_file import out_file, write_numbers

if TYPE_CHECKING:
    import torch

    from qwen_image.streaming.stream_blocks import BlockHomes
    from train.step.flow_matching_module import FlowMatchingModule

ATTENTION = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
SIGMA = 0.5


def build(home: str, recompute: int, layers: int, heads: int, device: torch.device, group: Any) -> FlowMatchingModule:
    """The step's module with its base at `home`."""
    from qwen_image.streaming.stream_blocks import BlockHomes

    if home.startswith("auto@"):
        return build_for_card(float(home.removeprefix("auto@")), layers, heads, device)
    place, *words = home.split("-")
    resident = next((int(word) for word in words if word.isdigit()), layers if place == "device" else 0)
    on_device = frozenset(i * layers // resident for i in range(resident)) if resident else frozenset()
    homes = BlockHomes(
        on_device,
        group if place.startswith("ranks") else None,
        host=place != "ranks",
        storage="int8" if "int8" in words else "computed",
    )
    return assemble(homes, "float8" in words, recompute, layers, heads, device, group)


def build_for_card(gib: float, layers: int, heads: int, device: torch.device) -> FlowMatchingModule:
    """As train_lora.py would with --gpu_memory_limit and everything else left alone."""
    import torch

    from qwen_image.loading.model_files import ModelSource
    from qwen_image.model.sizes import TransformerConfig
    from qwen_image.model.transformer import QwenImageTransformer
    from train.base_model.base_home import BaseHome
    from train.base_model.base_plan import BasePlan
    from train.config.zero_plan import ZeroPlan
    from train.data.batch_shapes import BatchShape
    from train.fit.activation_checkpointing import plan_checkpointing
    from train.fit.base_choice import choice_lines, fastest_base
    from train.fit.memory_plan import Machine, Setup, engine_bytes, trainable_parameters
    from train.lora.spec import LoraSpec
    from train.process.free_memory import limit_device

    limit_device(device, gib)
    with torch.device("meta"):
        empty = QwenImageTransformer(TransformerConfig(num_layers=layers, num_attention_heads=heads))
    base = BasePlan(
        ModelSource("-"),
        empty,
        torch.bfloat16,
        BaseHome(layers),
        open_precision=True,
        open_home=True,
        can_tabulate=True,
        tabulated=True,
    )
    zero, spec = ZeroPlan(2, reduce_bucket_size=50_000_000), LoraSpec(ATTENTION, 32, 32.0)
    shape = BatchShape(1, 1024, 1024, 128, False)
    setup = Setup(base, zero, trainable_parameters(spec, base), torch.bfloat16, shape.tokens, layers)
    chosen = fastest_base(setup, Machine.of(device))
    homes = chosen.base.home.homes(layers, chosen.base.int8)
    module = assemble(homes, chosen.base.float8, layers, layers, heads, device, None)
    added = engine_bytes(zero, setup.trainable, setup.lora_dtype, 1, 1, resumed=False)
    plan = plan_checkpointing("auto", module, shape, added, device)
    print(*choice_lines(setup, chosen, Machine.of(device)), *plan.lines(), sep="\n", flush=True)
    return module


def assemble(
    homes: BlockHomes, float8: bool, recompute: int, layers: int, heads: int, device: torch.device, group: Any
) -> FlowMatchingModule:
    """The step's module with its base at `homes`."""
    import torch

    from bench.random_transformer import drawn_instead_of_read
    from demo.random_model import write_random_model
    from qwen_image.float8.linear import keep_transposed
    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.loading.staged import Readers
    from qwen_image.streaming.stream_blocks import load_streamed
    from train.lora.inject import inject_lora
    from train.lora.spec import LoraSpec
    from train.step.flat_parameter import link
    from train.step.flow_matching_module import FlowMatchingModule
    from train.step.fused_projection import fuse_projections

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder, drawn_instead_of_read():
        write_random_model(Path(folder) / "model", layers=layers, heads=heads, hollow=True)
        files = resolve_model(ModelSource(str(Path(folder) / "model")), ("transformer",))
        transformer = load_streamed(
            files,
            dtype,
            device,
            homes,
            base_float8=float8,
            sigmas=[SIGMA],
            readers=None if group is None else Readers(group),
        )
    inject_lora(transformer, LoraSpec(ATTENTION, 32, 32.0), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    fuse_projections(transformer)
    transformer.checkpointed_blocks = recompute
    keep_transposed(transformer, recompute)
    if device.type == "cuda":
        transformer.compile_blocks(dynamic=True)
    module = FlowMatchingModule(transformer, "none", dtype)
    link(module.matrices(), module.use_flat())
    return module


def measure(module: FlowMatchingModule, size: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds and losses of steps with AdamW; the peak of memory; the share of a step that waited for weights."""
    import torch
    import torch.distributed as dist

    from qwen_image.encoders.text_encoder import Prompt

    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    generator = torch.Generator().manual_seed(rank)
    latents, noise = (torch.randn(1, 16, 1, size // 8, size // 8, generator=generator).to(device) for _ in range(2))
    width = module.transformer.config.joint_attention_dim
    prompt = Prompt(torch.randn(1, 128, width, generator=generator).to(device, module.dtype), None)
    flat = module.flat
    assert flat is not None
    optimizer = torch.optim.AdamW([flat], lr=1e-4, fused=device.type == "cuda")

    def step() -> torch.Tensor:
        loss = module(latents, noise, torch.tensor([SIGMA]), prompt).mean()
        loss.backward()
        if world > 1:
            assert flat.grad is not None
            dist.all_reduce(flat.grad)
            flat.grad.div_(world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    start, losses = time.perf_counter(), [step() for _ in range(2)]
    synchronize()
    result: dict[str, Any] = {"warm_up_seconds": time.perf_counter() - start}
    if device.type == "cuda":
        result["reserved_gib"] = torch.cuda.memory_reserved() / 2**30
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        losses.append(step())
        synchronize()
        times.append(time.perf_counter() - start)
    result |= {"seconds": statistics.median(times), "all": times, "losses": [loss.item() for loss in losses]}
    stream: Any = module.transformer.block_stream
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["card_gib"] = (total - free) / 2**30  # with context and libraries, as a user's monitor shows it
        if stream is not None and module.graphs is None:
            with stream.pause():  # whatever the slots hold: what is left is the weights' way
                step()
                synchronize()
                start = time.perf_counter()
                step()
                synchronize()
            result["without_fetching"] = time.perf_counter() - start
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--homes", default="device,host", help="comma list, see above")
    parser.add_argument("--recompute", default="60", help="comma list of numbers of recomputed blocks (default 60)")
    parser.add_argument("--layers", type=int, default=60, help="blocks of the transformer (default 60)")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels (default 24)")
    parser.add_argument("--size", type=int, default=1024, help="side of the square image in pixels (default 1024)")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--repeats", type=int, default=5, help="steps to take the median of (default 5)")
    parser.add_argument("--out", type=out_file, help="JSON file for all numbers")
    arguments = parser.parse_args(argv)

    import gc

    import torch
    import torch.distributed as dist

    from train.step.speedups import choose_workspaces

    group, rank = None, int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = dist.new_group(list(range(dist.get_world_size())))
    choose_workspaces(device, deterministic=False)
    rows: list[dict[str, Any]] = []
    for home in arguments.homes.split(","):
        for recompute in map(int, arguments.recompute.split(",")):
            start = time.perf_counter()
            row: dict[str, Any] = {"home": home, "recomputed": recompute}
            try:
                module = build(home, recompute, arguments.layers, arguments.heads, device, group)
                row["build_seconds"] = time.perf_counter() - start
                row["recomputed"] = module.transformer.checkpointed_blocks
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                if arguments.graphs:
                    module.use_graphs()
                row |= measure(module, arguments.size, arguments.repeats, device)
                del module
            except torch.cuda.OutOfMemoryError as error:
                row["failed"] = str(error).splitlines()[0]
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            if rank == 0:
                print(json.dumps({key: value for key, value in row.items() if key != "all"}), flush=True)
                if arguments.out:
                    write_numbers(arguments.out, {"rows": rows})
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
