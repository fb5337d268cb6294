"""Prior preservation without pictures: for a class prompt the LoRA shall predict what the base does.

DreamBooth (arXiv:2208.12242, eq. 2) keeps a subject from taking over its class ("a dog") by training on pictures of the class
as well, drawn by the model itself. The frozen base is in memory anyway, so it can be asked directly: in a share of the
micro-batches the captions give way to the class prompt c, and the target is the base's velocity,

    loss = weight(σ) · mean (v_LoRA(x_σ, σ, c) − v_base(x_σ, σ, c))²,

a distillation of the base into itself (ai-toolkit's "differential output preservation"). It costs a forward pass more. What is
kept lies near the prompts that are given: several, worded as the captions are but without the subject's name, keep a class
that a bare "a dog" doesn't (bench/prior_preservation.py). Letting the base come to x_σ by steps of its own was no better.

The loss is told of v_base by the latents and noise that the base believes in (`believed`), so the training step, its kernels
and its CUDA graphs know nothing of all this.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

from qwen_image.model.conditioning import Prompt
from qwen_image.model.family import Member
from train.base_model.online_encoder import OnlineEncoder
from train.config.train_config import TrainConfig
from train.data.batch import STORED_DTYPE
from train.flow.objective import add_noise
from train.lora.strength import lora_at
from train.step.flow_matching_module import FlowMatchingModule


class Example(NamedTuple):
    """What the module computes the loss of."""

    latents: torch.Tensor  # [B, 16, 1, H/8, W/8]
    noise: torch.Tensor  # float32, the same shape
    prompt: Prompt
    is_prior: bool = False


class PriorPrompt:
    """The class prompts of a run, and which micro-batches train them: a pure function of (seed, place in the stream).

    Attributes:
        embeds: of each class prompt [T, D], on the device.
        sharing: so many neighboring ranks share the base's weights, so that they must make the same number of forward passes.
    """

    def __init__(
        self,
        embeds: list[torch.Tensor],
        share: float,
        seed: int,
        rank: int = 0,
        sharing: int = 1,
        text_padding: int = 1,
    ) -> None:
        self.embeds, self.share, self.seed = embeds, share, seed
        self.rank, self.sharing, self.text_padding = rank, sharing, text_padding

    @classmethod
    def from_config(cls, config: TrainConfig, encoder: OnlineEncoder, rank: int, sharing: int) -> "PriorPrompt":
        """Encodes the prompts: `encoder` has a text encoder if there are any (`prompt_encoder`)."""
        prompts = list(config.prior_prompt)
        embeds = [each.to(STORED_DTYPE) for each in encoder.encode_prompts(prompts)] if prompts else []
        return cls(embeds, config.prior_prompt_share, config.seed, rank, sharing, encoder.text_padding)

    def lines(self) -> list[str]:
        """For people, before step 0."""
        if not self.embeds:
            return []
        what = "a class prompt" if len(self.embeds) == 1 else f"one of {len(self.embeds)} class prompts"
        return [f"prior_prompt: {self.share:.0%} of the micro-batches, whatever they hold, train {what} instead"]

    def drawn(self, place: int) -> int | None:
        """Which class prompt the micro-batch at `place` of the global stream trains; None: its own captions."""
        if not self.embeds:
            return None
        digest = hashlib.blake2b(f"{self.seed}/prior prompt/{place}".encode(), digest_size=16).digest()
        chance, which = (int.from_bytes(part, "little") for part in (digest[:8], digest[8:]))
        return which % len(self.embeds) if chance < self.share * 2**64 else None

    def __call__(
        self,
        module: FlowMatchingModule,
        place: int,
        latents: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        prompt: Prompt,
    ) -> Example:
        """What to train instead of the micro-batch at `place` of the global stream: mostly just that.

        Ranks that share the base's weights all ask it as soon as one of them has to.
        """
        mine = self.drawn(place)
        first = place - self.rank % self.sharing  # ranks take neighboring places of the stream
        if all(self.drawn(each) is None for each in range(first, first + self.sharing)):
            return Example(latents, noise, prompt)
        told = prompt if mine is None else self.repeated(self.embeds[mine], prompt)
        with lora_at(module.transformer, 0):
            velocity = module.velocity(latents, noise, sigma, told)
        if mine is None:
            return Example(latents, noise, prompt)
        return Example(*believed(latents, noise, sigma, velocity), told, is_prior=True)

    def repeated(self, embeds: torch.Tensor, prompt: Prompt) -> Prompt:
        """One prompt [T, D] for each sample, padded to the length of `prompt` if it fits: a shape that is known already."""
        tokens, samples = len(embeds), len(prompt.embeds)
        length = max(prompt.embeds.shape[1], -(-tokens // self.text_padding) * self.text_padding)
        padded = F.pad(embeds, (0, 0, 0, length - tokens)).expand(samples, -1, -1).contiguous()
        if length == tokens and prompt.mask is None:
            return Prompt(padded, None)
        mask = torch.arange(length, device=padded.device)[None] < tokens
        return Prompt(padded, mask.expand(samples, -1).contiguous())


def believed(
    latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, velocity: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and noise of the same x_σ whose target is `velocity`: x̂₀ = x_σ − σ·v and ε̂ = x_σ + (1 − σ)·v, in float32.

    latents, noise, velocity [B, …], σ [B] on any device. (1 − σ)·x̂₀ + σ·ε̂ is x_σ and ε̂ − x̂₀ is v, up to float32's rounding.
    """
    noised = add_noise(latents, noise, sigma.to(latents.device))
    sigma = sigma.to(latents.device).float().view(-1, *[1] * (latents.ndim - 1))
    return noised - sigma * velocity, noised + (1 - sigma) * velocity


def check_prior_prompt(prompts: tuple[str, ...], member: Member) -> None:
    """Raise ValueError where class prompts can't be trained: a prompt of an edit model is nothing without its pictures."""
    if prompts and member.most_sources:
        raise ValueError(
            f"prior_prompt is for text to image, and the model is {member.name}, whose prompts speak of source images: "
            "leave it out"
        )
