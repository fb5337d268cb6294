"""One LoRA training step of the full-size transformer on one GPU: ours in several settings, and the peers'.

    python bench/train_step.py --out step.json                                  # ours, 1024² batch 1
    python bench/train_step.py --variants ours,ours-full,ours-engine --sizes 1024x1024x1,512x512x4
    python bench/train_step.py --sources 1 --text 1408 --variants ours-auto,ours-auto-float8     # an edit, as Qwen-Image-Edit's
    python bench/train_step.py --sources 1 --zero_cond_t --text 256 --variants ours-auto         # as Qwen-Image-Edit-2511's
    python bench/train_step.py --layers 2 --variants ours,ours-engine --peers diffsynth,diffusers,diffusers_tuned

Random weights, cached latents and prompt embeddings, rank 32 on the six q/k/v projections, bf16. Prints medians, the
ratio to the first row, the share of the card's measured bf16 peak, peak memory, and where kernel time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.out_file import out_file, write_numbers

if TYPE_CHECKING:
    import torch

    from train.step.flow_matching_module import FlowMatchingModule

Size = tuple[int, int, int]  # height, width in pixels, batch
ATTENTION = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
OPTIMIZERS = ("adafactor", "muon", "prodigy", "schedulefree")
WORDS = {
    "full": "every block recomputed",
    "half": "half of the blocks recomputed",
    "auto": "as few blocks recomputed as fit",
    "engine": "through DeepSpeed's engine, ZeRO-2",
    **{name: f"engine's optimizer: {name}" for name in OPTIMIZERS},
    "loraplus": "engine's optimizer with two rates",
    "launched": "kernel by kernel, no CUDA graphs",
    "static": "compiled for each length",
    "eager": "not compiled",
    "direct": "modulation computed, not looked up",
    "separate": "q, k and v not fused",
    "masked": "padding by an attention mask",
    "float8": "float8 base",
    "unfused": "its GELU quantized by the compiler",
    "onelayout": "its weights transposed at each step",
}
KINDS = (  # first match names a kernel's kind
    # What the compiler fuses is named after all operations it came from, products and attention among them.
    ("everything else", ("triton_poi_", "triton_red_", "triton_per_")),
    ("attention", ("fmha", "flash", "attention", "cudnn_generated_fort", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "matmul", "cublas", "_mm", "addmm", "xmma")),
    ("copies", ("memcpy", "memset")),
)


@contextlib.contextmanager
def our_step(
    variant: str,
    layers: int,
    size: Size,
    text: int,
    device: torch.device,
    padding: int = 0,
    sources: int = 0,
    zero_cond_t: bool = False,
) -> Iterator[Callable[[], torch.Tensor]]:
    """`variant`: `ours`, as train_lora.py runs it without DeepSpeed, and words joined by '-' that change it (WORDS).

    `sources`: so many source images of the image's size, modulated as clean ones with `zero_cond_t`.
    """
    import torch

    from bench.random_transformer import random_transformer
    from qwen_image.float8.linear import keep_transposed, quantize_blocks
    from qwen_image.model.conditioning import Prompt
    from qwen_image.model.modulation import replace_by_table
    from qwen_image.model.sizes import LATENT_CHANNELS, VAE_FACTOR
    from train.fit.activation_checkpointing import plan_checkpointing
    from train.loader.batch_shapes import BatchShape
    from train.lora.spec import LoraSpec
    from train.step.build import StepOptions, build_step
    from train.step.speedups import choose_workspaces

    choose_workspaces(device, deterministic=False)
    words = set(variant.split("-")[1:])
    assert words <= WORDS.keys() and variant.startswith("ours"), f"{variant}: choose from {WORDS}"
    height, width, batch = size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = random_transformer(layers, device, dtype, zero_cond_t)
    if "direct" not in words:
        replace_by_table(transformer, [k / 1000 for k in range(1, 1001)])
    if "float8" in words:
        quantize_blocks(transformer, fuse="unfused" not in words)
    transformer.dense_padding = "masked" not in words
    options = StepOptions(
        dtype=dtype,
        lora_dtype=dtype,
        device=device,
        float8="float8" in words,
        fuse="separate" not in words,
        compile="eager" not in words and device.type == "cuda",
        dynamic="static" not in words,
        checkpointed_blocks=layers if "full" in words else layers // 2 if "half" in words else 0,
    )
    module, _, lines = build_step(transformer, LoraSpec(ATTENTION, 32, 32.0), options)
    print(*(f"… {line}" for line in lines), sep="\n", flush=True)
    if "onelayout" in words:
        keep_transposed(transformer, layers)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    latents = torch.randn(batch, LATENT_CHANNELS, 1, height // VAE_FACTOR, width // VAE_FACTOR, device=device)
    noise = torch.randn_like(latents)
    sigma = torch.tensor([0.3 + 0.5 * i / batch for i in range(batch)]).mul(1000).round() / 1000
    mask = None
    if padding:
        mask = torch.ones(batch, text, dtype=torch.bool, device=device)
        mask[0, text - padding :] = False
    embeds = torch.randn(batch, text, transformer.config.joint_attention_dim, device=device, dtype=dtype)
    prompt = Prompt(embeds, mask, tuple(torch.randn_like(latents).to(dtype) for _ in range(sources)))
    trained = [p for p in transformer.parameters() if p.requires_grad]
    if "auto" in words:
        moments = 2 * sum(p.numel() * p.element_size() for p in trained)
        shape = BatchShape(batch, height, width, text, padding > 0, ((width, height),) * sources)
        plan = plan_checkpointing("auto", module, shape, moments, device)
        print("…", *plan.lines(), flush=True)
    flags = ["--optimizer", *(words & {*OPTIMIZERS} or {"adamw"})]
    flags += ["--lora_plus_ratio", "16"] if "loraplus" in words else []
    inputs = latents, noise, sigma, prompt
    through_engine = engine_step(module, inputs, batch, flags) if "engine" in words else None
    if device.type == "cuda" and "launched" not in words:
        module.use_graphs()
    if through_engine is not None:
        yield through_engine
        return
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")

    def step() -> torch.Tensor:
        loss = module(latents, noise, sigma, prompt).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    yield step


@contextlib.contextmanager
def peer_step(name: str, layers: int, size: Size, text: int, device: torch.device) -> Iterator[Callable[[], Any]]:
    """A peer's step, as its own training script does it (bench/peers.py)."""
    from bench.peers import PEERS, Shape, Work

    with PEERS[name](Shape(layers=layers), Work(*size, text), device) as peer:
        yield peer.step


