"""Kernels that aren't PyTorch's are compared with the operations they stand for, on the GPU that will run them, before use.

They were written for and timed on an H100; another card, or another version of Triton or FlashAttention, may refuse
to compile one, or compile it wrongly. What fails here is switched off for this process, and PyTorch's own
operations do its work.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qwen_image.float8 import mlp as float8_mlp
from qwen_image.kernels import flash_attention
from qwen_image.model import attention, joint_layout
from qwen_image.model.layers import RMSNorm
from qwen_image.model.rotary import Rotary, rotary_table
from qwen_image.model.sizes import TransformerConfig

TEXT, ROWS, COLUMNS = 37, 6, 8  # of the samples that are compared
PADDING = 5  # tokens of the second of two samples
LONGER = 144  # more tokens for FlashAttention, which has another backward kernel for up to 128 keys (or 80 queries)
RANK, SCALE = 32, 32**-0.5  # of a LoRA whose updates are as large as what they are added to
FARTHEST = 0.03  # root mean square of the difference, relative: bf16 gives 0.003, float8's neighbors 0.02

Results = tuple[torch.Tensor, ...]


class Check(NamedTuple):
    """A kernel's name, the module's attribute that says whether to use it, and what to compare with and without it.

    `samples`: it is worth its check, seconds for compiling, where images are only sampled.
    """

    name: str
    module: Any
    switch: str
    results: Callable[[], Results]
    samples: bool = False


@torch.no_grad()
def distrust_kernels(
    config: TransformerConfig, dtype: torch.dtype, device: torch.device, float8: bool, trains: bool = True
) -> list[str]:
    """Switch off the kernels that don't do what they should for a model of `config` and `dtype`; a warning for each.

    Without training (not `trains`) those that gain nothing are switched off untried.
    """
    if device.type != "cuda":
        return []
    checks = [
        Check("joint layout", joint_layout, "HAS_TRITON", lambda: _joint_layout(config, dtype, device), samples=True),
        Check("low-rank layout", joint_layout, "HAS_LOW_RANK_KERNEL", lambda: _low_rank_layout(config, dtype, device)),
        Check("FlashAttention", flash_attention, "HAS_FLASH", lambda: _flash_attention(config, dtype, device)),
    ]
    if float8:
        checks.append(Check("float8 GELU", float8_mlp, "HAS_TRITON", lambda: _quantized_gelu(config, dtype, device)))
    checks = [check for check in checks if getattr(check.module, check.switch)]
    for check in checks:  # each is off until it has passed, so that only one at a time is in doubt
        setattr(check.module, check.switch, False)
    warnings = []
    for name, module, switch, results, samples in checks:
        if not (trains or samples):
            continue
        why = difference(results, module, switch)
        setattr(module, switch, not why)
        if why:
            warnings.append(f"warning: the {name} kernel is not used, PyTorch's operations take its place: {why}")
    return warnings


def difference(results: Callable[[], Results], module: Any, switch: str) -> str:
    """Why `results` with a kernel (`module.switch` is True) are not those without; "" when they agree. Leaves it True."""
    setattr(module, switch, False)
    try:
        expected = results()
    except RuntimeError:
        return ""  # this GPU can't do it at all (attention in float32, say): nothing to compare, and not the kernel's fault
    finally:
        setattr(module, switch, True)
    try:
        ours = results()
    except Exception as error:  # the compiler's own kinds, the driver's
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for one, other in zip(ours, expected, strict=True):
        far = float((one.double() - other.double()).norm() / other.double().norm())
        if not far < FARTHEST:  # NaN too
            return f"its result differs by {far:.2g}"
    return ""


def _random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """The same for the same shape and seed: what must differ from another of its shape wants a seed of its own."""
    generator = torch.Generator().manual_seed(sum(shape) + (seed << 32))
    return torch.randn(shape, generator=generator).to(device, dtype)


class LayoutInputs(NamedTuple):
    """Of `joint_layout`, all but the projections."""

    norms: joint_layout.Norms
    rotary: Rotary
    keep: torch.Tensor
    invertible: bool


def _layout_inputs(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> LayoutInputs:
    norms = joint_layout.Norms(*(RMSNorm(config.attention_head_dim).requires_grad_(False) for _ in range(4)))
    for norm in norms:
        norm.to(device, dtype)
    rotary = rotary_table(TEXT, ((ROWS, COLUMNS),), config.axes_dims_rope, device)
    return LayoutInputs(norms, rotary, _keep(device), invertible=True)


def _joint_layout(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Results:
    """Query, key and value, and the projections' gradients."""
    shapes = [(2, tokens, 3 * config.inner_dim) for tokens in (ROWS * COLUMNS, TEXT)]
    inputs = _layout_inputs(config, dtype, device)
    with torch.enable_grad():
        image, text = (_random(device, dtype, *shape).requires_grad_() for shape in shapes)
        return _differentiated(joint_layout.joint_layout(image, text, *inputs), (image, text))


