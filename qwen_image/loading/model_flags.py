"""The flags that say which model a command works with, defined once for all commands. Imports no torch."""

import argparse

# by option name; train/config/train_config.py shares these texts
MODEL_HELP = {
    "model": "folder in the Hugging Face layout, or a hub id such as Qwen/Qwen-Image",
    "revision": "branch, tag or commit of a hub id",
    "transformer_path": "file, folder or glob to use for the transformer",
    "text_encoder_path": "file, folder or glob to use for the text encoder",
    "vae_path": "file, folder or glob to use for the VAE",
    "tokenizer_path": "folder to use for the tokenizer",
}


def add_model_flags(parser: argparse.ArgumentParser, *components: str) -> None:
    """Add --model, --revision, and `--COMPONENT_path` for those components that the command reads.

    `ModelSource.from_options` makes the model's source of what is parsed.
    """
    for name, text in MODEL_HELP.items():
        component = name.removesuffix("_path")
        if component == name or component in components:
            parser.add_argument(f"--{name}", required=name == "model", metavar=name.upper(), help=text)
