"""Sizes that every Qwen-Image checkpoint shares, and those that its configuration gives. Imports no torch.

The VAE makes one latent of 16 channels of 8 × 8 pixels; the transformer takes patches of 2 × 2 latents as tokens of 64
channels. So an image of H × W pixels is H/16 · W/16 tokens.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from files.json_object import check_class, read_json_object

LATENT_CHANNELS = 16
VAE_FACTOR = 8  # pixels a latent on each side
PATCH = 2  # latents a token on each side
PIXEL_MULTIPLE = VAE_FACTOR * PATCH  # pixels a token on each side


def check_image_size(height: int, width: int) -> None:
    """Raise ValueError unless both sides are positive multiples of 16."""
    if height < PIXEL_MULTIPLE or width < PIXEL_MULTIPLE or height % PIXEL_MULTIPLE or width % PIXEL_MULTIPLE:
        raise ValueError(f"height and width must be positive multiples of {PIXEL_MULTIPLE}, got {height}×{width}")


@dataclass(frozen=True)
class TransformerConfig:
    """The fields of `transformer/config.json` that shape the model; defaults are Qwen-Image's (20 B parameters)."""

    patch_size: int = PATCH
    in_channels: int = LATENT_CHANNELS * PATCH**2
    out_channels: int = LATENT_CHANNELS
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False  # source images are modulated as at the noise level 0 (Qwen-Image-Edit-2511)

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_config_file(cls, path: Path) -> "TransformerConfig":
        """Read `config.json`. Raises ValueError for a model of another family, naming what differs."""
        config = read_json_object(path)
        check_class(config, path, "QwenImageTransformer2DModel", "transformer")
        for flag, family in (
            ("use_additional_t_cond", "Qwen-Image-Layered"),
            ("use_layer3d_rope", "Qwen-Image-Layered"),
            ("guidance_embeds", "a guidance-distilled model"),
        ):
            if config.get(flag):
                raise ValueError(
                    f"{path}: {flag} is set, which marks {family}; only Qwen-Image and Qwen-Image-2512 can be trained"
                )
        known = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        known["axes_dims_rope"] = tuple(known.get("axes_dims_rope", cls.axes_dims_rope))
        return cls(**known)
