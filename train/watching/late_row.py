"""A row of metrics whose numbers are still on their way from the device, so that the host need not wait for them.

Read in the step that made them, they kept the host from launching the next one: the GPU was idle for as long as that took.
A run that an error ends may lack its last row; what is resumed from a checkpoint has all before it.
"""

from typing import NamedTuple

import torch

from train.watching.metrics import Metrics


class LateRow(NamedTuple):
    """The row of optimizer step `step`; `numbers` is right on the host once `arrived` has happened (None: it is)."""

    step: int
    names: tuple[str, ...]
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, **values: torch.Tensor | float) -> "LateRow":
        """Send for `values`: numbers, or tensors of one element on the CPU or the current GPU. Waits for nothing."""
        tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
        if not any(tensor.is_cuda for tensor in tensors):
            known = [value.item() if isinstance(value, torch.Tensor) else value for value in values.values()]
            return cls(step, tuple(values), torch.tensor(known, dtype=torch.float64), None)
        numbers = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
        for place, value in enumerate(values.values()):
            numbers[place].copy_(torch.as_tensor(value, dtype=torch.float64).detach().reshape(()), non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        return cls(step, tuple(values), numbers, arrived)

    def write(self, metrics: Metrics) -> None:
        """Wait for the numbers and log them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        metrics.log(self.step, **dict(zip(self.names, self.numbers.tolist(), strict=True)))
