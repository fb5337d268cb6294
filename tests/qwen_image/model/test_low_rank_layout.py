"""LoRA updates added by the joint layout's kernel (on a GPU, else in Triton's interpreter), against float64 arithmetic."""

import pytest
import torch

from qwen_image.model import joint_layout as module
from qwen_image.model.joint_layout import Updates, joint_layout, takes_updates
from tests.helpers.joint_layout_reference import (
    CASES,
    DEVICE,
    TOLERANCE,
    assert_near,
    make,
    needs_kernel,
    needs_rounding,
    reference,
)
from tests.helpers.small_transformer import small_transformer
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec
from train.step.fused_projection import fuse_projections

pytestmark = needs_kernel


def make_updates(image, text, rank, scale, dtype, seed=5):
    """Updates about as large as the projections."""
    generator = torch.Generator().manual_seed(seed)
    inner, updates = image.shape[2] // 3, []
    for projection in (image, text):
        parts = projection.shape[2] // inner
        factors = torch.randn(*projection.shape[:2], parts * rank, generator=generator).to(dtype)
        ups = [(torch.randn(inner, rank, generator=generator) / rank**0.5 / scale).to(dtype) for _ in range(parts)]
        updates.append(Updates(factors, tuple(ups), scale))
    return tuple(updates)


def added(projection, update):
    """The projection with its update, in the arguments' dtype."""
    factors = update.factors.unflatten(-1, (len(update.ups), -1)).unbind(-2)
    return projection + update.scale * torch.cat([f @ up.t() for f, up in zip(factors, update.ups, strict=True)], -1)


def changed(update, change):
    return Updates(change(update.factors), tuple(change(up) for up in update.ups), update.scale)


def differentiated(function, image, text, updates, grads):
    """Outputs, and gradients of image, text, factors and up matrices."""
    image, text, *updates = (
        image.clone().requires_grad_(),
        text.clone().requires_grad_(),
        *(changed(update, lambda each: each.clone().requires_grad_()) for update in updates),
    )
    outputs = function(image, text, updates)
    loss = sum((output * grad).sum() for output, grad in zip(outputs, grads, strict=True))
    leaves = [image, text, *(leaf for update in updates for leaf in (update.factors, *update.ups))]
    return [each.detach() for each in (*outputs, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_rounding)], ids=str)
@pytest.mark.parametrize(("rank", "scale"), [(4, 1.0), (32, 0.5), (17, 2.0)])
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_updates_equal_the_definition(case, rank, scale, dtype, on_device):
    image, text, norms, rotary, keep, grads = make(case, dtype)
    updates = make_updates(image, text, rank, scale, dtype)

    def exact(image, text, updates):
        return reference(added(image, updates[0]), added(text, updates[1]), norms, rotary, keep)

    doubles = [changed(update, torch.Tensor.double) for update in updates]
    expected = differentiated(exact, image.double(), text.double(), doubles, [grad.double() for grad in grads])
    image, text, norms, rotary, keep, grads = on_device(image, text, norms, rotary, keep, grads)
    updates = [changed(update, lambda each: each.to(DEVICE)) for update in updates]

    def ours(image, text, updates):
        return joint_layout(image, text, norms, rotary, keep, True, tuple(updates))

    actual = differentiated(ours, image, text, updates, grads)
    # Gradients of factors and up matrices are sums over channels and tokens of what was rounded once already.
    assert_near(actual[:5], expected[:5], TOLERANCE[dtype])
    assert_near(actual[5:], expected[5:], 2 * TOLERANCE[dtype])
    assert {each.dtype for each in actual} == {dtype}


def test_many_tokens_and_more_than_one_group_of_heads(on_device, monkeypatch):
    """Streams of several blocks whose last is not full; gradients of factors summed over groups of heads."""
    monkeypatch.setitem(CASES, "several blocks", (35, (5, 9), 6, 16, 2, (7, 0), True))
    image, text, norms, rotary, keep, grads = make("several blocks", torch.float32)
    updates = make_updates(image, text, 8, 1.0, torch.float32)
    joined = [added(projection, update) for projection, update in zip((image, text), updates, strict=True)]
    expected = reference(*(each.double() for each in joined), norms, rotary, keep)
    image, text, norms, rotary, keep, grads = on_device(image, text, norms, rotary, keep, grads)
    updates = tuple(changed(update, lambda each: each.to(DEVICE)) for update in updates)
    assert_near(joint_layout(image, text, norms, rotary, keep, True, updates), expected, 4e-6)


