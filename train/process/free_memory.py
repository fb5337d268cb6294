"""Memory that this host and its device can still give."""

from pathlib import Path

import torch

GIB = 2**30


def device_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


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
