"""`--loader webdataset`: batches from shards that can't be indexed (a pipe, a server without byte ranges), one after another.

The weaker promise, compared with train/loader.py: nothing here is a function of (seed, epoch) and a position. Ranks and
workers get whole shards, drawn at random with replacement, and shuffle within a buffer of samples. So the order depends on
the number of ranks and workers; a sample may come twice before another comes once; a resumed run goes on with other
samples than the uninterrupted one would have seen; and no sample can be held out for validation. Noise, σ and caption
dropout belong to (seed, key of the sample, how often it came), so they are at least not those of the rank.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import safetensors.torch
import torch
from torch.utils.data import DataLoader, IterableDataset

from data_prep.pixels import decode_stored
from train.data import ATTEMPTS, LATENT_CHANNELS, VAE_FACTOR, Batch, BrokenSample, Sample, collate
from train.flow import SigmaSampling, sample_draws
from train.loader import PREFETCH, as_it_is, copied_ahead, end_workers_at_exit, leave_signals_to_the_parent

BUFFER = 1000  # samples that are shuffled together


class StreamLoader:
    """The interface of train.loader.BatchLoader over the `webdataset` library; see the module for what it can't promise.

    Args:
        urls: what webdataset takes: paths, http URLs, `pipe:` commands, braces.
        empty_prompt: [5, D] for caption dropout; encoded shards need it.
        consumed: micro-batches of an earlier run; they are counted on from, and change the shuffle, no more.
        total: samples of the whole set, for `epoch`; 0 where nobody knows.
    """

    def __init__(
        self,
        urls: str | list[str],
        batch_size: int,
        sampling: SigmaSampling,
        *,
        seed: int = 0,
        caption_dropout: float = 0.0,
        empty_prompt: torch.Tensor | None = None,
        max_prompt_tokens: int = 512,
        text_multiple: int = 1,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        consumed: int = 0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        on_broken_sample: Literal["skip", "stop"] = "skip",
        buffer: int = BUFFER,
        total: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.consumed, self.broken, self._say = consumed, 0, say
        self._epochs_a_micro_batch = batch_size / total if total else 0.0
        self._micro_batches_a_step, device = world * accumulation, torch.device(device)
        attempts = 0 if on_broken_sample == "stop" else ATTEMPTS
        shuffle_seed = (seed * 1_000_003 + rank) * 1_000_003 + consumed
        draw = (seed, sampling, caption_dropout)
        made = (empty_prompt, max_prompt_tokens, text_multiple, attempts)
        self._batches: Iterator[Batch | BrokenSample] = iter(
            DataLoader(
                StreamedBatches(urls, batch_size, buffer, shuffle_seed, draw, *made),
                batch_size=None,
                collate_fn=as_it_is,
                num_workers=num_workers,
                prefetch_factor=PREFETCH if num_workers else None,
                worker_init_fn=leave_signals_to_the_parent,
                pin_memory=device.type == "cuda",
            )
        )
        end_workers_at_exit(self._batches)
        checked = self._checked()
        self._stream: Iterator[Batch] = copied_ahead(checked, device) if device.type == "cuda" else checked

    def __iter__(self) -> Iterator[Batch]:
        return self._stream

    def _checked(self) -> Iterator[Batch]:
        for batch in self._batches:
            if isinstance(batch, BrokenSample):
                raise batch
            for message in batch.broken:
                self.broken += 1
                self._say(f"broken sample left out: {message}")
            yield batch

    def stepped(self) -> None:
        """Count one optimizer step of all ranks."""
        self.consumed += self._micro_batches_a_step

    def state(self) -> dict[str, Any]:
        """A count, and no position."""
        return {"consumed": self.consumed, "order": {"loader": "webdataset"}}

    @property
    def epoch(self) -> float:
        """Samples that were drawn, in epochs; 0 where the number of samples is unknown."""
        return self.consumed * self._epochs_a_micro_batch

    def close(self) -> None:
        self._stream = iter(())
        if hasattr(self._batches, "_shutdown_workers"):
            self._batches._shutdown_workers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StreamedBatches(IterableDataset[Any]):
    """What runs in the workers: webdataset's samples, sorted into batches of one size as they come."""

    def __init__(
        self,
        urls: str | list[str],
        batch_size: int,
        buffer: int,
        shuffle_seed: int,
        draw: tuple[int, SigmaSampling, float],
        empty_prompt: torch.Tensor | None,
        max_prompt_tokens: int,
        text_multiple: int,
        attempts: int,
    ) -> None:
        self.urls, self.batch_size, self.buffer, self.shuffle_seed, self.draw = (
            urls,
            batch_size,
            buffer,
            shuffle_seed,
            draw,
        )
        self.empty_prompt, self.max_prompt_tokens = empty_prompt, max_prompt_tokens
        self.text_multiple, self.attempts = text_multiple, attempts

    def __iter__(self) -> Iterator[Batch | BrokenSample]:
        import webdataset

        samples = webdataset.WebDataset(self.urls, resampled=True, shardshuffle=False, seed=self.shuffle_seed)
        waiting: dict[tuple[int, int], list[Sample]] = defaultdict(list)
        came, broken, in_a_row, place = Counter[str](), list[str](), 0, 0
        for raw in samples.shuffle(self.buffer, seed=self.shuffle_seed):
            try:
                sample = self.decode(raw)
            except Exception as error:  # decoders raise whatever they like
                broken.append(f"{raw['__key__']} in {raw['__url__']}: {' '.join(str(error).split())}")
                in_a_row += 1
                if in_a_row > self.attempts:
                    yield BrokenSample(broken[-1])
                    return
                continue
            in_a_row = 0
            group = waiting[sample.width, sample.height]
            group.append(sample)
            if len(group) == self.batch_size:
                yield self.make(place, group, came, broken)
                waiting.pop((sample.width, sample.height))
                broken, place = [], place + 1

    def decode(self, raw: dict[str, Any]) -> Sample:
        """A sample as webdataset gives it: undecoded bytes by suffix."""
        key, caption = raw["__key__"], raw.get("txt", b"").decode("utf-8")
        if "safetensors" in raw:
            tensors = safetensors.torch.load(raw["safetensors"])
            latent, embeds = tensors["latent"], tensors["prompt_embeds"][: self.max_prompt_tokens]
            height, width = (side * VAE_FACTOR for side in latent.shape[-2:])
            return Sample(0, key, width, height, caption, latent=latent, prompt_embeds=embeds)
        data = next(raw[suffix] for suffix in ("jpg", "jpeg", "png") if suffix in raw)
        pixels = torch.from_numpy(decode_stored(data, *image_size(data)).copy()).permute(2, 0, 1).contiguous()
        return Sample(0, key, pixels.shape[2], pixels.shape[1], caption, pixels=pixels)

    def make(self, place: int, samples: list[Sample], came: Counter[str], broken: list[str]) -> Batch:
        """A batch; `came` counts how often each sample has come to this worker."""
        (seed, sampling, dropout), (width, height) = self.draw, (samples[0].width, samples[0].height)
        shape = (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
        draws, indices = [], []
        for sample in samples:
            digest = hashlib.blake2b(sample.key.encode(), digest_size=7).digest()
            indices.append(int.from_bytes(digest, "little"))
            draws.append(sample_draws(seed, came[sample.key], indices[-1], shape, sampling, dropout))
            came[sample.key] += 1
        tensors = collate(samples, draws, self.empty_prompt, self.text_multiple)
        return Batch(place=place, epoch=0, indices=indices, broken=broken, **tensors)


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image.size
