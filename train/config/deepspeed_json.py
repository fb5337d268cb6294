"""Read a DeepSpeed JSON, refuse what does nothing or does harm here, and fill in the numbers that flags decide.

DeepSpeed itself passes "auto" on as a string, ignores misspelt top-level keys and clips at 1.0 when nothing is said
(0.19.8), so the file is checked here, key by key. ds_configs/README.md explains the keys to users.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from train.config.train_config import TrainConfig
from train.config.typed_fields import did_you_mean

# Blocks and their keys; None = the keys come from DeepSpeed's own model of the block, "" = a plain value.
ACCEPTED: dict[str, Any] = {
    "zero_optimization": None,
    "bf16": None,
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "timers": ("throughput",),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "comms_logger": ("enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "train_batch_size": "",
    "train_micro_batch_size_per_gpu": "",
    "gradient_accumulation_steps": "",
    "gradient_clipping": "",
    "communication_data_type": "",
    "zero_allow_untested_optimizer": "",
    "zero_force_ds_cpu_optimizer": "",
    "steps_per_print": "",
    "wall_clock_breakdown": "",
    "memory_breakdown": "",
    "dump_state": "",
    "log_level": "",
    "disable_python_gc": "",
}
REFUSED = {
    "optimizer": "use --optimizer, --learning_rate, --weight_decay, --adam_beta1, --adam_beta2",
    "scheduler": "use --lr_scheduler and --lr_warmup_steps",
    "activation_checkpointing": "use --activation_checkpointing (the block alone does nothing)",
    "fp16": "training is bfloat16 or float32: use --dtype",
    "torch_autocast": "training is bfloat16 or float32: use --dtype",
    "tensorboard": "metrics.jsonl and W&B (--wandb_mode) hold the metrics",
    "wandb": "use --wandb_mode, --wandb_project and --wandb_run_name",
    "csv_monitor": "metrics.jsonl holds the metrics",
    "comet": "metrics.jsonl and W&B (--wandb_mode) hold the metrics",
    "flops_profiler": "it crashes with scaled dot product attention",
    "compile": "the trainer compiles block by block",
    "gradient_allreduce_op": "gradients are averaged over ranks",
    "bfloat16": "the key is bf16 (and --dtype decides it)",
}
REFUSED_ZERO = {
    "zero_quantized_nontrainable_weights": "it turns the frozen bf16 weights into noise without a word",
    "round_robin_gradients": "LoRA files written under it are wrong",
    "leaf_module": "its hooks need block inputs with gradients, which the first block of a frozen model has not",
    "zenflow": "it replaces the optimizer, which --optimizer names",
    "cpu_offload": 'say "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'say "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": 'say "pin_memory" in offload_param or offload_optimizer',
    "stage3_gather_fp16_weights_on_model_save": "LoRA files are written by the trainer",
}


def load_deepspeed_config(path: str | Path, config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize(config=…)`: the JSON at `path`, checked, with every number filled in.

    Filled in: batch numbers for `world_size` ranks, clipping, bf16 from `config.trained_dtype`, float32 for gradient
    accumulation and communication, the throughput timer off (it waits for the device at every step), and for stage 3
    exact linear layers. A key that the file does give must agree with the flags.

    Raises FileNotFoundError, or ValueError with one line that names the file, the key and what to do.
    """
    settings = Settings(Path(path))
    settings.check_names()
    settings.check_zero(world_size)
    settings.fill(config, world_size)
    return settings.content