def _low_rank_layout(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Results:
    """The same with LoRA updates, and the gradients of their factors and up matrices."""
    inner, inputs = config.inner_dim, _layout_inputs(config, dtype, device)
    with torch.enable_grad():
        shapes: list[tuple[int, ...]] = [
            (2, tokens, 3 * width) for tokens in (ROWS * COLUMNS, TEXT) for width in (inner, RANK)
        ]
        shapes += [(inner, RANK)] * 6
        leaves = [_random(device, dtype, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
        image, of_image, text, of_text, *ups = leaves
        updates = (
            joint_layout.Updates(of_image, tuple(ups[:3]), SCALE),
            joint_layout.Updates(of_text, tuple(ups[3:]), SCALE),
        )
        if joint_layout.HAS_LOW_RANK_KERNEL:
            return _differentiated(joint_layout.joint_layout(image, text, *inputs, updates), leaves)
        image, text = _added(image, updates[0]), _added(text, updates[1])
        return _differentiated(joint_layout.joint_layout(image, text, *inputs), leaves)


def _added(projection: torch.Tensor, update: joint_layout.Updates) -> torch.Tensor:
    parts = zip(update.factors.split(RANK, -1), update.ups, strict=True)
    return projection + update.scale * torch.cat([factors @ up.t() for factors, up in parts], -1)


def _differentiated(made: Results, leaves: Sequence[torch.Tensor]) -> Results:
    """What was made, and the leaves' gradients from random ones of it."""
    upstream = [_random(each.device, each.dtype, *each.shape, seed=seed) for seed, each in enumerate(made)]
    return *(each.detach() for each in made), *torch.autograd.grad(made, leaves, upstream)


def _keep(device: torch.device) -> torch.Tensor:
    keep = torch.ones(2, TEXT + ROWS * COLUMNS, dtype=torch.bool)
    keep[1, TEXT - PADDING : TEXT] = False
    return keep.to(device)


def _flash_attention(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Results:
    """With padding and without."""
    keep = F.pad(_keep(device), (0, LONGER), value=True)
    return *_attended(config, dtype, keep), *_attended(config, dtype, keep, padded=False)


def _attended(config: TransformerConfig, dtype: torch.dtype, keep: torch.Tensor, padded: bool = True) -> Results:
    """What attends, and the gradients of query, key and value, where `keep` [B, L] is True or (not `padded`) everywhere."""
    shape = *keep.shape, config.num_attention_heads, config.attention_head_dim
    with torch.enable_grad():
        leaves = [leaf.requires_grad_() for leaf in _random(keep.device, dtype, 3, *shape)]
        query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
        attended = attention.joint_attention(query, key, value, keep if padded else None, dense=True)
        gradients = torch.autograd.grad(attended.float().square().sum(), leaves)
    return attended.detach(), *gradients


def _quantized_gelu(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Results:
    """GELU and its gradient, multiplied out again."""
    y, gradient = (_random(device, dtype, TEXT, 4 * config.inner_dim) for _ in range(2))
    weight_scale = torch.linspace(0.5, 2, y.shape[1], device=device)[None]
    quantized = float8_mlp.quantized_gelu(y), float8_mlp.quantized_gelu_gradient(gradient, y, weight_scale)
    return tuple(values.float() * scales for values, scales in quantized)
