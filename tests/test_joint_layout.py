"""The joint layout, plain and by kernel (on a GPU, else in Triton's interpreter), against float64 arithmetic."""

import os

import pytest
import torch

from qwen_image.model import joint_layout as module
from qwen_image.model.joint_layout import Norms, can_invert, has_kernel, joint_layout, plain_joint_layout
from qwen_image.model.layers import NORM_EPS, RMSNorm
from qwen_image.model.rotary import rotary_table
from tests.small_transformer import small_transformer

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
    rotary = rotary_table(text_tokens, rows, columns, axes, torch.device("cpu"))
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


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_plain_operations_equal_the_definition(case):
    arguments = make(case, torch.float32)
    assert not has_kernel(*arguments[:3])
    actual = outputs_and_gradients(plain_joint_layout, *arguments)
    assert_near(actual, expected_of(*arguments), TOLERANCE[torch.float32])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_rounding)], ids=str)
@pytest.mark.parametrize("invertible", [True, False])
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_kernels_equal_the_definition(case, invertible, dtype, on_device):
    arguments = make(case, dtype)
    expected = expected_of(*arguments)
    actual = outputs_and_gradients(joint_layout, *on_device(*arguments), invertible)
    assert_near(actual, expected, TOLERANCE[dtype])
    assert [each.dtype for each in actual] == [dtype] * 5


@needs_kernel
@needs_rounding
def test_kernels_are_at_least_as_exact_as_plain_operations(on_device):
    arguments = make("even", torch.bfloat16, seed=1)
    expected = expected_of(*arguments)
    plain = outputs_and_gradients(plain_joint_layout, *arguments)  # first: `on_device` moves the norms
    ours = outputs_and_gradients(joint_layout, *on_device(*arguments), True)
    for kernel, operations, exact in zip(ours, plain, expected, strict=True):
        kernel_error, error = ((x.double().cpu() - exact).square().mean().sqrt() for x in (kernel, operations))
        assert kernel_error <= 1.05 * error


@needs_kernel
def test_gradients_of_other_memory_orders(on_device):
    """Attention's backward pass may leave them as [B, H, L, D]."""
    image, text, norms, rotary, keep, grads = make("padding in one sample", torch.float32)
    expected = expected_of(image, text, norms, rotary, keep, grads)
    grads = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads]
    moved = on_device(image, text, norms, rotary, keep, grads)
    assert_near(outputs_and_gradients(joint_layout, *moved, True), expected, TOLERANCE[torch.float32])


@needs_kernel
@pytest.mark.parametrize("case", ["even", "last block, padding"])
def test_the_operators_are_registered_as_the_compiler_wants_them(case, on_device):
    image, text, norms, rotary, keep, _ = on_device(*make(case, torch.float32))
    weights = [norm.weight for norm in norms]
    torch.library.opcheck(
        torch.ops.qwen_image.joint_layout,
        (image.requires_grad_(), text.requires_grad_(), *weights, *rotary, keep, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize(("weight", "possible"), [(-0.5, True), (2**-10, False), (0.0, False)])
def test_which_weights_can_be_divided_out(weight, possible):
    norms = make("even", torch.bfloat16)[2]
    norms.added_k.weight.data[3] = weight
    assert can_invert(norms) == possible


@needs_kernel
def test_a_transformer_computes_the_same_with_the_kernels(on_device, monkeypatch):
    transformer = small_transformer(DEVICE)
    trained = [
        layer.weight.requires_grad_() for block in transformer.transformer_blocks for layer in block.attn.image_layers()
    ]
    latents, prompt = torch.randn(2, 6, 64, device=DEVICE), torch.randn(2, 3, 24, device=DEVICE)
    mask = torch.tensor([[True, True, True], [True, False, False]], device=DEVICE)
    results = []
    for invertible in (None, True, False):
        if invertible is None:
            monkeypatch.setattr(module, "has_kernel", lambda *_: False)
        else:
            monkeypatch.undo()
            if DEVICE == "cpu":
                monkeypatch.setattr(module, "has_kernel", lambda *_: True)
        for block in transformer.transformer_blocks:
            block.attn.invertible_norms = bool(invertible)
        velocity = transformer(latents, torch.tensor([0.3, 0.7]), prompt, mask, 2, 3)
        results.append((velocity.detach(), *torch.autograd.grad(velocity.square().sum(), trained)))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
