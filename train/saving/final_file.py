"""The LoRA file of a run's end, and whether it is there."""

from pathlib import Path

from qwen_image.loading.safetensors_ranges import read_headers
from train.config.check_paths import FINAL


def final_file_is_whole(run: Path, step: int, lora_format: str) -> bool:
    """Whether `run` holds the file of optimizer step `step`, complete and in this spelling. Reads its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        read_headers((run / FINAL,))  # also compares the file's size with what it should hold
        with safe_open(run / FINAL, framework="pt") as file:
            facts = file.metadata() or {}
    except (OSError, ValueError, SafetensorError):
        return False
    return facts.get("step") == str(step) and facts.get("lora_format", "diffusers") == lora_format
