"""Parked block inputs: what comes back is what went, host memory is used again, small tensors stay."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from train.step import offload_activations as activation_offload
from train.step.offload_activations import ActivationOffload


def gradients(offload: ActivationOffload | None) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(5)]
    hidden = x = torch.randn(4, 8, requires_grad=True)
    for layer in layers:
        block = torch.nn.Sequential(layer, torch.nn.Tanh())
        if offload is None:
            hidden = block(hidden)
        else:
            with offload():
                hidden = checkpoint(block, hidden, use_reentrant=False)
    return torch.autograd.grad(hidden.square().sum(), [x, *(p for layer in layers for p in layer.parameters())])


@pytest.mark.parametrize("smallest", [0, 1 << 20])
def test_gradients_stay_and_memory_is_used_again(monkeypatch: pytest.MonkeyPatch, smallest: int) -> None:
    monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", smallest)
    offload = ActivationOffload(torch.device("cpu"))
    expected = gradients(None)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(offload), expected, strict=True))
        assert offload.host_bytes == (5 * 4 * 8 * 4 if smallest == 0 else 0)
