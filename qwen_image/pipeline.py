"""Qwen-Image as one pipeline: the same functions serve sampling and the training loss, so they cannot disagree.

pipeline = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", dtype=torch.bfloat16, device="cuda")
images = pipeline.generate(["a lighthouse at dusk"], height=1024, width=1024, seeds=[0])
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from qwen_image.encoders.text_encoder import TextEncoder
from qwen_image.encoders.vae import VAE, uint8_from_pixels
from qwen_image.loading.model_files import ModelFiles, ModelSource, resolve_model
from qwen_image.loading.weights import empty_transformer, load_weights
from qwen_image.model.conditioning import Prompt
from qwen_image.model.modulation_table import Modulation
from qwen_image.model.sizes import LATENT_CHANNELS, PATCH, PIXEL_MULTIPLE, VAE_FACTOR, check_image_size
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule, euler_step

DEFAULT_NEGATIVE_PROMPT = " "
DEFAULT_MAX_TOKENS = 512


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, 1, H/8, W/8] → tokens [B, (H/16)·(W/16), 4·C]: each token holds a 2 × 2 patch, channel-major."""
    batch, channels, _, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH**2)


def unpack_latents(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `pack_latents` for an image of rows × columns tokens."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, rows, columns, channels // PATCH**2, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // PATCH**2, 1, rows * PATCH, columns * PATCH)


def time_input(sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """σ [B] float32 → the transformer's time input [B].

    1000·σ rounded to `dtype`, then divided by 1000: inference's rounding, which training must share (bf16 has steps of 4
    near 1000).
    """
    return (sigma * 1000).to(dtype) / 1000


def predict_velocity(
    transformer: nn.Module,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    prompt: Prompt,
    rows: int,
    columns: int,
    modulation: Modulation | None = None,
) -> torch.Tensor:
    """Velocity of packed latents [B, rows·columns, 64] at σ [B] (float32) under a prompt; same shape and dtype.

    σ may lie on the CPU: a modulation table then need not wait for the device. `modulation`: what
    `transformer.look_up(time_input(σ))` returned, if that was done before.
    """
    timestep = time_input(sigma, latents.dtype)
    return transformer(latents, timestep, prompt.embeds.to(latents.dtype), prompt.mask, rows, columns, modulation)


def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, rescaled token by token to the norm of the positive prediction."""
    guided = negative + scale * (positive - negative)
    return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


@dataclass
class QwenImagePipeline:
    """The four components; those that a task doesn't need are None (training from encoded shards loads no encoder)."""

    transformer: QwenImageTransformer | None
    text_encoder: TextEncoder | None
    vae: VAE | None
    schedule: SigmaSchedule
    files: ModelFiles

    @classmethod
    def from_pretrained(
        cls,
        source: str | ModelSource,
        *,
        components: tuple[str, ...] = ("transformer", "text_encoder", "vae"),
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        progress: bool = False,
        stream_text_encoder: bool = False,
    ) -> "QwenImagePipeline":
        """Load `components` of a local folder, a hub id, or a source with overrides of single components.

        `stream_text_encoder`: its layers lie in host memory and are on the device one after the other.
        """
        source = ModelSource(source) if isinstance(source, str) else source
        needed = (*components, "scheduler") + (("tokenizer",) if "text_encoder" in components else ())
        files = resolve_model(source, needed)
        schedule = SigmaSchedule.from_config_file(files["scheduler"].folder / "scheduler_config.json")
        transformer = text_encoder = vae = None
        if "transformer" in components:
            transformer = load_transformer(files, dtype, device, progress)
        if "text_encoder" in components:
            places = files["text_encoder"], files["tokenizer"]
            text_encoder = TextEncoder.from_files(*places, dtype, device, streamed=stream_text_encoder)
        if transformer is not None and text_encoder is not None:
            check_prompt_width(text_encoder, transformer.config.joint_attention_dim)
        if "vae" in components:
            vae = VAE.from_files(files["vae"], dtype, device)
        return cls(transformer, text_encoder, vae, schedule, files)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str] | Prompt,
        *,
        negative_prompt: str | Prompt | None = DEFAULT_NEGATIVE_PROMPT,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        true_cfg_scale: float = 4.0,
        seeds: list[int] | None = None,
        noise: torch.Tensor | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        on_step: Callable[[int, int], object] | None = None,
        only_finite: bool = False,
    ) -> torch.Tensor:
        """One image a prompt: uint8 [B, H, W, 3] on the CPU.

        The noise of image i is drawn on the CPU from `seeds[i]` (default: its position), so an image doesn't depend on
        its batch or device; `noise` [B, 16, 1, H/8, W/8] replaces it. Guidance runs when `true_cfg_scale` > 1 and there
        is a negative prompt. Prompts may be embeddings, then no text encoder is needed.

        `only_finite`: raise ValueError instead of making an image of NaN, which is black.
        """
        check_image_size(height, width)
        if self.transformer is None or self.vae is None:
            raise ValueError("generating images needs the components transformer and vae")
        parameter = next(self.transformer.parameters())
        prompt = self._prompt(prompts, max_tokens).to(parameter.device, parameter.dtype)
        batch = len(prompt.embeds)
        negative = None
        if true_cfg_scale > 1 and negative_prompt is not None:
            texts = [negative_prompt] * batch if isinstance(negative_prompt, str) else negative_prompt
            negative = self._prompt(texts, max_tokens).to(parameter.device, parameter.dtype)
        if noise is None:
            noise = draw_noise(seeds if seeds is not None else list(range(batch)), height, width, parameter.dtype)
        if len(noise) != batch:
            raise ValueError(f"{len(noise)} seeds were given for {batch} prompts")
        rows, columns = height // PIXEL_MULTIPLE, width // PIXEL_MULTIPLE
        latents = pack_latents(noise.to(parameter.device, parameter.dtype))
        sigmas = self.schedule.sigmas(num_inference_steps, rows * columns)
        for step in range(num_inference_steps):
            sigma = sigmas[step].expand(batch)
            velocity = predict_velocity(self.transformer, latents, sigma, prompt, rows, columns)
            if negative is not None:
                opposite = predict_velocity(self.transformer, latents, sigma, negative, rows, columns)
                velocity = guide(velocity, opposite, true_cfg_scale)
            latents = euler_step(latents, velocity, sigmas[step], sigmas[step + 1])
            if on_step is not None:
                on_step(step + 1, num_inference_steps)
        if only_finite and not latents.isfinite().all():
            raise ValueError(
                "the image became NaN or infinite on its way from noise: take a smaller strength of the LoRA, or less guidance"
            )
        return uint8_from_pixels(self.vae.decode(unpack_latents(latents, rows, columns)))

    def _prompt(self, prompts: list[str] | Prompt, max_tokens: int) -> Prompt:
        if isinstance(prompts, Prompt):
            return prompts
        if self.text_encoder is None:
            raise ValueError("prompts in words need the component text_encoder; load it or pass embeddings")
        return self.text_encoder.encode(prompts, max_tokens)


def check_prompt_width(text_encoder: TextEncoder, width: int) -> None:
    """Raise ValueError unless the text encoder makes embeddings of the width that the transformer reads."""
    made = text_encoder.language_model.config.hidden_size
    if made != width:
        raise ValueError(
            f"the text encoder makes prompt embeddings {made} wide, but the transformer takes {width}: they belong to "
            "different models (--text_encoder_path, --transformer_path)"
        )


def draw_noise(seeds: list[int], height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Starting noise [B, 16, 1, H/8, W/8] on the CPU, image i from its own seed: diffusers' for the same generators."""
    shape = (1, LATENT_CHANNELS, 1, height // VAE_FACTOR, width // VAE_FACTOR)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds])


def load_transformer(
    files: ModelFiles, dtype: torch.dtype, device: torch.device | str = "cpu", progress: bool = False
) -> QwenImageTransformer:
    """The transformer on `device`, frozen, in evaluation mode; no second copy of the weights ever exists."""
    transformer = empty_transformer(files)
    load_weights(transformer, files["transformer"].weights, dtype, device, progress, unscaled_float8=True)
    return transformer.eval()
