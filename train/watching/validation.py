"""Validation: the loss at fixed σ with fixed noise, so that two steps differ by the model alone.

On held-out samples it says whether the LoRA generalizes. On a fixed subset of the training samples, measured in the same way,
it says how well these are learned; the gap between the two is over-training.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from train.base_model.online_encoder import OnlineEncoder
from train.config.train_config import TrainConfig
from train.data.batch import Batch, make_batch
from train.data.draws import Draws, sample_generator
from train.data.mixture import Mixture
from train.data.sample import BrokenSample, DataSet
from train.data.shard_dataset import ShardDataset
from train.process.ranks import Ranks
from train.step.flow_matching_module import FlowMatchingModule

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NOISE_SEED = 0x5EED  # never that of training, the same in every run: losses of different runs are comparable
Say = Callable[[str], None]


class FixedSamples:
    """Samples of one data set with noise of their own, spread over the ranks.

    Every rank runs the same number of forward passes (under ZeRO-3 each is a collective): the last ones are repeated
    with weight 0 where the samples do not divide evenly, as where they are fewer than the ranks. A sample that can't be read
    is left out and named, or ends the run, by `on_broken`. Building it is a collective.
    """

    def __init__(
        self,
        dataset: ShardDataset | Mixture,
        indices: list[int],
        encoder: OnlineEncoder,
        ranks: Ranks,
        on_broken: Literal["skip", "stop"] = "stop",
    ) -> None:
        self.encoder, self.device = encoder, ranks.device
        read: dict[int, Batch] = {}
        while True:  # until nobody meets a broken one: what is left is dealt anew
            padded = indices + indices[:1] * (-len(indices) % ranks.world)
            dealt = list(enumerate(padded))[ranks.rank :: ranks.world]
            broken = _read(dataset, [index for _, index in dealt], read)
            if dist.is_initialized():
                everywhere: list[dict[int, str]] = [{}] * ranks.world
                dist.all_gather_object(everywhere, broken)
                broken = {index: why for each in everywhere for index, why in each.items()}
            if not broken:
                break
            if on_broken == "stop" or len(broken) == len(indices):
                raise BrokenSample(f"validation: {next(iter(broken.values()))}")
            for why in broken.values():
                ranks.say(f"left out of validation: broken sample {why}")
            indices = [index for index in indices if index not in broken]
        self.batches = [(read[index], place < len(indices)) for place, index in dealt]

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def losses(self, module: FlowMatchingModule) -> tuple[float, list[float]]:
        """Unweighted: the mean over samples and SIGMAS, and the mean over samples at each of SIGMAS.

        A collective, the same values on every rank.
        """
        was_training = module.training
        module.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # of all, and how many
        by_sigma = torch.zeros(len(SIGMAS), dtype=torch.float64, device=self.device)
        weighting, module.weighting = module.weighting, "none"
        for cpu_batch, counts in self.batches:
            batch = cpu_batch.to(self.device)
            latents, prompt = self.encoder(batch)
            for place, sigma in enumerate(SIGMAS):
                loss = module(latents, batch.noise, torch.full_like(batch.sigma, sigma), prompt, batch.mask)
                total += torch.stack([loss.double().sum(), torch.tensor(1.0, device=self.device)]) * counts
                by_sigma[place] += loss.double().sum() * counts
        module.weighting = weighting
        module.train(was_training)
        if dist.is_initialized():
            dist.all_reduce(total)
            dist.all_reduce(by_sigma)
        samples = total[1].item() / len(SIGMAS)
        return (total[0] / total[1]).item(), (by_sigma / samples).tolist()


class Validation:
    """The held-out samples of a run, and as many of those it trains on as `--validation_training_samples` says."""

    def __init__(self, held_out: FixedSamples | None, trained: FixedSamples | None) -> None:
        self.held_out, self.trained = held_out, trained

    @classmethod
    def from_config(cls, config: TrainConfig, dataset: DataSet, encoder: OnlineEncoder, ranks: Ranks) -> "Validation":
        """Reads the samples. Raises BrokenSample for one that can't be read, by `--on_broken_sample`."""
        if not isinstance(dataset, ShardDataset | Mixture):  # a stream holds nothing out
            return cls(None, None)
        chosen = dataset.validation, dataset.training_subset(config.watched_samples) if config.watched_samples else ()
        held_out, trained = (
            FixedSamples(dataset, [int(index) for index in indices], encoder, ranks, config.on_broken_sample)
            if len(indices)
            else None
            for indices in chosen
        )
        return cls(held_out, trained)

    def __len__(self) -> int:
        """Samples of this rank."""
        return sum(len(samples) for samples in (self.held_out, self.trained) if samples is not None)

    def measure(self, module: FlowMatchingModule, prefix: str = "") -> dict[str, float]:
        """The losses by the names that metrics have, each beginning with `prefix`; a collective.

        validation_loss of the held-out samples, training_subset_loss of the others, both at each σ besides, and
        validation_gap, by how much the first is above the second.
        """
        found: dict[str, float] = {}
        for name, samples in (("validation_loss", self.held_out), ("training_subset_loss", self.trained)):
            if samples is not None:
                found[f"{prefix}{name}"], by_sigma = samples.losses(module)
                for sigma, loss in zip(SIGMAS, by_sigma, strict=True):
                    found[f"{prefix}{name}/sigma_{sigma}"] = loss
        if self.held_out is not None and self.trained is not None:
            gap = found[f"{prefix}validation_loss"] - found[f"{prefix}training_subset_loss"]
            found[f"{prefix}validation_gap"] = gap
        return found


def _read(dataset: ShardDataset | Mixture, indices: list[int], read: dict[int, Batch]) -> dict[int, str]:
    """Add the batches of `indices` to `read`; why those that can't be read can't be, by index."""
    broken = {}
    for index in indices:
        try:
            read[index] = read.get(index) or _validation_batch(dataset, index)
        except BrokenSample as error:
            broken[index] = str(error)
    return broken


def _validation_batch(dataset: ShardDataset | Mixture, index: int) -> Batch:
    def draw(epoch: int, virtual: int, latent_shape: tuple[int, ...]) -> Draws:
        noise = torch.randn(latent_shape, generator=sample_generator(_NOISE_SEED, 0, virtual))
        return Draws(noise, SIGMAS[0], drop_caption=False)

    return make_batch(dataset, place=0, epoch=0, indices=[index], draw=draw, attempts=0)
