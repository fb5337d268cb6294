"""The trained matrices as one parameter: same values, same gradients, and the matrices follow it."""

import pytest
import torch
from torch import nn

from train.step.flat_parameter import FlatGradient, flatten, link


@pytest.fixture
def matrices() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 2))]


def compute(matrices: list[nn.Parameter]) -> torch.Tensor:
    """Two losses that depend on all matrices."""
    first, second, third = matrices
    return torch.stack([(first @ third).square().sum() + second.sum(), (second**3).sum() * first.sum()])


def test_gradient_is_that_of_the_matrices(matrices: list[nn.Parameter]) -> None:
    weights = torch.tensor([0.3, 2.0])
    expected = torch.autograd.grad((compute(matrices) * weights).sum(), matrices)
    flat = flatten(matrices)
    losses = FlatGradient.apply(lambda: compute(matrices), matrices, flat)
    assert torch.equal(losses, compute(matrices))
    (losses * weights).sum().backward()
    assert torch.equal(flat.grad, torch.cat([gradient.reshape(-1) for gradient in expected]))
    assert all(matrix.grad is None for matrix in matrices)


def test_gradients_add_up_over_micro_batches(matrices: list[nn.Parameter]) -> None:
    flat = flatten(matrices)
    for _ in range(2):
        FlatGradient.apply(lambda: compute(matrices), matrices, flat).mean().backward()
    once = torch.autograd.grad(compute(matrices).mean(), matrices)
    torch.testing.assert_close(flat.grad, 2 * torch.cat([gradient.reshape(-1) for gradient in once]))


def test_matrices_follow_the_flat_parameter(matrices: list[nn.Parameter]) -> None:
    before = [matrix.detach().clone() for matrix in matrices]
    flat = flatten(matrices)
    flat.data = torch.cat([torch.zeros(5), flat.data])[5:]  # moved into another buffer, as DeepSpeed does
    link(matrices, flat)
    assert all(torch.equal(matrix, values) for matrix, values in zip(matrices, before, strict=True))
    flat.data.add_(1)
    assert all(torch.equal(matrix, values + 1) for matrix, values in zip(matrices, before, strict=True))


def test_one_dtype_only(matrices: list[nn.Parameter]) -> None:
    with pytest.raises(ValueError, match="must share one dtype and device"):
        flatten([*matrices, nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