def test_padding_is_zero_whatever_it_was(on_device):
    image, text, norms, rotary, keep, _ = on_device(*make("padding in one sample", torch.float32))
    updates = make_updates(image.cpu(), text.cpu(), 4, 1.0, torch.float32)
    updates = tuple(changed(update, lambda each: each.to(DEVICE)) for update in updates)
    text[~keep[:, : text.shape[1]]] = float("nan")
    query, key, value = joint_layout(image, text, norms, rotary, keep, True, updates)
    assert (key[~keep] == 0).all() and (value[~keep] == 0).all()
    assert all(each[keep].isfinite().all() for each in (query, key, value))


@pytest.mark.parametrize("case", ["even", "last block, padding"])
def test_the_operators_are_registered_as_the_compiler_wants_them(case, on_device):
    image, text, norms, rotary, keep, _ = on_device(*make(case, torch.float32))
    of_image, of_text = (
        changed(update, lambda each: each.to(DEVICE))
        for update in make_updates(image.cpu(), text.cpu(), 4, 1.0, torch.float32)
    )
    ups = [*of_image.ups, *[of_image.ups[0]] * (3 - len(of_text.ups)), *of_text.ups]
    weights = [norm.weight for norm in norms]
    factors = of_image.factors.requires_grad_(), of_text.factors.requires_grad_()
    torch.library.opcheck(
        torch.ops.qwen_image.low_rank_layout,
        (image.requires_grad_(), text.requires_grad_(), *factors, ups, weights, *rotary, keep, 0.5),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


ALL = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def transformer_with(targets):
    """A transformer with a LoRA on fused projections, and what to call it with."""
    transformer = small_transformer(DEVICE)
    inject_lora(transformer, LoraSpec(targets, 4, 2.0))
    for parameter in lora_parameters(transformer).values():
        parameter.data.normal_(0, 0.2)
    fuse_projections(transformer)
    for block in transformer.transformer_blocks:
        block.attn.invertible_norms = True
    latents, prompt = torch.randn(2, 6, 64, device=DEVICE), torch.randn(2, 3, 24, device=DEVICE)
    mask = torch.tensor([[True, True, True], [True, False, False]], device=DEVICE)
    return transformer, (latents, torch.tensor([0.3, 0.7]), prompt, mask, ((2, 3),))


def velocity_and_gradients(transformer, arguments):
    velocity = transformer(*arguments)
    gradients = torch.autograd.grad(velocity.square().sum(), list(lora_parameters(transformer).values()))
    return velocity.detach(), *gradients


def assert_same(results, others):
    for actual, expected in zip(results, others, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize(("targets", "left"), [(ALL, True), (ALL[1:], False)], ids=["all", "some"])
def test_a_transformer_computes_the_same_with_the_updates_left_to_the_kernel(targets, left, on_device, monkeypatch):
    transformer, arguments = transformer_with(targets)
    called, results, original = [], [], module.joint_layout

    def watched(*arguments):
        called.append(arguments[6] is not None)
        return original(*arguments)

    monkeypatch.setattr("qwen_image.model.joint_attention.joint_layout", watched)
    for kernel in (False, True):
        monkeypatch.setattr(module, "HAS_LOW_RANK_KERNEL", kernel)
        results.append(velocity_and_gradients(transformer, arguments))
    assert called == [False] * 2 + [left] * 2
    assert_same(*results)


@pytest.mark.skipif(DEVICE == "cpu", reason="compiled on a GPU")
def test_on_a_gpu_compiled_blocks_compute_the_same():
    transformer, arguments = transformer_with(ALL)
    expected = velocity_and_gradients(transformer, arguments)
    transformer.compile_blocks(dynamic=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        results = velocity_and_gradients(transformer, arguments)
    assert_same(results, expected)
    # What a kernel only reads is not copied first, as when the compiler can't tell what it writes.
    assert not [event.name for event in profile.events() if "clone" in event.name]


@pytest.mark.parametrize(("invertible", "rank", "possible"), [(True, 64, True), (True, 65, False), (False, 4, False)])
def test_when_updates_can_be_left_to_the_kernel(invertible, rank, possible, on_device):
    image, text, norms, *_ = on_device(*make("even", torch.float32))
    assert takes_updates(image, text, norms, invertible, rank) == possible
