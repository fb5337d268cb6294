"""The drawing model's VAE: single frames need one tap of its causal convolutions; it learns; its latents are unit-sized."""

from __future__ import annotations

import pytest
import torch

from demo.drawing import vae as drawing_vae
from demo.drawing.course import Course
from demo.drawing.vae import decode, encode, fresh_vae, latents_of, learn, mean_error, single_frames, to_pixels
from demo.pictures.painting import paint
from demo.pictures.random_scenes import random_scene


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.stack([torch.from_numpy(paint(random_scene(i), 32).copy()) for i in range(16)])


def test_one_tap_is_the_whole_function(pictures: torch.Tensor):
    """diffusers' own encode and decode, with weights on the other taps and in the residual branches too."""
    vae = fresh_vae(0).eval()
    generator = torch.Generator().manual_seed(1)
    pixels = to_pixels(pictures[:2])
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()
        decoded = vae.decode(latents).sample[:, :, 0]
        with single_frames(vae):
            ours = encode(vae, pixels)[0]
            ours_decoded = decode(vae, ours)
        again = vae.encode(pixels[:, :, None]).latent_dist.mode()
    assert torch.equal(again, latents)
    torch.testing.assert_close(ours, latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours_decoded.clamp(-1, 1), decoded.clamp(-1, 1), atol=1e-4, rtol=1e-3)


def test_it_learns_and_its_latents_are_unit_sized(pictures: torch.Tensor):
    vae = fresh_vae(0)
    before = mean_error(vae, pictures.numpy())
    learn(vae, pictures, Course("VAE", 0, steps=40, warm_up=5), batch=4, seed=0)
    assert mean_error(vae, pictures.numpy()) < 0.8 * before
    latents = latents_of(vae, pictures)
    assert latents.shape == (16, 16, 1, 4, 4)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.01
    assert 0.2 < latents.std() < 1.05  # of the means alone; with the posterior's noise it is 1
    assert not any(torch.stack([p.isnan().any() for p in vae.parameters()]).tolist())
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] > 1 and module.kernel_size[1] > 1:
            assert not module.weight[:, :, :-1].any()  # what meets zeros alone has learned nothing


def test_a_channel_that_is_hardly_used_is_not_blown_up(pictures: torch.Tensor):
    vae = fresh_vae(0)
    with torch.no_grad():
        vae.quant_conv.weight[0] *= 1e-4
        vae.quant_conv.bias[16] = 0  # and its posterior is N(≈ 0, 1)
        vae.quant_conv.weight[16] = 0
    latents = latents_of(vae, pictures)
    assert latents[:, 0].abs().max() < 0.1
    assert latents[:, 1].std() > 0.1


def test_edges_count():
    flat, edge = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 0.1
    shifted = torch.full_like(flat, 0.05)
    assert drawing_vae.picture_loss(edge, flat) > drawing_vae.picture_loss(shifted, flat)  # of equal mean error
    assert drawing_vae.picture_loss(flat, flat) == 0
