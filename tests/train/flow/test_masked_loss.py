"""The masked loss against its formula written out element by element, and what an element outside the mask weighs."""

import pytest
import torch

from qwen_image.model.conditioning import pack_latents
from train.flow.masked_loss import mask_weights, masked_flow_matching_loss
from train.flow.objective import flow_matching_loss

ROWS, COLUMNS = 6, 4  # of the latent


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    prediction, target = (torch.randn(3, 16, 1, ROWS, COLUMNS, generator=generator) for _ in range(2))
    return prediction, target


def masks() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    mask = torch.randint(0, 256, (3, ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
    mask[1, :3], mask[1, 3:] = 255, 0
    mask[2] = 255
    return mask


def loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, minimum: float) -> torch.Tensor:
    packed = pack_latents(prediction), pack_latents(target)
    return masked_flow_matching_loss(*packed, torch.tensor([1.0, 2.0, 3.0]), mask_weights(mask, minimum))


@pytest.mark.parametrize("minimum", [0.0, 0.1, 0.5, 1.0])
def test_the_formula_by_hand(pair: tuple[torch.Tensor, torch.Tensor], minimum: float) -> None:
    prediction, target = pair
    found = loss(*pair, masks(), minimum)
    for sample in range(3):
        weighted = weights = 0.0
        for channel in range(16):
            for row in range(ROWS):
                for column in range(COLUMNS):
                    m = masks()[sample, row, column].item() / 255
                    w = minimum + (1 - minimum) * m
                    error = (prediction - target)[sample, channel, 0, row, column].item()
                    weighted, weights = weighted + w * error**2, weights + w
        assert found[sample].item() == pytest.approx((sample + 1) * weighted / weights, rel=1e-5)


@pytest.mark.parametrize("minimum", [0.0, 0.1, 0.25])
def test_gradients_outside_are_the_minimum_weights_share(
    pair: tuple[torch.Tensor, torch.Tensor], minimum: float
) -> None:
    """For the same error inside and outside; and nothing at all outside where the minimum is 0."""
    _, target = pair
    prediction = (target + 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(prediction, target, masks(), minimum)[1], prediction)
    inside, outside = gradient[1, :, :, :3], gradient[1, :, :, 3:]
    assert inside.min() > 0 and torch.allclose(inside, inside[0, 0, 0, 0].expand_as(inside))
    torch.testing.assert_close(outside, minimum * inside)
    assert minimum > 0 or not outside.any()
    # Σ w·e²/Σ w at e = ½: derivative 2·½·w/Σ w, times the sample's weight 2.
    total = 16 * COLUMNS * 3 * (1 + minimum)
    assert inside[0, 0, 0, 0].item() == pytest.approx(2 / total, rel=1e-5)


def test_the_scale_stays(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """White, black and evenly grey masks give the plain loss; so does, at any area, an error that is the same everywhere."""
    plain = flow_matching_loss(*map(pack_latents, pair), torch.tensor([1.0, 2.0, 3.0]))
    for value in (255, 0, 100):
        even = torch.full((3, ROWS, COLUMNS), value, dtype=torch.uint8)
        for minimum in (0.0, 0.1):
            torch.testing.assert_close(loss(*pair, even, minimum), plain)
    _, target = pair
    for minimum in (0.0, 0.1):
        torch.testing.assert_close(loss(target + 0.5, target, masks(), minimum), 0.25 * torch.tensor([1.0, 2.0, 3.0]))
