"""The flags that say which model a command works with, defined once for all commands. Imports no torch."""

import argparse

from qwen_image.model.family import MEMBERS

# by option name; train/config/train_config.py shares these texts
MODEL_HELP = {
    "model": "folder in the Hugging Face layout, or a hub id such as Qwen/Qwen-Image",
    "revision": "branch, tag or commit of a hub id",
    "model_family": "auto: as the folder's files tell; a single file can't: text-to-image, edit, edit-2509 or edit-2511",
    "transformer_path": "file, folder or glob to use for the transformer",
    "text_encoder_path": "file, folder or glob to use for the text encoder",
    "vae_path": "file, folder or glob to use for the VAE",
    "tokenizer_path": "folder to use for the tokenizer",
    "picture_positions": "of edit models' vision tokens: on a grid, as they were trained; consecutive, as diffusers 0.42 with "
    "transformers 5 has them",
}
PART_OF = {"picture_positions": "text_encoder"}  # of flags that aren't called like a component's path
CHOICES: dict[str, tuple[str, ...]] = {
    "model_family": ("auto", *MEMBERS),
    "picture_positions": ("grid", "consecutive"),
}


def model_options(*components: str) -> list[str]:
    """Names of the model's options that a command which reads `components` has."""
    return [name for name in MODEL_HELP if PART_OF.get(name, name.removesuffix("_path")) in (name, *components)]


def add_model_flags(parser: argparse.ArgumentParser, *components: str) -> None:
    """Add --model, --revision, and `--COMPONENT_path` for those components that the command reads.

    `ModelSource.from_options` makes the model's source of what is parsed.
    """
    for name in model_options(*components):
        values = {"choices": CHOICES[name]} if name in CHOICES else {"metavar": name.upper()}
        parser.add_argument(f"--{name}", required=name == "model", help=MODEL_HELP[name], **values)
