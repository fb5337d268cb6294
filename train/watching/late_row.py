"""A row of metrics whose numbers are still on their way from the device."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Read = Callable[[list[float]], dict[str, float]]


class Part(NamedTuple):
    """Numbers [N] on the CPU or the current GPU, and what is to be made of them once they are on the host."""

    numbers: torch.Tensor
    read: Read


class LateRow(NamedTuple):
    """A row whose numbers are still on their way from the device; on the host once `arrived` has happened (None: they are).

    Read in the step that made them, they would keep the host from launching the next one.
    """

    step: int
    names: tuple[str, ...]
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None
    parts: tuple[tuple[int, Read], ...] = ()

    @classmethod
    def of(cls, step: int, parts: Sequence[Part] = (), /, **values: torch.Tensor | float) -> "LateRow":
        """Send for `values`: numbers, or tensors of one element on the CPU or the current GPU; and for `parts`. No waiting."""
        tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
        sizes = tuple((part.numbers.numel(), part.read) for part in parts)
        total = len(values) + sum(size for size, _ in sizes)
        on_gpu = any(tensor.is_cuda for tensor in [*tensors, *(part.numbers for part in parts)])
        numbers = torch.empty(total, dtype=torch.float64, pin_memory=on_gpu)
        for place, value in enumerate(values.values()):
            if isinstance(value, torch.Tensor):
                numbers[place].copy_(value.detach().to(torch.float64).reshape(()), non_blocking=True)
            else:
                numbers[place] = value
        place = len(values)
        for part in parts:
            numbers[place : place + part.numbers.numel()].copy_(part.numbers.detach().double(), non_blocking=True)
            place += part.numbers.numel()
        arrived = None
        if on_gpu:
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        return cls(step, tuple(values), numbers, arrived, sizes)

    def read(self) -> dict[str, float]:
        """The numbers by name, waited for."""
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers = self.numbers.tolist()
        found = dict(zip(self.names, numbers[: len(self.names)], strict=True))
        place = len(self.names)
        for size, read in self.parts:
            found |= read(numbers[place : place + size])
            place += size
        return found
