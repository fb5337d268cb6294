"""Sample images during training: the run's prompts, always with the same noise, so that steps can be compared."""

from pathlib import Path

from PIL import Image

from qwen_image.loading.model_files import ModelSource
from qwen_image.model.dtypes import DTYPES
from qwen_image.model.prompt import Prompt
from qwen_image.pipeline import DEFAULT_NEGATIVE_PROMPT, QwenImagePipeline
from train.base_model.online_encoder import OnlineEncoder
from train.config.train_config import TrainConfig
from train.process.ranks import Ranks
from train.saving.checkpoints import settle
from train.watching.image_grid import make_grid, save_png


class Preview:
    """The prompts of `--sample_prompts`, spread over the ranks; their embeddings are made once, at start.

    When the shards are encoded, the text encoder is loaded for that and released, and the VAE waits on the CPU.
    Every rank makes the same number of images (under ZeRO-3 each forward is a collective).
    """

    def __init__(self, config: TrainConfig, pipeline: QwenImagePipeline, encoder: OnlineEncoder, ranks: Ranks):
        self.config, self.pipeline, self.ranks = config, pipeline, ranks
        prompts = list(config.sample_prompts)
        per_rank = -(-len(prompts) // ranks.world)
        places = [ranks.rank + turn * ranks.world for turn in range(per_rank)]
        self.jobs = [(place, place % len(prompts)) for place in places] if prompts else []
        if not prompts:
            return
        if pipeline.text_encoder is None:
            loaded = QwenImagePipeline.from_pretrained(
                ModelSource.from_options(config),
                components=("text_encoder", "vae"),
                dtype=DTYPES[config.dtype],
            )
            options = config.max_prompt_tokens, config.text_multiple, ranks.device
            encoder = OnlineEncoder(loaded.vae, loaded.text_encoder, *options, swap=True)
        assert encoder.vae is not None
        texts = [*prompts, DEFAULT_NEGATIVE_PROMPT]
        self.embeds = [Prompt(encoder.encode_prompts([text])[0][None].cpu(), None) for text in texts]
        self.vae = encoder.vae
        self.vae_home = self.vae.device

    def write(self, step: int) -> Path | None:
        """Make the images of `step` as RUN/samples/step-<step>/NN.png and grid.png; returns the grid's path.

        Images that can't be written (a full disk) raise an OSError on all ranks, or are reported, by `on_save_error`.
        """
        if not self.jobs:
            return None
        config = self.config
        folder = config.output_path / "samples" / f"step-{step:08d}"
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
                height=config.sample_height,
                width=config.sample_width,
                num_inference_steps=config.sample_num_inference_steps,
                true_cfg_scale=config.sample_true_cfg_scale,
                seeds=[config.seed + prompt],
            )
            if place < len(config.sample_prompts):
                parameters = {"prompt": config.sample_prompts[prompt], "seed": config.seed + prompt, "step": step}
                try:
                    save_png(folder / f"{prompt:02d}.png", Image.fromarray(pixels[0].numpy()), parameters)
                except OSError as error:
                    problem = error
        self.vae.to(self.vae_home)
        transformer.train(was_training)
        if not settle(problem, "sample images not written", config.on_save_error, self.ranks.say):
            return None
        grid = folder / "grid.png"
        if self.ranks.is_main:
            images = [Image.open(folder / f"{n:02d}.png").convert("RGB") for n in range(len(config.sample_prompts))]
            try:
                make_grid([images], [f"step {step}"], list(config.sample_prompts)).save(grid)
            except OSError as error:
                problem = error
        return grid if settle(problem, "sample grid not written", config.on_save_error, self.ranks.say) else None
