"""The joint layout, plain and by kernel (on a GPU, else in Triton's interpreter), against float64 arithmetic."""

import pytest
import torch

from qwen_image.model import joint_layout as module
from qwen_image.model.joint_layout import can_invert, has_kernel, joint_layout, plain_joint_layout
from tests.helpers.joint_layout_reference import (
    CASES,
    DEVICE,
    TOLERANCE,
    assert_near,
    expected_of,
    make,
    needs_kernel,
    needs_rounding,
    outputs_and_gradients,
)
from tests.helpers.small_transformer import small_transformer


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
        (image.requires_grad_(), text.requires_grad_(), weights, *rotary, keep, True),
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
        velocity = transformer(latents, torch.tensor([0.3, 0.7]), prompt, mask, ((2, 3),))
        results.append((velocity.detach(), *torch.autograd.grad(velocity.square().sum(), trained)))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
