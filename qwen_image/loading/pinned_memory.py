"""Host memory that a GPU copies from at full speed, if the system lets it be page-locked."""

import math
import mmap
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

ARENA_ALIGNMENT = 256  # bytes; for copies by DMA and vector loads
ARENA_BYTES = 2 << 30  # pinned at once, while threads already read into the arena before


class Pages(mmap.mmap):
    """An anonymous mapping that is unlocked, if it was locked for a GPU, before it is unmapped.

    Otherwise the driver goes on believing that these addresses are locked, and refuses to lock whatever lies there next.
    """

    locked_at: int | None = None

    def __del__(self) -> None:
        if self.locked_at is not None:
            torch.cuda.cudart().cudaHostUnregister(self.locked_at)


def pinned_memory(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Page-locked memory of exactly this size; given back when the last view of it is gone. Raises MemoryError.

    Where the system refuses to lock it, it is ordinary memory, and that is told once. torch's own pinned allocator rounds each
    tensor up to a power of two: 62 GB for the 41 GB of Qwen-Image.
    """
    pages, memory = _mapped(elements, dtype)
    if pages is None:
        return memory
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel() * dtype.itemsize, 0)
    if int(error) != 0:
        if torch.cuda.is_initialized():
            with suppress(RuntimeError):  # CUDA keeps the refusal as its last error, which the next launch would raise
                torch.zeros(1, device="cuda")
        tell_unlocked(elements * dtype.itemsize, str(error))
        return memory
    pages.locked_at = memory.data_ptr()
    return memory


def host_memory(shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """Uninitialized host memory by torch's own allocator, page-locked if that is asked for and the system allows it."""
    if pinned:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            tell_unlocked(math.prod(shape) * dtype.itemsize, str(error).splitlines()[0])
    return torch.empty(shape, dtype=dtype)


_told: set[str] = set()


def tell_unlocked(size: int, reason: str) -> None:
    """One line for people, the first time: what it costs and how the limit is raised."""
    if "unlocked" in _told:
        return
    _told.add("unlocked")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    allowed = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 1024:.0f} KiB"
    print(
        f"warning: the system refused to page-lock {size / 1e9:.1f} GB of host memory ({reason}; ulimit -l: {allowed}): copies "
        "to the GPU are about half as fast and hold the host up. Raise the limit (ulimit -l unlimited; docker run --ulimit "
        "memlock=-1; Slurm: PropagateResourceLimitsExcept=MEMLOCK), or run fewer ranks on this host",
        file=sys.stderr,
        flush=True,
    )


def unforked_memory(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory that child processes don't inherit. Raises MemoryError.

    Linux copies page-locked memory at every fork, because a device may write to it at any time: two loader workers made
    three of a base of 41 GB.
    """
    return _mapped(elements, dtype)[1]


def _mapped(elements: int, dtype: torch.dtype) -> tuple[Pages | None, torch.Tensor]:
    if elements == 0:
        return None, torch.empty(0, dtype=dtype)
    try:
        memory = Pages(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{elements * dtype.itemsize / 1e9:.1f} GB of host memory: {error}") from None
    memory.madvise(mmap.MADV_DONTFORK)
    return memory, torch.frombuffer(memory, dtype=dtype)  # the tensor keeps the mapping alive


@dataclass
class Arena:
    """Memory of one kind in aligned pieces; page-locked memory is taken in large ones, because each locking takes long."""

    device: torch.device
    dtype: torch.dtype
    pinned: bool
    remaining: int  # elements that will still be taken, at most
    _arena: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _used: int = 0

    def take(self, size: int) -> torch.Tensor:
        """An uninitialized tensor of `size` elements."""
        self.remaining -= size
        if not self.pinned:
            return torch.empty(size, dtype=self.dtype, device=self.device)
        alignment = ARENA_ALIGNMENT // self.dtype.itemsize
        start = -(-self._used // alignment) * alignment
        if start + size > self._arena.numel():
            elements = max(size, min(self.remaining + size, ARENA_BYTES // self.dtype.itemsize))
            self._arena, start = pinned_memory(elements, self.dtype), 0
        self._used = start + size
        return self._arena[start : start + size]
