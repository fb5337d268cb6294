"""Inputs of recomputed blocks wait for the backward pass in host memory: at 1024² 26 MB a block and sample, 1.5 GB in all.

DeepSpeed's own (`cpu_checkpointing`) empties tensors in place and fails here, where all blocks share the time embedding;
torch's `save_on_cpu` waits for every copy. These copies run beside the computation, and come back one block ahead.
"""

from dataclasses import dataclass, field

import torch
from torch.autograd.graph import saved_tensors_hooks

from qwen_image.loading.pinned_memory import host_memory

SMALLEST_BYTES = 1 << 20  # modulation and masks stay where they are
AHEAD = 4  # tensors fetched before they are asked for: image and text of two blocks


@dataclass
class Parked:
    """One tensor on the host, and its copy back when that is under way."""

    place: int
    host: torch.Tensor
    device: torch.device
    fetched: torch.Tensor | None = None
    used: bool = False
    arrived: torch.cuda.Event | None = field(default=None)


class ActivationOffload:
    """Called before each recomputed block: a context in which what the block's recomputation needs goes to the host."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parked: list[Parked] = []
        self.spare: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def __call__(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.park, self.fetch)

    @property
    def host_bytes(self) -> int:
        """Host memory held, in use or spare."""
        spare = [tensor for tensors in self.spare.values() for tensor in tensors]
        return sum(t.numel() * t.element_size() for t in [*spare, *(p.host for p in self.parked)])

    def park(self, tensor: torch.Tensor) -> torch.Tensor | Parked:
        if tensor.numel() * tensor.element_size() < SMALLEST_BYTES:
            return tensor
        if self.parked and all(parked.used for parked in self.parked):  # the backward pass before is over
            for parked in self.parked:
                self.spare.setdefault((parked.host.shape, parked.host.dtype), []).append(parked.host)
            self.parked = []
        spare = self.spare.get((tensor.shape, tensor.dtype))
        host = spare.pop() if spare else host_memory(tensor.shape, tensor.dtype, tensor.is_cuda)
        if self.stream is None:
            host.copy_(tensor)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.stream)
        self.parked.append(Parked(len(self.parked), host, tensor.device))
        return self.parked[-1]

    def forget(self) -> None:
        """Drop what is parked: its backward pass will not come."""
        self.parked = []

    def fetch(self, parked: torch.Tensor | Parked) -> torch.Tensor:
        if isinstance(parked, torch.Tensor):
            return parked
        if parked.place < len(self.parked) and self.parked[parked.place] is parked:
            for other in self.parked[max(0, parked.place - AHEAD) : parked.place + 1]:
                if not other.used:
                    self._start(other)
        if parked.fetched is None:  # asked for a second time
            self._start(parked)
        tensor, parked.fetched, parked.used = parked.fetched, None, True
        assert tensor is not None
        if parked.arrived is not None:
            current = torch.cuda.current_stream(parked.device)
            current.wait_event(parked.arrived)
            tensor.record_stream(current)
        return tensor

    def _start(self, parked: Parked) -> None:
        """Begin the copy back, behind the copy out on the same stream."""
        if parked.fetched is not None:
            return
        if self.stream is None:
            parked.fetched = parked.host.clone()
            return
        with torch.cuda.stream(self.stream):
            parked.fetched = parked.host.to(parked.device, non_blocking=True)
            parked.arrived = torch.cuda.Event()
            parked.arrived.record(self.stream)
