"""How long a GPU waits for weights: gaps between the kernels of a step in which only a fetch was pending.

    with torch.profiler.profile(...) as profiler: step()
    waiting(events_of(profiler))

A gap counts as waiting for weights as far as a fetch (a copy from the host, an all-gather, whatever follows it on its stream)
is at work in it, if the kernel after the gap was already launched when the gap began: then nothing but the fetch kept it.
A kernel that was launched later is the host's fault.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

SHORT_US = 3.0  # between two kernels of one queue there is always a microsecond or two
FETCHES = ("Memcpy HtoD", "AllGather", "all_gather", "split_with_sizes_copy", "chunk_cat")


class Kernel(NamedTuple):
    """A kernel or copy on the device. Microseconds; `launched`: when the host did, None: unknown (long before)."""

    name: str
    start: float
    end: float
    stream: int
    launched: float | None = None


def events_of(profiler: Any) -> list[Kernel]:
    """What the device did, from a finished torch.profiler.profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text())["traceEvents"])


def kernels_of(trace: Iterable[dict[str, Any]]) -> list[Kernel]:
    """The device's events of a Chrome trace, each with the time of the call that launched it."""
    trace = list(trace)
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in trace
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    return [
        Kernel(
            event["name"],
            event["ts"],
            event["ts"] + event["dur"],
            event.get("args", {}).get("stream", 0),
            launches.get(event.get("args", {}).get("correlation")),
        )
        for event in trace
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and event.get("ph") == "X"
    ]


def waiting(kernels: Iterable[Kernel]) -> dict[str, float] | None:
    """Seconds and shares of a step that began and ended with an idle device; None without kernels.

    wall: from the first kernel to the last; waits_for_weights, waits_for_host: in gaps, see above; fetching: with a fetch at
    work, hidden behind computation or not.
    """
    kernels = list(kernels)
    computing = compute_stream(kernels)
    fetch = [kernel for kernel in kernels if is_fetch(kernel, computing)]
    compute = sorted((kernel for kernel in kernels if not is_fetch(kernel, computing)), key=lambda kernel: kernel.start)
    if not compute:
        return None
    fetching = merged(fetch)
    begin = min(kernel.start for kernel in kernels)
    weights, host, reached = 0.0, 0.0, begin
    for kernel in compute:
        gap = kernel.start - reached
        if gap > SHORT_US:
            queued = kernel.launched is None or kernel.launched <= reached or reached == begin
            fetched = overlap(fetching, reached, kernel.start) if queued else 0.0
            weights += fetched
            host += gap - fetched
        reached = max(reached, kernel.end)
    wall = max(reached, max(kernel.end for kernel in kernels)) - begin
    return {
        "wall": wall * 1e-6,
        "fetching": sum(end - start for start, end in fetching) * 1e-6,
        "waits_for_weights": weights * 1e-6,
        "waits_for_host": host * 1e-6,
        "waiting_share": weights / wall,
    }


def compute_stream(kernels: Iterable[Kernel]) -> int | None:
    """The stream that computes most."""
    busy: dict[int, float] = defaultdict(float)
    for kernel in kernels:
        if not any(word in kernel.name for word in FETCHES):
            busy[kernel.stream] += kernel.end - kernel.start
    return max(busy, key=busy.__getitem__) if busy else None


def is_fetch(kernel: Kernel, computing: int | None) -> bool:
    """Whether it brings weights: by its name, or because it is neither on the stream that computes nor about gradients."""
    if any(word in kernel.name for word in FETCHES):
        return True
    return kernel.stream != computing and "nccl" not in kernel.name


def merged(kernels: Iterable[Kernel]) -> list[tuple[float, float]]:
    """The union of their times, in order."""
    spans: list[tuple[float, float]] = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if spans and kernel.start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], kernel.end)
        else:
            spans.append((kernel.start, kernel.end))
    return spans


def overlap(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """How much of [start, end] the spans cover."""
    return sum(max(0.0, min(end, there) - max(start, here)) for here, there in spans)


def profile_step(step: Callable[[], object]) -> dict[str, float] | None:
    """The waiting of one call of `step`, after one that isn't looked at; None without a GPU."""
    import torch

    step()
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    return waiting(events_of(profiler))
