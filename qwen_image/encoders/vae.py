"""The variational autoencoder (VAE): images to normalized latents and back, with diffusers' AutoencoderKLQwenImage.

A VAE's encoder gives a normal distribution for each latent; its mode is what training and sampling use. Diffusion wants
latents of about unit variance: z = (x − latents_mean) / latents_std per channel, by the checkpoint's own numbers.
"""

from collections.abc import Callable
from typing import Any

import torch

from files.json_object import check_class, read_json_object
from files.shown import shown
from qwen_image.loading.model_files import Component
from qwen_image.loading.weights import load_weights
from qwen_image.model.sizes import VAE_FACTOR, check_image_size
from qwen_image.out_of_memory import memory_ran_out


class VAE:
    """The frozen autoencoder. Images are [B, 3, H, W] in [−1, 1], latents [B, 16, 1, H/8, W/8].

    What a GPU has no room for is done image by image, and an image that it has no room for in overlapping tiles, as
    diffusers' `enable_tiling` does: seams are blended, so its latents are not quite those of the whole image. `say`: told of
    each size that is done in tiles, once.
    """

    def __init__(self, model: Any, latents_mean: list[float], latents_std: list[float]):
        self.model = model.eval().requires_grad_(False)
        self.say: Callable[[str], object] = print
        self.tiled: set[tuple[str, int, int]] = set()  # what is done, and height and width in pixels
        parameter = next(model.parameters())
        shape = (1, -1, 1, 1, 1)
        self.latents_mean = torch.tensor(latents_mean, device=parameter.device).view(shape)
        self.latents_std = torch.tensor(latents_std, device=parameter.device).view(shape)

    @classmethod
    def from_files(cls, component: Component, dtype: torch.dtype, device: torch.device | str) -> "VAE":
        from diffusers import AutoencoderKLQwenImage

        config_file = component.folder / "config.json"
        if not config_file.is_file():
            raise FileNotFoundError(
                f"{shown(config_file)} is missing; the VAE is AutoencoderKLQwenImage in diffusers' layout"
            )
        check_class(read_json_object(config_file), config_file, "AutoencoderKLQwenImage", "VAE")
        config = AutoencoderKLQwenImage.load_config(component.folder)
        with torch.device("meta"):
            model = AutoencoderKLQwenImage.from_config(config)
        load_weights(model, component.weights, dtype, device)
        return cls(model, model.config.latents_mean, model.config.latents_std)

    @property
    def device(self) -> torch.device:
        return self.latents_mean.device

    def to(self, device: torch.device | str) -> None:
        """Move the VAE."""
        self.model.to(device)
        self.latents_mean, self.latents_std = self.latents_mean.to(device), self.latents_std.to(device)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Posterior mode of images [B, 3, H, W] in [−1, 1], normalized: float32 [B, 16, 1, H/8, W/8]."""
        return self.encode_moments(images)[0]

    @torch.no_grad()
    def encode_moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mode and standard deviation, both normalized float32 [B, 16, 1, H/8, W/8]."""
        check_image_size(*images.shape[-2:])
        parameter = next(self.model.parameters())
        pixels = images.to(parameter.device, parameter.dtype).unsqueeze(2)

        def encode(part: torch.Tensor) -> torch.Tensor:
            posterior = self.model.encode(part).latent_dist
            return torch.stack([posterior.mode(), posterior.std])

        found = self._as_fits("encoded", encode, pixels, images.shape[-2], images.shape[-1], dim=1)
        return (found[0].float() - self.latents_mean) / self.latents_std, found[1].float() / self.latents_std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalized latents [B, 16, 1, H/8, W/8] → images [B, 3, H, W], about [−1, 1], in the VAE's dtype."""
        parameter = next(self.model.parameters())
        denormalized = latents.to(parameter.device, torch.float32) * self.latents_std + self.latents_mean

        def decode(part: torch.Tensor) -> torch.Tensor:
            return self.model.decode(part, return_dict=False)[0][:, :, 0]

        rows, columns = (VAE_FACTOR * side for side in latents.shape[-2:])
        return self._as_fits("decoded", decode, denormalized.to(parameter.dtype), rows, columns)

    def _as_fits(
        self,
        word: str,
        compute: Callable[[torch.Tensor], torch.Tensor],
        batch: torch.Tensor,
        height: int,
        width: int,
        dim: int = 0,
    ) -> torch.Tensor:
        """`compute` of the whole batch, or of its parts where memory runs out, put together along `dim`; in tiles at last."""
        tiled = (word, height, width) in self.tiled
        if tiled and len(batch) > 1:
            return torch.cat([self._as_fits(word, compute, one, height, width, dim) for one in batch.split(1)], dim)
        self.model.enable_tiling() if tiled else self.model.disable_tiling()
        try:
            return compute(batch)
        except RuntimeError as error:
            if tiled or not memory_ran_out(error):
                raise
        if batch.is_cuda:  # outside of the handler: here the frames that held tensors are gone
            torch.cuda.empty_cache()
        if len(batch) > 1:
            return torch.cat([self._as_fits(word, compute, one, height, width, dim) for one in batch.split(1)], dim)
        self.tiled.add((word, height, width))
        self.say(
            f"images of {height}×{width} are {word} in tiles: there is no room on the GPU for a whole one"
            + (", and the latents are not quite the whole image's" if word == "encoded" else "")
        )
        return self._as_fits(word, compute, batch, height, width, dim)


def pixels_from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def uint8_from_pixels(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] about [−1, 1] → uint8 [B, H, W, 3], rounded as diffusers' VaeImageProcessor does."""
    unit = (images.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (unit * 255).round().to(torch.uint8).cpu()
