"""Forward and backward pass as CUDA graphs, one pair for each shape of a batch.

A CUDA graph is a recording of kernel launches, with the addresses that they work on, which the host then launches as one. A
step of Qwen-Image is some 3,200 kernels (before the kernels of qwen_image/kernels/, 6,000), which a host launches hardly
faster than an H100 runs them: the GPU waits in between, at 512² most of the time. A graph takes the host out of it, and
whatever the host does next (DeepSpeed's hooks, the next batch) happens while the GPU works.

All shapes share one pool of memory: at any time only one of them is between its forward and its backward pass. What a
graph reads and writes has fixed addresses: inputs are copied into its own buffers, and all gradients leave through one
flat buffer.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.out_of_memory import memory_ran_out
from qwen_image.streaming.block_stream import BlockStream
from train.loader.batch_shapes import KEPT

Inputs = tuple[torch.Tensor | None, ...]
MODE = "thread_local"  # NCCL's and the loader's threads may go on calling CUDA while a graph is captured


@dataclass
class Pair:
    """The two graphs of one shape, and the tensors that outside code writes before and reads after a launch."""

    inputs: Inputs
    losses: torch.Tensor
    upstream: torch.Tensor  # d(objective)/d(losses), [B]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    kept_alive: object
    holds: list[list[int | None]]  # what a block stream's slots hold before, between and after the two; empty without


class StepGraphs:
    """Computes losses [B] of a batch by replaying graphs; their gradients reach `trained` through autograd.

    Args:
        module: its parameters with requires_grad are trained; all of one dtype, and their addresses don't change.
        flat: the parameter that receives their gradients as one tensor; None: each its own.
        compute: device tensors (None where a batch lacks one) → losses [B]; must not wait for the device or draw
            random numbers.
        small: a context in which `compute` takes little memory but meets every kernel, for compiling and warming up.
        keep_alive: what the graphs read that something else owns.
        source: brings the weights of blocks that don't stay on the device; its fetches become part of the graphs.
    """

    def __init__(
        self,
        module: nn.Module,
        flat: nn.Parameter | None,
        compute: Callable[[Inputs], torch.Tensor],
        small: Callable[[], AbstractContextManager[object]],
        keep_alive: Callable[[Inputs], object],
        source: BlockStream | None = None,
    ) -> None:
        self.module, self.compute, self.small, self.keep_alive = module, compute, small, keep_alive
        self.source = source
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.receivers = self.trained if flat is None else [flat]
        self.pairs: OrderedDict[tuple[Any, ...], Pair] = OrderedDict()
        self.kept = KEPT
        self.pool = torch.cuda.graph_pool_handle()
        # One for all captures: freed memory serves its own stream alone, and each stream has cuBLAS workspaces of 64 MiB.
        self.stream = torch.cuda.Stream()
        first = self.trained[0]
        self.sizes = [parameter.numel() for parameter in self.trained]
        self.gradients = torch.empty(sum(self.sizes), dtype=first.dtype, device=first.device)

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Losses [B] of the batch, differentiable once with respect to `trained`."""
        key = tuple(None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        pair = self.pairs.get(key)
        if pair is None:
            pair = self.pairs[key] = self.capture_with_room(inputs)
            while len(self.pairs) > self.kept:
                self.pairs.popitem(last=False)
        self.pairs.move_to_end(key)
        for own, given in zip(pair.inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given, non_blocking=True)
        losses = _Replay.apply(self, pair, *self.receivers)
        assert isinstance(losses, torch.Tensor)
        return losses

    def capture_with_room(self, inputs: Inputs) -> Pair:
        """`capture`; when memory runs out, the other shapes make room, and half as many of them are kept from then on.

        Raises RuntimeError (qwen_image/out_of_memory.py knows it) when it isn't theirs that lacks.
        """
        try:
            return self.capture(inputs)
        except RuntimeError as error:
            if not self.pairs or not memory_ran_out(error):
                raise
        # Here the exception is gone, and with it every frame that held a tensor.
        torch.cuda.synchronize()
        self.kept = max(1, len(self.pairs) // 2)
        self.pairs.clear()
        gc.collect()
        torch.cuda.empty_cache()
        self.pool = torch.cuda.graph_pool_handle()  # the old one may still hold what is alive elsewhere
        return self.capture(inputs)

    def capture(self, inputs: Inputs) -> Pair:
        """Record both graphs for the shapes of `inputs`. Raises RuntimeError, leaving what was captured before."""
        own: Inputs = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.small(), self.paused(), fresh_leaves(self.module) as leaves:
            torch.autograd.grad(self.compute(own).sum(), leaves, allow_unused=True)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        holds: list[list[int | None]] = []
        if self.source is not None:
            self.source.require(0, +1)
            torch.cuda.synchronize()
        with fresh_leaves(self.module) as leaves:
            with (
                torch.cuda.graph(forward, pool=self.pool, stream=stream, capture_error_mode=MODE),
                self.recorded(holds),
            ):
                losses = self.compute(own)
            upstream = torch.ones_like(losses)
            with (
                torch.cuda.graph(backward, pool=self.pool, stream=stream, capture_error_mode=MODE),
                self.recorded(holds),
            ):
                gradients = torch.autograd.grad(losses, leaves, upstream)
                torch._foreach_copy_(self.views(self.gradients), [gradient.reshape(-1) for gradient in gradients])
                del gradients  # its memory may serve the next shape
        if self.source is not None:
            holds.append(self.source.holds)
            self.source.forget()  # a capture fetches nothing
        return Pair(own, losses.detach(), upstream, forward, backward, self.keep_alive(own), holds)

    def paused(self) -> AbstractContextManager[None]:
        """A context for passes whose numbers don't matter."""
        return nullcontext() if self.source is None else self.source.pause()

    @contextmanager
    def recorded(self, holds: list[list[int | None]]) -> Iterator[None]:
        """A graph is being captured inside; what a block stream's slots hold before it is added to `holds`."""
        if self.source is None:
            yield
            return
        holds.append(list(self.source.holds))
        with self.source.recorded():
            yield

    def replay(self, graph: torch.cuda.CUDAGraph, holds: list[list[int | None]], part: int) -> None:
        """Launch the `part`-th graph of a pair, with the blocks in their slots that it was captured with."""
        if self.source is None:
            graph.replay()
            return
        self.source.have(holds[part])
        graph.replay()
        self.source.holds = list(holds[part + 1])

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return list(flat.split(self.sizes))


class _Replay(torch.autograd.Function):
    """Launches the forward graph, and the backward graph when gradients are asked for."""

    @staticmethod
    def forward(ctx: Any, graphs: StepGraphs, pair: Pair, *receivers: torch.Tensor) -> torch.Tensor:
        ctx.graphs, ctx.pair = graphs, pair
        graphs.replay(pair.forward, pair.holds, 0)
        return pair.losses.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        graphs, pair = ctx.graphs, ctx.pair
        pair.upstream.copy_(upstream[0])
        graphs.replay(pair.backward, pair.holds, 1)
        # A copy, because .grad may keep what it is given until after the next launch.
        parts = graphs.gradients.clone().split([receiver.numel() for receiver in graphs.receivers])
        return None, None, *(part.view_as(p) for part, p in zip(parts, graphs.receivers, strict=True))


@contextmanager
def fresh_leaves(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The trained parameters replaced by new ones over the same memory, in the order of `module.parameters()`.

    Autograd brings a gradient to the stream on which the parameter was first used. DeepSpeed's hooks fix that to the
    default stream, which a capture must not touch.
    """
    owners = [(owner, name, p) for owner in module.modules() for name, p in owner._parameters.items() if p is not None]
    leaves = {p: nn.Parameter(p.detach()) for _, _, p in owners if p.requires_grad}
    replaced = [(owner, name, p) for owner, name, p in owners if p in leaves]
    for owner, name, parameter in replaced:
        owner._parameters[name] = leaves[parameter]
    try:
        yield list(leaves.values())
    finally:
        for owner, name, parameter in replaced:
            owner._parameters[name] = parameter


@contextmanager
def few_blocks(transformer: QwenImageTransformer) -> Iterator[None]:
    """The transformer with one block of each kind (first, recomputed, kept, last): all its kernels in little memory.

    The first is a kind of its own, because its input needs no gradient.
    """
    whole, checkpointed = transformer.transformer_blocks, transformer.checkpointed_blocks
    chosen = sorted({0, min(1, len(whole) - 1), min(checkpointed, len(whole) - 1), len(whole) - 1})
    transformer.transformer_blocks = nn.ModuleList([whole[index] for index in chosen])
    transformer.checkpointed_blocks = sum(index < checkpointed for index in chosen)
    try:
        yield
    finally:
        transformer.transformer_blocks, transformer.checkpointed_blocks = whole, checkpointed
