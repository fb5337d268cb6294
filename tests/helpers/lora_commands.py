"""The commands that read a LoRA file, by the name of the script or of train_lora.py's flag."""

from pathlib import Path

from tests.helpers.training_run import train
from train import convert_lora, merge_lora, sample

COMMANDS = ("sample", "merge_lora", "convert_lora", "lora_checkpoint", "preset_lora_path")


def give_to(command: str, lora: Path, model: Path, data: Path, output: Path, *training: str) -> int:
    """Run one of COMMANDS on a LoRA file; its exit code. `training`: further flags where it is a training run."""
    if command == "sample":
        return sample.main(["--model", str(model), "--lora", str(lora), "--prompt", "x", "--output_path", str(output)])
    if command == "merge_lora":
        return merge_lora.main(["--model", str(model), "--lora", str(lora), "--output_path", str(output)])
    if command == "convert_lora":
        return convert_lora.main([str(lora), str(output), "--format", "comfyui", "--model", str(model)])
    return train(model, data, output, *training, f"--{command}", str(lora))
