"""Pictures made in the tests: photo-like texture, encoded every way that a folder may hold."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources.found_input import Input


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth color fields with edges and grain, [H, W, 3] uint8; the quadrants differ, so that a turn shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(width, height)
    planes = [np.sin(7 * x * (c + 1) + 3 * y + seed) + np.cos(5 * y * (c + 2) - 2 * x) for c in range(3)]
    pixels = 128 + 45 * np.stack(planes, axis=-1) + rng.normal(0, 4, (height, width, 3))
    pixels[: height // 2, : width // 2] += 40
    return pixels.clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}), **options)
    return out.getvalue()


def opened(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else 100.0


def die_if_deadly(job: object, item: Input) -> str:
    """Work for a process that an image may kill; here, and not in a test file, because the process imports it."""
    if item.file == b"deadly":
        os.kill(os.getpid(), signal.SIGSEGV)
    return item.path


def folder_of(root: Path, files: dict[str, bytes | str]) -> Path:
    """`root` with these files in it, by their names within it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root
