"""Kernels that fail or compute something else are switched off before anything relies on them."""

from types import SimpleNamespace

import pytest
import torch

from qwen_image import kernel_check as trusted_kernels
from qwen_image.float8 import mlp as float8_mlp
from qwen_image.kernel_check import difference, distrust_kernels
from qwen_image.kernels import flash_attention
from qwen_image.model import joint_layout
from qwen_image.model.sizes import TransformerConfig

CONFIG = TransformerConfig(num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
CPU = torch.device("cpu")
CHECKS = ("_joint_layout", "_low_rank_layout", "_flash_attention", "_quantized_gelu")


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
    module, right = SimpleNamespace(HAS_FLASH=False), torch.tensor([1.0, -2.0, 3.0])
    assert difference(lambda: (right, kernel(right) if module.HAS_FLASH else right), module, "HAS_FLASH") == reason
    assert module.HAS_FLASH, "who asks decides"


def test_what_works_neither_way_is_no_fault_of_the_kernel():
    module = SimpleNamespace(HAS_TRITON=True)
    assert difference(lambda: fail(RuntimeError("no cuDNN attention in float32")), module, "HAS_TRITON") == ""


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_compared_says_something(check, monkeypatch):
    """Results of the plain operations on the CPU: finite, and each with a length to compare with."""
    monkeypatch.setattr(joint_layout, "HAS_LOW_RANK_KERNEL", False)  # `takes_updates` is not asked
    results = getattr(trusted_kernels, check)(CONFIG, torch.float32, CPU)
    assert len(results) >= 2 and all(each.isfinite().all() and each.double().norm() > 0.1 for each in results)


@pytest.fixture
def all_on(monkeypatch):
    """Every kernel is there, says its module, and gives what plain operations give."""
    for module in (joint_layout, float8_mlp):
        monkeypatch.setattr(module, "HAS_TRITON", True)
    monkeypatch.setattr(joint_layout, "HAS_LOW_RANK_KERNEL", True)
    monkeypatch.setattr(flash_attention, "HAS_FLASH", True)
    for check in CHECKS:
        monkeypatch.setattr(trusted_kernels, check, lambda *_: (torch.ones(4),))


def switches():
    return joint_layout.HAS_TRITON, flash_attention.HAS_FLASH, float8_mlp.HAS_TRITON


@pytest.mark.parametrize(
    "check,name,module,switch",
    [
        ("_low_rank_layout", "low-rank layout", joint_layout, "HAS_LOW_RANK_KERNEL"),
        ("_flash_attention", "FlashAttention", flash_attention, "HAS_FLASH"),
    ],
)
def test_only_what_fails_is_switched_off(all_on, monkeypatch, check, name, module, switch):
    monkeypatch.setattr(trusted_kernels, check, lambda *_: (torch.ones(4) * (1 + getattr(module, switch)),))
    gpu = torch.device("cuda")
    (warning,) = distrust_kernels(CONFIG, torch.float32, gpu, float8=True)
    assert warning.startswith(f"warning: the {name} kernel is not used") and "differs by 1" in warning
    assert getattr(module, switch) is False
    assert switches() == (True, name != "FlashAttention", True)
    assert distrust_kernels(CONFIG, torch.float32, gpu, float8=True) == [], "it is off already"


def test_kernels_are_compared_one_at_a_time(all_on, monkeypatch):
    """With those that have passed, without those that are still in doubt."""
    met = []
    monkeypatch.setattr(trusted_kernels, "_flash_attention", lambda *_: met.append(switches()) or (torch.ones(4),))
    assert distrust_kernels(CONFIG, torch.float32, torch.device("cuda"), float8=True) == []
    assert met == [(True, False, False), (True, True, False)]
    assert switches() == (True, True, True)


@pytest.mark.parametrize("float8", [True, False])
def test_only_what_the_base_needs_is_compared(all_on, monkeypatch, float8):
    met = []
    for check in CHECKS:
        monkeypatch.setattr(trusted_kernels, check, lambda *_, check=check: met.append(check) or (torch.ones(4),))
    assert distrust_kernels(CONFIG, torch.float32, torch.device("cuda"), float8) == []
    assert set(CHECKS) - set(met) == (set() if float8 else {"_quantized_gelu"})


def test_where_images_are_only_sampled_few_kernels_are_compared_and_the_others_not_used(all_on, monkeypatch):
    met = set()
    for check in CHECKS:
        monkeypatch.setattr(trusted_kernels, check, lambda *_, check=check: met.add(check) or (torch.ones(4),))
    assert distrust_kernels(CONFIG, torch.float32, torch.device("cuda"), float8=False, trains=False) == []
    assert met == {"_joint_layout"}
    assert switches() == (True, False, True)
    assert not joint_layout.HAS_LOW_RANK_KERNEL


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [TransformerConfig(), CONFIG], ids=["full size", "small"])
def test_on_this_gpu_all_kernels_can_be_trusted(config):
    for float8 in (True, False):
        assert distrust_kernels(config, torch.bfloat16, torch.device("cuda"), float8) == []