class Settings:
    """A DeepSpeed JSON on its way to complete settings; every refusal starts with the file's path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"no DeepSpeed configuration at {path} (ds_configs/ holds four to choose from)")
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=self._unique)
        except UnicodeDecodeError:
            self.refuse("is not UTF-8 text")
        except json.JSONDecodeError as error:
            self.refuse(f"line {error.lineno}, column {error.colno}: {error.msg}")
        self.content: dict[str, Any] = content
        if type(content) is not dict:
            self.refuse("must hold one JSON object")

    def refuse(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path}: {problem}")

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key in {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}:
            self.refuse(f"{key} is given twice")
        return dict(pairs)

    def check_names(self) -> None:
        """Every key is known, has a value ("auto" is none), and belongs here."""
        for place, value in walk(self.content):
            if value == "auto":
                self.refuse(f'{place} is "auto": leave the key out to have it filled in, or give a value')
        for key, value in self.content.items():
            if key in REFUSED:
                self.refuse(f"{key} does not belong here: {REFUSED[key]}")
            if key not in ACCEPTED:
                self.refuse(f"unknown key {key}{did_you_mean(key, ACCEPTED)}")
            if ACCEPTED[key] == "":
                continue
            if type(value) is not dict:
                self.refuse(f"{key} must be an object, got {json.dumps(value)}")
            for name in value:
                if ACCEPTED[key] and name not in ACCEPTED[key]:
                    self.refuse(f"unknown key {key}.{name}{did_you_mean(name, ACCEPTED[key])}")

    def check_zero(self, world_size: int) -> None:
        """The blocks that DeepSpeed models itself: names and values by its models, then what breaks a LoRA on ZeRO."""
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

        zero = self.content.get("zero_optimization", {})
        for key, reason in REFUSED_ZERO.items():
            if zero.get(key):
                self.refuse(f"zero_optimization.{key} does not belong here: {reason}")
        for block, model in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config)):
            names = {field.alias or name for name, field in model.model_fields.items()}
            for name in self.content.get(block, {}):
                if name not in names:
                    self.refuse(f"unknown key {block}.{name}{did_you_mean(name, names)}")
            try:
                model(**self.content.get(block, {}))
            except ValidationError as error:
                wrong = error.errors()[0]
                place = ".".join(map(str, (block, *wrong["loc"])))
                self.refuse(f"{place}: {wrong['msg']}, got {json.dumps(wrong['input'], default=str)}")
        stage = zero.get("stage")
        if stage not in (2, 3):
            self.refuse(f"zero_optimization.stage must be 2 or 3, got {json.dumps(stage)}")
        if stage == 2 and zero.get("offload_param", {}).get("device", "none") != "none":
            self.refuse("zero_optimization.offload_param needs stage 3: stage 2 keeps all weights on the GPU")
        if zero.get("offload_optimizer", {}).get("super_offload"):
            self.refuse("zero_optimization.offload_optimizer.super_offload replaces the trainer's optimizer")
        group = zero.get("zero_hpz_partition_size", 1)
        if group > 1 and world_size % group:
            self.refuse(f"zero_optimization.zero_hpz_partition_size ({group}) must divide the {world_size} ranks")
        for name in ("offload_param", "offload_optimizer"):
            if zero.get(name, {}).get("device") == "nvme":
                self.refuse(
                    f"zero_optimization.{name}.device nvme is not supported: a LoRA's optimizer state is small, and the base "
                    "takes 41 GB of host memory over all ranks of a node: use cpu"
                )
        if zero.get("offload_optimizer", {}).get("ratio", 1.0) != 1.0:
            self.refuse("zero_optimization.offload_optimizer.ratio must be 1: checkpoints know whole optimizers alone")

    def fill(self, config: TrainConfig, world_size: int) -> None:
        """Put in the numbers that flags decide; a number that is there must agree."""
        samples = config.batch_size * config.gradient_accumulation_steps * world_size
        product = f"--batch_size {config.batch_size} × {config.gradient_accumulation_steps} × {world_size} ranks"
        self.agree("train_micro_batch_size_per_gpu", config.batch_size, f"--batch_size {config.batch_size}")
        steps = config.gradient_accumulation_steps
        self.agree("gradient_accumulation_steps", steps, f"--gradient_accumulation_steps {steps}")
        self.agree("train_batch_size", samples, f"{product} = {samples}")
        self.agree("gradient_clipping", config.max_grad_norm, f"--max_grad_norm {config.max_grad_norm}")
        # bf16 mode is about what is trained: it would round float32 LoRA weights, and needs nothing of the frozen ones
        trained = config.trained_dtype
        self.agree("bf16.enabled", trained == "bfloat16", f"LoRA weights are {trained} (--lora_dtype, --dtype)")
        self.agree("zero_force_ds_cpu_optimizer", False, "the trainer's own optimizer")
        for key in ("data_types.grad_accum_dtype", "communication_data_type"):
            if self.default(key, "fp32") not in ("fp32", "bf16"):
                self.refuse(f"{key} must be fp32 or bf16")
        self.default("timers.throughput.enabled", False)

    def default(self, place: str, value: Any) -> Any:
        """The value at the dotted `place`, which becomes `value` if it is not there."""
        *blocks, key = place.split(".")
        block = self.content
        for name in blocks:
            block = block.setdefault(name, {})
            if type(block) is not dict:
                self.refuse(f"{name} must be an object, got {json.dumps(block)}")
        return block.setdefault(key, value)

    def agree(self, place: str, value: Any, source: str) -> None:
        """Set `place` to `value`, or refuse if the file says something else than `source` does."""
        given = self.default(place, value)
        if given != value or (type(given) is bool) != (type(value) is bool):
            self.refuse(f"{place} is {json.dumps(given)}, but {source}: make them agree, or leave the key out")


def walk(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of a JSON value with its dotted place: ("zero_optimization.stage", 2)."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from walk(child, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from walk(child, f"{place}[{index}]")
    else:
        yield place, value


SLOW_OR_LOSSY = {
    "wall_clock_breakdown": "waits for the device several times a step",
    "memory_breakdown": "waits for the device several times a step",
    "comms_logger.enabled": "waits for the device at every communication",
    "timers.throughput.enabled": "waits for the device at every forward and step",
    "bf16.bf16_master_weights_and_grads": "updates below 1/256 of a weight are lost",
    "bf16.bf16_optimizer_states": "AdamW's moments lose precision",
    "zero_optimization.zero_quantized_gradients": "gradients are rounded to 8 bits",
}


def warnings(settings: dict[str, Any]) -> list[str]:
    """One line for each key of complete `settings` that costs speed or precision without need."""
    zero = settings["zero_optimization"]
    values = dict(walk(settings))
    lines = [f"{place} is on: it {why}" for place, why in SLOW_OR_LOSSY.items() if values.get(place) is True]
    for key in ("data_types.grad_accum_dtype", "communication_data_type"):
        if values[key] != "fp32":
            lines.append(f"{key} is {values[key]}: small gradients are lost in the sum")
    unused = [key for key in zero if is_about_parameters(key) and key not in (OFFLOAD, HPZ)]
    if unused:
        lines.append(
            f"{', '.join(unused)}: no longer used, the frozen base is divided block by block; they can be removed"
        )
    return lines


OFFLOAD, HPZ = "offload_param", "zero_hpz_partition_size"


def is_about_parameters(key: str) -> bool:
    """Whether a key of zero_optimization says how DeepSpeed's own stage 3 would treat weights."""
    others = ("sub_group_size", "memory_efficient_linear", "param_persistence_threshold", "model_persistence_threshold")
    return key.startswith("stage3_") or key in (OFFLOAD, HPZ, "zero_quantized_weights", *others)
