"""Host memory that a GPU copies from at full speed, and modules that lend their weights to the GPU for a while."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

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

    torch's own pinned allocator rounds each tensor up to a power of two: 62 GB for the 41 GB of Qwen-Image.
    """
    pages, memory = _mapped(elements, dtype)
    if pages is None:
        return memory
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel() * dtype.itemsize, 0)
    if int(error) != 0:
        raise MemoryError(
            f"{elements * dtype.itemsize / 1e9:.1f} GB of host memory could not be page-locked ({error}): "
            'set "pin_memory": false in offload_param, or use fewer ranks on this host'
        )
    pages.locked_at = memory.data_ptr()
    return memory


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


def pin(module: nn.Module) -> None:
    """Move the weights of a module on the CPU into pinned memory, tensor by tensor."""
    for tensor in module.parameters():
        memory = pinned_memory(tensor.numel(), tensor.dtype)
        memory.copy_(tensor.data.view(-1))
        tensor.data = memory.view(tensor.shape)


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module's weights and buffers on `device` for a while. They are frozen: nothing is copied back."""
    tensors = [*module.parameters(), *module.buffers()]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data


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
