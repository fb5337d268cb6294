"""A small VAE of the real class, trained from scratch on drawn pictures: 8 × 8 pixels to 16 channels and back, sharp.

Pictures are single frames. Of a causal convolution over time only the last tap then meets pixels, the others meet
the zeros before the first frame: training computes that tap alone, as a convolution over the picture, which is the same
function at a third of the work. The other taps are saved as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from demo.drawing.course import Course

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

SHAPE: dict[str, Any] = {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 2}
PEAK_RATE = 1e-3
BATCH = 64
EDGE_WEIGHT = 0.5  # of the differences between neighbours, at three sizes, beside that of the pixels
KL_WEIGHT = 1e-3  # of a latent's divergence from N(0, 1) in nats: its noise makes the decoder forgive small errors
FIRST_LOG_VARIANCE = -4.0


def fresh_vae(seed: int) -> AutoencoderKLQwenImage:
    """Random weights for single frames: variance 1 / fan-in of the last tap, the other taps and the biases 0.

    PyTorch's own initialization, a third of that variance, lets a picture fade on its way through a dozen convolutions.
    Residual branches begin as 0, so that the way is nearly linear at first.
    """
    from diffusers import AutoencoderKLQwenImage

    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKLQwenImage(**SHAPE)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                continue
            weight = module.weight if module.weight.ndim == 4 else module.weight[:, :, -1]
            module.weight.zero_()
            assert module.bias is not None
            module.bias.zero_()
            if not name.endswith(("conv2", ".proj")):  # the last layer of a residual branch
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        vae.quant_conv.bias[vae.config.z_dim :] = FIRST_LOG_VARIANCE
    return vae


@contextmanager
def single_frames(vae: AutoencoderKLQwenImage) -> Iterator[None]:
    """Within it the convolutions over time compute their last tap alone, which for single frames is all."""
    convolutions = [module for module in vae.modules() if isinstance(module, torch.nn.Conv3d)]
    for module in convolutions:
        module.forward = partial(_last_tap, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


def _last_tap(conv: Any, x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
    assert x.shape[2] == 1 and cache_x is None
    left, _, top, *_ = conv._padding
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left)).unsqueeze(2)


def encode(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """pixels [B, 3, H, W] in −1 … 1 → mean and log-variance [B, 16, 1, H/8, W/8]."""
    mean, log_variance = vae.quant_conv(vae.encoder(pixels.unsqueeze(2))).chunk(2, dim=1)
    return mean, log_variance.float().clamp(-30, 20)


def decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """[B, 16, 1, H/8, W/8] → pixels [B, 3, H, W]."""
    return vae.decoder(vae.post_quant_conv(latents))[:, :, 0]


def picture_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the pixels, and of their differences to the right and downwards at three sizes."""
    loss = (decoded - pixels).abs().mean()
    for number in range(3):
        error = decoded - pixels
        loss = loss + EDGE_WEIGHT * sum(torch.diff(error, dim=axis).abs().mean() for axis in (2, 3))
        if number < 2:
            decoded, pixels = F.avg_pool2d(decoded, 2), F.avg_pool2d(pixels, 2)
    return loss


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W] in −1 … 1."""
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def learn(vae: AutoencoderKLQwenImage, pictures: torch.Tensor, course: Course, batch: int, seed: int) -> None:
    """Train in place on uint8 pictures [N, H, W, 3], which lie on the device of the VAE."""
    device = pictures.device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    vae.train()
    with single_frames(vae):
        for rate in course.rates(PEAK_RATE):
            index = torch.randint(len(pictures), (batch,), device=device, generator=generator)
            pixels = to_pixels(pictures[index])
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                mean, log_variance = encode(vae, pixels)
                noise = torch.randn(mean.shape, device=device, generator=generator)
                decoded = decode(vae, mean + (0.5 * log_variance).exp() * noise).float()
            mean = mean.float()
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            loss = picture_loss(decoded, pixels)
            (loss + KL_WEIGHT * kl).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if course.is_due():
                error = (decoded - pixels).abs().mean() * 127.5
                course.tell(loss=loss.item(), kl=kl.item(), levels=error.item())
    vae.eval()


@torch.no_grad()
def latents_of(vae: AutoencoderKLQwenImage, pictures: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Normalised latents [N, 16, 1, H/8, W/8] of uint8 pictures [N, H, W, 3]; writes mean and deviation into the configuration.

    They are those of the posterior's samples. Of its means alone a channel that the VAE hardly uses would have next to
    none, and normalising would blow up what is left of it.
    """
    means, variances = [], []
    with single_frames(vae):
        for part in pictures.split(batch):
            mean, log_variance = encode(vae, to_pixels(part))
            means.append(mean.float())
            variances.append(log_variance.exp().mean((0, 2, 3, 4)) * len(part))
    latents = torch.cat(means)
    mean = latents.mean((0, 2, 3, 4))
    std = (latents.var((0, 2, 3, 4)) + torch.stack(variances).sum(0) / len(pictures)).sqrt()
    mean, std = (torch.tensor([round(x, 4) for x in values.tolist()], device=latents.device) for values in (mean, std))
    vae.register_to_config(latents_mean=_rounded(mean), latents_std=_rounded(std))
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(x, 4) for x in values.tolist()]


@torch.no_grad()
def mean_error(vae: AutoencoderKLQwenImage, pictures: np.ndarray) -> float:
    """Mean absolute error of decoded pictures, uint8 [N, H, W, 3], in levels of 255."""
    device = next(vae.parameters()).device
    pixels = to_pixels(torch.from_numpy(pictures).to(device))
    with single_frames(vae):
        decoded = decode(vae, encode(vae, pixels)[0]).clamp(-1, 1)
    return ((decoded - pixels).abs().mean() * 127.5).item()
