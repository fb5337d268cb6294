"""What the samples of a row's steps were: their σ, their losses by σ, their tokens, their arithmetic, those left out.

Gathered on the host, as shapes and σ are known there, and added up over the ranks once a row.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from qwen_image.free_memory import GIB, peak_bytes
from qwen_image.model.conditioning import Prompt
from qwen_image.model.sizes import TransformerConfig
from train.data.batch import Batch
from train.fit.step_flops import peak_flops, step_flops
from train.watching.late_row import Part

BANDS = 5  # of σ: [0, 0.2), [0.2, 0.4) …, called by their middles, which are validation's σ
TOKENS, FLOPS, PEAK = "tokens", "flops", "peak_flops"  # of a row, the last two a GPU; Metrics makes rates of them


class Seen(NamedTuple):
    """Of a micro-batch: σ [B] on the CPU, losses [B] and which samples are the prior set's, bool [B], on the device."""

    sigma: torch.Tensor
    losses: torch.Tensor
    prior: torch.Tensor | None


class StepStatistics:
    """Adds up what `saw` is told; `row` begins anew.

    has_prior: the run has samples of a prior, so that every row tells the subject's loss, also before the first of them.
    """

    def __init__(self, config: TransformerConfig, device: torch.device, has_prior: bool = False) -> None:
        self.config, self.device, self.peak = config, device, peak_flops(device)
        self._has_prior = has_prior
        self._begin()

    def _begin(self) -> None:
        self._seen: list[Seen] = []
        self._tokens = 0
        self._flops = 0.0

    def saw(self, batch: Batch, losses: torch.Tensor, latents: torch.Tensor, prompt: Prompt) -> None:
        """A micro-batch was launched: losses [B], latents [B, 16, 1, H/8, W/8], padded prompts [B, T]. Waits for nothing."""
        samples, image, text = len(latents), latents.shape[-2] * latents.shape[-1] // 4, prompt.embeds.shape[1]
        self._seen.append(Seen(batch.sigma, losses.detach(), batch.prior))
        self._tokens += samples * (image + text)
        self._flops += step_flops(self.config, samples, image, text)

    def row(self, skipped_steps: int, skipped_samples: int) -> Part:
        """For a row of metrics; a collective. `skipped_samples`: of this rank so far, `skipped_steps`: of all."""
        sigma = torch.cat([seen.sigma for seen in self._seen]).double()
        band = (sigma * BANDS).long().clamp(max=BANDS - 1)
        sums = [len(sigma), sigma.sum().item(), sigma.square().sum().item(), self._tokens, self._flops, skipped_samples]
        on_host = torch.tensor([*sums, -sigma.min().item(), sigma.max().item()], dtype=torch.float64)
        on_device, band = to_device(on_host, self.device), to_device(band, self.device)
        losses = torch.cat([seen.losses for seen in self._seen]).double()
        finite = torch.isfinite(losses)
        zeros = torch.zeros(BANDS, dtype=torch.float64, device=self.device)
        by_band = zeros.index_add(0, band, torch.where(finite, losses, 0.0))
        counts = zeros.index_add(0, band, finite.double())
        of_prior = torch.zeros(2, dtype=torch.float64, device=self.device)  # the sum of its finite losses, and how many
        for seen in self._seen:
            if seen.prior is not None:
                right = seen.prior & torch.isfinite(seen.losses)
                of_prior += torch.stack([torch.where(right, seen.losses.double(), 0.0).sum(), right.double().sum()])
        totals, extremes = torch.cat([on_device[:-2], by_band, counts, of_prior]), on_device[-2:].clone()
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world > 1:
            dist.all_reduce(totals)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        self._begin()
        memory = {"peak_memory_gib": round(peak_bytes(self.device) / GIB, 3)} if self.device.type == "cuda" else {}

        def read(numbers: list[float]) -> dict[str, float]:
            count, total, squares, tokens, flops, broken = numbers[:6]
            mean = total / count
            found = {
                "sigma_mean": mean,
                "sigma_std": max(squares / count - mean**2, 0.0) ** 0.5,
                "sigma_min": -numbers[-2],
                "sigma_max": numbers[-1],
                TOKENS: tokens,
                FLOPS: flops / world,
                "skipped_steps": skipped_steps,
                "skipped_samples": int(broken),
                **memory,
            }
            if self.peak is not None:
                found[PEAK] = self.peak
            for place in range(BANDS):
                if samples := numbers[6 + BANDS + place]:
                    found[f"loss/sigma_{(2 * place + 1) / (2 * BANDS):g}"] = numbers[6 + place] / samples
            all_sum, all_count = sum(numbers[6 : 6 + BANDS]), sum(numbers[6 + BANDS : 6 + 2 * BANDS])
            prior_sum, prior_count = numbers[6 + 2 * BANDS : 8 + 2 * BANDS]
            if prior_count:
                found["loss/prior"] = prior_sum / prior_count
            if self._has_prior and (subject := all_count - prior_count):
                found["loss/subject"] = (all_sum - prior_sum) / subject
            return found

        return Part(torch.cat([totals, extremes]), read)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From the CPU, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
