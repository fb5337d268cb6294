"""Loading a full-size model, and ZeRO-3 with its weights in host memory, on one GPU; about 7 minutes.

    python bench/zero3_h100.py --folder /local/disk             # needs 43 GB of disk, 100 GB of host memory, 1 GPU
    python bench/zero3_h100.py --folder /tmp --tiny             # the same way with a small model, on the CPU too

1. write a random checkpoint of 20.4 B parameters in bfloat16 (41 GB, Hugging Face layout) and encoded shards of noise
2. read its files plainly, with the page cache dropped before: the disk's own speed
3. load them by the real loader as stage 2 does (onto the GPU): seconds, peak of host memory; page cache dropped before
4. train 20 steps by train/train_lora.py with ds_configs/zero3_offload.json at 1024² and batch size 1: loading, s a step,
   peak on the GPU and in host memory

--skip_training and --skip_loading leave out what has been measured; --keep leaves the model for another start.
"""

import argparse
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READ_BYTES = 16 << 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--config", type=Path, default=ROOT / "ds_configs" / "zero3_offload.json")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--lora_rank", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="2 narrow blocks, 64 pixels: to try the script")
    parser.add_argument("--keep", action="store_true", help="leave the model where it is, and take one that is there")
    parser.add_argument("--skip_loading", action="store_true")
    parser.add_argument("--skip_training", action="store_true")
    parser.add_argument(
        "--train_flags", nargs=argparse.REMAINDER, default=[], help="more flags for train_lora.py; last"
    )
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.load:
        print(json.dumps(load(options.load)))
        return 0

    folder: Path = options.folder / "zero3_h100"
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    side = 64 if options.tiny else options.side
    try:
        rows = [("model", write_model(folder, options.tiny, side))]
        if not options.skip_loading:
            rows += measure_loading(folder / "model")
        if not options.skip_training:
            rows += measure_training(folder, options, side)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n| what | measured |\n| --- | --- |")
    for what, measured in rows:
        print(f"| {what} | {measured} |")
    return 0


def write_model(folder: Path, tiny: bool, side: int) -> str:
    from demo.random_model import write_random_encoded, write_random_model

    start = time.perf_counter()
    text_dim = 64 if tiny else 3584
    if not (folder / "model" / "model_index.json").is_file():
        size = {"layers": 2, "heads": 2, "text_dim": text_dim, "file_bytes": 4_000_000} if tiny else {}
        write_random_model(folder / "model", **size, hollow=False)
        write_random_encoded(folder / "data", 8, side, side, prompt_tokens=128, text_dim=text_dim)
    files = list((folder / "model").rglob("*.safetensors"))
    size_gb = sum(path.stat().st_size for path in files) / 1e9
    say(f"{size_gb:.2f} GB in {len(files)} files, written in {time.perf_counter() - start:.0f} s")
    return f"{size_gb:.2f} GB in {len(files)} files"


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_loading(model: Path) -> list[tuple[str, str]]:
    from bench.measured_training import run
    from demo.random_model import drop_cache

    rows = []
    files = sorted(model.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    for threads in (1, 4):
        drop_cache(model)
        start = time.perf_counter()
        read_plainly(files, threads)
        plain = time.perf_counter() - start
        rows.append((f"plain read, {threads} threads", f"{plain:.1f} s, {size / plain / 1e9:.2f} GB/s"))
        say(" ".join(rows[-1]))
    for name, drop in (("from the disk", True), ("from the page cache", False)):
        if drop:
            drop_cache(model)
        result = json.loads(run([sys.executable, __file__, "--folder", "-", "--load", str(model)]).splitlines()[-1])
        seconds = result["seconds"]
        note = f", {seconds / plain:.2f} × the plain read with 4 threads" if drop else ""
        memory = f"host memory {result['host_gib']:.2f} GiB above baseline, GPU {result['gpu_gib']:.1f} GiB"
        rows.append((f"loader, stage 2, {name}", f"{seconds:.1f} s{note}; {memory}"))
        say(" ".join(rows[-1]))
    return rows


def read_plainly(files: list[Path], threads: int) -> None:
    """Every byte once, in pieces of READ_BYTES, to nowhere."""

    def read(place: tuple[Path, int]) -> None:
        path, offset = place
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            file.read(READ_BYTES)

    places = [(path, offset) for path in files for offset in range(0, path.stat().st_size, READ_BYTES)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, places):
            pass


def load(model: Path) -> dict[str, float]:
    """In a process of its own: load as stage 2 does."""
    import torch

    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.pipeline import load_transformer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    files = resolve_model(ModelSource(str(model)), ("transformer", "scheduler"))
    baseline = host_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    transformer = load_transformer(files, torch.bfloat16, device, progress=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del transformer
    gpu = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"seconds": seconds, "host_gib": (host_bytes("VmHWM") - baseline) / 2**30, "gpu_gib": gpu}


def host_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_training(folder: Path, options: argparse.Namespace, side: int) -> list[tuple[str, str]]:
    from bench.measured_training import measure_runs

    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    flags = ["--deepspeed", str(options.config), "--model", str(folder / "model"), "--data", str(folder / "data")]
    flags += ["--output_path", str(output), "--max_steps", str(options.steps), "--lora_rank", str(options.lora_rank)]
    flags += ["--log_steps", "1", "--save_steps", "0", "--wandb_mode", "disabled", *options.train_flags]
    (result,) = measure_runs([flags])
    if result is None:
        raise RuntimeError("the training failed")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    times = sorted(row["seconds_per_step"] for row in rows if row["step"] > 3 and "loss" in row)
    losses = [row["loss"] for row in rows if "loss" in row]
    size = sum(path.stat().st_size for path in (output / "checkpoints").rglob("*") if path.is_file())
    name = f"{options.steps} steps of {options.config.stem}, {side}²"
    step = f"{times[len(times) // 2]:.2f} s a step (median from the fourth on; {times[0]:.2f} to {times[-1]:.2f})"
    memory = f"GPU peak {result.get('gpu_gib', 0):.1f} GiB allocated, {result.get('reserved_gib', 0):.1f} reserved"
    host = f"host peak {result['host_gib']:.1f} GiB (pinned weights in it); {result['seconds']:.0f} s in all"
    ends = f"{losses[0]:.4f} → {losses[-1]:.4f}; checkpoint {size / 1e6:.1f} MB, no frozen tensor in it: {only_lora(output)}"
    return [(name, step), ("its memory", f"{memory}; {host}"), ("its loss", ends)]


def only_lora(output: Path) -> bool:
    from safetensors import safe_open

    names: list[str] = []
    for path in (output / "checkpoints").rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return bool(names) and all(".lora_" in name for name in names)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
