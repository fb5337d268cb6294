"""How fast batches come: our loader against the `webdataset` library, seeking, and memory over many batches.

    python bench/loader.py                              # all three, a table in Markdown (about 4 minutes)
    python bench/loader.py --part throughput --samples 2000 --workers 0 1 2 4 8
    python bench/loader.py --part seek --seek_samples 10000000
    python bench/loader.py --part memory --batches 100000
    python bench/loader.py --part captions              # what caption levers and variants cost a sample

Shards are written to a temporary folder (--folder) first. Both loaders do the same work for a batch: read, decode, pad,
stack, draw noise and σ. webdataset reads shards from end to end, ours picks samples at random over the whole set: on a
disk that is slower at random access that is the price of an order that can be resumed.
"""

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT_TOKENS, PROMPT_WIDTH = 128, 3584  # a usual caption for Qwen2.5-VL
SHARD_SAMPLES = 100


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "throughput", "seek", "memory", "captions"], default="all")
    parser.add_argument("--folder", type=Path, help="where the shards go (default: a temporary folder)")
    parser.add_argument("--samples", type=int, default=400, help="samples of 1024x1024 pixels in each data set")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement of throughput")
    parser.add_argument("--seek_samples", type=int, default=10_000_000)
    parser.add_argument("--batches", type=int, default=100_000, help="of the memory measurement")
    options = parser.parse_args(argv)

    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        if options.part in ("all", "throughput"):
            print_throughput(folder, options)
        if options.part in ("all", "seek"):
            print_seek(options.seek_samples)
        if options.part in ("all", "memory"):
            print_memory(folder, options.batches)
        if options.part in ("all", "captions"):
            print_captions(folder)
    finally:
        shutil.rmtree(folder)
    return 0


# ── throughput ───────────────────────────────────────────────────────────────────────────────────────────────────────


def print_throughput(folder: Path, options: argparse.Namespace) -> None:
    print(f"\nSamples a second, 1024x1024, batches of {options.batch_size}, {os.cpu_count()} cores, warm page cache\n")
    print("| shards | workers | ours | webdataset | ours / webdataset |\n| --- | --- | --- | --- | --- |")
    for payload in ("safetensors", "jpg"):
        data = write_set(folder / payload, options.samples, payload, side=1024)
        for workers in options.workers:
            rates = [rate(make(data, options.batch_size, workers), options.seconds) for make in (ours, webdatasets)]
            name = "encoded" if payload == "safetensors" else "images"
            print(f"| {name} | {workers} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[0] / rates[1]:.2f} |", flush=True)
        shutil.rmtree(data)


def ours(folder: Path, batch_size: int, workers: int) -> Any:
    from train.data.shard_dataset import ShardDataset
    from train.flow.timestep_sampling import SigmaSampling
    from train.loader.indexed_loader import BatchLoader
    from train.loader.worker_loader import Reading

    dataset = ShardDataset(folder)
    return BatchLoader(dataset, dataset.order(batch_size), SigmaSampling(), Reading(num_workers=workers))


def webdatasets(folder: Path, batch_size: int, workers: int) -> Any:
    import torch

    from train.data.shard_dataset import ShardDataset
    from train.flow.timestep_sampling import SigmaSampling
    from train.loader.webdataset_stream import StreamLoader
    from train.loader.worker_loader import Reading

    torch.manual_seed(0)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    empty = ShardDataset(folder).empty_prompt
    return StreamLoader(urls, batch_size, SigmaSampling(), Reading(num_workers=workers), empty_prompt=empty, buffer=100)


def rate(loader: Any, seconds: float) -> float:
    """Samples a second, after a second (and a batch of each worker) to get going."""
    with loader:
        batches = iter(loader)
        warm = time.perf_counter() + 1.5
        while time.perf_counter() < warm:
            next(batches)
        start, samples = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            samples += len(next(batches).keys)
        return samples / (time.perf_counter() - start)


