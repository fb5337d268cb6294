"""float8 layers: where scales belong, how large errors are, that compiling changes nothing, and that training still works."""

import pytest
import torch

from qwen_image.float8 import linear as float8
from qwen_image.float8.linear import FLOAT8, Float8Linear, check_float8, keep_transposed, quantize_blocks, quantize_rows
from qwen_image.float8.scaled_rows import product_of_few_rows, scaled_product
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.model.conditioning import Prompt
from qwen_image.pipeline import load_transformer, predict_velocity
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec
from train.step.fused_projection import FusedProjection, fuse_projections

ATTENTION = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def tiny(tiny_model, dtype=torch.float32, quantized=True):
    transformer = load_transformer(resolve_model(ModelSource(str(tiny_model)), ("transformer",)), dtype)
    if quantized:
        quantize_blocks(transformer)
    return transformer


def inputs(transformer, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 12, 64, generator=generator).to(dtype)
    lengths = (5, 9)
    width = transformer.config.joint_attention_dim
    return latents, Prompt.from_list([torch.randn(n, width, generator=generator).to(dtype) for n in lengths])


def velocity(transformer, dtype=torch.float32, seed=0):
    latents, prompt = inputs(transformer, dtype, seed)
    return predict_velocity(transformer, latents, torch.tensor([0.3, 0.8]), prompt, 3, 4)


