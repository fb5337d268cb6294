"""Sample images during training: the run's prompts, always with the same noise, so that steps can be compared."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image

from files.shown import shown
from qwen_image.encoders.source_images import read_source
from qwen_image.model.conditioning import Prompt
from qwen_image.model.sizes import LATENT_CHANNELS, PATCH
from qwen_image.out_of_memory import memory_ran_out
from qwen_image.pipeline import QwenImagePipeline, encode_sources, predict_velocity
from train.base_model.online_encoder import OnlineEncoder
from train.config.sample_prompts import SamplePrompt, Told, tell
from train.config.train_config import TrainConfig
from train.lora.strength import lora_at
from train.process.ranks import Ranks
from train.saving.checkpoints import object_device, settle
from train.watching.image_grid import make_grid, read_parameters, save_png

Averaged = Callable[[], AbstractContextManager[None]]


class Job(NamedTuple):
    """An image for this rank to make: the prompt's place, and whether it is wanted or only keeps the ranks in step."""

    place: int
    counts: bool


class Sheet(NamedTuple):
    """What was written for one step: the sheet of all images, and the step's own by prompt."""

    grid: Path
    images: list[tuple[Path, str]]


def deal(samples: Sequence[SamplePrompt], rank: int, world: int, in_step: bool) -> list[Job]:
    """This rank's images. `in_step`: each forward pass is a collective, so that all ranks must make the same number of them.

    Then images of equally many passes are made together, and the last of them by several ranks, where they don't divide.
    """
    places = range(len(samples))
    if not in_step:
        return [Job(place, True) for place in places[rank::world]]
    jobs = []
    for passes in sorted({sample.passes for sample in samples}):
        alike = [place for place in places if samples[place].passes == passes]
        padded = [Job(place, True) for place in alike] + [Job(alike[-1], False)] * (-len(alike) % world)
        jobs += padded[rank::world]
    return jobs


