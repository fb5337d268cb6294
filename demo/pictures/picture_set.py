"""Many drawn pictures at once, by all CPU cores: what the VAE, the transformer and the classifier learn from."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from demo.pictures.captions import caption
from demo.pictures.painting import paint
from demo.pictures.random_scenes import random_scene
from demo.pictures.scene import Scene

CHUNK = 64  # pictures that a process draws at a time
HELD_OUT_EVERY = 8  # one chunk in so many shows pairs of shape and color that only the classifier may see


@dataclass(frozen=True)
class PictureSet:
    """Pictures uint8 [N, side, side, 3] and their scenes; `seen` [N]: whether the model may learn from them."""

    pictures: np.ndarray
    scenes: list[Scene]
    seen: np.ndarray

    def __len__(self) -> int:
        return len(self.scenes)


def draw_chunk(job: tuple[int, int, bool]) -> tuple[np.ndarray, list[Scene]]:
    """CHUNK pictures from `first_seed` on: (first_seed, side, held_out) → pictures and scenes."""
    first_seed, side, held_out = job
    scenes = [random_scene(first_seed + i, wanted_held_out=held_out) for i in range(CHUNK)]
    return np.stack([paint(scene, side) for scene in scenes]), scenes


def draw_set(count: int, side: int, first_seed: int = 0, seconds: float | None = None) -> PictureSet:
    """About `count` pictures (a multiple of CHUNK), fewer when `seconds` are over; the first ones are always the same."""
    jobs = [
        (first_seed + CHUNK * number, side, number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        for number in range(-(-count // CHUNK))
    ]
    pictures = np.empty((len(jobs) * CHUNK, side, side, 3), np.uint8)
    scenes: list[Scene] = []
    seen: list[bool] = []
    start = time.perf_counter()
    for (_, _, held_out), (drawn, their) in zip(jobs, _in_processes(jobs), strict=False):
        pictures[len(scenes) : len(scenes) + CHUNK] = drawn
        scenes += their
        seen += [not held_out] * CHUNK
        if seconds is not None and time.perf_counter() - start > seconds and len(seen) >= HELD_OUT_EVERY * CHUNK:
            break
    return PictureSet(pictures[: len(scenes)], scenes, np.array(seen))


def _in_processes(jobs: list[tuple[int, int, bool]]) -> Iterator[tuple[np.ndarray, list[Scene]]]:
    """In the jobs' order; a few are drawn here without any process."""
    workers = min(len(jobs) // 8, len(os.sched_getaffinity(0)))
    if workers < 2:
        yield from map(draw_chunk, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(draw_chunk, jobs)


def captions(scenes: list[Scene], each: int) -> list[list[str]]:
    """`each` ways to tell every scene; the first numbers of a scene's captions are always the same."""
    return [[caption(scene, random.Random(f"{scene.seed}/{i}")) for i in range(each)] for scene in scenes]
