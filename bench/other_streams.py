"""The same step with its frozen base streamed by other libraries: what own code (qwen_image/streaming/) is measured against.

fully_shard, fully_shard_host: torch's FSDP2 around every block, the LoRA as its `ignored_params`; with `CPUOffloadPolicy` the
shares lie in pinned host memory. It keeps weights in their own dtype, so there is no float8 here, and wraps whole blocks.

deepspeed_leaf, deepspeed_leaf_host: DeepSpeed's ZeRO stage 3 with the blocks as leaf modules, so that it runs its hooks once
a block instead of once a layer, and with each block's frozen matrices as one parameter, so that it gathers once a block.
Its memory is right only where every block is recomputed: autograd keeps what a kept block has saved of gathered weights.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bench.stream_homes import Model, assemble, parse

if TYPE_CHECKING:
    import torch

    from train.step.flow_matching_module import FlowMatchingModule


def build_other(home: str, model: Model, recompute: int) -> FlowMatchingModule:
    """The step of a resident base, handed over to the library that `home` names. A collective."""
    need_process_group(model.device)
    module = assemble(parse("device", model, recompute), model, compile_blocks=False)
    own_fused_weights(module)
    if model.device.type == "cuda":
        compile_forwards(module)
    if home.startswith("fully_shard"):
        shard_fully(module, model, host=home.endswith("_host"))
    else:
        use_deepspeed(module, model, host=home.endswith("_host"))
    return module


def need_process_group(device: torch.device) -> None:
    """Both want one, on a single rank too."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it


def own_fused_weights(module: FlowMatchingModule) -> None:
    """Let the weights of the fused projections be parameters, in the place of the layers' parameters that are views of them."""
    from torch import nn

    for block in module.transformer.transformer_blocks:
        attention: Any = block.attn
        text = attention.text_layers(with_query=not block.is_last)
        for fused, layers in (
            (attention.image_projection, attention.image_layers()),
            (attention.text_projection, text),
        ):
            weight = fused.weight
            del fused.weight
            fused.weight = nn.Parameter(weight, requires_grad=False)
            for layer in layers:
                base = getattr(layer, "base_layer", layer)
                base.weight = base.bias = None


def compile_forwards(module: FlowMatchingModule) -> None:
    """Compile what the blocks compute but not the hooks around it, which both libraries live in."""
    import torch

    module.transformer.compile_blocks(dynamic=True)
    for block in module.transformer.transformer_blocks:
        block._compiled_call_impl = None
        block.forward = torch.compile(block.forward, options={"triton.multi_kernel": 1})


def shard_fully(module: FlowMatchingModule, model: Model, host: bool) -> None:
    """Spread every block over the ranks by `fully_shard`, and what is in none as its root."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(module.matrices())}
    if host:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=model.device.type == "cuda")
    for block in module.transformer.transformer_blocks:
        fully_shard(block, reshard_after_forward=True, **options)
    fully_shard(module.transformer, **options)


def use_deepspeed(module: FlowMatchingModule, model: Model, host: bool) -> None:
    """Give DeepSpeed's stage 3 the frozen weights alone: the LoRA's matrices are hidden from it, as plain tensors."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    if model.device.type == "cpu":  # as train/process/ranks.py does
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    transformer = module.transformer
    matrices: list[Any] = module.matrices()
    hide_parameters(transformer, trained=True)
    module.matrices = lambda: matrices  # type: ignore[method-assign]
    largest = 0
    for block in transformer.transformer_blocks:
        largest = max(largest, flatten_block(block))
    set_z3_leaf_modules(transformer, [type(transformer.transformer_blocks[0])])
    # DeepSpeed's hook after a leaf's backward pass hangs on its inputs, so that the first one's must want gradients.
    transformer.img_in.register_forward_hook(lambda layer, inputs, output: output.requires_grad_())
    stage: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": 2 * largest,
        "stage3_max_live_parameters": 4 * largest,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": largest // 8,
    }
    if host:
        stage["offload_param"] = {"device": "cpu", "pin_memory": model.device.type == "cuda"}
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}
    settings["bf16"] = {"enabled": model.device.type == "cuda"}
    deepspeed.initialize(model=transformer, config=settings, dist_init_required=False)


def hide_parameters(module: Any, trained: bool) -> None:
    """Keep the parameters that are (not) trained as plain attributes of their modules."""
    for part in module.modules():
        if hasattr(part, "in_features") and not hasattr(part, "weight"):  # tabulated; DeepSpeed wants to print it
            part.register_parameter("weight", None)
            part.register_parameter("bias", None)
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.requires_grad == trained:
                del part._parameters[name]
                object.__setattr__(part, name, parameter)


def flatten_block(block: Any) -> int:
    """Make all frozen matrices of a block views of one parameter, bound anew before it computes; the parameter's elements.

    Vectors become plain tensors: they stay.
    """
    import torch
    from torch import nn

    from qwen_image.streaming.block_layout import BlockLayout, frozen_matrices

    weights = dict(frozen_matrices(block))
    layout = BlockLayout.of({name: (weight.shape, weight.dtype) for name, weight in weights.items()})
    (dtype,) = {weight.dtype for weight in weights.values()}
    flat = torch.zeros(layout.size, dtype=torch.uint8, device=next(iter(weights.values())).device)
    for name, view in layout.views(flat).items():
        view.copy_(weights[name].data)
    owners = {name: (block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in weights}
    hide_parameters(block, trained=False)
    block.flat = nn.Parameter(flat.view(dtype), requires_grad=False)
    compute = block.forward

    def forward(*arguments: Any) -> Any:
        for name, view in layout.views(block.flat.data.view(torch.uint8)).items():
            owner, leaf = owners[name]
            object.__setattr__(owner, leaf, view)
        return compute(*arguments)

    block.forward = forward
    return block.flat.numel()
