"""FlashAttention 4 for the joint attention, on Hopper GPUs where it is installed: pip install -e '.[flash]'.

FlashAttention computes softmax(q·kᵀ)·v tile by tile in on-chip memory, with a running maximum and sum for each row, so the
[L, L] matrix of scores never lies in memory (Dao et al. 2022; the fourth version is written for asynchronous tensor cores).
Besides the output it returns each row's log-sum-exp, from which the backward pass makes the scores again. cuDNN's attention
does the same; this library's backward pass is quicker (qwen_image/kernels/README.md). Padding needs no mask here either
(qwen_image/model/attention.py).
"""

import functools
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qwen_image.kernels import attention_gradients
from qwen_image.kernels.padding import without_padding

HOPPER = 9  # major compute capability: the only one on which this was measured
DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 128)  # the library takes multiples of 8 up to 256
COMPILER_COMPLAINT = r"Argument aux_data \(position \d+\) cannot be converted to a JitArgument"


def is_installed() -> bool:
    """Whether FlashAttention 4 is there to be imported.

    Found out without doing so: that takes 6 s, and FlashAttention 2's package of the same name may not fit this torch.
    """
    package = find_spec("flash_attn")
    folders = package.submodule_search_locations if package is not None else None
    return any((Path(folder) / "cute").is_dir() for folder in folders or ()) and find_spec("cutlass") is not None


HAS_FLASH = is_installed()


@functools.cache
def library() -> Any:
    """FlashAttention's own module, imported when it is first needed.

    Its compiler complains of an argument that stands for optional tensors: without these it is two times None, and no
    type of argument that the compiler knows.
    """
    warnings.filterwarnings("ignore", COMPILER_COMPLAINT, UserWarning)
    from flash_attn.cute import interface

    return interface


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


# What torch.compiler.assume_constant_result does, without importing the compiler, half of what imports take.
is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]


def can_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `flash_attention` can and should do it: query, key and value [B, H, L, D] with the memory of [B, L, H, D].

    Not where every bit counts: its deterministic mode, slower than cuDNN, gave two gradients for one input on an H100.
    """
    return (
        HAS_FLASH
        and not torch.are_deterministic_algorithms_enabled()
        and query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[3] in HEAD_SIZES
        and all(each.transpose(1, 2).is_contiguous() for each in (query, key, value))
        and is_hopper(query.device)
    )


@torch.library.custom_op("qwen_image::flash_attention", mutates_args=())
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in which `padding` [B] (float32) of each sample's keys are zero rows that must not count; None: no keys are.

    query [B, H, Lq, D], key and value [B, H, L, D] have the memory of [B, L, H, D]; so have the output [B, Lq, H, D] and
    all gradients. Also returns the log-sum-exp [B, H, Lq], float32. The gradients of key and value hold rubbish in the
    zero rows: the caller's `· keep` drops it.
    """
    inputs = (each.transpose(1, 2) for each in (query, key, value))
    output, lse = library()._flash_attn_fwd(*inputs, return_lse=True)[:2]
    if padding is None:
        return output, lse
    return without_padding(output.transpose(1, 2), lse, padding)


@torch.library.custom_op("qwen_image::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad and output [B, Lq, H, D] and the rest as above → the gradients of query, key and value, [B, L, H, D]."""
    inputs = (each.transpose(1, 2) for each in (query, key, value))
    grads = library()._flash_attn_bwd(*inputs, output, grad, lse)
    dq, dk, dv = (each.contiguous() for each in grads[:3])
    return dq, dk, dv


attention_gradients.register(flash_attention, flash_attention_backward)
