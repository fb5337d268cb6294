"""CPU time of one image's way into a shard, against Pillow, libvips and img2dataset's resizer, in one run.

    make bench-data                                     # with its peers; 1,000 photo-like JPEGs, 10 minutes of one core
    make bench-data BENCH_ARGS="--images 100 --num_workers 2"
    python bench/packing.py --images 100                # peers that aren't installed are left out

All read the same bytes, resize to the bucket of about 1024 x 1024 pixels and encode a JPEG of quality 95, 4:4:4 (but
img2dataset: its own subsampling, no crop, area filter), on one thread, image by image in turn. PSNR is that of the
pixels before encoding against Pillow's Lanczos in float32 from the same decoded source, rounded to 8 bits: against the
unrounded one no 8-bit picture could have more than 58.9 dB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

for variable in ("OMP_NUM_THREADS", "VIPS_CONCURRENCY", "OPENCV_FOR_THREADS_NUM"):
    os.environ[variable] = "1"  # before the libraries that read them
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # img2dataset imports it, and it asks the network for its newest version

PSNR_IMAGES = 8  # lossless encoding and the reference cost far more than what is measured
SIDES = (800, 4000)
SEED = 20


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "bench_photos")
    parser.add_argument("--num_workers", type=int, default=0, help="also time make_shards.py with so many processes")
    return parser.parse_args(argv)


# ── the corpus ───────────────────────────────────────────────────────────────────────────────────────────────────────


def make_corpus(folder: Path, count: int) -> list[Path]:
    """JPEGs of 0.8 to 4 k pixels a side, the same on every machine: 1/f texture, edges, shading and film grain."""
    paths = [folder / f"{number:04d}.jpg" for number in range(count)]
    if all(path.is_file() for path in paths):
        return paths
    import simplejpeg

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    texture, grain = _texture(rng, SIDES[1]), rng.normal(0, 5, (SIDES[1], SIDES[1], 1)).astype(np.int16)
    for path in paths:
        width = int(rng.integers(*SIDES, endpoint=True))
        height = int(rng.integers(max(SIDES[0], width // 3), min(SIDES[1], width * 3), endpoint=True))
        top, left = (int(rng.integers(SIDES[1] - side + 1)) for side in (height, width))
        pixels = texture[top : top + height, left : left + width][:, :: int(rng.choice([-1, 1]))]
        gains = rng.uniform(0.75, 1.15, 3) * 256
        pixels = (pixels.astype(np.int32) * gains.astype(np.int32) >> 8) + grain[:height, :width]
        pixels = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))
        quality = int(rng.integers(85, 96))
        path.write_bytes(simplejpeg.encode_jpeg(pixels, quality, "RGB", "420"))
        path.with_suffix(".txt").write_text(f"photo-like picture {path.stem}")
    return paths


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3] uint8: noise whose amplitude falls with frequency as in photographs (about 1/f), and hard edges."""
    from PIL import Image

    total = np.zeros((side, side, 3), np.float32)
    for level in range(2, 11):
        cells = rng.normal(0, 1, (2**level, 2**level, 3)).astype(np.float32)
        planes = [Image.fromarray(cells[..., c]).resize((side, side), Image.Resampling.BICUBIC) for c in range(3)]
        total += np.stack([np.asarray(plane) for plane in planes], axis=-1) * 0.62**level
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    for _ in range(60):  # objects: half planes and discs, each a step in brightness
        a, b = rng.uniform(0, side, 2)
        inside = (x - a) ** 2 + (y - b) ** 2 < rng.uniform(40, 500) ** 2
        total[inside] += rng.normal(0, 0.15, 3).astype(np.float32)
    return ((total - total.mean()) / total.std() * 52 + 122).clip(0, 255).astype(np.uint8)


# ── the candidates: bytes in, (bytes out, pixels before encoding or None) ────────────────────────────────────────────


