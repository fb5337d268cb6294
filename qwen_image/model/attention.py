"""Joint attention where some text tokens are padding, without paying for a mask.

Attention kernels with a key mask are slower than those without. Instead the padded rows of K and V are zeroed and dense
attention runs. A zero key scores 0, so n of them add n·e⁰ to each softmax sum and nothing to its numerator: with
(o, lse) = attention(q, k·keep, v·keep),

    share = n·exp(−lse),   o' = o / (1 − share),   lse' = lse + log1p(−share)

are the output and log-sum-exp over the real keys alone. Backward takes (o', lse') into the dense kernel's own backward:
exp(s − lse') is then the right probability for every real key, zero keys pass nothing on to q, and what reaches the
padded rows of K and V is dropped with `keep`.

It needs a kernel that returns and takes the log-sum-exp: cuDNN's on CUDA, flash attention's on the CPU. On Hopper GPUs
FlashAttention 4, where it is installed, takes cuDNN's place, without padding too (qwen_image/kernels/flash_attention.py).
qwen_image/kernels/padding.py makes (o', lse') of (o, lse).
"""

import torch
import torch.nn.functional as F

from qwen_image.kernels import attention_gradients
from qwen_image.kernels.flash_attention import can_flash
from qwen_image.kernels.padding import without_padding

aten = torch.ops.aten


def joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    dense: bool,
    zeroed: bool = False,
) -> torch.Tensor:
    """softmax(q·kᵀ/√D)·v over the keys where `keep` is True.

    query [B, H, Lq, D], key and value [B, H, L, D], keep bool [B, L] or None → [B, H, Lq, D]. `dense` chooses the
    method above, else padding costs a masked kernel; `zeroed`: for that, key and value are 0 already where they should.
    On CUDA float32 and float64 always take the mask: cuDNN's attention knows neither, and returns NaN for float32.
    """
    if keep is None:
        if can_flash(query, key, value):
            return torch.ops.qwen_image.flash_attention(query, key, value, None)[0].transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value)
    if not dense or (query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep[:, None, None])
    if not zeroed:
        kept = keep[:, None, :, None].to(key.dtype)
        key, value = key * kept, value * kept
    padding = (~keep).sum(1, dtype=torch.float32)
    if can_flash(query, key, value):
        return torch.ops.qwen_image.flash_attention(query, key, value, padding)[0].transpose(1, 2)
    return torch.ops.qwen_image.padded_attention(query, key, value, padding)[0].transpose(1, 2)


@torch.library.custom_op("qwen_image::padded_attention", mutates_args=())
def padded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in which `padding` [B] of each sample's keys are zero rows that must not count.

    query, key and value are [B, H, L, D] with the memory of [B, L, H, D], as the projections leave them; so are the
    output [B, Lq, H, D] and all gradients. Also returns the corrected log-sum-exp [B, H, Lq]. The gradients of key and
    value hold rubbish in the zero rows: the caller's `· keep` drops it.
    """
    if query.is_cuda:
        output, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, False, False)
        lse = lse.view(query.shape[:3])
    else:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return without_padding(output, lse, padding)


@torch.library.custom_op("qwen_image::padded_attention_backward", mutates_args=())
def padded_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The dense kernel's backward with the corrected output and log-sum-exp; gradients of shape [B, L, H, D]."""
    grad, output = grad.transpose(1, 2), output.transpose(1, 2)
    if query.is_cuda:
        unused = torch.empty((), dtype=torch.int64, device=query.device)  # the kernel's random state, without dropout
        length, keys = query.shape[2], key.shape[2]
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad,
            query,
            key,
            value,
            output,
            lse.unsqueeze(-1),
            unused,
            unused,
            None,
            None,
            None,
            length,
            keys,
            0.0,
            False,
        )
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, lse, 0.0, False
        )
    dq, dk, dv = (each.transpose(1, 2).contiguous() for each in grads[:3])
    return dq, dk, dv


attention_gradients.register(padded_attention, padded_attention_backward)
