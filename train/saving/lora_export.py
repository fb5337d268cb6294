"""LoRA files of a run: what stands in their headers, when which file is written, and by whom.

The weights are gathered on the training thread; one background thread writes the file while training goes on.
"""

import threading
from pathlib import Path
from typing import Any

import torch

from qwen_image.loading.model_files import ModelFiles
from qwen_image.model.dtypes import DTYPES
from train.config.train_config import TrainConfig
from train.engine.deepspeed_engine import whole_weights
from train.engine.ema import EMA
from train.engine.optimizer_state import WEIGHT, ema_of, lora_kind
from train.lora.dora import dora_scale
from train.lora.inject import short_name
from train.lora.lora_file import FAMILY, save_lora
from train.lora.spec import LoraSpec
from train.lora.targets import base_layer
from train.process.ranks import Ranks
from train.saving.checkpoints import settle
from train.saving.final_file import FINAL
from train.saving.keep_best import BEST, Best
from train.saving.run_folder import PACKAGES, collect_versions

EMA_FINAL = "lora-ema.safetensors"  # beside FINAL


class LoraExport:
    """Writes `lora-<step>.safetensors` and, at the end, `lora.safetensors` into the run folder.

    Of the moving average too, if the engine keeps one: `lora-ema-<step>.safetensors`, `lora-ema.safetensors`.

    A file that can't be written ends the run with an OSError on all ranks (`on_save_error` stop), or is reported and
    left out (continue); the final one, which is what the run was for, always ends it. The error comes up at the next
    `write` or `finish`.

    Args:
        save_steps: how often a run writes one.
        metadata: what the header says besides the LoRA's own shape.
        lora_format: whose spelling the files have.
    """

    def __init__(
        self,
        output_path: Path,
        save_steps: int,
        dtype: torch.dtype,
        on_save_error: str,
        spec: LoraSpec,
        metadata: dict[str, str],
        ranks: Ranks,
        lora_format: str = "diffusers",
    ):
        self.output_path, self.save_steps, self.dtype, self.on_save_error = (
            output_path,
            save_steps,
            dtype,
            on_save_error,
        )
        self.spec, self.metadata, self.ranks, self.lora_format = spec, metadata, ranks, lora_format
        self._writer: threading.Thread | None = None
        self._problem: OSError | None = None
        self._path = output_path
        self._pending = False  # the same on all ranks, though only rank 0 has a writer

    @classmethod
    def from_config(
        cls, config: TrainConfig, spec: LoraSpec, files: ModelFiles, data_fingerprint: str, ranks: Ranks
    ) -> "LoraExport":
        versions = collect_versions()
        architecture = "qwen-image-edit" if files.member.most_sources else "qwen-image"
        metadata = {
            "base_model": files.name,
            FAMILY: files.member.name,
            "base_model_revision": files.revision or "",
            "base_model_fingerprint": files.fingerprint("transformer"),
            "preset_loras": ", ".join(config.preset_lora_path),
            "modelspec.architecture": f"{architecture}/lora",
            "data_fingerprint": data_fingerprint,
            "timestep_sampling": config.timestep_sampling,
            "loss_weighting": config.loss_weighting,
            "learning_rate": str(config.learning_rate),
            **({"optimizer": config.optimizer} if config.optimizer != "adamw" else {}),
            "seed": str(config.seed),
            "git_commit": str(versions["git_commit"]),
            "versions": ", ".join(f"{name} {versions[name]}" for name in PACKAGES),
        }
        save_dtype = DTYPES[config.save_dtype]
        where = config.output_path, config.save_steps
        return cls(*where, save_dtype, config.on_save_error, spec, metadata, ranks, config.lora_format)

    def notes(self, path: Path) -> list[str]:
        """For people, at the end of a run: what its file needs elsewhere."""
        if self.spec.is_lokr and self.lora_format == "diffusers":
            return [
                f'in diffusers a LoKr is loaded by pipeline.transformer.load_lora_adapter("{path}"), not by load_lora_weights'
            ]
        if not self.spec.dora or self.lora_format == "comfyui":
            return []
        return [
            f"for ComfyUI, a DoRA needs train/convert_lora.py {path} OUT --format comfyui --model MODEL, or train/merge_lora.py"
        ]

    def write(self, engine: Any, step: int) -> Path:
        """Start to write the LoRA of optimizer step `step`; a collective. Returns the file's path on every rank."""
        if ema_of(engine) is not None:
            self._start(engine, step, f"lora-ema-{step}.safetensors", EMA)
        return self._start(engine, step, f"lora-{step}.safetensors")

    def write_best(self, engine: Any, best: Best) -> Path:
        """Start to write what `best` has just found, as `lora-best.safetensors`; a collective."""
        assert best.step is not None
        return self._start(
            engine, best.step, BEST, EMA if best.averaged else WEIGHT, {"validation_loss": repr(best.loss)}
        )

    def write_again(self, engine: Any, step: int, steps: int) -> None:
        """For a run that goes on from `step`: its file, if one was due. A kill may have come between checkpoint and file."""
        if 0 < step < steps and self.save_steps and step % self.save_steps == 0:
            self.write(engine, step)

    def write_final(self, engine: Any, step: int) -> Path:
        """Write `lora.safetensors`, and wait until it is there; a collective."""
        if ema_of(engine) is not None:  # first: the run is over when the other file is there
            self._start(engine, step, EMA_FINAL, EMA)
            self.finish("stop")
        path = self._start(engine, step, FINAL)
        self.finish("stop")
        return path

    def files(self) -> list[Path]:
        """What a run that is done leaves behind: the LoRA of its end, its average's, the best."""
        return [path for name in (FINAL, EMA_FINAL, BEST) if (path := self.output_path / name).is_file()]

    def finish(self, on_error: str | None = None) -> None:
        """Wait for the file that is being written; a collective. Raises OSError, on all ranks, by policy."""
        if not self._pending:
            return
        if self._writer is not None:
            self._writer.join()
        problem, self._writer, self._problem, self._pending = self._problem, None, None, False
        settle(problem, f"LoRA file {self._path} not written", on_error or self.on_save_error, self.ranks.say)

    def _start(
        self, engine: Any, step: int, name: str, kind: str = WEIGHT, facts: dict[str, str] | None = None
    ) -> Path:
        self.finish()
        path = self._path = self.output_path / name
        header = {**self.metadata, **(facts or {}), "step": str(step)}
        ema = ema_of(engine)
        kind = lora_kind(engine) if kind == WEIGHT else kind
        if kind == EMA and ema is not None:
            header |= {"ema_decay": repr(ema.decay)}
        weights = whole_weights(engine, kind)
        if self.ranks.is_main:
            tensors = {short_name(name).removeprefix("transformer."): weight for name, weight in weights.items()}
            if self.spec.dora and self.lora_format == "comfyui":
                tensors = with_dora_scales(tensors, engine.module.transformer, self.spec.scale, self.dtype)
            self._writer = threading.Thread(target=self._save, args=(path, tensors, header), name="lora-export")
            self._writer.start()
        self._pending = True
        return path

    def _save(self, path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        try:
            save_lora(path, tensors, self.spec, header, self.dtype, self.lora_format)
        except Exception as error:  # whatever it is, the training thread has to learn of it
            self._problem = error if isinstance(error, OSError) else OSError(None, f"{type(error).__name__}: {error}")


def with_dora_scales(
    tensors: dict[str, torch.Tensor], transformer: torch.nn.Module, scale: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The trained weights by short name with ComfyUI's dora_scale in the place of each magnitude vector.

    From the weights as `dtype` rounds them, since those are what ComfyUI will find; on the device of the base.
    """
    ending, found = "lora_magnitude_vector", {}
    for name, tensor in tensors.items():
        if not name.endswith(ending):
            found[name] = tensor
            continue
        layer = name.removesuffix(f".{ending}")
        lora_a = tensors[f"{layer}.lora_A"].to(dtype)
        lora_b = (tensors[f"{layer}.lora_B"].float() * scale).to(dtype)
        found[f"{layer}.dora_scale"] = dora_scale(base_layer(transformer, layer).weight, lora_a, lora_b, tensor).cpu()
    return found
