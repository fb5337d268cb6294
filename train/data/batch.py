"""One micro-batch: samples of one bucket with all that chance decided for them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

import torch

from qwen_image.model.conditioning import Prompt
from qwen_image.model.sizes import LATENT_CHANNELS, VAE_FACTOR
from train.data.draws import Draws
from train.data.mixture import Mixture
from train.data.sample import BrokenSample, Sample
from train.data.shard_dataset import ShardDataset

ATTEMPTS = 16  # so many broken samples in a row are bad luck, more are a broken data set


# (epoch, virtual index, latent_shape) -> Draws: train.data.draws.sample_draws with seed, distribution and dropout bound
DrawSample = Callable[[int, int, tuple[int, ...]], Draws]
# (epoch, virtual index) -> what decides over the sample's caption: caption_variants.caption_chance with the seed bound
CaptionChance = Callable[[int, int], Random]
Chance = Callable[[], Random] | None  # of one sample


@dataclass
class Batch:
    """One micro-batch: samples of one bucket with all that chance decided for them. B samples."""

    place: int  # in the global stream of micro-batches
    epoch: int
    indices: list[int]  # virtual indices (Order.locate): sample + N · repeat number
    keys: list[str]
    width: int  # pixels
    height: int
    captions: list[str]  # "" where dropped
    noise: torch.Tensor  # float32 [B, 16, 1, H/8, W/8]
    sigma: torch.Tensor  # float32 [B], k/1000; stays on the CPU, where the modulation table is looked up
    drop: torch.Tensor  # bool [B]: the caption was dropped
    latents: torch.Tensor | None = None  # [B, 16, 1, H/8, W/8], dtype as stored
    pixels: torch.Tensor | None = None  # uint8 [B, 3, H, W]
    prompt_embeds: torch.Tensor | None = None  # [B, T, D], zeros right of each prompt
    prompt_mask: torch.Tensor | None = None  # bool [B, T]; None: no padding
    sources: tuple[torch.Tensor, ...] = ()  # of pairs: latents or pixels of the first source images, the second …
    source_sizes: list[tuple[tuple[int, int], ...]] = field(
        default_factory=list
    )  # each sample's, before they were packed
    broken: list[str] = field(default_factory=list)  # members that were replaced, and why
    prior: torch.Tensor | None = None  # bool [B]: of the prior set; None: none is
    loss_weight: torch.Tensor | None = None  # float32 [B], a factor on each sample's loss for the gradient; None: 1
    mask: torch.Tensor | None = None  # of the loss: uint8 [B, H/8, W/8], 255 where it counts in full; None: everywhere

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The same batch with `function` applied to every tensor but σ."""
        tensors = {n: v for n, v in vars(self).items() if isinstance(v, torch.Tensor) and n != "sigma"}
        moved: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items()}
        return replace(self, **moved, sources=tuple(map(function, self.sources)))

    def tensors(self) -> list[torch.Tensor]:
        return [*self.sources, *(value for value in vars(self).values() if isinstance(value, torch.Tensor))]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> "Batch":
        return self.map(lambda tensor: tensor.pin_memory())


def collate(
    samples: Sequence[Sample], draws: Sequence[Draws], empty_prompt: torch.Tensor | None = None, text_padding: int = 1
) -> dict[str, Any]:
    """The fields of Batch from `keys` on but for `broken`; prompts are padded to a multiple of `text_padding` tokens."""
    drop = [draw.drop_caption for draw in draws]
    batch: dict[str, Any] = {
        "keys": [sample.key for sample in samples],
        "width": samples[0].width,
        "height": samples[0].height,
        "captions": ["" if dropped else sample.caption for sample, dropped in zip(samples, drop, strict=True)],
        "noise": torch.stack([draw.noise for draw in draws]).unsqueeze(2),
        "sigma": torch.tensor([draw.sigma for draw in draws], dtype=torch.float32),
        "drop": torch.tensor(drop),
    }
    if any(sample.prior for sample in samples):
        batch["prior"] = torch.tensor([sample.prior for sample in samples])
    if any(sample.loss_weight != 1 for sample in samples):
        batch["loss_weight"] = torch.tensor([sample.loss_weight for sample in samples], dtype=torch.float32)
    masks = [sample.mask for sample in samples if sample.mask is not None]
    if masks:
        batch["mask"] = torch.stack(masks)
    batch["source_sizes"] = [sample.source_sizes for sample in samples if sample.source_sizes]
    sources = tuple(torch.stack(place) for place in zip(*(sample.sources for sample in samples), strict=True))
    if samples[0].pixels is not None:
        return batch | {"pixels": torch.stack([s.pixels for s in samples if s.pixels is not None]), "sources": sources}
    prompts = [prompt_of(sample, dropped, empty_prompt) for sample, dropped in zip(samples, drop, strict=True)]
    embeds, mask, _ = Prompt.from_list(prompts, text_padding)
    latents = torch.stack([s.latent for s in samples if s.latent is not None]).unsqueeze(2)
    sources = tuple(each.unsqueeze(2) for each in sources)
    return batch | {"latents": latents, "prompt_embeds": embeds, "prompt_mask": mask, "sources": sources}


