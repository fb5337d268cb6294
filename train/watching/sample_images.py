"""Sample images during training: the run's prompts, always with the same noise, so that steps can be compared."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwen_image.loading.model_files import ModelSource
from qwen_image.model.conditioning import Prompt
from qwen_image.model.dtypes import DTYPES
from qwen_image.pipeline import DEFAULT_NEGATIVE_PROMPT, QwenImagePipeline
from train.base_model.online_encoder import OnlineEncoder
from train.config.train_config import TrainConfig
from train.process.ranks import Ranks
from train.saving.checkpoints import settle
from train.watching.image_grid import make_grid, save_png


@dataclass(frozen=True)
class SampleOptions:
    """What is sampled: one image a prompt, of height × width pixels, in so many denoising steps under guidance `cfg`."""

    prompts: tuple[str, ...]
    height: int
    width: int
    num_inference_steps: int
    true_cfg_scale: float
    seed: int
    max_prompt_tokens: int

    @classmethod
    def from_config(cls, config: TrainConfig) -> "SampleOptions":
        return cls(
            config.sample_prompts,
            config.sample_height,
            config.sample_width,
            config.sample_num_inference_steps,
            config.sample_true_cfg_scale,
            config.seed,
            config.max_prompt_tokens,
        )


class Preview:
    """The prompts of `--sample_prompts`, spread over the ranks; their embeddings are made once, at start.

    When the shards are encoded, the text encoder is loaded for that and released, and the VAE waits on the CPU.
    Every rank makes the same number of images (under ZeRO-3 each forward is a collective).
    """

    def __init__(
        self,
        options: SampleOptions,
        output_path: Path,
        on_save_error: str,
        pipeline: QwenImagePipeline,
        encoder: OnlineEncoder,
        ranks: Ranks,
    ):
        self.options, self.output_path, self.on_save_error = options, output_path, on_save_error
        self.pipeline, self.ranks = pipeline, ranks
        prompts = list(options.prompts)
        per_rank = -(-len(prompts) // ranks.world)
        places = [ranks.rank + turn * ranks.world for turn in range(per_rank)]
        self.jobs = [(place, place % len(prompts)) for place in places] if prompts else []
        if not prompts:
            return
        assert encoder.vae is not None
        texts = [*prompts, DEFAULT_NEGATIVE_PROMPT]
        self.embeds = [Prompt(encoder.encode_prompts([text])[0][None].cpu(), None) for text in texts]
        self.vae = encoder.vae
        self.vae_home = self.vae.device

    @classmethod
    def from_config(
        cls, config: TrainConfig, pipeline: QwenImagePipeline, encoder: OnlineEncoder, ranks: Ranks
    ) -> "Preview":
        """With the encoders that training has, or with its own where the shards are encoded."""
        options = SampleOptions.from_config(config)
        if options.prompts and pipeline.text_encoder is None:
            parts, source = ("text_encoder", "vae"), ModelSource.from_options(config)
            loaded = QwenImagePipeline.from_pretrained(source, components=parts, dtype=DTYPES[config.dtype])
            encoder = OnlineEncoder(
                loaded.vae, loaded.text_encoder, options.max_prompt_tokens, 1, ranks.device, swap=True
            )
        return cls(options, config.output_path, config.on_save_error, pipeline, encoder, ranks)

    def write(self, step: int) -> Path | None:
        """Make the images of `step` as RUN/samples/step-<step>/NN.png and grid.png; returns the grid's path.

        Images that can't be written (a full disk) raise an OSError on all ranks, or are reported, by `on_save_error`.
        """
        if not self.jobs:
            return None
        options = self.options
        folder = self.output_path / "samples" / f"step-{step:08d}"
        transformer = self.pipeline.transformer
        assert transformer is not None
        was_training = transformer.training
        transformer.eval()
        self.vae.to(self.ranks.device)
        pipeline = QwenImagePipeline(transformer, None, self.vae, self.pipeline.schedule, self.pipeline.files)
        problem: OSError | None = None
        for place, prompt in self.jobs:
            pixels = pipeline.generate(
                self.embeds[prompt],
                negative_prompt=self.embeds[-1],
                height=options.height,
                width=options.width,
                num_inference_steps=options.num_inference_steps,
                true_cfg_scale=options.true_cfg_scale,
                seeds=[options.seed + prompt],
            )
            if place < len(options.prompts):
                parameters = {"prompt": options.prompts[prompt], "seed": options.seed + prompt, "step": step}
                try:
                    save_png(folder / f"{prompt:02d}.png", Image.fromarray(pixels[0].numpy()), parameters)
                except OSError as error:
                    problem = error
        self.vae.to(self.vae_home)
        transformer.train(was_training)
        if not settle(problem, "sample images not written", self.on_save_error, self.ranks.say):
            return None
        grid = folder / "grid.png"
        if self.ranks.is_main:
            paths = [folder / f"{n:02d}.png" for n in range(len(options.prompts))]
            images = [Image.open(path, formats=["PNG"]).convert("RGB") for path in paths]
            try:
                make_grid([images], [f"step {step}"], list(options.prompts)).save(grid)
            except OSError as error:
                problem = error
        return grid if settle(problem, "sample grid not written", self.on_save_error, self.ranks.say) else None
