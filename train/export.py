"""LoRA files of a run: what stands in their headers, and when which file is written."""

from pathlib import Path
from typing import Any

from qwen_image.pipeline import QwenImagePipeline
from train.config import TrainConfig
from train.data import ShardDataset
from train.engine import DTYPES, Ranks, whole_weights
from train.lora import LoraSpec, short_name
from train.lora_file import save_lora
from train.run_folder import PACKAGES, collect_versions

FINAL = "lora.safetensors"


class LoraExport:
    """Writes `lora-<step>.safetensors` and, at the end, `lora.safetensors` into the run folder."""

    def __init__(
        self, config: TrainConfig, spec: LoraSpec, pipeline: QwenImagePipeline, dataset: ShardDataset, ranks: Ranks
    ):
        self.config, self.spec, self.ranks = config, spec, ranks
        versions = collect_versions()
        self.metadata = {
            "base_model": pipeline.files.name,
            "base_model_revision": pipeline.files.revision or "",
            "base_model_fingerprint": pipeline.files.fingerprint("transformer"),
            "modelspec.architecture": "qwen-image/lora",
            "data_fingerprint": dataset.fingerprint,
            "timestep_sampling": config.timestep_sampling,
            "loss_weighting": config.loss_weighting,
            "learning_rate": str(config.learning_rate),
            "seed": str(config.seed),
            "git_commit": str(versions["git_commit"]),
            "versions": ", ".join(f"{name} {versions[name]}" for name in PACKAGES),
        }

    def write(self, engine: Any, step: int, *, final: bool = False) -> Path:
        """Write the LoRA of optimizer step `step`; a collective. Returns the file's path on every rank."""
        path = self.config.output_path / (FINAL if final else f"lora-{step}.safetensors")
        weights = whole_weights(engine)
        if self.ranks.is_main:
            tensors = {short_name(name).removeprefix("transformer."): weight for name, weight in weights.items()}
            metadata = {**self.metadata, "step": str(step)}
            save_lora(path, tensors, self.spec, metadata, DTYPES[self.config.save_dtype])
        return path
