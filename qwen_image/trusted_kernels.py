"""Triton kernels are compared with the operations they stand for, on the GPU that will run them, before they are used.

They were written for and timed on an H100; another card, or another version of Triton, may refuse to compile one, or compile
it wrongly. What fails here is switched off for this process, and PyTorch's own operations do its work.
"""

from collections.abc import Callable
from typing import Any

import torch

from qwen_image import attention, float8_mlp, joint_layout
from qwen_image.layers import RMSNorm
from qwen_image.rotary import rotary_table
from qwen_image.transformer import TransformerConfig

TEXT, ROWS, COLUMNS = 37, 6, 8  # of the samples that are compared
PADDING = 5  # tokens of the second of two samples
FARTHEST = 0.03  # root mean square of the difference, relative: bf16 gives 0.003, float8's neighbours 0.02

Results = tuple[torch.Tensor, ...]


@torch.no_grad()
def distrust_kernels(config: TransformerConfig, dtype: torch.dtype, device: torch.device, float8: bool) -> list[str]:
    """Switch off the kernels that don't do what they should for a model of `config` and `dtype`; a warning for each."""
    if device.type != "cuda":
        return []
    checks: list[tuple[str, Any, Callable[[], Results]]] = [
        ("joint layout", joint_layout, lambda: _joint_layout(config, dtype, device)),
        ("padding", attention, lambda: _padded_attention(config, dtype, device)),
    ]
    if float8:
        checks.append(("float8 GELU", float8_mlp, lambda: _quantised_gelu(config, dtype, device)))
    warnings = []
    for name, module, results in checks:
        if module.HAS_TRITON and (why := difference(results, module)):
            module.HAS_TRITON = False
            warnings.append(f"warning: the {name} kernel is not used, PyTorch's operations take its place: {why}")
    return warnings


def difference(results: Callable[[], Results], switch: Any) -> str:
    """Why `results` with the kernels (`switch.HAS_TRITON`) are not those without; "" when they agree."""
    switch.HAS_TRITON = False
    try:
        expected = results()
    except RuntimeError:
        return ""  # this GPU can't do it at all (attention in float32, say): nothing to compare, and not the kernel's fault
    finally:
        switch.HAS_TRITON = True
    try:
        ours = results()
    except Exception as error:  # the compiler's own kinds, the driver's
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for one, other in zip(ours, expected, strict=True):
        far = float((one.double() - other.double()).norm() / other.double().norm())
        if not far < FARTHEST:  # NaN too
            return f"its result differs by {far:.2g}"
    return ""


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def _joint_layout(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Results:
    """Query, key and value, and the projections' gradients."""
    inner, image_tokens = config.inner_dim, ROWS * COLUMNS
    norms = joint_layout.Norms(*(RMSNorm(config.attention_head_dim).requires_grad_(False) for _ in range(4)))
    for norm in norms:
        norm.to(device, dtype)
    rotary = rotary_table(TEXT, ROWS, COLUMNS, config.axes_dims_rope, device)
    with torch.enable_grad():
        image, text = (_random(device, dtype, 2, n, 3 * inner).requires_grad_() for n in (image_tokens, TEXT))
        made = joint_layout.joint_layout(image, text, norms, rotary, _keep(device), invertible=True)
        upstream = [_random(device, dtype, *each.shape) for each in made]
        gradients = torch.autograd.grad(made, (image, text), upstream)
    return *(each.detach() for each in made), *gradients


def _keep(device: torch.device) -> torch.Tensor:
    keep = torch.ones(2, TEXT + ROWS * COLUMNS, dtype=torch.bool)
    keep[1, TEXT - PADDING : TEXT] = False
    return keep.to(device)


def _padded_attention(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Results:
    """What attends, and the gradients of query, key and value."""
    shape = 2, TEXT + ROWS * COLUMNS, config.num_attention_heads, config.attention_head_dim
    keep = _keep(device)
    with torch.enable_grad():
        query, key, value = (_random(device, dtype, *shape).requires_grad_() for _ in range(3))
        attended = attention.joint_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), keep, dense=True
        )
        gradients = torch.autograd.grad(attended.float().square().sum(), (query, key, value))
    return attended.detach(), *gradients


def _quantised_gelu(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Results:
    """GELU and its gradient, multiplied out again."""
    y, gradient = (_random(device, dtype, TEXT, 4 * config.inner_dim) for _ in range(2))
    weight_scale = torch.linspace(0.5, 2, y.shape[1], device=device)[None]
    quantised = float8_mlp.quantised_gelu(y), float8_mlp.quantised_gelu_gradient(gradient, y, weight_scale)
    return tuple(values.float() * scales for values, scales in quantised)
