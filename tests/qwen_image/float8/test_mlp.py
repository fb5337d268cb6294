"""The float8 MLP in one function: the kernels (on a GPU, else in Triton's interpreter), and the function against layers."""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qwen_image.float8 import linear as float8
from qwen_image.float8 import mlp as float8_mlp
from qwen_image.float8.linear import Float8Linear, keep_transposed, quantize_blocks
from qwen_image.float8.mlp import quantized_gelu, quantized_gelu_gradient
from qwen_image.float8.scaled_rows import FLOAT8, LARGEST, SMALLEST_SCALE, quantize_rows
from qwen_image.model.layers import FeedForward
from tests.helpers.small_transformer import small_transformer
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= float8.FIRST_CAPABILITY
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (ON_GPU or INTERPRETED),
    reason="the kernels run on a GPU with float8, or by `make test-kernels`",
)
needs_gpu = pytest.mark.skipif(not ON_GPU or INTERPRETED, reason="needs a GPU with float8")
DEVICE = "cpu" if INTERPRETED or not ON_GPU else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows(count, width, seed=0, spread=3.0):
    """Rows of very different lengths, one of zeros."""
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spread
    values[count // 2] = 0
    return values * torch.logspace(-3, 0.5, count)[:, None]


def unrounded(name, *inputs):
    """What a kernel stores before rounding to float8 (which the interpreter gets wrong), and the scales."""
    from qwen_image.float8 import gelu_operators
    from qwen_image.kernels import gelu_kernels

    count, width = inputs[0].shape
    values, scales = torch.empty(count, width, device=DEVICE), torch.empty(count, 1, device=DEVICE)
    kernel = getattr(gelu_kernels, name)
    inputs = [each.to(DEVICE) for each in inputs]
    kernel[(count,)](*inputs, values, scales, **gelu_operators.tiles(width), num_warps=gelu_operators.WARPS)
    return values.cpu(), scales.cpu()


def exact_gradient(gradient, y, scale):
    y = y.double().requires_grad_()
    F.gelu(y, approximate="tanh").backward(gradient.double())
    return y.grad * scale.double()


def assert_quantizes(values, scales, exact):
    """values · scales are the exact values in float32's precision, with the largest of each row at 448."""
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales.double(), (largest / LARGEST).clamp(min=SMALLEST_SCALE), rtol=1e-5, atol=0)
    # near 0 gelu(y) for y ≪ 0 counts against the row's largest value
    assert ((values.double() * scales - exact).abs() <= 3e-6 * (largest + exact.abs())).all()
    assert torch.equal(values.abs().amax(1).round(decimals=3) == LARGEST, largest.flatten() > 0)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "width"), [(5, 96), (4, 64), (3, 100), (1, 2), (2, 33)])
def test_kernels_equal_the_definition(count, width, dtype):
    """Two whole tiles, two equal ones, a masked one, the smallest, one column in the second tile."""
    y, gradient = rows(count, width).to(dtype), rows(count, width, 1, 1e-3).to(dtype)
    scale = torch.logspace(-8, 0, width)[None]
    assert_quantizes(*unrounded("gelu_kernel", y), F.gelu(y.double(), approximate="tanh"))
    assert_quantizes(*unrounded("gelu_gradient_kernel", gradient, y, scale), exact_gradient(gradient, y, scale))


@needs_kernel
def test_large_and_tiny_values():
    y = torch.tensor([[-1e4, -30, -6, -1e-3, 0, 1e-6, 7, 2e4], [-40, -20, -10, -5, -5e-5, -5e-9, -0.0, -3]])
    exact = F.gelu(y.double(), approximate="tanh")
    values, scales = unrounded("gelu_kernel", y)
    assert_quantizes(values, scales, exact)
    near_zero = y[1:].abs() < 4
    torch.testing.assert_close((values * scales)[1:][near_zero].double(), exact[1:][near_zero], rtol=1e-5, atol=0)
    values, scales = unrounded("gelu_gradient_kernel", torch.ones_like(y), y, torch.ones(1, 8))
    assert_quantizes(values, scales, exact_gradient(torch.ones_like(y), y, torch.ones(1, 8)))


