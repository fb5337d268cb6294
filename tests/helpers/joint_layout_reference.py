"""Inputs of the joint layout and its definition in float64; where its kernels can run."""

import os

import pytest
import torch

from qwen_image.model import joint_layout as module
from qwen_image.model.joint_layout import Norms
from qwen_image.model.layers import NORM_EPS, RMSNorm
from qwen_image.model.rotary import rotary_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


needs_kernel = pytest.mark.skipif(
    not module.HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="the kernels run on a GPU, or by `make test-kernels`",
)


# text tokens, (rows, columns) of the image, heads, dim, batch, padding of each sample or None, whether text has queries
CASES = {
    "even": (4, (2, 4), 4, 32, 1, None, True),
    "odd text, six heads": (5, (1, 3), 6, 16, 1, None, True),
    "padding in one sample": (3, (2, 3), 2, 32, 2, (2, 0), True),
    "last block": (5, (1, 3), 2, 32, 2, None, False),
    "last block, padding": (5, (1, 2), 4, 32, 2, (0, 4), False),
}


# Relative to the largest value: one rounding of the result in bf16 (2⁻⁹), plus that of what is inverted; float32 sums.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


needs_rounding = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter truncates to bf16 where a GPU rounds")


def make(case, dtype, weight_spread=1.5, seed=0):
    text_tokens, (rows, columns), heads, dim, batch, padding, text_query = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    tokens, inner = text_tokens + rows * columns, heads * dim
    image = torch.randn(batch, rows * columns, 3 * inner, generator=generator).to(dtype)
    text = 3 * torch.randn(batch, text_tokens, (2 + text_query) * inner, generator=generator).to(dtype)
    norms = Norms(*(RMSNorm(dim).requires_grad_(False) for _ in range(4)))
    for norm in norms:
        exponent = 2 * torch.rand(dim, generator=generator) - 1
        norm.weight.data = (weight_spread**exponent).to(dtype)
    keep = None
    if padding is not None:
        keep = torch.arange(tokens) < text_tokens - torch.tensor(padding)[:, None]
        keep = keep | (torch.arange(tokens) >= text_tokens)
    grads = [
        torch.randn(batch, length, heads, dim, generator=generator).to(dtype)
        for length in (tokens if text_query else rows * columns, tokens, tokens)
    ]
    axes = (dim - 2 * (3 * dim // 8), 3 * dim // 8, 3 * dim // 8)
    rotary = rotary_table(text_tokens, ((rows, columns),), axes, torch.device("cpu"))
    return image, text, norms, rotary, keep, grads


def reference(image, text, norms, rotary, keep):
    """The definition in float64, channel pairs as complex numbers."""
    cos, sin = (table[0, :, :, ::2].double() for table in rotary)
    turn = torch.complex(cos, sin)
    dim = norms.q.weight.shape[0]

    def normed(x, norm):
        x = x.unflatten(-1, (-1, dim))
        return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * norm.weight.double()

    def rotated(x, turn):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    q, k, v = image.chunk(3, -1)
    *text_q, text_k, text_v = text.split(q.shape[-1], -1)
    key = rotated(torch.cat([normed(text_k, norms.added_k), normed(k, norms.k)], 1), turn)
    value = torch.cat([text_v, v], 1).unflatten(-1, (-1, dim))
    query = normed(q, norms.q)
    if text_q:
        query = torch.cat([normed(text_q[0], norms.added_q), query], 1)
    query = rotated(query, turn[-query.shape[1] :])
    if keep is not None:
        key, value = key * keep[..., None, None], value * keep[..., None, None]
    return query, key, value


def outputs_and_gradients(function, image, text, norms, rotary, keep, grads, *more):
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    outputs = function(image, text, norms, rotary, keep, *more)
    loss = sum((output * grad).sum() for output, grad in zip(outputs, grads, strict=True))
    return [each.detach() for each in (*outputs, *torch.autograd.grad(loss, [image, text]))]


def expected_of(image, text, norms, rotary, keep, grads):
    return outputs_and_gradients(
        reference, image.double(), text.double(), norms, rotary, keep, [grad.double() for grad in grads]
    )


def assert_near(actual, expected, tolerance):
    for ours, exact in zip(actual, expected, strict=True):
        error = ((ours.double().cpu() - exact).abs().max() / exact.abs().max()).item()
        assert error < tolerance


@pytest.fixture
def on_device(monkeypatch):
    """Arguments moved to where the kernels run; the CPU counts as such in the interpreter."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "has_kernel", lambda *_: True)

    def move(image, text, norms, rotary, keep, grads):
        norms = Norms(*(norm.to(DEVICE) for norm in norms))
        rotary = type(rotary)(*(table.to(DEVICE) for table in rotary))
        keep = None if keep is None else keep.to(DEVICE)
        return image.to(DEVICE), text.to(DEVICE), norms, rotary, keep, [grad.to(DEVICE) for grad in grads]

    return move
