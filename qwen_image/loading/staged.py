"""The transformer read tensor by tensor into what it becomes: merged, float8, or columns of the modulation table.

    transformer = load_staged(files, torch.bfloat16, "cuda", base_float8=True, sigmas=[k / 1000 for k in range(1, 1001)])

A tensor in the model's dtype lives only between the disk and what is made of it, so a float8 model of 13 GB never needs the
41 GB of the bf16 one. Threads read ahead by one block while the device works. With `readers`, ranks that can reach the same
files take turns: each block is read, merged and quantized by one of them and broadcast to the others, so each byte comes from
the disk once.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qwen_image.float8.linear import Float8Linear, use_float8
from qwen_image.loading.model_files import ModelFiles
from qwen_image.loading.pinned_memory import pinned_memory, unforked_memory
from qwen_image.loading.safetensors_ranges import RangeReader
from qwen_image.loading.weights import empty_transformer, match_weights, replace_parameter
from qwen_image.model.modulation import TableBuilder
from qwen_image.model.transformer import QwenImageTransformer

TABULATED = ("img_mod", "txt_mod")
BLOCKS = "transformer_blocks."
OUTSIDE = -1  # stands for the number of a block: what is in none

Change = Callable[[str, torch.Tensor], torch.Tensor]  # a layer's full name and weight → what to use instead


class Readers:
    """The ranks of a process group as they share the reading: block i is number i mod size's.

    `group`: None stands for this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def reads(self, block: int) -> bool:
        return self.reader(block) == self.rank

    def reader(self, block: int) -> int:
        return max(block, 0) % self.size

    def agree(self, problem: Exception | None) -> None:
        """Raise on every rank what kept one of them from reading; a collective."""
        if problem is not None and self.group is None:
            raise problem
        if self.group is None:
            return
        told: list[Any] = [None] * self.size
        own = None if problem is None else (type(problem).__name__, f"{problem} (on rank {dist.get_rank()})")
        dist.all_gather_object(told, own, group=self.group)
        if problem is not None:
            raise problem
        for kind, text in filter(None, told):
            raise {"FileNotFoundError": FileNotFoundError, "OSError": OSError}.get(kind, ValueError)(text)

    def share(self, block: int, values: torch.Tensor) -> None:
        """Broadcast what the reader of `block` has, contiguous, into everybody's `values`."""
        if self.group is not None:
            assert values.is_contiguous()
            dist.broadcast(values.view(-1).view(torch.uint8), group=self.group, group_src=self.reader(block))


def load_staged(
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    base_float8: bool = False,
    sigmas: Iterable[float] | None = None,
    change: Change | None = None,
    progress: bool = False,
    readers: Readers | None = None,
    finished: Callable[[QwenImageTransformer, int], None] | None = None,
) -> QwenImageTransformer:
    """The frozen transformer on `device`, in evaluation mode.

    Args:
        base_float8: quantize the blocks' projections and MLPs (qwen_image/float8/linear.py).
        sigmas: put a modulation table for them in the place of the modulation layers; None: keep the layers.
        change: applied to each linear layer's weight, in `dtype`, before anything else is made of it.
        readers: the ranks that read together; all of them must call this, a collective.
        finished: called with each block that is complete, in order; what it does with the block's weights is its own matter.

    Raises ValueError when names or shapes are another model's, before any weight is read.
    """
    device, readers = torch.device(device), readers or Readers()
    transformer = empty_transformer(files)
    stored = match_weights(transformer, files["transformer"].weights)
    linear = {f"{name}.weight" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    if base_float8:
        use_float8(transformer, dtype)
    names: dict[int, list[str]] = {block: [] for block in (OUTSIDE, *range(transformer.config.num_layers))}
    for name in stored:  # in the files' order within a block
        names[_block(name)].append(name)
    own = [block for block in names if readers.reads(block)]
    total = sum(stored[name].numel * stored[name].dtype.itemsize for block in own for name in names[block])
    with RangeReader(progress, total) as reader:
        stage = Stage(transformer, change, linear, device, dtype)
        later = iter(own)

        def read_ahead() -> None:
            for name in names.get(next(later, -2), ()):
                values = torch.empty(stored[name].shape, dtype=dtype, device=device)
                stage.add(name, values, reader.read(stored[name], values))

        read_ahead()
        problem: Exception | None = None
        for block in names:
            if readers.reads(block) and problem is None:
                try:
                    read_ahead()
                    stage.finish(len(names[block]))
                except (ValueError, OSError, MemoryError, RuntimeError) as error:
                    # The others wait for this rank's part: they get what there is, and are told at the end.
                    problem = error
            if problem is not None and readers.group is None:
                break
            stage.complete(block, readers, is_read=readers.reads(block) and problem is None)
            if block == OUTSIDE and sigmas is not None:
                allocate = pinned_memory if device.type == "cuda" else unforked_memory
                stage.builder = TableBuilder(transformer, sigmas, allocate)
            if block != OUTSIDE and finished is not None:
                finished(transformer, block)
        readers.agree(problem)
    if stage.builder is not None:
        stage.builder.finish()
    return transformer.eval()


def _block(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith(BLOCKS) else OUTSIDE


@dataclass
class Stage:
    """Tensors on their way from the disk, oldest first; what has arrived is put into the transformer."""

    transformer: QwenImageTransformer
    change: Change | None
    linear: set[str]  # names of linear layers' weights
    device: torch.device
    dtype: torch.dtype
    builder: TableBuilder | None = None
    waiting: deque[tuple[str, torch.Tensor, list[Future[None]]]] = field(default_factory=deque)

    def add(self, name: str, values: torch.Tensor, arriving: list[Future[None]]) -> None:
        """`values` will be full when all of `arriving` is done."""
        self.waiting.append((name, values, arriving))

    def finish(self, count: int) -> None:
        """Wait for the `count` oldest tensors."""
        for _ in range(count):
            name, values, arriving = self.waiting.popleft()
            for future in arriving:
                future.result()
            if self.change is not None and name in self.linear:
                values = self.change(name.removesuffix(".weight"), values)
            layer = self.transformer.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, Float8Linear) and name.endswith(".weight"):
                layer.quantize(values)
            else:
                replace_parameter(self.transformer, name, nn.Parameter(values, requires_grad=False))

    def complete(self, block: int, readers: Readers, is_read: bool) -> None:
        """Give every rank what one of them read of a block, its modulation as columns of the table.

        `is_read`: this rank has read it.
        """
        if block == OUTSIDE:
            for name, part in self.transformer.named_children():
                if name + "." != BLOCKS:
                    self._share(part, block, readers)
            return
        module = self.transformer.transformer_blocks[block]
        if self.builder is not None:
            columns = self.builder.columns(block) if is_read else self.builder.room(self.device)
            readers.share(block, columns)
            self.builder.add_block(block, columns)
        self._share(module, block, readers)

    def _share(self, module: nn.Module, block: int, readers: Readers) -> None:
        if readers.group is None:
            return
        quantized = [layer for layer in module.modules() if isinstance(layer, Float8Linear)]
        for layer in quantized:
            if layer.weight.is_meta:
                layer.allocate(self.device)
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
                parameter = nn.Parameter(values, requires_grad=False)
                replace_parameter(module, name, parameter)
            readers.share(block, parameter.data)
        for layer in quantized:
            readers.share(block, layer.scale)
