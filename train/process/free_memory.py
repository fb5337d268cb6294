"""Memory that this host and its device can still give."""

import resource
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


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def host_bytes() -> int:
    """Memory that this host can still give: the kernel's estimate, or what the control group leaves if that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        cached = sum(int(statistics.get(name, 0)) for name in ("inactive_file", "active_file"))  # given back when asked
        free = min(free, int(text) - int(used.read_text()) + cached)
    return max(free, 0)