def engine_step(
    module: FlowMatchingModule, arguments: tuple[Any, ...], batch: int, more: list[str]
) -> Callable[[], torch.Tensor]:
    """The same through DeepSpeed's engine, ZeRO-2, as train_lora.py runs it."""
    import torch

    from train.config.command_line import parse
    from train.config.zero_plan import ZeroPlan
    from train.engine.deepspeed_engine import initialize
    from train.engine.optimizer import Optimizer
    from train.process.ranks import join_process_group

    settings = Path(__file__).resolve().parent.parent / "ds_configs" / "zero2.json"
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    flags = f"--model - --data - --output_path - --batch_size {batch} --dtype {dtype}".split()
    config = parse(["--deepspeed", str(settings), *flags, *more])
    ranks = join_process_group()
    engine = initialize(module, Optimizer.from_config(config), ZeroPlan.from_config(config, ranks.world))

    def step() -> torch.Tensor:
        loss = engine(*arguments).mean()
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def measure(step: Callable[[], torch.Tensor], repeats: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of `repeats` warm steps, peak GiB, seconds of the first (compiling) one, and kernel totals."""
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":  # a graph takes its memory when it is captured, in the first step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(3):
        loss = step()
    synchronize()
    result: dict[str, Any] = {"warm_up_seconds": time.perf_counter() - start}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        loss = step()
        synchronize()
        times.append(time.perf_counter() - start)
    result |= {"seconds": statistics.median(times), "all": times, "loss": loss.item()}
    if device.type == "cuda":
        result |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "kernels": kernel_times(step)}
    return result


def kernel_times(step: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """Milliseconds of one step's kernels by kind, and the twenty longest by name."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        milliseconds = event.device_time / 1000
        kinds[kind_of(event.name)] += milliseconds
        names[event.name].append(milliseconds)
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:20]
    return {"kinds": dict(kinds), "longest": [(name[:90], len(each), round(sum(each), 2)) for name, each in longest]}