def relative(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def layer(dtype, in_features=96, out_features=160):
    """A layer whose rows differ in length by a factor of 1000, its exact weight, and an input with an outlier."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.logspace(-3, 0, out_features)[:, None]
    made = Float8Linear(in_features, out_features, dtype)
    made.quantize(weight)
    made.bias = torch.nn.Parameter(torch.randn(out_features, generator=generator).to(dtype), requires_grad=False)
    x = torch.randn(2, 7, in_features, generator=generator)
    x[1, 3, 5] = 3000
    return made, weight.double(), x.to(dtype).requires_grad_()


def test_a_value_is_off_by_a_sixteenth_at_most():
    values = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 50)[:, None]
    values[7] = 0
    quantized, scale = quantize_rows(values)
    assert quantized.dtype == FLOAT8 and scale.shape == (50, 1)
    off = (quantized.double() * scale.double() - values.double()).abs()
    # half a step of three mantissa bits; below the smallest normal number half of the smallest step, 2⁻⁹
    assert (off <= torch.maximum(values.double().abs() / 16, scale.double() * 2**-10) * (1 + 1e-6)).all()
    assert (quantized.float().abs().amax(1)[values.abs().amax(1) > 0] == 448).all()
    for bad in (float("nan"), float("inf")):
        values[3, 4] = bad
        quantized, scale = quantize_rows(values)
        assert (quantized.float() * scale)[3].isnan().any() and (quantized.float() * scale)[4:].isfinite().all()


@pytest.mark.parametrize("transposed", [False, True], ids=["one layout", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_product_and_input_gradient(dtype, transposed):
    made, weight, x = layer(dtype)
    made.keep_transposed(transposed)
    gradient = (torch.randn(2, 7, 160, generator=torch.Generator().manual_seed(2)) * 1e-9).to(dtype)
    output = made(x)
    output.backward(gradient)
    dequantized = made.weight.double() * made.scale.double().t()
    assert relative(dequantized, weight) < 0.03

    def rounded(values):
        quantized, scale = quantize_rows(values)
        return quantized.double() * scale.double()

    exact = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative(output, rounded(x.detach()) @ dequantized.t() + made.bias.double()) < exact
    scaled = rounded(gradient.float() * made.scale) / made.scale.double()
    assert relative(x.grad, scaled @ dequantized) < exact
    assert relative(output - made.bias, x.detach().double() @ weight.t()) < 0.05
    assert relative(x.grad, gradient.double() @ weight) < 0.05
    assert made.weight.grad is None and output.dtype == x.grad.dtype == dtype


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < float8.FIRST_CAPABILITY,
    reason="needs a GPU with float8",
)
@pytest.mark.parametrize("in_features", [3072, 12288])
@pytest.mark.parametrize("tokens", [1, 16, 32, 42, 43, 63, 64, 129])
def test_few_tokens_on_a_gpu(tokens, in_features):
    """cuBLAS lacks some of these products; compiled without a length in mind they are the same."""
    generator = torch.Generator().manual_seed(2)
    made = Float8Linear(in_features, 3072)
    made.quantize(torch.randn(3072, in_features, generator=generator) * in_features**-0.5)
    made.bias = torch.nn.Parameter(torch.randn(3072, generator=generator).bfloat16(), requires_grad=False)
    x = torch.randn(1, tokens, in_features, generator=generator).bfloat16()
    expected = made(x)
    made.cuda()
    for function in (made, torch.compile(made, fullgraph=True, dynamic=True)):
        assert relative(function(x.cuda()).cpu(), expected) < 5e-3


@pytest.mark.parametrize("with_bias", [True, False])
def test_zero_rows_below_change_nothing(with_bias):
    generator = torch.Generator().manual_seed(3)
    left, right, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 24), (7, 24), (7,)))
    (left, left_scale), (right, right_scale) = quantize_rows(left), quantize_rows(right)
    arguments = left, left_scale, right, right_scale.t(), bias if with_bias else None, torch.bfloat16
    result = product_of_few_rows(*arguments)
    torch.testing.assert_close(result, scaled_product(*arguments))
    without_values = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in arguments]
    promised = product_of_few_rows(*without_values)  # what the compiler is told
    assert (promised.shape, promised.dtype, promised.stride()) == (result.shape, result.dtype, result.stride())


def test_rows_of_their_own_cost_no_accuracy_and_protect_small_ones():
    """One scale a tensor instead is as good until values differ by 10⁵, the range of e4m3; then it loses the small ones."""
    made, weight, x = layer(torch.float32)

    def whole(values):
        quantized, scale = quantize_rows(values.reshape(1, -1))
        return (quantized.double() * scale.double()).view(values.shape)

    for outlier, spoilt in ((3000, False), (3e6, True)):
        x.data[1, 3, 5] = outlier
        exact = (x.detach().double() @ weight.t())[0]  # the other sample's tokens
        ours = (made(x) - made.bias).detach()[0]
        theirs = (whole(x.detach()) @ whole(weight.float()).t())[0]
        assert relative(ours, exact) < 0.04
        assert relative(theirs, exact) > 0.1 if spoilt else relative(theirs, exact) < 0.05


@pytest.mark.parametrize("recomputed", [0, 2])
def test_compiled_blocks_have_no_breaks_and_equal_eager_ones(tiny_model, recomputed):
    results = []
    for compiled in (False, True):
        transformer = tiny(tiny_model)
        inject_lora(transformer, LoraSpec((*ATTENTION, "to_out.0", "img_mlp.net.2"), 4, 8.0))
        for name, parameter in lora_parameters(transformer).items():
            if name.endswith("lora_B"):
                parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
        fuse_projections(transformer)
        transformer.checkpointed_blocks = recomputed
        keep_transposed(transformer, recomputed)
        if compiled:
            for block in transformer.transformer_blocks:
                block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        output = velocity(transformer)
        gradients = torch.autograd.grad(output.square().sum(), list(lora_parameters(transformer).values()))
        results.append([output.detach(), *gradients])
    for eager, same in zip(*results, strict=True):
        torch.testing.assert_close(same, eager, rtol=1e-4, atol=1e-5)


def test_one_layout_or_two(tiny_model):
    transformer = tiny(tiny_model)
    inject_lora(transformer, LoraSpec(ATTENTION, 4, 4.0))
    fuse_projections(transformer)

    def held():
        return [sum(s.nbytes() for s in storages(block)) for block in transformer.transformer_blocks]

    def storages(block):  # each once, whoever has a view of it
        tensors = [*block.parameters(), *block.buffers()]
        return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.dtype == FLOAT8}.values()

    one = held()
    names = [name for name, _ in transformer.named_parameters()]
    size = 24 * transformer.config.inner_dim**2  # both streams: 4 projections and two layers of 4·D
    assert one == [size, size]
    keep_transposed(transformer, 1)
    assert held() == [size, 2 * size]
    expected = float8.float8_bytes(tiny(tiny_model, quantized=False), 1)
    assert expected[0] == 2 * size and 3 * size < expected[1] < 3.2 * size
    keep_transposed(transformer, 2)
    assert held() == [size, size]
    assert [name for name, _ in transformer.named_parameters()] == names


def test_fused_equals_separate(tiny_model):
    transformer = tiny(tiny_model)
    inject_lora(transformer, LoraSpec(ATTENTION, 4, 8.0))
    for parameter in lora_parameters(transformer).values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    attention = transformer.transformer_blocks[0].attn
    x = torch.randn(2, 5, transformer.config.inner_dim, requires_grad=True)
    layers = attention.image_layers()
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    separate = torch.cat([layer(x) for layer in layers], -1)
    gradients = torch.autograd.grad(separate.square().sum(), [x, *trained])
    fused = FusedProjection(layers)
    together = fused(x, layers)
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5)
    of_x, *of_lora = torch.autograd.grad(together.square().sum(), [x, *trained])
    for ours, theirs in zip(of_lora, gradients[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert relative(of_x, gradients[0]) < 0.05  # gradients of three layers are rounded as one row


def test_training_follows_the_unquantized_run(tiny_model):
    """50 steps towards a velocity that a LoRA can reach: the loss falls by half, and float8 stays within 1 % of it."""
    curves = []
    for quantized in (False, True):
        transformer = tiny(tiny_model, quantized=quantized)
        inject_lora(transformer, LoraSpec((*ATTENTION, "proj_out", "img_mlp.net.2"), 8, 8.0))
        fuse_projections(transformer)
        target = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(5))
        optimizer = torch.optim.AdamW(lora_parameters(transformer).values(), lr=3e-3)
        losses = []
        for step in range(50):
            loss = (velocity(transformer, seed=step % 4) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    plain, ours = curves
    assert plain[-4:].mean() < 0.5 * plain[:4].mean()
    assert ((ours - plain).abs() / plain).max() < 0.01


def test_sampling_and_peft_leave_the_base_alone(tiny_model):
    transformer = tiny(tiny_model, torch.bfloat16)
    with torch.no_grad():
        before = velocity(transformer, torch.bfloat16)
    plain = velocity(tiny(tiny_model, torch.bfloat16, quantized=False), torch.bfloat16)
    assert 0 < relative(before, plain) < 0.1
    inject_lora(transformer, LoraSpec(("to_q", "net.2"), 4, 4.0, dropout=0.5), dtype=torch.bfloat16)
    assert {p.dtype for p in lora_parameters(transformer).values()} == {torch.bfloat16}
    transformer.eval()
    assert torch.equal(velocity(transformer, torch.bfloat16), before)  # lora_B is 0
    transformer.train()
    velocity(transformer, torch.bfloat16).float().square().mean().backward()
    assert all(p.grad is not None for p in lora_parameters(transformer).values())


def test_devices(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8\.9 or newer .* but NVIDIA A100-SXM4-80GB has 8\.0: use --base"):
        check_float8(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert check_float8(cuda, torch.bfloat16) == []
    with pytest.raises(ValueError, match="computes in bfloat16 on a GPU, got dtype float32"):
        check_float8(cuda, torch.float32)
    assert "emulated" in check_float8(torch.device("cpu"), torch.float32)[0]
