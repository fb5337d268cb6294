"""The bf16 MLP in one function: against the layers on the CPU, in PyTorch's operations; cuBLASLt's epilogues on a GPU."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qwen_image.float8.linear import quantise_blocks
from qwen_image.kernels import cublaslt
from qwen_image.model import gelu_products
from qwen_image.model.gelu_products import fuse_gelu, gelu_mlp
from qwen_image.model.layers import FeedForward
from tests.helpers.small_transformer import small_transformer
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not gelu_products.HAS_EPILOGUES, reason="needs an NVIDIA GPU and cuBLASLt"
)


def feed_forward(dtype, dim=48, device="cpu"):
    made = FeedForward(dim).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    made.fused = gelu_mlp
    return made.to(device, dtype)


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output_and_gradient(function, x):
    x = x.clone().requires_grad_()
    output = function(x)
    (gradient,) = torch.autograd.grad(output, x, random(*output.shape, seed=2).to(output))
    return output.detach(), gradient


def far(actual, expected):
    """Root mean square of the difference, relative."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def forced(monkeypatch):
    """The function is taken on the CPU too, in which its operators use PyTorch's operations."""
    monkeypatch.setattr(gelu_products, "can_fuse_gelu", lambda *_: True)


@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 48)], ids=str)
@pytest.mark.usefixtures("forced")
def test_the_function_equals_the_layers(shape):
    mlp, x = feed_forward(torch.float32), random(*shape)
    ours = output_and_gradient(mlp, x)
    recomputed = output_and_gradient(lambda x: checkpoint(mlp, x, use_reentrant=False), x)
    assert type(mlp(x.clone().requires_grad_()).grad_fn).__name__ == "_MLPBackward"
    with torch.no_grad():
        assert torch.equal(mlp(x), ours[0])
    mlp.fused = None
    for actual, again, expected in zip(ours, recomputed, output_and_gradient(mlp, x), strict=True):
        torch.testing.assert_close(actual, expected)
        assert torch.equal(actual, again)


@pytest.mark.usefixtures("forced")
def test_only_the_inner_product_is_kept_for_the_backward_pass():
    mlp, kept = feed_forward(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mlp(random(9, 48).requires_grad_())
    assert [tuple(tensor.shape) for tensor in kept if tensor.shape[0] == 9] == [(9, 192)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_registered_as_the_compiler_wants_them(dtype):
    x, weight, bias, y = (each.to(dtype) for each in (random(5, 16), random(24, 16), random(24), random(5, 24)))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.qwen_image.gelu_product, (x, weight, bias), test_utils=checks)
    torch.library.opcheck(
        torch.ops.qwen_image.gelu_gradient_product, (x, random(16, 24).to(dtype), y), test_utils=checks
    )
    spread = torch.ops.qwen_image.gelu_product(random(16, 5).to(dtype).t(), weight, bias)
    assert all(each.is_contiguous() and each.shape == (5, 24) for each in spread)


def test_without_a_gpu_or_with_a_lora_on_it_the_layers_do_it(monkeypatch):
    mlp, x = feed_forward(torch.bfloat16), random(3, 48).bfloat16()
    layers = mlp.net[0].proj, mlp.net[2]
    monkeypatch.setattr(gelu_products, "HAS_EPILOGUES", True)
    assert gelu_mlp(x, *layers) is None
    monkeypatch.setattr(gelu_products, "can_fuse_gelu", lambda *_: True)
    assert gelu_mlp(x, *layers) is not None
    assert gelu_mlp(x, layers[0], torch.nn.Linear(192, 48)) is None
    assert gelu_mlp(x, torch.nn.Sequential(layers[0]), layers[1]) is None


class OnGPU(torch.Tensor):
    is_cuda = True


def test_what_can_be_fused(monkeypatch):
    monkeypatch.setattr(gelu_products, "HAS_EPILOGUES", True)
    x = random(3, 48).bfloat16()
    on_gpu = x.as_subclass(OnGPU)

    def can(x, dtype=torch.bfloat16, dim=48, change=lambda mlp: None):
        mlp = feed_forward(dtype, dim)
        change(mlp)
        return gelu_products.can_fuse_gelu(x, mlp.net[0].proj, mlp.net[2])

    assert can(on_gpu)
    assert not can(x)
    assert not can(on_gpu.float().as_subclass(OnGPU))
    assert not can(on_gpu, dtype=torch.float32)
    assert not can(on_gpu, dim=44)
    assert not can(on_gpu, change=lambda mlp: mlp.net[2].weight.requires_grad_())
    assert not can(on_gpu, change=lambda mlp: setattr(mlp.net[0].proj.weight, "ds_id", 3))
    assert not can(on_gpu, change=lambda mlp: setattr(mlp.net[0].proj, "bias", None))
    monkeypatch.setattr(gelu_products, "HAS_EPILOGUES", False)
    assert not can(on_gpu)


@pytest.mark.parametrize("version", [None, "99.0"])
def test_without_the_library_there_are_no_epilogues(monkeypatch, version):
    monkeypatch.setattr(torch.version, "cuda", version)
    assert cublaslt.library.__wrapped__() is None


class Library:
    """Notes what cuBLASLt is asked; `status` is the answer."""

    def __init__(self):
        self.calls, self.status, self.algorithms = [], {}, 1

    def __getattr__(self, name):
        def called(*arguments):
            values = [getattr(each, "_obj", each) for each in arguments]  # of byref
            if name == "cublasLtMatmulAlgoGetHeuristic":
                values[8].workspace_bytes, values[9].value = 1000, self.algorithms
            self.calls.append((name, [getattr(value, "value", value) for value in values]))
            return self.status.get(name, 0)

        return called

    def of(self, name):
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def noted(monkeypatch):
    library = Library()
    monkeypatch.setattr(cublaslt, "library", lambda: library)
    monkeypatch.setattr(cublaslt, "_plans", {})
    # The host's allocator promises 64 bytes: with 256 it would be chance whether a second call finds the first one's plan.
    monkeypatch.setattr(cublaslt, "ALIGNMENT", 64)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=1 << 40))
    cublaslt._handle.cache_clear()
    yield library
    cublaslt._handle.cache_clear()


