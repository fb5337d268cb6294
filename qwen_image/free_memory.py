"""Memory that this host and its device can still give."""

import resource
from collections.abc import Iterator
from pathlib import Path

import torch

GIB = 2**30


CONTEXT_BYTES = 1 * GIB  # on a GPU besides torch's tensors: CUDA context, NCCL, cuBLAS, loaded kernels, fragments

_limits: dict[int, int] = {}  # --gpu_memory_limit in bytes, by device


def limit_device(device: torch.device, gib: float | None) -> None:
    """Let this process use no more of its GPU than a card of `gib` GiB would give, what libraries take outside torch included.

    Raises ValueError for more than the card has.
    """
    if gib is None or device.type != "cuda":
        return
    index = _index(device)
    free, total = torch.cuda.mem_get_info(index)
    limit = int(gib * GIB)
    if limit > total:
        raise ValueError(
            f"gpu_memory_limit: {gib:g} GiB, but {torch.cuda.get_device_name(index)} has {total / GIB:.1f}"
        )
    outside = max(total - free - torch.cuda.memory_reserved(index), CONTEXT_BYTES)  # most of it is still to come
    _limits[index] = limit
    torch.cuda.set_per_process_memory_fraction(max(limit - outside, 0) / total, index)


def device_bytes(device: torch.device) -> int:
    """Memory of the card, or what `limit_device` leaves of it."""
    total = torch.cuda.get_device_properties(device).total_memory
    return min(total, _limits.get(_index(device), total))


def allocator_bytes(device: torch.device) -> int:
    """What torch's allocator may take in all."""
    index = _index(device)
    _, total = torch.cuda.mem_get_info(index)
    return int(total * torch.cuda.get_per_process_memory_fraction(index))


_earlier: dict[int, int] = {}  # the highest peak before `restart_peak`, by device


def restart_peak(device: torch.device) -> None:
    """Let torch count its peak anew, of what comes from now on; `peak_bytes` remembers what was before."""
    if device.type == "cuda":
        _earlier[_index(device)] = peak_bytes(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far: of its GPU, by torch's allocator; without one, of the host's memory."""
    if device.type == "cuda":
        return max(_earlier.get(_index(device), 0), torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_free_bytes(device: torch.device) -> int:
    """What torch's allocator can still give on a GPU: free memory and its own cache, within `limit_device`'s limit."""
    index = _index(device)
    free, _ = torch.cuda.mem_get_info(index)
    taken = torch.cuda.memory_allocated(index)
    return min(free + torch.cuda.memory_reserved(index), allocator_bytes(device)) - taken


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def host_bytes(root: Path = Path("/")) -> int:
    """Memory that this host can still give: the kernel's estimate, or what a control group leaves if that is less.

    Each group that this process is in counts, up to the root: a batch system limits a job, a step or a task.
    """
    fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *(left for group in control_groups(root) for left in left_in(group))]))


def control_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups for memory, of both versions, inner ones first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = top / path.lstrip("/")
        yield from (group for group in (inner, *inner.parents) if group == top or top in group.parents)
    yield root / "sys/fs/cgroup"  # of a container, whose own paths lie elsewhere


def left_in(group: Path) -> Iterator[int]:
    """What a group's limit leaves, if it has one; cached files are given back when memory is asked for."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            text = (group / limit).read_text().strip()
            if text == "max":
                continue
            taken = int((group / used).read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        prefix = "" if limit == "memory.max" else "total_"
        cached = sum(int(statistics.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))
        yield int(text) - taken + cached
