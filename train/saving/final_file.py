"""The LoRA file of a run's end, and whether it is there."""

from pathlib import Path

from qwen_image.loading.safetensors_ranges import read_headers
from train.config.run_files import FINAL


def lora_facts(path: Path) -> dict[str, str]:
    """What a LoRA file's header tells; nothing where there is no file, or none that is whole. Reads its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        read_headers((path,))  # also compares the file's size with what it should hold
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, ValueError, SafetensorError):
        return {}


def final_file_is_whole(run: Path, step: int, lora_format: str) -> bool:
    """Whether `run` holds the file of optimizer step `step`, complete and in this spelling."""
    facts = lora_facts(run / FINAL)
    return facts.get("step") == str(step) and facts.get("lora_format", "diffusers") == lora_format
