"""The flags of the model: one definition, the same in every command."""

import argparse
from dataclasses import fields

import pytest

from qwen_image.loading.model_files import ModelSource
from qwen_image.loading.model_flags import MODEL_HELP, add_model_flags
from train.config.train_config import HINTS


def test_every_part_of_a_source_has_a_flag():
    assert list(MODEL_HELP) == [field.name for field in fields(ModelSource)]


def test_a_command_has_the_flags_of_its_components():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_model_flags(parser, "vae")
    parsed = parser.parse_args(["--model", "a/b", "--vae_path", "x.safetensors"])
    assert ModelSource.from_options(parsed) == ModelSource("a/b", vae_path="x.safetensors")
    assert not hasattr(parsed, "transformer_path")
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parser.parse_args(["--vae_path", "x"])


def test_training_says_the_same():
    for name, text in MODEL_HELP.items():
        assert HINTS[name].__metadata__ == (text,)