def prompt_of(sample: Sample, dropped: bool, empty_prompt: torch.Tensor | None) -> torch.Tensor:
    """[T, D] of an encoded sample; of one whose caption is `dropped` that of the empty caption, with its own source images."""
    empty = empty_prompt if sample.empty_prompt is None else sample.empty_prompt
    found = empty if dropped else sample.prompt_embeds
    assert found is not None, "encoded samples need the embedding of the empty caption"
    return found


def make_batch(
    dataset: ShardDataset | Mixture,
    place: int,
    epoch: int,
    indices: Sequence[int],
    draw: DrawSample,
    text_padding: int = 1,
    attempts: int = ATTEMPTS,
    caption_chance: CaptionChance | None = None,
) -> Batch:
    """The micro-batch that `Order.micro_batch(place)` gave as (epoch, indices): a pure function, in whatever process.

    A sample that can't be read gives way to the next readable one of its bucket (keeping the noise and σ that belong to
    its own index) and is named in `broken`. Where its bucket has none, the micro-batch is made of the samples of another
    bucket. Raises BrokenSample after more than `attempts` of them in a row. Without `caption_chance` captions don't vary.
    """
    broken: list[str] = []
    chances: list[Chance] = [
        None if caption_chance is None else partial(caption_chance, epoch, int(index)) for index in indices
    ]
    asked = dataset, indices, chances, attempts, broken
    samples = _of_its_bucket(*asked) or _of_another(*asked)
    width, height = samples[0].width, samples[0].height
    latent_shape = (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
    draws = [draw(epoch, int(index), latent_shape) for index in indices]
    tensors = collate(samples, draws, dataset.empty_prompt, text_padding)
    return Batch(place=place, epoch=epoch, indices=[int(index) for index in indices], broken=broken, **tensors)


def _of_its_bucket(
    dataset: ShardDataset | Mixture, indices: Sequence[int], chances: list[Chance], attempts: int, broken: list[str]
) -> list[Sample] | None:
    """The samples, or the first readable one after each in its bucket; None where there is none."""
    samples = []
    for index, chance in zip((int(index) % len(dataset) for index in indices), chances, strict=True):
        candidates = itertools.chain([index], dataset.same_bucket(index))
        sample = _first_readable(dataset, candidates, chance, attempts, broken)
        if sample is None:
            return None
        samples.append(sample)
    return samples


def _of_another(
    dataset: ShardDataset | Mixture, indices: Sequence[int], chances: list[Chance], attempts: int, broken: list[str]
) -> list[Sample]:
    """As many readable samples of the first other bucket that has one; they come again where it has too few."""
    unnamed: list[str] = []  # these stand in no batch's place: their own is where they are named
    others = dataset.other_buckets(int(indices[0]) % len(dataset))
    first = _first_readable(dataset, others, chances[0], attempts, unnamed)
    if first is None:
        raise BrokenSample(f"no other sample can be read (check_shards.py lists them): {[*broken, *unnamed][-1]}")
    members = itertools.cycle([*dataset.same_bucket(first.index), first.index])
    samples = [first]
    for chance in chances[1:]:
        sample = _first_readable(dataset, members, chance, attempts, unnamed)
        assert sample is not None, "the members go round, and the first can be read"
        samples.append(sample)
    return samples


def _first_readable(
    dataset: ShardDataset | Mixture, candidates: Iterable[int], chance: Chance, attempts: int, broken: list[str]
) -> Sample | None:
    """The first of `candidates` that can be read; None at their end. Names the first broken one in `broken`."""
    for number, index in enumerate(candidates):
        try:
            return dataset.read(index, chance)
        except BrokenSample as found:
            if number == 0:
                broken.append(str(found))
            if number >= attempts:
                if attempts == 0:
                    raise
                text = f"{attempts} samples after a broken one are broken too (check_shards.py lists them): {found}"
                raise BrokenSample(text) from found
    return None


# Encoded shards store latents and prompt embeddings in this type; encoding online rounds alike, so both give one loss.
STORED_DTYPE = torch.bfloat16
