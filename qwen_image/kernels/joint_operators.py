"""The joint layout as operators on CUDA tensors, with gradients; torch.compile sees through them to the kernels."""

from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from qwen_image.kernels.joint_kernels import backward_kernel, forward_kernel
from qwen_image.kernels.layout_shapes import NORM_EPS, constants, empty_gradients, empty_outputs, heads_a_program

GROUP = 8  # heads a program, at most
WARPS = 4


@triton_op("qwen_image::joint_layout", mutates_args=())
def forward_op(
    image: torch.Tensor,
    text: torch.Tensor,
    norms: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    keep: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `joint_layout`; also the 1 / rms of q and k, float32 [B, L, 2, heads], if the backward pass shall `save` it."""
    outputs = empty_outputs(image, text, norms[0].shape[0], save)
    batch, tokens, heads, dim = outputs[1].shape
    group = heads_a_program(heads, GROUP)
    wrap_triton(forward_kernel)[(tokens, batch, heads // group)](
        image,
        text,
        *norms,
        cos,
        sin,
        cos if keep is None else keep,
        *outputs,
        text.shape[1],
        image.shape[1],
        EPS=NORM_EPS,
        GROUP=group,
        SAVE=save,
        **constants(heads, dim, image, text, keep),
        num_warps=WARPS,
    )
    return outputs


@forward_op.register_fake
def _(
    image: torch.Tensor, text: torch.Tensor, norms: list[torch.Tensor], *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_outputs(image, text, norms[0].shape[0], save=others[-1])


@triton_op("qwen_image::joint_layout_backward", mutates_args=())
def backward_op(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    image: torch.Tensor | None,
    text: torch.Tensor | None,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    scales: torch.Tensor,
    norms: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    keep: torch.Tensor | None,
    text_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `image` and `text`, from what the forward pass read (image, text) or from what it made (query, key)."""
    grads = empty_gradients(grad_query, grad_key, text_tokens)
    batch, tokens, heads, dim = grad_key.shape
    group = heads_a_program(heads, GROUP)
    unused = grad_key
    wrap_triton(backward_kernel)[(tokens, batch, heads // group)](
        grad_query,
        grad_key,
        grad_value,
        *(unused if each is None else each for each in (image, text, query, key)),
        scales,
        *norms,
        cos,
        sin,
        cos if keep is None else keep,
        *grads,
        text_tokens,
        tokens - text_tokens,
        EPS=NORM_EPS,
        GROUP=group,
        SAVED=query is not None,
        **constants(heads, dim, *grads, keep),
        num_warps=WARPS,
    )
    return grads


@backward_op.register_fake
def _(grad_query: torch.Tensor, grad_key: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_gradients(grad_query, grad_key, text_tokens=others[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    image, text, norms, cos, sin, keep, save = inputs
    query, key, _, scales = output
    # What attention keeps anyway, else the projections.
    ctx.save_for_backward(
        *((None, None, query, key) if save else (image, text, None, None)), scales, cos, sin, keep, *norms
    )
    ctx.text_tokens = text.shape[1]
    ctx.mark_non_differentiable(scales)
    ctx.set_materialize_grads(True)


def _backward(
    ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, _: Any
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: with activation checkpointing each access recomputes
    *kept, scales, cos, sin, keep = saved[:8]
    norms = list(saved[8:])
    grads = (each.contiguous() for each in (grad_query, grad_key, grad_value))
    image, text = torch.ops.qwen_image.joint_layout_backward(
        *grads, *kept, scales, norms, cos, sin, keep, ctx.text_tokens
    )
    return image, text, [None] * len(norms), None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)