def kind_of(kernel: str) -> str:
    """What a kernel of this name does, by KINDS."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "everything else")


def in_own_process(arguments: argparse.Namespace, name: str, size: Size, is_peer: bool) -> list[dict[str, Any]]:
    """One row measured by this script in a new process; none when it fails, which it says."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--sizes", "x".join(map(str, size)), "--out", str(out)]
        command += ["--variants", "" if is_peer else name, "--peers", name if is_peer else ""]
        for option in ("layers", "text", "padding", "repeats", "sources"):
            command += [f"--{option}", str(getattr(arguments, option))]
        command += ["--zero_cond_t"] * arguments.zero_cond_t
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        print("\n".join(line for line in done.stdout.splitlines() if line.startswith(("…", "{"))), flush=True)
        if done.returncode:
            print(f"{name} failed: {done.stderr[-600:]}", flush=True)
            return []
        return json.loads(out.read_text())["rows"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60, help="blocks of the transformer (default 60)")
    parser.add_argument(
        "--variants", default="ours", help=f"comma list of ours[-word…]; words: {', '.join(WORDS)} (default ours)"
    )
    parser.add_argument("--sizes", default="1024x1024x1", help="comma list of HEIGHTxWIDTHxBATCH")
    parser.add_argument("--text", type=int, default=128, help="text tokens (default 128)")
    parser.add_argument("--padding", type=int, default=0, help="of which padding in the first sample (default 0)")
    parser.add_argument("--sources", type=int, default=0, help="source images of the image's size: an edit (default 0)")
    parser.add_argument("--zero_cond_t", action="store_true", help="sources modulated as clean (Qwen-Image-Edit-2511)")
    parser.add_argument("--repeats", type=int, default=4, help="warm steps to take the median of (default 4)")
    parser.add_argument("--peers", default="", help="comma list of names in bench/peers.py")
    parser.add_argument("--out", type=out_file, help="JSON file for all numbers")
    arguments = parser.parse_args(argv)

    import torch

    from bench.card_limit import measured_peak, needed_tflop

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [(int(h), int(w), int(b)) for h, w, b in (size.split("x") for size in arguments.sizes.split(","))]
    rows: list[dict[str, Any]] = []

    def save(peak: float | None = None) -> None:
        if arguments.out:
            write_numbers(arguments.out, {"peak_tflops": peak, "rows": rows})

    def run(name: str, size: Size, is_peer: bool) -> None:
        print(f"… {name} {size}", flush=True)
        ours = partial(
            our_step, padding=arguments.padding, sources=arguments.sources, zero_cond_t=arguments.zero_cond_t
        )
        make: Any = peer_step if is_peer else ours
        with make(name, arguments.layers, size, arguments.text, device=device) as step:
            row = measure(step, arguments.repeats, device)
        rows.append({"name": name, "size": size, **row})
        short = {key: value for key, value in row.items() if key not in ("all", "kernels")}
        print(json.dumps(short | row.get("kernels", {}).get("kinds", {})), flush=True)

    jobs = [(name, size, False) for size in sizes for name in arguments.variants.split(",") if name]
    jobs += [(name, size, True) for size in sizes for name in arguments.peers.split(",") if name]
    if len(jobs) == 1:
        run(*jobs[0])
    else:
        for name, size, is_peer in jobs:  # a process each: what one leaves on the card would count against the next
            rows += in_own_process(arguments, name, size, is_peer)
            save()  # who stops the script here has the rows so far

    peak = measured_peak(device) if device.type == "cuda" else 1.0  # last: our step chooses cuBLAS's workspaces first
    print(
        f"\npeak {peak:.0f} TFLOP/s, torch {torch.__version__}, {arguments.layers} blocks, {arguments.text} text tokens"
    )
    for row in rows:
        height, width, batch = row["size"]
        whole = height * (1 + arguments.sources), width, batch  # source images are tokens like the image's own
        share = needed_tflop(arguments.layers, whole, arguments.text) / row["seconds"] / peak
        print(
            f"{row['name']:>22} {'×'.join(map(str, row['size'])):>14}  {row['seconds']:.4f} s  "
            f"{row['seconds'] / rows[0]['seconds']:.2f} ×  {share:.0%} of peak  {row.get('peak_gib', 0):.2f} GiB"
        )
    save(peak)
    return int(len(rows) < len(jobs))


if __name__ == "__main__":
    sys.exit(main())