@needs_kernel
@pytest.mark.parametrize("column", [3, 70], ids=["first tile", "second"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_alone(bad, column):
    y, gradient, scale = rows(4, 96), rows(4, 96, 1), torch.ones(1, 96)
    fine_forward, fine_backward = unrounded("gelu_kernel", y), unrounded("gelu_gradient_kernel", gradient, y, scale)
    spoilt_y, spoilt_gradient = y.clone(), gradient.clone()
    spoilt_y[1, column] = spoilt_gradient[1, column] = bad
    for fine, spoilt in (
        (fine_forward, unrounded("gelu_kernel", spoilt_y)),
        (fine_backward, unrounded("gelu_gradient_kernel", gradient, spoilt_y, scale)),
        (fine_backward, unrounded("gelu_gradient_kernel", spoilt_gradient, y, scale)),
    ):
        products = spoilt[0] * spoilt[1]
        assert products[1].isnan().any() and not spoilt[1][1].isfinite()
        rest = torch.tensor([0, 2, 3])
        assert torch.equal(products[rest], (fine[0] * fine[1])[rest])


@needs_kernel
def test_the_operators_are_registered_as_the_compiler_wants_them():
    y, gradient, scale = (x.to(DEVICE) for x in (rows(3, 96), rows(3, 96, 1), torch.ones(1, 96)))
    for name, inputs in (("quantized_gelu", (y,)), ("quantized_gelu_gradient", (gradient, y, scale))):
        torch.library.opcheck(
            getattr(torch.ops.qwen_image, name), inputs, test_utils=("test_schema", "test_faketensor")
        )


@needs_gpu
@pytest.mark.parametrize("width", [12288, 1000])
def test_operators_equal_plain_operations(width):
    """The same float8 numbers but where float32 rounds across a boundary, at the size of the real model too."""
    y, gradient = rows(37, width).bfloat16(), rows(37, width, 1, 1e-6).bfloat16()
    scale = torch.logspace(-6, -3, width)[None]
    plain = quantized_gelu(y), quantized_gelu_gradient(gradient, y, scale)
    y, gradient, scale = y.cuda(), gradient.cuda(), scale.cuda()
    ours = quantized_gelu(y), quantized_gelu_gradient(gradient, y, scale)
    for (values, scales), (expected, expected_scales) in zip(ours, plain, strict=True):
        torch.testing.assert_close(scales.cpu(), expected_scales, rtol=1e-5, atol=0)
        values, expected = values.cpu().float(), expected.float()
        assert (values != expected).float().mean() < 1e-3
        torch.testing.assert_close(values, expected, rtol=0.13, atol=2**-9)


def feed_forward(dtype, dim=48, seed=0):
    """A float8 MLP with all that `quantize_blocks` gives it."""
    generator = torch.Generator().manual_seed(seed)
    made = FeedForward(dim)
    for owner, name, (width, height) in ((made.net[0], "proj", (dim, 4 * dim)), (made.net, "2", (4 * dim, dim))):
        layer = Float8Linear(width, height, dtype)
        layer.quantize(torch.randn(height, width, generator=generator) * width**-0.5)
        layer.bias = torch.nn.Parameter(torch.randn(height, generator=generator).to(dtype), requires_grad=False)
        setattr(owner, name, layer)
    made.fused = float8.fused_mlp
    return made


def output_and_gradient(function, x):
    x = x.clone().requires_grad_()
    output = function(x)
    (gradient,) = torch.autograd.grad(output, x, torch.linspace(-1, 2, output.numel()).view(output.shape).to(output))
    return output.detach(), gradient


@pytest.fixture
def forced(monkeypatch):
    """The function is taken on the CPU too, in which it uses PyTorch's operations."""
    monkeypatch.setattr(float8, "has_kernel", lambda *_: True)


@pytest.mark.parametrize("transposed", [False, True], ids=["one layout", "both"])
@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 48)], ids=str)
@pytest.mark.usefixtures("forced")
def test_the_function_equals_the_layers(shape, transposed):
    mlp = feed_forward(torch.float32)
    for layer in (mlp.net[0].proj, mlp.net[2]):
        layer.keep_transposed(transposed)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = output_and_gradient(mlp, x)
    recomputed = output_and_gradient(lambda x: checkpoint(mlp, x, use_reentrant=False), x)
    assert type(mlp(x.clone().requires_grad_()).grad_fn).__name__ == "_MLPBackward"
    mlp.fused = None
    layers = output_and_gradient(mlp, x)
    for actual, again, expected in zip(ours, recomputed, layers, strict=True):
        assert torch.equal(actual, expected) and torch.equal(again, expected)
    with torch.no_grad():
        assert torch.equal(mlp(x), layers[0])