def test_what_cublaslt_is_asked(noted):
    """Columns come first there: the weight is the left factor. The addresses are told at each call, the rest once."""
    x, weight, bias = (random(*shape).bfloat16() for shape in ((5, 16), (24, 16), (24,)))
    for _ in range(2):
        noted.calls.clear()
        gelu, y = cublaslt.product_with_gelu(x, weight, bias)
        attributes = noted.of("cublasLtMatmulDescSetAttribute")
        assert [(each[1], each[2]) for each in attributes[-2:]] == [(11, y.data_ptr()), (8, bias.data_ptr())]
        (asked,) = noted.of("cublasLtMatmul")
        assert asked[2] == 1 and asked[7] == 0 and asked[14:] == [1000, 1 << 40]
        assert [asked[i] for i in (3, 5, 8, 10)] == [each.data_ptr() for each in (weight, x, gelu, gelu)]
        if len(attributes) > 2:
            assert [each[1:4] for each in attributes[:6]] == [
                [3, 1, 4], [4, 0, 4], [7, 164, 4], [12, 24, 8], [22, 14, 4], [26, 14, 4]
            ]  # fmt: skip
            layouts = [each[1:] for each in noted.of("cublasLtMatrixLayoutCreate")]
            assert layouts == [[14, 16, 24, 16], [14, 16, 5, 16], [14, 24, 5, 24]]
    assert len(attributes) == 2 and not noted.of("cublasLtMatmulAlgoGetHeuristic")
    noted.calls.clear()
    down = random(16, 24).bfloat16()
    output = cublaslt.product_with_gelu_gradient(x, down, y)
    (asked,) = noted.of("cublasLtMatmul")
    assert [asked[i] for i in (3, 5, 8, 10)] == [each.data_ptr() for each in (down, x, output, output)]
    attributes = {each[1]: each[2] for each in noted.of("cublasLtMatmulDescSetAttribute")}
    assert attributes == {3: 0, 4: 0, 7: 192, 12: 24, 22: 14, 11: y.data_ptr()}
    layouts = [each[1:] for each in noted.of("cublasLtMatrixLayoutCreate")]
    assert layouts == [[14, 24, 16, 24], [14, 16, 5, 16], [14, 24, 5, 24]]


def test_a_view_at_fewer_bytes_gets_a_plan_of_its_own(noted):
    x, weight, bias = (random(*shape).bfloat16() for shape in ((6, 8), (24, 8), (24,)))
    for rows in (x[:5], x[1:]):  # the second begins 16 bytes later
        noted.calls.clear()
        cublaslt.product_with_gelu(rows, weight, bias)
    assert [product.alignment for product in cublaslt._plans] == [64, 16]
    limits = [each[1:3] for each in noted.of("cublasLtMatmulPreferenceSetAttribute")]
    assert limits[1:] == [[5, 16], [6, 16], [7, 16], [8, 16]]


def test_what_cublaslt_refuses_is_told_with_the_shapes(noted):
    operands = [random(*shape).bfloat16() for shape in ((5, 16), (24, 16), (24,))]
    shapes = "rows=5, columns=24, inner=16, epilogue=164"
    noted.algorithms = 0
    with pytest.raises(RuntimeError, match=f"no algorithm for .*{shapes}"):
        cublaslt.product_with_gelu(*operands)
    noted.algorithms, noted.status["cublasLtMatmul"] = 1, 13
    with pytest.raises(RuntimeError, match=f"cublasLtMatmul failed with status 13 for .*{shapes}"):
        cublaslt.product_with_gelu(*operands)


def test_the_heuristics_result_is_laid_out_as_in_the_header():
    """cublasLtMatmulHeuristicResult_t: an algorithm of 64 bytes, size_t, enum, float, int[4]."""
    assert ctypes.sizeof(cublaslt._Choice) == 96 and cublaslt._Choice.workspace_bytes.offset == 64


