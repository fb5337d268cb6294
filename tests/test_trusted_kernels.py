"""Kernels that fail or compute something else are switched off before anything relies on them."""

from types import SimpleNamespace

import pytest
import torch

from qwen_image import attention, float8_mlp, joint_layout, trusted_kernels
from qwen_image.transformer import TransformerConfig
from qwen_image.trusted_kernels import difference, distrust_kernels

CONFIG = TransformerConfig(num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
CPU = torch.device("cpu")
CHECKS = ("_joint_layout", "_padded_attention", "_quantised_gelu")


def fail(error: Exception) -> tuple[torch.Tensor, ...]:
    raise error


@pytest.mark.parametrize(
    "kernel,reason",
    [
        (lambda right: right, ""),
        (lambda right: right * 1.001, ""),
        (lambda right: right * 1.05, "its result differs by 0.05"),
        (lambda right: right * float("nan"), "its result differs by nan"),
        (lambda right: right.new_zeros(3), "its result differs by 1"),
        (lambda right: fail(TypeError("no such\n  architecture")), "TypeError: no such architecture"),
    ],
)
def test_a_kernel_is_trusted_when_it_gives_what_plain_operations_give(kernel, reason):
    switch, right = SimpleNamespace(HAS_TRITON=True), torch.tensor([1.0, -2.0, 3.0])
    assert difference(lambda: (right, kernel(right) if switch.HAS_TRITON else right), switch) == reason
    assert switch.HAS_TRITON, "who asks decides"


def test_what_works_neither_way_is_no_fault_of_the_kernel():
    switch = SimpleNamespace(HAS_TRITON=True)
    assert difference(lambda: fail(RuntimeError("no cuDNN attention in float32")), switch) == ""


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_compared_says_something(check):
    """Results of the plain operations on the CPU: finite, and each with a length to compare with."""
    results = getattr(trusted_kernels, check)(CONFIG, torch.float32, CPU)
    assert len(results) >= 2 and all(each.isfinite().all() and each.double().norm() > 0.1 for each in results)


def test_only_what_fails_is_switched_off(monkeypatch):
    for module in (joint_layout, attention, float8_mlp):
        monkeypatch.setattr(module, "HAS_TRITON", True)
    right = torch.ones(4)
    for check in CHECKS:
        monkeypatch.setattr(trusted_kernels, check, lambda *_: (right,))
    monkeypatch.setattr(trusted_kernels, "_padded_attention", lambda *_: (right * (1 + attention.HAS_TRITON),))
    gpu = torch.device("cuda")
    (warning,) = distrust_kernels(CONFIG, torch.float32, gpu, float8=True)
    assert warning.startswith("warning: the padding kernel is not used") and "differs by 1" in warning
    assert (joint_layout.HAS_TRITON, attention.HAS_TRITON, float8_mlp.HAS_TRITON) == (True, False, True)
    assert distrust_kernels(CONFIG, torch.float32, gpu, float8=True) == [], "it is off already"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [TransformerConfig(), CONFIG], ids=["full size", "small"])
def test_on_this_gpu_all_kernels_can_be_trusted(config):
    assert distrust_kernels(config, torch.bfloat16, torch.device("cuda"), float8=True) == []
