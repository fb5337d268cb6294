"""A training step that changes nothing: what it holds in memory, or that it runs out of it."""

import gc
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from qwen_image.out_of_memory import memory_ran_out
from train.step.flow_matching_module import FlowMatchingModule
from train.step.offload_activations import ActivationOffload


class Trial(NamedTuple):
    """What one trial step took. Bytes: before it, more after its forward pass, and at the most."""

    resident: int
    kept: int
    peak: int


class SavedBytes:
    """A context that counts what autograd keeps: distinct memory, without the tensors given (weights, buffers).

    It sees eager operations; what a recomputed block parks elsewhere or lets go is not counted.
    """

    def __init__(self, without: Iterable[torch.Tensor] = ()) -> None:
        self.bytes = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in without}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:  # kept memory is not given out again, so its address is its name
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor.detach()

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def try_step(
    module: FlowMatchingModule,
    arguments: tuple[Any, ...],
    prepare: Callable[[], object] = lambda: None,
    fetching: bool = False,
) -> Trial | None:
    """After `prepare`, one forward and backward pass of `module` as training does it; None when memory ran out.

    Nothing changes: no gradient is stored (no hook of DeepSpeed's sees one), no graph is captured, random generators and
    the module's mode are as before. On CUDA the bytes are torch's own counters; on the CPU they are what autograd keeps,
    without what the work takes. Streamed blocks are computed with whatever their slots hold, unless `fetching`: so no rank
    waits in a gather for one that ran out of memory.
    """
    device = arguments[0].device
    training, graphs = module.training, module.graphs
    module.train()
    module.graphs = None
    try:
        source = module.transformer.block_stream
        fetching_nothing = nullcontext() if source is None or fetching else source.pause()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), fetching_nothing:
            prepare()
            return _measured_step(module, arguments, device)
    except RuntimeError as error:
        if not memory_ran_out(error):
            raise
    finally:
        module.train(training)
        module.graphs = graphs
    # here the exception and with it every frame that held a tensor is gone
    if isinstance(module.transformer.saved_inputs, ActivationOffload):
        module.transformer.saved_inputs.forget()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _measured_step(module: FlowMatchingModule, arguments: tuple[Any, ...], device: torch.device) -> Trial:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if device.type != "cuda":
        with SavedBytes([*module.parameters(), *module.buffers(), *_tensors(arguments)]) as saved:
            loss = module.forward(*arguments).mean()
        torch.autograd.grad(loss, trained, allow_unused=True)
        return Trial(0, saved.bytes, saved.bytes)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = module.forward(*arguments).mean()
    kept = torch.cuda.memory_allocated(device) - before
    torch.autograd.grad(loss, trained, allow_unused=True)
    torch.cuda.synchronize(device)
    return Trial(before, kept, torch.cuda.max_memory_allocated(device))


def _tensors(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """Those among the arguments, and in tuples of them."""
    nested = [_tensors(each) for each in arguments if isinstance(each, tuple)]
    return [item for each in nested for item in each] + [item for item in arguments if isinstance(item, torch.Tensor)]