@pytest.mark.usefixtures("forced")
def test_in_bfloat16_the_function_is_not_farther_from_the_unrounded_mlp_than_the_layers():
    mlp = feed_forward(torch.bfloat16)
    x = torch.randn(65, 48, generator=torch.Generator().manual_seed(1)).bfloat16()

    def exact(x):
        weights = [layer.weight.double() * layer.scale.double().t() for layer in (mlp.net[0].proj, mlp.net[2])]
        hidden = F.gelu(F.linear(x, weights[0], mlp.net[0].proj.bias.double()), approximate="tanh")
        return F.linear(hidden, weights[1], mlp.net[2].bias.double())

    expected = output_and_gradient(exact, x.double())
    ours = output_and_gradient(mlp, x)
    mlp.fused = None
    layers = output_and_gradient(mlp, x)
    for actual, separate, reference in zip(ours, layers, expected, strict=True):
        error, their_error = (((each.double() - reference).norm() / reference.norm()) for each in (actual, separate))
        assert error < 1.05 * their_error < 0.06


@pytest.mark.usefixtures("forced")
def test_only_the_inner_product_is_kept_for_the_backward_pass():
    mlp = feed_forward(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mlp(torch.randn(9, 48, requires_grad=True))
    assert [tuple(tensor.shape) for tensor in kept if tensor.shape[0] == 9] == [(9, 192)]


def transformer_with(targets, fuse=True):
    transformer = small_transformer()
    quantize_blocks(transformer, fuse=fuse)
    inject_lora(transformer, LoraSpec(targets, 4, 8.0))
    for name, parameter in lora_parameters(transformer).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    return transformer


def run(transformer):
    generator = torch.Generator().manual_seed(1)
    latents, prompt = torch.randn(2, 6, 64, generator=generator), torch.randn(2, 3, 24, generator=generator)
    velocity = transformer(latents, torch.tensor([0.3, 0.7]), prompt, None, ((2, 3),))
    gradients = torch.autograd.grad(velocity.square().sum(), list(lora_parameters(transformer).values()))
    return [velocity.detach(), *gradients]


@pytest.mark.skipif(INTERPRETED, reason="has no kernels in it")
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    ("targets", "recomputed"),
    [(("to_q", "to_k"), 1), (("to_q", "img_mlp.net.2"), 0)],
    ids=["first block recomputed", "LoRA on an MLP"],
)
def test_a_compiled_transformer_has_no_breaks_and_equals_the_layers(targets, recomputed):
    torch._dynamo.reset()
    expected = run(transformer_with(targets, fuse=False))
    for compiled in (False, True):
        transformer = transformer_with(targets)
        transformer.checkpointed_blocks = recomputed
        keep_transposed(transformer, recomputed)
        if compiled:
            for block in transformer.transformer_blocks:
                block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        for actual, reference in zip(run(transformer), expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


def test_without_a_gpu_or_with_a_lora_on_it_the_layers_do_it(monkeypatch):
    mlp = feed_forward(torch.float32)
    x = torch.randn(3, 48)
    layers = mlp.net[0].proj, mlp.net[2]
    assert not float8_mlp.has_kernel(x, 192) and float8.fused_mlp(x, *layers) is None
    monkeypatch.setattr(float8, "has_kernel", lambda *_: True)
    assert float8.fused_mlp(x, *layers) is not None
    assert float8.fused_mlp(x, layers[0], torch.nn.Linear(192, 48)) is None
    assert float8.fused_mlp(x, torch.nn.Sequential(layers[0]), layers[1]) is None


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [33, 128])
def test_on_a_gpu_the_function_equals_the_layers(tokens, compiled):
    mlp = feed_forward(torch.bfloat16, dim=3072).cuda()
    x = torch.randn(1, tokens, 3072, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    function = torch.compile(mlp, fullgraph=True) if compiled else mlp
    with torch.profiler.profile() as profile:
        ours = output_and_gradient(function, x)
    names = {event.name for event in profile.events()}
    assert any("gelu_kernel" in name for name in names) and any("gelu_gradient_kernel" in name for name in names)
    mlp.fused = None
    for actual, expected in zip(ours, output_and_gradient(mlp, x), strict=True):
        assert ((actual.double() - expected.double()).norm() / expected.double().norm()) < 0.02


def test_plain_operations_are_the_definition():
    y, gradient, scale = rows(5, 96), rows(5, 96, 1), torch.logspace(-4, 0, 96)[None]
    for ours, exact in (
        (quantized_gelu(y), F.gelu(y.double(), approximate="tanh")),
        (quantized_gelu_gradient(gradient, y, scale), exact_gradient(gradient, y, scale)),
    ):
        values, scales = quantize_rows(exact.float())
        assert ours[0].dtype == FLOAT8
        torch.testing.assert_close(ours[1], scales, rtol=1e-5, atol=0)
        assert (ours[0].float() != values.float()).float().mean() < 0.01