# ── seeking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_seek(samples: int) -> None:
    import numpy as np

    from train.data.sample_order import Order

    words = np.random.default_rng(0)
    bucket, shard = words.integers(0, 40, samples).astype(np.int32), np.arange(samples, dtype=np.int32) // 10_000
    start = time.perf_counter()
    order = Order(bucket, shard, batch_size=4)
    built = time.perf_counter()
    order.micro_batch(3 * order.length + order.length // 2)
    there = time.perf_counter()
    order.micro_batch(3 * order.length + order.length // 3)
    again = time.perf_counter()
    print(
        f"\nSeek to the middle of the fourth epoch of {samples:,} samples in 40 buckets: {there - start:.1f} s "
        f"(set-up {built - start:.1f}, plan {there - built:.1f}); elsewhere in it: {(again - there) * 1e6:.0f} µs; "
        f"peak memory {peak_mib():.0f} MiB"
    )


def peak_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_memory(folder: Path, batches: int) -> None:
    """Memory of the loader and its readers as they go on."""
    data = write_set(folder / "small", 2000, "safetensors", side=64, tokens=8, width=16)
    loader = ours(data, 2, workers=2)
    mib: list[float] = []
    start = time.perf_counter()
    with loader:
        for count, _ in enumerate(itertools.islice(loader, batches), start=1):
            if count % (batches // 10) == 0:
                mib.append(proportional_mib())
                print(f"{count} batches: {mib[-1]:.0f} MiB", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(
        f"\nMemory of the loader and 2 workers, every {batches // 10:,} of {batches:,} batches: "
        f"{', '.join(f'{value:.0f}' for value in mib)} MiB ({batches / seconds:.0f} batches a second)"
    )


def proportional_mib() -> float:
    """Anonymous and shared memory of this process and its children, shared pages counted once.

    Without mapped files: how much of torch's libraries counts depends on who else on the machine uses them.
    """
    import multiprocessing

    total = 0
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            total += int(line.split()[1]) if line.startswith(("Pss_Anon:", "Pss_Shmem:")) else 0
    return total / 1024


# ── captions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_captions(folder: Path) -> None:
    """Microseconds of a caption under each lever; of reading an encoded sample with 8 variants and without, in turns."""
    from functools import partial

    from data_prep.encoding.caption_variants import CaptionOptions, caption_chance
    from train.data.shard_dataset import ShardDataset

    tags = [f"tag number {number}" for number in range(30)]
    caption = ", ".join(["[trigger] cat", *tags[:-1], "{a|b {c|d}}"])
    tag_levers = {"caption_shuffle_tags": True, "caption_keep_tags": 1, "caption_tag_dropout": 0.1}
    levers: dict[str, dict[str, Any]] = {
        "none": {},
        "trigger word, prefix": {"trigger_word": "zwx", "caption_prefix": "photo"},
        "tags shuffled and dropped": tag_levers,
        "alternatives": {"caption_alternatives": True},
        "all": {**tag_levers, "trigger_word": "zwx", "caption_prefix": "photo", "caption_alternatives": True},
    }
    print(
        f"\nMicroseconds of one caption of {len(caption)} characters and 31 tags, its draws included, the least of 5\n"
    )
    print("| levers | µs |\n| --- | --- |")
    for name, values in levers.items():
        options = CaptionOptions(**values)
        print(f"| {name} | {1e6 * least(lambda o=options: o.drawn([caption], caption_chance(0, 1, 2)), 2000):.1f} |")
    plain, varied = (
        ShardDataset(write_set(folder / name, 64, "safetensors", side=1024, variants=count))
        for name, count in (("one", 1), ("eight", 8))
    )
    numbers = range(64)
    times: dict[str, list[float]] = {"1 caption": [], "8 variants": []}
    for turn in range(20):
        for name, dataset in (("1 caption", plain), ("8 variants", varied)):
            start = time.perf_counter()
            for number in numbers:
                dataset.read(number, partial(caption_chance, 0, turn, number))
            times[name].append((time.perf_counter() - start) / len(numbers))
    print("\nMicroseconds of reading an encoded sample of 1024x1024, one after the other, in turns (least, median)\n")
    for name, seconds in times.items():
        print(f"| {name} | {1e6 * min(seconds):.0f} | {1e6 * sorted(seconds)[len(seconds) // 2]:.0f} |")


def least(work: Any, count: int) -> float:
    """Seconds of one call, the least of five means over `count`."""
    import timeit

    return min(timeit.repeat(work, number=count, repeat=5)) / count


# ── the data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_set(
    folder: Path,
    samples: int,
    payload: str,
    side: int,
    tokens: int = PROMPT_TOKENS,
    width: int = PROMPT_WIDTH,
    variants: int = 1,
) -> Path:
    """A data set of `samples` of side × side pixels: noise latents, or photographs' like (smooth plus grain) JPEGs.

    `variants`: so many forms of each caption, of encoded samples.
    """
    import safetensors.torch
    import torch

    from data_prep.encoding.variant_members import variant_members, with_variants
    from data_prep.shard_format import shards as form

    folder.mkdir(parents=True)
    columns: dict[str, list[Any]] = {name: [] for name in form.INDEX_ROWS.names}
    listed = []
    for shard, first in enumerate(range(0, samples, SHARD_SAMPLES)):
        count = min(SHARD_SAMPLES, samples - first)
        with form.TarShardWriter(folder / form.tar_name(shard)) as tar:
            for index in range(count):
                key, caption = form.sample_key(shard, index), f"caption of sample {first + index}"
                body, more = b"{}", list[tuple[str, bytes]]()
                if variants > 1:
                    embeds = [torch.randn(tokens, width).bfloat16() for _ in range(variants)]
                    entries, more = variant_members([f"{caption} {draw}" for draw in range(variants)], embeds)
                    body = with_variants(body, entries)
                members = [
                    (payload, make_payload(payload, side, tokens, width)),
                    ("json", body),
                    ("txt", caption.encode()),
                    *more,
                ]
                places = tar.add(key, members)
                row = {"key": key, "path": key, "shard": shard, "bucket": 0}
                row |= {"caption_length": len(caption), "prompt_tokens": tokens}
                if variants > 1:
                    columns.setdefault(form.VARIANT_TOKENS, []).append([tokens] * variants)
                for member, suffix in (("payload", payload), ("json", "json"), ("txt", "txt")):
                    row[f"{member}_offset"], row[f"{member}_size"] = places[suffix]
                for name, value in row.items():
                    columns[name].append(value)
        listed.append(form.Shard(form.tar_name(shard), count, tar.bytes, tar.sha256))
    form.write_index(folder, columns)
    buckets, totals = [form.Bucket(0, side, side, samples)], {"samples": samples}
    form.write_manifest(folder, form.Manifest(payload, "0" * 64, {}, buckets, totals, listed, {}))
    if payload == "safetensors":
        empty = torch.zeros(5, width, dtype=torch.bfloat16)
        safetensors.torch.save_file({"prompt_embeds": empty}, folder / form.EMPTY_PROMPT)
    return folder


def make_payload(payload: str, side: int, tokens: int, width: int) -> bytes:
    import numpy as np
    import safetensors.torch
    import simplejpeg
    import torch

    from qwen_image.model.sizes import LATENT_CHANNELS, VAE_FACTOR

    if payload == "safetensors":
        latent = torch.randn(LATENT_CHANNELS, side // VAE_FACTOR, side // VAE_FACTOR).bfloat16()
        return safetensors.torch.save({"latent": latent, "prompt_embeds": torch.randn(tokens, width).bfloat16()})
    coarse = torch.rand(1, 3, side // 32, side // 32)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)[0]
    grain = torch.randn(3, side, side) * 4
    pixels = (smooth * 255 + grain).clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95, colorsubsampling="444")


if __name__ == "__main__":
    sys.exit(main())
