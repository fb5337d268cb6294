"""Qwen-Image as one pipeline: the same functions serve sampling and the training loss, so they cannot disagree.

pipeline = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", dtype=torch.bfloat16, device="cuda")
images = pipeline.generate(["a lighthouse at dusk"], height=1024, width=1024, seeds=[0])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from files.shown import shown
from qwen_image.encoders.source_images import SourceImage
from qwen_image.encoders.text_encoder import TextEncoder
from qwen_image.encoders.vae import VAE, pixels_from_uint8, uint8_from_pixels
from qwen_image.loading.model_files import ModelFiles, ModelSource, resolve_model
from qwen_image.loading.weights import empty_transformer, load_weights
from qwen_image.model.conditioning import Prompt, join, pack_latents, unpack_latents
from qwen_image.model.modulation_table import Modulation
from qwen_image.model.sizes import LATENT_CHANNELS, PIXEL_MULTIPLE, VAE_FACTOR, check_image_size
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule, euler_step

DEFAULT_NEGATIVE_PROMPT = " "
DEFAULT_MAX_TOKENS = 512
DEFAULT_SIDE = 1024  # pixels of an image without sources


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
    """Velocity of packed latents [B, rows·columns, 64] at σ [B] (float32) under a prompt with its sources; same shape, dtype.

    σ may lie on the CPU: a modulation table then need not wait for the device. `modulation`: what
    `transformer.look_up(time_input(σ))` returned, if that was done before.
    """
    timestep = time_input(sigma, latents.dtype)
    image, grids = join(latents, prompt.sources), prompt.grids(rows, columns)
    return transformer(image, timestep, prompt.embeds.to(latents.dtype), prompt.mask, grids, modulation)


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
            text_encoder = TextEncoder.of_model(files, dtype, device, streamed=stream_text_encoder)
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
        sources: Sequence[Sequence[SourceImage]] = (),
        height: int | None = None,
        width: int | None = None,
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
        is a negative prompt. Prompts may be embeddings, then no text encoder is needed. `sources`: of an edit model, each
        prompt's source images, those of a batch of equal sizes (embeddings bring them along). Without `height` and `width`
        an edit has the size of one of them (`Member.size_from`), other images 1024 × 1024.

        `only_finite`: raise ValueError instead of making an image of NaN, which is black.
        """
        if height is None or width is None:
            height, width = self._size(sources)
        check_image_size(height, width)
        if self.transformer is None or self.vae is None:
            raise ValueError("generating images needs the components transformer and vae")
        parameter = next(self.transformer.parameters())
        latents_of_sources = encode_sources(self.vae, sources)
        prompt = self._prompt(prompts, max_tokens, sources, latents_of_sources).to(parameter.device, parameter.dtype)
        batch = len(prompt.embeds)
        negative = None
        if true_cfg_scale > 1 and negative_prompt is not None:
            texts = [negative_prompt] * batch if isinstance(negative_prompt, str) else negative_prompt
            negative = self._prompt(texts, max_tokens, sources, latents_of_sources)
            negative = negative.to(parameter.device, parameter.dtype)
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

    def _size(self, sources: Sequence[Sequence[SourceImage]]) -> tuple[int, int]:
        """Height and width of an image for which none are given."""
        if not sources:
            return DEFAULT_SIDE, DEFAULT_SIDE
        height, width, _ = sources[0][self.files.member.size_from].pixels.shape
        return height, width

    def _prompt(
        self,
        prompts: list[str] | Prompt,
        max_tokens: int,
        sources: Sequence[Sequence[SourceImage]],
        latents: tuple[torch.Tensor, ...],
    ) -> Prompt:
        if isinstance(prompts, Prompt):
            return prompts
        if self.text_encoder is None:
            raise ValueError("prompts in words need the component text_encoder; load it or pass embeddings")
        if not self.files.member.most_sources and not sources:
            return self.text_encoder.encode(prompts, max_tokens)
        if len(sources) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many lists of source images, got {len(sources)}")
        embeds = []
        for text, own in zip(prompts, sources, strict=True):
            self.files.member.check_sources(len(own), f"the prompt {shown(repr(text), 60)}")
            embeds.append(self.text_encoder.encode_pictures(text, own).cut(max_tokens))
        return Prompt.from_list(embeds, sources=latents)


def encode_sources(vae: VAE, sources: Sequence[Sequence[SourceImage]]) -> tuple[torch.Tensor, ...]:
    """Normalized latents of the samples' first source images, of their second ones …: [B, 16, 1, h, w] each.

    Raises ValueError for samples whose images are not of equal number and sizes.
    """
    layouts = {tuple(source.pixels.shape for source in own) for own in sources}
    if len(layouts) > 1:
        raise ValueError("the source images of a batch must be of equal number and sizes: make one image at a time")
    places = zip(*sources, strict=True)
    stacks = [torch.from_numpy(np.stack([source.pixels for source in place])) for place in places]
    return tuple(vae.encode(pixels_from_uint8(stack.permute(0, 3, 1, 2))) for stack in stacks)


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