class Preview:
    """The prompts of `--sample_prompts`, spread over the ranks; their embeddings are made once, at start.

    What an image takes of memory is given back when all are made; an image that doesn't fit is left out, which is said.
    """

    def __init__(
        self,
        samples: Sequence[SamplePrompt],
        output_path: Path,
        on_save_error: str,
        pipeline: QwenImagePipeline,
        encoder: OnlineEncoder,
        ranks: Ranks,
        base: str = "",
    ):
        self.samples, self.output_path, self.on_save_error = samples, output_path, on_save_error
        self.pipeline, self.ranks, self.base = pipeline, ranks, base
        transformer = pipeline.transformer
        self.stream = None if transformer is None else transformer.block_stream
        self.base_made = False  # in this process; what did not fit then is not tried again
        self.jobs = deal(samples, ranks.rank, ranks.world, self.stream is not None)
        self.embeds: dict[Told, Prompt] = {}
        if not samples:
            return
        assert encoder.vae is not None
        self.vae_home = encoder.vae.device
        if any(each.source_image for each in samples):
            encoder.vae.to(ranks.device)
        for told in dict.fromkeys(told for each in samples for told in tell(each)):
            sources = [read_source(Path(name).expanduser(), told.source_pixels) for name in told.source_image]
            if sources:
                embeds = encoder.encode_pictures([told.text], [sources])[0]
            else:
                embeds = encoder.encode_prompts([told.text])[0]
            latents = encode_sources(encoder.vae, [sources]) if sources else ()
            self.embeds[told] = Prompt(embeds[None].cpu(), None, tuple(latent.cpu() for latent in latents))
        encoder.vae.to(self.vae_home)
        self.vae = encoder.vae
        self.vae.say = ranks.say

    @classmethod
    def from_config(
        cls, config: TrainConfig, pipeline: QwenImagePipeline, encoder: OnlineEncoder, ranks: Ranks
    ) -> "Preview":
        """`encoder`: one with both encoders, if there are prompts (`prompt_encoder`)."""
        samples = config.samples()
        for each in samples:
            where = f"sample_prompts: {shown(repr(each.prompt), 60)}"
            pipeline.files.member.check_sources(len(each.source_image), where)
        base = " + ".join([pipeline.files.fingerprint("transformer"), *config.preset_lora_path]) if samples else ""
        return cls(samples, config.output_path, config.on_save_error, pipeline, encoder, ranks, base)

    # ── what is written ───────────────────────────────────────────────────────────────────────────────────────────────

    def write_base(self) -> None:
        """Make the base model's images, RUN/samples/base/NN.png, unless they are there; a collective."""
        if not self.samples or self.base_made:
            return
        self.base_made = True
        if self._missing_base():
            with self._ready() as pipeline:
                lost, problem = self._make(pipeline, "base", "", 0.0, {"base": self.base})
            self._told("the base's sample images", lost, problem)

    def write(self, step: int, averaged: Averaged | None = None) -> Sheet | None:
        """Make the images of `step` as RUN/samples/step-<step>/NN.png and a sheet of them beside the base's, grid.png.

        With the moving average in the model's place (`averaged`), NN-ema.png besides. A collective. Images that can't be
        written (a full disk) raise an OSError on all ranks, or are reported, by `on_save_error`; then there is no sheet.
        """
        if not self.samples:
            return None
        self.write_base()
        folder = f"step-{step:08d}"
        kinds: list[tuple[str, AbstractContextManager[None]]] = [("", nullcontext())]
        if averaged is not None:
            kinds.append(("-ema", averaged()))
        for suffix, weights in kinds:
            facts = {"step": step} | ({"weights": "ema"} if suffix else {})
            with weights, self._ready() as pipeline:
                lost, problem = self._make(pipeline, folder, suffix, 1.0, facts)
            if not self._told(f"sample images of step {step}", lost, problem):
                return None
        return self._sheet(step, [suffix for suffix, _ in kinds])

    def _sheet(self, step: int, suffixes: list[str]) -> Sheet | None:
        folder, problem = self.output_path / "samples" / f"step-{step:08d}", None
        names = [f"{place:02d}" for place in range(len(self.samples))]
        own = [(path, sample.prompt) for name, sample in zip(names, self.samples, strict=True)
               if (path := folder / f"{name}.png").is_file()]  # fmt: skip
        sheet = Sheet(folder / "grid.png", own)
        if self.ranks.is_main:
            sources = source_rows(self.samples)
            rows = [("base", [self.output_path / "samples" / "base" / f"{name}.png" for name in names])]
            for suffix in suffixes:
                label = f"step {step}{', moving average' if suffix else ''}"
                rows.append((label, [folder / f"{name}{suffix}.png" for name in names]))
            images = [[opened(path) for path in paths] for _, paths in rows]
            try:
                given = [f"source image {number + 1}" for number in range(len(sources))]
                labels = [*given, *(label for label, _ in rows)], [sample.prompt for sample in self.samples]
                make_grid([*sources, *images], *labels).save(sheet.grid)
            except OSError as error:
                problem = error
        return sheet if settle(problem, "sample sheet not written", self.on_save_error, self.ranks.say) else None

    def _told(self, what: str, lost: list[int], problem: OSError | None) -> bool:
        """Whether all images could be written; what did not fit into memory on whichever rank is one line. A collective."""
        everywhere: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(everywhere, lost)
        places = sorted({place for each in everywhere for place in each})
        if places:
            first = self.samples[places[0]]
            self.ranks.say(
                f"warning: {what}: {len(places)} of {len(self.samples)} left out, they don't fit into memory (first "
                f"{first.width}×{first.height}, {shown(first.prompt, 60)}); smaller ones may: --sample_width, --sample_height"
            )
        return settle(problem, f"{what} not written", self.on_save_error, self.ranks.say)

    def _parameters(self, sample: SamplePrompt, facts: dict[str, Any]) -> dict[str, Any]:
        strength = {"lora_strength": 0.0} if "base" in facts else {}
        return sample.facts() | strength | facts

    def _missing_base(self) -> bool:
        """Whether an image of the base isn't there as it is asked for now: main looks, all learn it."""
        missing = [False]
        if self.ranks.is_main:
            for place, sample in enumerate(self.samples):
                path = self.output_path / "samples" / "base" / f"{place:02d}.png"
                missing[0] |= parameters_of(path) != self._parameters(sample, {"base": self.base})
        dist.broadcast_object_list(missing, device=object_device())
        return missing[0]

    # ── how it is made ────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _ready(self) -> Iterator[QwenImagePipeline]:
        """The model in evaluation mode with the VAE beside it; then all as it was, and the memory given back."""
        transformer = self.pipeline.transformer
        assert transformer is not None
        was_training = transformer.training
        transformer.eval()
        try:
            yield QwenImagePipeline(transformer, None, self.vae, self.pipeline.schedule, self.pipeline.files)
        finally:
            self.vae.to(self.vae_home)
            transformer.train(was_training)
            self._give_back()

    def _make(
        self, pipeline: QwenImagePipeline, folder: str, suffix: str, strength: float, facts: dict[str, Any]
    ) -> tuple[list[int], OSError | None]:
        """Make and write this rank's images, the LoRA at `strength` times the prompt's own; which didn't fit, and an error."""
        lost, problem = [], None
        assert pipeline.transformer is not None
        for place, counts in self.jobs:
            sample = self.samples[place]
            with lora_at(pipeline.transformer, strength * sample.lora_strength):
                pixels = self._draw(pipeline, sample)
            path = self.output_path / "samples" / folder / f"{place:02d}{suffix}.png"
            if pixels is None:
                lost.append(place)
                path.unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
            elif counts:
                try:
                    save_png(path, Image.fromarray(pixels[0].numpy()), self._parameters(sample, facts))
                except OSError as error:
                    problem = error
        return lost, problem

    def _draw(self, pipeline: QwenImagePipeline, sample: SamplePrompt) -> torch.Tensor | None:
        """uint8 [1, H, W, 3], or None when memory ran out.

        Where passes are collectives, that is found out by one step that fetches nothing, and then the rank goes on with
        passes over a few pixels, since the others wait for it in each.
        """
        if self.stream is not None:
            with self.stream.pause():
                fits = self._generate(pipeline, sample, steps=1) is not None
            if not fits:
                self._keep_step(pipeline, sample)
                return None
        return self._generate(pipeline, sample, sample.num_inference_steps)

    def _generate(self, pipeline: QwenImagePipeline, sample: SamplePrompt, steps: int) -> torch.Tensor | None:
        try:
            self.vae.to(self.ranks.device)
            return pipeline.generate(
                self.embeds[tell(sample)[0]],
                negative_prompt=self.embeds[tell(sample)[1]],
                height=sample.height,
                width=sample.width,
                num_inference_steps=steps,
                true_cfg_scale=sample.true_cfg_scale,
                seeds=[sample.seed],
            )
        except RuntimeError as error:
            if not memory_ran_out(error) or (self.stream is not None and steps > 1):
                raise
        self._give_back()  # here the exception and with it every frame that held a tensor is gone
        return None

    @torch.no_grad()
    def _keep_step(self, pipeline: QwenImagePipeline, sample: SamplePrompt) -> None:
        """As many passes as the image would have had, at σ = 1, which every schedule begins with."""
        transformer = pipeline.transformer
        assert transformer is not None
        parameter = next(transformer.parameters())
        tokens = torch.zeros(1, 1, LATENT_CHANNELS * PATCH**2, device=self.ranks.device, dtype=parameter.dtype)
        prompt = self.embeds[tell(sample)[1]]._replace(sources=()).to(self.ranks.device, parameter.dtype)
        for _ in range(sample.passes):
            predict_velocity(transformer, tokens, torch.ones(1), prompt, 1, 1)

    def _give_back(self) -> None:
        if self.ranks.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def source_rows(samples: Sequence[SamplePrompt]) -> list[list[Image.Image | None]]:
    """The samples' first source images, their second ones …, as they are given to the model."""
    found = [
        [read_source(Path(name).expanduser(), each.source_pixels) for name in each.source_image] for each in samples
    ]
    most = max(map(len, found))
    return [[Image.fromarray(own[n].pixels) if n < len(own) else None for own in found] for n in range(most)]


def parameters_of(path: Path) -> dict[str, Any] | None:
    """What stands in a PNG of ours; None for one that isn't there or isn't whole."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
        return read_parameters(path)
    except (OSError, ValueError, KeyError, SyntaxError):
        return None


def opened(path: Path) -> Image.Image | None:
    """The image at `path`, if it is there and whole."""
    try:
        return Image.open(path, formats=["PNG"]).convert("RGB")
    except (OSError, SyntaxError):
        return None