def transformer_with(targets, fuse=True):
    transformer = small_transformer()
    inject_lora(transformer, LoraSpec(targets, 4, 8.0))
    for name, parameter in lora_parameters(transformer).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    if fuse:
        fuse_gelu(transformer)
    return transformer


def run(transformer):
    velocity = transformer(random(2, 6, 64), torch.tensor([0.3, 0.7]), random(2, 3, 24), None, 2, 3)
    gradients = torch.autograd.grad(velocity.square().sum(), list(lora_parameters(transformer).values()))
    return [velocity.detach(), *gradients]


@pytest.mark.usefixtures("forced")
def test_the_images_plain_mlps_are_fused_and_no_others():
    def fused(transformer):
        blocks = transformer.transformer_blocks
        assert all(block.txt_mlp.fused is not gelu_mlp for block in blocks)
        return [block.img_mlp.fused is gelu_mlp for block in blocks]

    assert fused(transformer_with(("to_q",))) == [True, True]
    assert fused(transformer_with(("transformer_blocks.1.img_mlp.net.2",))) == [True, False]
    transformer = transformer_with(("to_q",), fuse=False)
    quantise_blocks(transformer)
    fuse_gelu(transformer)
    assert fused(transformer) == [False, False]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("recomputed", [0, 1], ids=["all kept", "first block recomputed"])
def test_a_compiled_transformer_has_no_breaks_and_equals_the_layers(recomputed):
    torch._dynamo.reset()
    expected = run(transformer_with(("to_q", "to_k"), fuse=False))
    for compiled in (False, True):
        transformer = transformer_with(("to_q", "to_k"))
        transformer.checkpointed_blocks = recomputed
        if compiled:
            transformer.dynamic_lengths = True
            for block in transformer.transformer_blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        for actual, reference in zip(run(transformer), expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", [(1, 1024), (1, 4096), (1, 1000), (2, 1000), (2, 4096), (1, 7)], ids=str)
def test_on_a_gpu_the_function_is_not_farther_from_the_exact_one_than_the_layers(shape, compiled):
    mlp = feed_forward(torch.bfloat16, dim=3072, device="cuda")
    x = random(*shape, 3072).cuda().bfloat16()
    torch._dynamo.reset()
    ours = output_and_gradient(torch.compile(mlp, fullgraph=True, dynamic=True) if compiled else mlp, x)
    mlp.fused = None
    layers = output_and_gradient(mlp, x)
    exact = output_and_gradient(mlp.double(), x.double())
    for actual, separate, reference in zip(ours, layers, exact, strict=True):
        assert far(actual, reference) < 1.1 * far(separate, reference) < 0.02


@needs_gpu
def test_on_a_gpu_each_operator_is_as_exact_as_bfloat16_allows(monkeypatch):
    """At the real model's width; the second time every operand is at 16 bytes past the allocator's 512."""
    monkeypatch.setattr(cublaslt, "_plans", {})
    for offset in (0, 8):
        x, weight, bias, gradient, down = (
            (0.05 * spread * random(offset + rows * columns)).cuda().bfloat16()[offset:].view(rows, columns)
            for rows, columns, spread in (
                (1024, 3072, 20),
                (12288, 3072, 1),
                (1, 12288, 1),
                (1024, 3072, 1),
                (3072, 12288, 1),
            )
        )
        gelu, y = torch.ops.qwen_image.gelu_product(x, weight, bias[0])
        exact = F.linear(x.double(), weight.double(), bias[0].double())
        assert far(y, exact) < 2e-3 and far(gelu, F.gelu(exact, approximate="tanh")) < 2e-3
        ours = torch.ops.qwen_image.gelu_gradient_product(gradient, down, y)
        exact = torch.ops.aten.gelu_backward(gradient.double() @ down.double(), y.double(), approximate="tanh")
        assert far(ours, exact) < 2e-3
    assert [product.alignment for product in cublaslt._plans] == [256, 256, 16, 16]


@needs_gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_on_a_gpu_the_operators_can_be_captured_in_a_graph(own_stream):
    mlp, x = feed_forward(torch.bfloat16, dim=512, device="cuda"), random(1, 300, 512).cuda().bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream) if own_stream else nullcontext():
        output_and_gradient(mlp, x)
    torch.cuda.synchronize()
    graph, buffer = torch.cuda.CUDAGraph(), x.clone().requires_grad_()
    upstream = random(*x.shape, seed=2).to(x)
    with torch.cuda.graph(graph, stream=stream if own_stream else None, capture_error_mode="thread_local"):
        output = mlp(buffer)
        (gradient,) = torch.autograd.grad(output, buffer, upstream)
    for seed in (5, 6):
        fresh = random(*x.shape, seed=seed).to(x)
        with torch.no_grad():
            buffer.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        for actual, expected in zip((output, gradient), output_and_gradient(mlp, fresh), strict=True):
            assert torch.equal(actual, expected)
