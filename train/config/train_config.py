"""The one definition of every training option: name, type, default, help text and check.

    python train/train_lora.py --help
    deepspeed train/train_lora.py --config run.yaml --learning_rate 2e-4      # flags override the file

A YAML file holds the same names without the dashes; an unknown name or a wrong type is an error that names the line.
Relative paths, in the file too, start from the working directory. No torch here: `--help` has to be quick.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from data_prep.encoding.caption_variants import CAPTION_HELP, CaptionOptions
from qwen_image.loading.model_flags import MODEL_HELP
from train.config.data_sources import DataSource, read_sources
from train.config.optimizer_args import OPTIMIZERS, Name, read_arguments
from train.config.sample_prompts import SamplePrompt, read_prompts
from train.config.typed_fields import (
    MOST,
    Count,
    NotNegative,
    Number,
    Pixels,
    Positive,
    Precision,
    Share,
    Whole,
    convert,
)

HEADINGS = {  # the first field of each group in --help and in config.yaml
    "model": "model",
    "data": "data",
    "trigger_word": "captions (of image shards; encode_shards.py has the same options)",
    "lora_rank": "LoRA",
    "timestep_sampling": "flow matching",
    "max_steps": "optimization",
    "deepspeed": "memory",
    "output_path": "saving and resuming",
    "device": "clusters",
    "log_steps": "logging",
    "validation_samples": "validation",
    "sample_prompts": "sampling",
}
COMMA_LISTS = ("lora_target_modules",)  # other lists are repeated flags: a prompt may hold commas


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on, besides the DeepSpeed JSON. Values are converted and checked on creation.

    Raises ValueError with one line that names the field, the value and the limit.
    """

    # ---- model
    model: Annotated[str, MODEL_HELP["model"]]
    revision: Annotated[str | None, MODEL_HELP["revision"]] = None
    model_family: Annotated[
        Literal["auto", "text-to-image", "edit", "edit-2509", "edit-2511"], MODEL_HELP["model_family"]
    ] = "auto"
    transformer_path: Annotated[str | None, MODEL_HELP["transformer_path"]] = None
    text_encoder_path: Annotated[str | None, MODEL_HELP["text_encoder_path"]] = None
    vae_path: Annotated[str | None, MODEL_HELP["vae_path"]] = None
    tokenizer_path: Annotated[str | None, MODEL_HELP["tokenizer_path"]] = None
    picture_positions: Annotated[Literal["grid", "consecutive"], MODEL_HELP["picture_positions"]] = "grid"
    dtype: Annotated[Precision, "of the frozen weights and the activations"] = "bfloat16"
    base_precision: Annotated[
        Literal["auto", "dtype", "float8", "int8"],
        "of the blocks' frozen projections and MLPs: dtype keeps them exact, 27.2 GB; float8 takes 13.6 GB and multiplies in 8 "
        "bits, on a GPU of compute capability 8.9 or newer; int8 takes 14.1 GB and becomes dtype block by block, on any GPU; "
        "LoRA and everything else stay as they are; auto: dtype, and where the GPU can't hold that the fastest that fits",
    ] = "auto"

    # ---- data
    data: Annotated[
        tuple[str, ...],
        "folder of shards (make_shards.py) or of encoded shards (encode_shards.py), here or remote (s3://, hf://, …); several, "
        "each FOLDER or FOLDER:WEIGHT (repeat the flag; a list in YAML): a weight of 2 is twice an epoch, 0.5 in every other",
    ]
    prior_data: Annotated[
        tuple[str, ...],
        "prior preservation: folders as for data, of pictures of the class that the subject belongs to (a regularization set), "
        "trained beside data and never validated",
    ] = ()
    prior_share: Annotated[
        Annotated[float, Interval(gt=0.0, lt=1.0)], "share of micro-batches that are of prior_data"
    ] = 0.5
    prior_weight: Annotated[
        Annotated[float, Interval(gt=0.0, le=1000.0)],
        "factor on the loss of the samples of prior_data and prior_prompt",
    ] = 1.0
    data_cache_path: Annotated[Path, "folder for local copies of remote shards"] = Path("~/.cache/qwen_image_lora")
    data_cache_gb: Annotated[
        Annotated[float, Interval(ge=0.0, le=1e9)],
        "each node keeps so many GB of the remote shards that come next; 0 = none",
    ] = 50.0
    dataset_repeat: Annotated[Count, "how often every sample occurs in an epoch"] = 1
    batch_size: Annotated[Count, "samples of a micro-batch on each rank"] = 1
    num_workers: Annotated[Whole, "loader processes of each rank; 0 = load in the training process"] = 2
    shuffle_window: Annotated[Count, "K: how many shards are shuffled together"] = 16
    tail: Annotated[
        Literal["auto", "wrap", "drop"],
        "a bucket's last, incomplete batch: wrap fills it from the bucket's start, drop leaves it out of the epoch; "
        "auto wraps small data sets",
    ] = "auto"
    loader: Annotated[
        Literal["indexed", "webdataset"],
        "indexed: random access through the shards' index, exactly resumable; webdataset: one after another, for streams "
        "without an index (pipe:, braces), with weaker promises",
    ] = "indexed"
    max_prompt_tokens: Annotated[
        Annotated[int, Interval(ge=1, le=1024)],
        "longer captions are cut; sampling cuts at 512, the encoder allows 1024",
    ] = 512
    text_padding: Annotated[
        Count | None,
        "pad a batch's text to a multiple of this many tokens: fewer shapes; not given: on a GPU 32, or 64 or 128 where "
        "the data set has too many shapes for CUDA graphs, else 1",
    ] = None

    # ---- captions
    trigger_word: Annotated[str | None, CAPTION_HELP["trigger_word"]] = None
    caption_prefix: Annotated[str | None, CAPTION_HELP["caption_prefix"]] = None
    caption_suffix: Annotated[str | None, CAPTION_HELP["caption_suffix"]] = None
    caption_alternatives: Annotated[bool, CAPTION_HELP["caption_alternatives"]] = False
    caption_shuffle_tags: Annotated[bool, CAPTION_HELP["caption_shuffle_tags"]] = False
    caption_keep_tags: Annotated[Whole, CAPTION_HELP["caption_keep_tags"]] = 0
    caption_tag_dropout: Annotated[Share, CAPTION_HELP["caption_tag_dropout"]] = 0.0
    caption_tag_separator: Annotated[str, CAPTION_HELP["caption_tag_separator"]] = ","

    # ---- LoRA
    lora_rank: Annotated[Count, "rank of the LoRA matrices"] = 32
    lora_alpha: Annotated[Positive | None, "the update is scaled by alpha / rank; not given: alpha = rank"] = None
    lora_dropout: Annotated[Annotated[float, Interval(ge=0.0, le=0.99)], "dropout before lora_A"] = 0.0
    lora_target_modules: Annotated[
        tuple[str, ...],
        "comma-separated names of the linear layers to adapt, or groups: attention (to_q … to_add_out), mlp, modulation "
        "(no table then: 12.7 GiB more), all three: all",
    ] = (
        "to_q",
        "to_k",
        "to_v",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
    )
    lora_type: Annotated[
        Literal["lora", "lokr"],
        "lora: two matrices of low rank (rsLoRA and DoRA have flags of their own); lokr: the Kronecker product of two small "
        "matrices, fewer parameters or a higher rank (docs/levers.md)",
    ] = "lora"
    lokr_factor: Annotated[
        Annotated[int, Interval(ge=-1, le=MOST)],
        "LoKr: rows and columns of its first matrix, where they divide the layer's; -1: about the square root of them, the "
        "fewest parameters",
    ] = -1
    lokr_decompose_both: Annotated[bool, "LoKr: a product of rank lora_rank for the first matrix too"] = False
    lora_rslora: Annotated[bool, "rank-stabilised LoRA: scale by alpha / sqrt(rank)"] = False
    lora_dora: Annotated[
        bool,
        "DoRA: train the magnitude of the weights too; ComfyUI (v0.3.77 or newer) reads it in its own lora_format alone, every "
        "program after train/merge_lora.py",
    ] = False
    lora_format: Annotated[
        Literal["diffusers", "comfyui", "diffsynth", "kohya"],
        "whose spelling the LoRA files have: ComfyUI reads all, DiffSynth comfyui and diffsynth (no LoKr), docs/lora_files.md; "
        "train/convert_lora.py rewrites a file",
    ] = "diffusers"
    lora_dtype: Annotated[
        Precision | None, "of the LoRA weights in the forward pass (AdamW's are float32); not given: as dtype"
    ] = None
    lora_checkpoint: Annotated[
        Path | None, "LoRA file or run folder to start from (weights only, steps count from 0)"
    ] = None
    preset_lora_path: Annotated[
        tuple[str, ...], "LoRA files merged into the frozen base, each FILE or FILE:WEIGHT (repeat the flag)"
    ] = ()

    # ---- flow matching
    timestep_sampling: Annotated[
        Literal["qwen_shift", "logit_normal", "uniform", "shift", "diffsynth"], "how the noise level sigma is drawn"
    ] = "qwen_shift"
    logit_mean: Annotated[Number, "mean of the normal draw of logit_normal"] = 0.0
    logit_std: Annotated[Positive, "standard deviation of the normal draw of logit_normal"] = 1.0
    timestep_shift: Annotated[Positive, "constant shift of `shift`"] = 2.2
    loss_weighting: Annotated[
        Literal["none", "bsmntw", "sigma_sqrt", "cosmap"], "weight of the loss as a function of sigma"
    ] = "none"
    masked_loss: Annotated[
        bool, "weight the loss by the samples' masks (make_shards.py packs them), also in validation; docs/levers.md"
    ] = False
    mask_min_weight: Annotated[Share, "of the masked loss where a mask is black; where it is white it is 1"] = 0.1
    caption_dropout: Annotated[Share, "share of samples trained with the empty caption"] = 0.0
    prior_prompt: Annotated[
        tuple[str, ...],
        "prior preservation without pictures: prompts of the class that the subject belongs to ('a dog on a beach'; repeat the "
        "flag), worded as the captions are, for which the LoRA shall predict what the base does",
    ] = ()
    prior_prompt_share: Annotated[Share, "share of micro-batches that train one of prior_prompt"] = 0.35

    # ---- optimization
    max_steps: Annotated[Count | None, "stop after this many optimizer steps (instead of num_epochs)"] = None
    num_epochs: Annotated[Count | None, "passes over the data; 1 when max_steps is not given either"] = None
    gradient_accumulation_steps: Annotated[Count, "micro-batches of one optimizer step on each rank"] = 1
    optimizer: Annotated[
        Name,
        "prodigy and schedulefree need their packages, extras of these names; docs/levers.md says what each is for",
    ] = "adamw"
    optimizer_args: Annotated[
        tuple[str, ...], "the optimizer's own arguments, each key=value (repeat the flag); docs/levers.md lists them"
    ] = ()
    learning_rate: Annotated[
        Annotated[float, Interval(gt=0.0, le=1000.0)] | None,
        "peak learning rate; not given: 1e-4, of adafactor 0.01 (relative to each matrix), of prodigy 1 (times its estimate)",
    ] = None
    lora_plus_ratio: Annotated[
        Annotated[float, Interval(gt=0.0, le=1000.0)] | None,
        "LoRA+: lora_B has so many times the learning rate, 16 for instance; not given: the same",
    ] = None
    weight_decay: Annotated[
        Annotated[float, Interval(ge=0.0, le=1000.0)] | None, "decoupled weight decay; not given: 0.01, of adafactor 0"
    ] = None
    adam_beta1: Annotated[Annotated[float, Interval(ge=0.0, le=0.9999999)], "decay of Adam's first moment"] = 0.9
    adam_beta2: Annotated[Annotated[float, Interval(ge=0.0, le=0.9999999)], "decay of Adam's second moment"] = 0.999
    adam_epsilon: Annotated[Annotated[float, Interval(gt=0.0, le=1000.0)], "added to the denominator of Adam"] = 1e-8
    max_grad_norm: Annotated[NotNegative, "clip the global gradient norm to this; 0 = no clipping"] = 1.0
    lr_scheduler: Annotated[
        Literal["constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear"],
        "course of the learning rate after warm-up: constant, or down to lr_min at the last step; constant_with_warmup is "
        "constant, and insists on lr_warmup_steps",
    ] = "constant"
    lr_warmup_steps: Annotated[Whole, "optimizer steps of linear warm-up from 0"] = 0
    lr_num_cycles: Annotated[Count, "how often cosine_with_restarts comes down from the peak"] = 1
    lr_min: Annotated[NotNegative, "the rate (not a share of it) at which a course that comes down ends"] = 0.0
    ema_decay: Annotated[
        Annotated[float, Interval(ge=0.0, le=0.9999999)] | None,
        "keep an exponential moving average of the LoRA's float32 weights too (0.99 spans some 100 steps), with validation, "
        "sample images and files of its own; not given: none",
    ] = None
    seed: Annotated[Whole, "of the order, the noise, sigma, what becomes of captions and the initial LoRA weights"] = 0

    # ---- memory
    deepspeed: Annotated[Path, "DeepSpeed JSON, such as ds_configs/zero2.json"]
    activation_checkpointing: Annotated[
        Whole | Literal["none", "full", "auto"],
        "which blocks are recomputed: none, all, as few as fit (measured before step 0), or a number",
    ] = "auto"
    offload_activations: Annotated[
        bool, "what recomputed blocks start from waits in host memory: 1.5 GB less on a GPU at 1024x1024, batch size 1"
    ] = False
    encoder_device: Annotated[
        Literal["auto", "device", "swap", "cpu"],
        "where text encoder and VAE work when the shards hold images: device keeps 14 GB on the GPU, swap brings the text "
        "encoder's layers there one after the other for each batch, cpu is slow; auto: device if the memory plan has "
        "room, else swap",
    ] = "auto"
    deterministic: Annotated[bool, "bit-reproducible kernels, slower"] = False
    resident_blocks: Annotated[
        Whole | Literal["auto"],
        "so many blocks of the base stay on the GPU, the others come from host memory (under ZeRO-3 from all ranks) while "
        "they compute; auto: as many as fit, under ZeRO-3 none",
    ] = "auto"
    gpu_memory_limit: Annotated[Positive | None, "use no more of each GPU than so many GiB, as if it had no more"] = (
        None
    )
    modulation_table: Annotated[
        Literal["auto", "on", "off"],
        "compute the frozen modulation once and drop its weights (13.6 of 41 GB in bf16); auto: when LoRA leaves it alone",
    ] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], "compile the blocks (a minute at start); auto: on a GPU"] = "auto"
    cuda_graphs: Annotated[
        Literal["auto", "on", "off"],
        "launch a step's kernels as one graph, captured once for each shape of a batch: on a GPU, but not with "
        "lora_dropout or offload_activations; auto: where the run is long enough to win back the capturing",
    ] = "auto"

    # ---- saving and resuming
    output_path: Annotated[Path, "run folder: config, metrics, LoRA files, checkpoints"]
    save_steps: Annotated[Whole, "write lora-<step>.safetensors this often; 0 = at the end only"] = 500
    checkpoint_steps: Annotated[
        Whole | None, "write a resumable checkpoint (optimizer state) this often; not given: save_steps"
    ] = None
    checkpoint_minutes: Annotated[
        NotNegative, "write one besides when so many minutes have passed since the last (or the start); 0 = none"
    ] = 10.0
    keep_checkpoints: Annotated[Whole, "how many of the newest checkpoints stay; 0 = all"] = 2
    keep_every: Annotated[Whole, "checkpoints at multiples of this many steps stay as well; 0 = none"] = 0
    on_save_error: Annotated[
        Literal["stop", "continue"], "what a checkpoint or LoRA file that cannot be written (a full disk) does"
    ] = "stop"
    save_dtype: Annotated[Literal["float32", "bfloat16"], "of the weights in LoRA files"] = "float32"
    resume: Annotated[str, "auto (newest checkpoint in output_path, if any), never, or a checkpoint's path"] = "auto"
    resume_ignore_data: Annotated[bool, "resume although the data set has changed; its order starts anew"] = False
    on_nonfinite: Annotated[Literal["stop", "skip"], "what a NaN or infinite gradient does: end, or skip the step"] = (
        "stop"
    )
    on_broken_sample: Annotated[Literal["skip", "stop"], "what a sample that cannot be read does"] = "skip"

    dry_run: Annotated[
        bool,
        "tell what the run would do (data, steps, trainable parameters, memory, time, files, downloads), then end: reads no "
        "weights, writes nothing",
    ] = False

    # ---- clusters
    device: Annotated[
        Literal["auto", "cpu"],
        "auto: GPUs, and an error where some were given (or the model is large) but torch sees none; cpu: without them",
    ] = "auto"
    local_model_copy: Annotated[
        Path | None,
        "a folder on a disk of each node ('$TMPDIR'): one rank of the node copies the weights there, all read them from there; "
        "the copy stays for later starts",
    ] = None
    join_timeout: Annotated[Positive, "seconds that ranks wait for each other at start; then the missing are named"] = (
        180.0
    )
    step_timeout: Annotated[
        Positive | None,
        "seconds an optimizer step may take before the run ends with exit code 75; not given: 10 times the median, at "
        "least 600",
    ] = None

    # ---- logging
    log_steps: Annotated[Count, "optimizer steps between two rows of metrics.jsonl"] = 10
    deepspeed_log: Annotated[
        Literal["quiet", "all"],
        "what DeepSpeed says about itself: quiet keeps its errors, and each warning once, from rank 0 (its launcher's lines: "
        "deepspeed --quiet train/train_lora.py …)",
    ] = "quiet"
    wandb_mode: Annotated[
        Literal["auto", "online", "offline", "disabled"], "auto = online when an API key is found, else offline"
    ] = "auto"
    wandb_project: Annotated[str, "W&B project"] = "qwen-image-lora"
    wandb_run_name: Annotated[str | None, "W&B run name; not given: the name of the run folder"] = None
    wandb_artifact: Annotated[bool, "upload the LoRA files of the run's end to W&B"] = False
    tensorboard: Annotated[
        bool, "write TensorBoard's events to the run folder's tensorboard/ too (the extra [tensorboard])"
    ] = False

    report: Annotated[
        Literal["auto", "off"],
        "auto: report.html of the run at its end, a second's work; train/report.py makes one any time",
    ] = "auto"

    # ---- validation
    validation_samples: Annotated[Whole, "samples held out of the training data; 0 = no validation"] = 0
    validation_steps: Annotated[
        Whole | None, "steps between validations; 0 = at the end only; not given: save_steps"
    ] = None
    validation_training_samples: Annotated[
        Whole | None,
        "training samples that are measured in the same way, so that the gap between the two losses shows over-training; 0 = "
        "none; not given: as many as validation_samples",
    ] = None
    keep_best: Annotated[
        bool,
        "keep the LoRA with the lowest validation loss as lora-best.safetensors (with ema_decay the better of both)",
    ] = False

    # ---- sampling
    sample_prompts: Annotated[
        tuple[str, ...],
        "prompts of the sample images (repeat the flag; a list in YAML), or a file of them, .yaml or .jsonl, with a size, "
        "guidance, steps, seed, negative prompt and strength for each (train/config/sample_prompts.py)",
    ] = ()
    sample_steps: Annotated[Whole | None, "steps between sample images; 0 = at the end only; not given: save_steps"] = (
        None
    )
    sample_height: Annotated[
        Pixels, "height of sample images in pixels; both left at 1024: edits have their source's"
    ] = 1024
    sample_width: Annotated[Pixels, "width of sample images in pixels"] = 1024
    sample_num_inference_steps: Annotated[Count, "denoising steps of sample images"] = 30
    sample_true_cfg_scale: Annotated[Annotated[float, Ge(1.0)], "guidance; 1 = none"] = 4.0

    def __post_init__(self) -> None:
        for name, hint in HINTS.items():
            try:
                object.__setattr__(self, name, convert(getattr(self, name), hint, comma_list=name in COMMA_LISTS))
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError(f"give max_steps ({self.max_steps}) or num_epochs ({self.num_epochs}), not both")
        if self.max_steps is None and self.num_epochs is None:
            object.__setattr__(self, "num_epochs", 1)
        if self.max_steps is not None and self.lr_warmup_steps > self.max_steps:
            raise ValueError(f"lr_warmup_steps ({self.lr_warmup_steps}) must not be above max_steps ({self.max_steps})")
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(OPTIMIZERS[self.optimizer], name))
        self._check_optimizer()
        self._check_schedule()
        if self.lora_dtype == "bfloat16" and self.dtype == "float32":
            raise ValueError("lora_dtype bfloat16 needs dtype bfloat16, got dtype float32")
        if self.loader == "webdataset" and (self.max_steps is None or self.validation_samples or self.watched_samples):
            raise ValueError(
                "loader webdataset knows no epochs and can't hold samples out: give max_steps, and no validation_samples"
            )
        CaptionOptions.from_options(self)
        if self.loader == "webdataset" and (len(self.data) > 1 or self.prior_data):
            raise ValueError("loader webdataset reads one set: several, and prior_data, need loader indexed")
        scale = self.alpha / (math.sqrt(self.lora_rank) if self.lora_rslora else self.lora_rank)
        if not 1e-6 <= scale <= 1e6:  # beyond, the update or its gradient is lost in float32 beside weights of about 1
            raise ValueError(
                f"lora_alpha ({self.alpha:g}) with lora_rank {self.lora_rank} scales the update by {scale:g}; it must be "
                "between 1e-06 and 1e+06"
            )
        if any(not prompt.strip() for prompt in self.prior_prompt):
            raise ValueError(
                "prior_prompt must not be empty: name the subject's class, 'a photo of a dog' for instance"
            )
        if self.prior_prompt and self.prior_prompt_share in (0, 1):
            raise ValueError(
                f"prior_prompt_share ({self.prior_prompt_share:g}) must lie between 0 and 1: 0 would train no prior_prompt, 1 "
                "nothing else"
            )
        if self.keep_best and not self.validation_samples:
            raise ValueError("keep_best chooses by the validation loss: give validation_samples, 4 for instance")
        if self.lora_dora and self.lora_format in ("diffsynth", "kohya"):
            raise ValueError(
                f"lora_format {self.lora_format} has no name for the magnitudes of lora_dora: use diffusers or comfyui"
            )
        self._check_lokr()
        for name in ("model", "data", "resume", "wandb_project", "lora_target_modules"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")

    def _check_optimizer(self) -> None:
        """Raise ValueError for options that do not go with the optimizer, by name; no package is looked for."""
        read_arguments(self.optimizer, self.optimizer_args)
        if self.optimizer == "prodigy" and self.lora_plus_ratio is not None:
            raise ValueError(
                "lora_plus_ratio does not go with optimizer prodigy, which estimates one rate for all weights: leave it out"
            )
        if self.lora_plus_ratio is not None and self.lora_type != "lora":
            raise ValueError("lora_plus_ratio is about lora_A and lora_B, which only lora_type lora has: leave it out")
        if self.optimizer != "schedulefree":
            return
        if not self.lr_scheduler.startswith("constant"):
            raise ValueError(
                f"lr_scheduler {self.lr_scheduler} does not go with optimizer schedulefree: it averages its steps in place of "
                "a rate that comes down, and weighs them by the highest rate so far; use constant"
            )
        if self.adam_beta1 == 0:
            raise ValueError("adam_beta1 0 does not go with optimizer schedulefree, which averages by it: say 0.9")
        if self.ema_decay is not None:
            raise ValueError(
                "ema_decay does not go with optimizer schedulefree: what it saves and validates is an average already"
            )

    def _check_schedule(self) -> None:
        """Raise ValueError for options of a learning rate's course that contradict each other, or do nothing."""
        if self.lr_scheduler == "constant_with_warmup" and self.lr_warmup_steps == 0:
            raise ValueError(
                "lr_scheduler constant_with_warmup needs lr_warmup_steps, 100 for instance (or say constant)"
            )
        if self.lr_num_cycles != 1 and self.lr_scheduler != "cosine_with_restarts":
            raise ValueError(
                f"lr_num_cycles ({self.lr_num_cycles}) is of lr_scheduler cosine_with_restarts, not of {self.lr_scheduler}"
            )
        if self.lr_min and self.lr_scheduler.startswith("constant"):
            raise ValueError(
                f"lr_min ({self.lr_min:g}) is where a rate ends that comes down, and lr_scheduler {self.lr_scheduler} doesn't"
            )
        if self.lr_min > self.peak_learning_rate:
            raise ValueError(f"lr_min ({self.lr_min:g}) must not be above learning_rate ({self.learning_rate:g})")

    def _check_lokr(self) -> None:
        """Raise ValueError for what doesn't go with a LoKr, or is a LoKr's alone."""
        if self.lokr_factor == 0:
            raise ValueError("lokr_factor must be -1 or at least 1, got 0")
        if self.lora_type == "lora":
            if self.lokr_factor != -1 or self.lokr_decompose_both:
                raise ValueError("lokr_factor and lokr_decompose_both are a LoKr's: say lora_type lokr, or leave them")
            return
        if self.lora_dora or self.lora_rslora:
            name = "lora_dora" if self.lora_dora else "lora_rslora"
            raise ValueError(f"lora_type lokr has no {name} (nor has PEFT's LoKr): leave one of the two")
        if self.lora_dropout:
            raise ValueError(
                f"lora_type lokr has no lora_dropout: there is no lora_A that it could stand before, got {self.lora_dropout:g}"
            )
        if self.lora_format == "diffsynth":
            raise ValueError("lora_format diffsynth has no name for a LoKr: use diffusers, comfyui or kohya")

    def idle_options(self) -> list[str]:
        """A warning for each lever's option that was given and does nothing, because the lever itself is off."""
        levers: tuple[tuple[str, bool, str], ...] = (
            ("prior_share", bool(self.prior_data), "prior_data"),
            ("prior_prompt_share", bool(self.prior_prompt), "prior_prompt"),
            ("prior_weight", bool(self.prior_data or self.prior_prompt), "prior_data or prior_prompt"),
            ("mask_min_weight", self.masked_loss, "masked_loss"),
        )
        return [
            f"warning: {name} {getattr(self, name):g} does nothing without {lever}"
            for name, on, lever in levers
            if not on and getattr(self, name) != DEFAULTS[name]
        ]

    @property
    def data_sources(self) -> list[DataSource]:
        """`data` with its weights; a stream's address has none."""
        return read_sources("data", self.data) if self.loader == "indexed" else [DataSource(self.data[0])]

    @property
    def prior_sources(self) -> list[DataSource]:
        """`prior_data` with its weights."""
        return read_sources("prior_data", self.prior_data)

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, which has its optimizer's default by now."""
        assert self.learning_rate is not None
        return self.learning_rate

    @property
    def decoupled_weight_decay(self) -> float:
        """`weight_decay`, which has its optimizer's default by now."""
        assert self.weight_decay is not None
        return self.weight_decay

    @property
    def alpha(self) -> float:
        """LoRA alpha: `lora_alpha`, or the rank."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def trained_dtype(self) -> Literal["bfloat16", "float32"]:
        """Type of the LoRA weights in the forward pass: `lora_dtype`, or `dtype`."""
        return self.dtype if self.lora_dtype is None else self.lora_dtype

    @property
    def checkpoint_every(self) -> int:
        """Optimizer steps between two checkpoints; 0 = at the end only."""
        return self.save_steps if self.checkpoint_steps is None else self.checkpoint_steps

    @property
    def validate_every(self) -> int:
        """Optimizer steps between two validations; 0 = at the end only."""
        return self.save_steps if self.validation_steps is None else self.validation_steps

    @property
    def watched_samples(self) -> int:
        """Training samples that are validated beside those held out."""
        given = self.validation_training_samples
        return self.validation_samples if given is None else given

    @property
    def sample_every(self) -> int:
        """Optimizer steps between two sets of sample images; 0 = at the end only."""
        return self.save_steps if self.sample_steps is None else self.sample_steps

    @property
    def prompt_components(self) -> tuple[str, ...]:
        """The model's components that the options' own prompts need, whatever the shards hold."""
        if self.sample_prompts:
            return ("text_encoder", "vae")
        return ("text_encoder",) if self.prior_prompt else ()

    def samples(self) -> tuple[SamplePrompt, ...]:
        """The sample images, files of `sample_prompts` read. Raises what `read_prompts` does."""
        defaults = SamplePrompt(
            prompt="",
            seed=self.seed,
            height=self.sample_height,
            width=self.sample_width,
            num_inference_steps=self.sample_num_inference_steps,
            true_cfg_scale=self.sample_true_cfg_scale,
        )
        sized = (self.sample_height, self.sample_width) != (1024, 1024)
        return read_prompts(self.sample_prompts, defaults, count_seeds=True, sized=sized)

    def to_dict(self, **decided: Any) -> dict[str, Any]:
        """The fields as plain values (str, int, float, bool, list, None), for YAML, JSON and W&B.

        `decided` stands in for options that were left open and that the run has decided.
        """
        plain: dict[str, Any] = {}
        for name in HINTS:
            value = decided.get(name, getattr(self, name))
            if name == "data" and len(value) == 1:  # as it stood in configurations before there could be several
                value = value[0]
            plain[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        return plain

    def identity(self, **decided: Any) -> dict[str, Any]:
        """What a checkpoint remembers of the options: others are allowed when it is resumed, but told. JSON."""
        return {"config": self.to_dict(**decided)}

    def to_yaml(self, **decided: Any) -> str:
        """The resolved configuration as a file for `--config`: reading it back gives an equal configuration."""
        import yaml

        lines: list[str] = []
        for name, value in self.to_dict(**decided).items():
            if name in HEADINGS:
                lines.append(f"{'' if not lines else chr(10)}# {HEADINGS[name]}\n")
            lines.append(yaml.safe_dump({name: value}, allow_unicode=True, width=10_000))
        return "".join(lines)


HINTS: dict[str, Any] = typing.get_type_hints(TrainConfig, include_extras=True)
REQUIRED = [field.name for field in dataclasses.fields(TrainConfig) if field.default is dataclasses.MISSING]
DEFAULTS: dict[str, Any] = {  # of the options that have one
    field.name: field.default for field in dataclasses.fields(TrainConfig) if field.default is not dataclasses.MISSING
}