def candidates() -> dict[str, Callable[[bytes, bool], bytes]]:
    """name -> function(source bytes, lossless); where a package is missing, its name is printed and left out."""
    from data_prep.images import convert as images
    from data_prep.images import resizing
    from data_prep.images.buckets import BucketOptions, place
    from data_prep.images.header import ImageOptions

    images.one_thread()
    found: dict[str, Callable[[bytes, bool], bytes]] = {}

    def ours(backend: str) -> Callable[[bytes, bool], bytes]:
        jpg, png = (ImageOptions(format=kind, resize=backend) for kind in ("jpg", "png"))
        return lambda data, lossless: images.store(data, png if lossless else jpg).data

    def pillow(data: bytes, lossless: bool) -> bytes:
        from PIL import Image

        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        to = place(*image.size, BucketOptions())
        assert to is not None
        box = (to.crop_left, to.crop_top, to.crop_left + to.crop_width, to.crop_top + to.crop_height)
        small = image.convert("RGB").resize((to.width, to.height), Image.Resampling.LANCZOS, box=box)
        out = io.BytesIO()
        small.save(out, *(("PNG",) if lossless else ("JPEG",)), quality=95, subsampling=0)
        return out.getvalue()

    def vips(data: bytes, lossless: bool) -> bytes:
        import pyvips

        image = pyvips.Image.new_from_buffer(data, "", access="sequential")
        to = place(image.width, image.height, BucketOptions())
        assert to is not None
        image = image.crop(to.crop_left, to.crop_top, to.crop_width, to.crop_height)
        image = image.resize(to.width / image.width, vscale=to.height / image.height, kernel="lanczos3")
        if lossless:
            return image.pngsave_buffer()
        return image.jpegsave_buffer(Q=95, subsample_mode="off")

    def area(data: bytes, lossless: bool) -> bytes:
        from img2dataset.resizer import Resizer
        from PIL import Image

        to = place(*Image.open(io.BytesIO(data), formats=["JPEG"]).size, BucketOptions())
        assert to is not None
        quality, kind = (1, "png") if lossless else (95, "jpg")
        side = min(to.width, to.height)
        resizer = Resizer(side, "keep_ratio", True, encode_quality=quality, encode_format=kind)
        encoded, *_, error = resizer(io.BytesIO(data))
        assert error is None, error
        return bytes(encoded)

    if resizing.resize_backend() == "torch":
        found["data_prep (torch)"] = ours("torch")
    found |= {"data_prep (pillow)": ours("pillow"), "Pillow LANCZOS": pillow}
    for name, package, function in (("libvips lanczos3", "pyvips", vips), ("img2dataset (area)", "img2dataset", area)):
        try:
            __import__("img2dataset.resizer" if package == "img2dataset" else package)
            found[name] = function
        except Exception as error:
            print(f"without {name}: {error}", file=sys.stderr)
    return found


def psnr(source: bytes, result: bytes) -> float:
    """dB of a lossless result against float32 Lanczos to the same size; img2dataset's shows all of the source."""
    import simplejpeg
    from PIL import Image

    from data_prep.images.buckets import BucketOptions, place

    pixels = simplejpeg.decode_jpeg(source, "RGB")
    image = np.asarray(Image.open(io.BytesIO(result), formats=["JPEG", "PNG"]).convert("RGB")).astype(np.float64)
    to = place(pixels.shape[1], pixels.shape[0], BucketOptions())
    assert to is not None
    box = (0, 0, pixels.shape[1], pixels.shape[0])
    if image.shape[:2] == (to.height, to.width):
        box = (to.crop_left, to.crop_top, to.crop_left + to.crop_width, to.crop_top + to.crop_height)
    planes = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    small = [np.asarray(p.resize(image.shape[1::-1], Image.Resampling.LANCZOS, box=box)) for p in planes]
    reference = np.stack(small, axis=-1).clip(0, 255).round()
    error = float(np.mean((reference - image) ** 2))
    return float(10 * np.log10(255**2 / max(1e-9, error)))


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    paths = make_corpus(args.corpus / f"{args.images}", args.images)
    functions = candidates()
    cpu, wall = dict.fromkeys(functions, 0.0), dict.fromkeys(functions, 0.0)
    decibels: dict[str, list[float]] = {name: [] for name in functions}
    pixels = 0
    first = paths[0].read_bytes()
    for function in functions.values():
        function(first, False)  # imports and warms
    for number, path in enumerate(paths):
        data = path.read_bytes()
        order = list(functions)
        for name in order[number % len(order) :] + order[: number % len(order)]:  # nobody always comes first
            start, wall_start = time.process_time(), time.perf_counter()
            functions[name](data, False)
            cpu[name] += time.process_time() - start
            wall[name] += time.perf_counter() - wall_start
            if number % max(1, len(paths) // PSNR_IMAGES) == 0:
                decibels[name].append(psnr(data, functions[name](data, True)))
        pixels += _pixels(data)
    baseline = cpu["Pillow LANCZOS"]
    print(f"{len(paths)} JPEGs of {pixels / len(paths) / 1e6:.1f} MP on average, to about 1 MP, one thread")
    print("| way | CPU ms an image | x Pillow | images/s | PSNR dB (least) |\n| --- | --- | --- | --- | --- |")
    for name in functions:
        quality = f"{np.mean(decibels[name]):.1f} ({min(decibels[name]):.1f})"
        ms = cpu[name] / len(paths) * 1e3
        print(f"| {name} | {ms:.1f} | {cpu[name] / baseline:.2f} | {len(paths) / wall[name]:.1f} | {quality} |")
    if args.num_workers:
        _time_packer(paths[0].parent, args.num_workers)
    return 0


def _pixels(data: bytes) -> int:
    import simplejpeg

    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return height * width


def _time_packer(folder: Path, workers: int) -> None:
    """All of make_shards.py, planning and writing included."""
    from data_prep import make_shards

    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        flags = ["--dataset_base_path", str(folder), "--output_path", out, "--num_workers", str(workers)]
        assert make_shards.main(flags) == 0
        seconds = time.perf_counter() - start
        samples = json.loads((Path(out) / "manifest.json").read_bytes())["totals"]["samples"]
    print(
        f"make_shards.py --num_workers {workers}: {samples} images in {seconds:.1f} s, {samples / seconds:.1f} images/s"
    )


if __name__ == "__main__":
    sys.exit(main())
