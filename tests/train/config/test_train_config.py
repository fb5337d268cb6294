"""The training configuration: file, flags, checks, and the way back to YAML."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config.check_paths import check_paths
from train.config.command_line import build_parser, parse
from train.config.train_config import HEADINGS, HINTS, TrainConfig
from train.config.typed_fields import convert, did_you_mean

REQUIRED = ["--model", "owner/model", "--data", "shards", "--deepspeed", "zero2.json", "--output_path", "run"]


def make_config(**changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"model": "owner/model", "data": "shards", "deepspeed": "z.json", "output_path": "run"}
    return TrainConfig(**(options | changes))


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "model: from/file\nlearning_rate: 5e-5\nlora_rank: 8\n")
    config = parse([*REQUIRED[2:], "--config", file, "--lora_rank", "4"])
    assert (config.model, config.learning_rate, config.lora_rank, config.seed) == ("from/file", 5e-5, 4, 0)


def test_every_kind_of_flag() -> None:
    config = parse(
        [
            *REQUIRED,
            *["--local_rank", "3", "--lora_dora", "--lora_rslora", "false"],
            *["--activation_checkpointing", "7", "--caption_dropout", "1"],
            *["--lora_target_modules", "to_q, to_k", "--lora_alpha", "16", "--dtype=float32", "--resume", "a/b"],
            *["--sample_prompts", "a cat, sitting", "a dog", "--sample_prompts", "100 % rain"],
        ]
    )
    assert config.lora_dora is True and config.lora_rslora is False and config.activation_checkpointing == 7
    assert config.lora_target_modules == ("to_q", "to_k") and config.alpha == 16.0 and config.dtype == "float32"
    assert config.sample_prompts == ("a cat, sitting", "a dog", "100 % rain")
    assert config.output_path == Path("run") and config.caption_dropout == 1.0 and config.resume == "a/b"


def test_derived_values() -> None:
    config = make_config(save_steps=40, lora_rank=8)
    assert (config.alpha, config.checkpoint_every, config.validate_every, config.sample_every) == (8.0, 40, 40, 40)
    assert make_config(save_steps=40, checkpoint_steps=0).checkpoint_every == 0
    assert config.num_epochs == 1 and make_config(max_steps=5).num_epochs is None


def test_lora_weights_follow_the_base_unless_said_otherwise() -> None:
    assert make_config().trained_dtype == "bfloat16" and make_config(dtype="float32").trained_dtype == "float32"
    assert make_config(lora_dtype="float32").trained_dtype == "float32"


def test_a_flag_replaces_the_files_length_of_training(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "num_epochs: 3\n")
    assert parse([*REQUIRED, "--config", file]).num_epochs == 3
    config = parse([*REQUIRED, "--config", file, "--max_steps", "10"])
    assert (config.max_steps, config.num_epochs) == (10, None)


FLAG_ERRORS = [
    (["--learning-rate", "1"], "unknown flag --learning-rate (did you mean --learning_rate?)"),
    (["--lr_warmup_step=1"], "unknown flag --lr_warmup_step (did you mean --lr_warmup_steps?)"),
    (["extra"], "unexpected argument 'extra'"),
    (["--lora_rank"], "expected one argument"),
    (["--lora_rank", "1.5"], "--lora_rank must be a whole number, got '1.5'"),
    (["--lora_rank", "0"], "--lora_rank must be at least 1, got 0"),
    (["--learning_rate", "fast"], "--learning_rate must be a number, got 'fast'"),
    (["--learning_rate", "nan"], "--learning_rate must be a finite number"),
    (["--learning_rate", "0"], "--learning_rate must be above 0"),
    (["--learning_rate", "1e38"], "--learning_rate must be at most 1000.0, got 1e38"),
    (["--batch_size", "99999999999999999999"], "--batch_size must be at most 2147483647"),
    (["--dataset_repeat", "99999999999999999999"], "--dataset_repeat must be at most 2147483647"),
    (["--seed", "99999999999999999999"], "--seed must be at most 1099511627776"),
    (["--data_cache_gb", "1e300"], "--data_cache_gb must be at most 1000000000.0"),
    (["--weight_decay", "1e300"], "--weight_decay must be at most 1000.0"),
    (["--adam_epsilon", "1e300"], "--adam_epsilon must be at most 1000.0"),
    (["--caption_dropout", "1.1"], "--caption_dropout must be at most 1.0"),
    (["--sample_height", "1000"], "--sample_height must be a multiple of 16, got 1000"),
    (["--timestep_sampling", "qwen-shift"], "(did you mean qwen_shift?)"),
    (["--activation_checkpointing", "some"], "must be a whole number or must be one of none, full, auto, got 'some'"),
    (["--lora_dora", "yes"], "--lora_dora must be true or false, got 'yes'"),
    (["--lora_target_modules", "to_q,,to_k"], "none of them empty"),
    (["--max_steps", "3", "--num_epochs", "2"], "give max_steps (3) or num_epochs (2), not both"),
    (["--max_steps", "3", "--lr_warmup_steps", "4"], "lr_warmup_steps (4) must not be above max_steps (3)"),
    (["--optimizer", "adam"], "--optimizer must be one of adamw, adafactor, muon, prodigy, schedulefree, got 'adam'"),
    (["--optimizer_args", "momentum=0.9"], "optimizer_args: adamw has no momentum; it has none"),
    (
        ["--optimizer", "prodigy", "--optimizer_args", "d_koef=2"],
        "optimizer_args: prodigy has no d_koef (did you mean d_coef?); it knows d_coef, d0, growth_rate",
    ),
    (["--optimizer", "prodigy", "--optimizer_args", "d_coef=-1"], "optimizer_args: d_coef must be above 0"),
    (["--optimizer", "prodigy", "--optimizer_args", "d_coef=1", "d_coef=2"], "optimizer_args: d_coef is given twice"),
    (["--optimizer", "prodigy", "--optimizer_args", "d_coef"], "optimizer_args takes key=value, got 'd_coef'"),
    (["--optimizer", "muon", "--optimizer_args", "nesterov=maybe"], "nesterov must be true or false, got 'maybe'"),
    (
        ["--optimizer", "muon", "--optimizer_args", "weight_decay=0"],
        "weight_decay is a flag of its own: --weight_decay",
    ),
    (["--optimizer", "prodigy", "--lora_plus_ratio", "4"], "lora_plus_ratio does not go with optimizer prodigy"),
    (["--optimizer", "schedulefree", "--lr_scheduler", "cosine"], "cosine does not go with optimizer schedulefree"),
    (["--optimizer", "schedulefree", "--ema_decay", "0.9"], "ema_decay does not go with optimizer schedulefree"),
    (["--optimizer", "schedulefree", "--adam_beta1", "0"], "adam_beta1 0 does not go with optimizer schedulefree"),
    (["--lr_scheduler", "constant_with_warmup"], "constant_with_warmup needs lr_warmup_steps"),
    (["--lr_scheduler", "cosine", "--lr_num_cycles", "2"], "lr_num_cycles (2) is of lr_scheduler cosine_with_restarts"),
    (["--lr_min", "1e-5"], "lr_min (1e-05) is where a rate ends that comes down, and lr_scheduler constant doesn't"),
    (["--lr_scheduler", "linear", "--lr_min", "2e-4"], "lr_min (0.0002) must not be above learning_rate (0.0001)"),
    (["--lora_dtype", "bfloat16", "--dtype", "float32"], "lora_dtype bfloat16 needs dtype bfloat16"),
    (["--model="], "model must not be empty"),
    (["--lora_rank", "true"], "--lora_rank must be a whole number, got 'true'"),
    (["--lora_rank", "9" * 5000], "--lora_rank must be a shorter number, got '999"),
    (
        ["--lora_alpha", "1e300"],
        "lora_alpha (1e+300) with lora_rank 32 scales the update by 3.125e+298; it must be between",
    ),
    (["--lora_alpha", "1e-300"], "lora_alpha (1e-300) with lora_rank 32 scales the update by 3.125e-302; it must be"),
    (
        ["--lora_alpha", "4e6", "--lora_rslora", "--lora_rank", "4"],
        "with lora_rank 4 scales the update by 2e+06; it must",
    ),
    (["--lora_alpha=-inf"], "--lora_alpha must be a finite number, got -inf"),
    (["--lora_dora=1"], "--lora_dora must be true or false, got '1'"),
    (["--lora_dropout", "nan"], "--lora_dropout must be a finite number, got nan"),
    (["--activation_checkpointing", "-1"], "must be at least 0 or must be one of none, full, auto, got '-1'"),
    (["--output_path="], "--output_path must be a path, got ''"),
    (["--loader", "web\x1b[2J\ndataset"], r"got 'web\x1b[2J\ndataset' (did you mean webdataset?)"),
    (["--loss_weighting", "x" * 10**5], "must be one of none, bsmntw, sigma_sqrt, cosmap, got 'xxx"),
]


@pytest.mark.parametrize(("flags", "message"), FLAG_ERRORS, ids=[" ".join(flags)[:60] for flags, _ in FLAG_ERRORS])
def test_a_wrong_flag_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse([*REQUIRED, *flags])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


FILE_ERRORS = [
    ("seed: 1\nlora_rnak: 8\n", "line 2: unknown option 'lora_rnak' (did you mean lora_rank?)"),
    ("# x\n\nlora_rank: big\n", "line 3: lora_rank must be a whole number, got 'big'"),
    ("lora_rank: true\n", "line 1: lora_rank must be a whole number, got True"),
    ("seed: 1\nseed: 2\n", "line 2: seed is given twice"),
    ("revision: 1234567\n", "line 1: revision must be text, got 1234567; put it in quotes"),
    ("sample_prompts: [a, 3]\n", "line 1: sample_prompts must be a list of texts"),
    ("sample_width: 40\n", "line 1: sample_width must be a multiple of 16, got 40"),
    ("seed: [1\n", "line 2, column 1: "),
    ("- seed\n", "must hold lines of `name: value`, got a list"),
    ("lora_rank: 8.0\n", "line 1: lora_rank must be a whole number, got 8.0"),
    ("lora_rank: [8]\n", "line 1: lora_rank must be a whole number, got [8]"),
    ("learning_rate: true\n", "line 1: learning_rate must be a number, got True"),
    ("learning_rate: .nan\n", "line 1: learning_rate must be a finite number, got nan"),
    ("lora_dora: 1\n", "line 1: lora_dora must be true or false, got 1"),
    ("output_path: 3\n", "line 1: output_path must be a path, got 3"),
    ("wandb_run_name: 2026-11-28\n", "line 1: wandb_run_name must be text, got datetime.date(2026, 11, 28)"),
    ("sample_prompts: ['']\n", "line 1: sample_prompts must be a list of texts, none of them empty, got ['']"),
    ("dtype:\n", "line 1: dtype must be one of bfloat16, float32, got None"),
]


@pytest.mark.parametrize(("text", "message"), FILE_ERRORS, ids=[text for text, _ in FILE_ERRORS])
def test_a_wrong_line_of_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse([*REQUIRED, "--config", yaml_file(tmp_path, text)])
    assert "run.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_options_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing --model, --deepspeed: "):
        parse(["--data", "x", "--output_path", "y"])
    with pytest.raises(FileNotFoundError, match="no configuration file at "):
        parse(["--config", str(tmp_path / "none.yaml")])
    assert parse([*REQUIRED, "--config", yaml_file(tmp_path, "# nothing\n")]) == parse(REQUIRED)


def test_values_given_in_code_are_converted_and_checked() -> None:
    config = make_config(learning_rate=1, sample_prompts=["a"], output_path="~/run")
    assert config.learning_rate == 1.0 and config.sample_prompts == ("a",)
    assert config.output_path == Path.home() / "run"
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        dataclasses.replace(config, batch_size=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_the_resolved_copy_reads_back_equal(tmp_path: Path) -> None:
    changed = make_config(
        learning_rate=1e-7,
        adam_epsilon=1e-20,
        revision="1234567",
        wandb_run_name="null and: void # é",
        sample_prompts=["a: b", "- c", "null", "12", "line\nbreak", "ü" * 300],
        lora_target_modules=["to_q"],
        activation_checkpointing=3,
        max_steps=7,
        lora_alpha=0.5,
    )
    for config in (changed, make_config()):
        assert parse(["--config", yaml_file(tmp_path, config.to_yaml())]) == config


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
def test_any_prompt_survives_yaml(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    config = make_config(sample_prompts=[prompt], lora_alpha=3)
    folder = tmp_path_factory.mktemp("yaml")
    assert parse(["--config", yaml_file(folder, config.to_yaml())]) == config


@settings(deadline=None)
@given(st.floats(min_value=0, max_value=1000, exclude_min=True))
def test_any_number_survives_its_text(number: float) -> None:
    assert convert(repr(number), HINTS["learning_rate"]) == number


def test_every_field_is_a_flag_with_a_help_text_under_a_heading() -> None:
    flags = {action.dest: action for action in build_parser()._actions}
    for name in HINTS:
        assert flags[name].option_strings == [f"--{name}"] and flags[name].help, name
    assert next(iter(HINTS)) in HEADINGS and set(HEADINGS) <= set(HINTS)
    text = build_parser().format_help()
    positions = [text.index(f"\n{heading}:\n") for heading in HEADINGS.values()]
    assert positions == sorted(positions)


def test_help_needs_no_torch() -> None:
    code = """
import sys
from train.config.command_line import parse
try:
    parse(["--help"])
finally:
    assert not {"torch", "deepspeed"} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "--learning_rate" in ran.stdout and not ran.stderr


def test_did_you_mean_stays_silent_without_a_near_name() -> None:
    assert did_you_mean("zzz", HINTS) == ""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Everything a configuration may point to."""
    for folder in ("model", "data"):
        (tmp_path / folder).mkdir()
    for name in ("model/model_index.json", "data/manifest.json", "z.json", "lora.safetensors"):
        (tmp_path / name).touch()
    names = {"model": "model", "data": "data", "deepspeed": "z.json", "output_path": "new/run"}
    return {name: tmp_path / place for name, place in names.items()}


def test_paths_that_exist_pass_and_nothing_is_created(files: dict[str, Path], tmp_path: Path) -> None:
    check_paths(
        make_config(**files, lora_checkpoint=tmp_path / "lora.safetensors", transformer_path=f"{tmp_path}/*.s*")
    )
    check_paths(make_config(**files | {"model": "Qwen/Qwen-Image"}, revision="main"))
    assert not (tmp_path / "new").exists()


PATH_ERRORS: list[tuple[dict[str, str], str]] = [
    ({"model": "{}/none"}, "model: no folder at"),
    ({"model": "./none"}, "model: no folder at"),
    ({"model": "Qwen-Image"}, "it is no hub id"),
    ({"model": "{}/data"}, "holds no model_index.json"),
    ({"revision": "main"}, "revision (main) belongs to a hub id"),
    ({"data": "{}/none"}, "data: no folder at"),
    ({"data": "{}/model"}, "data: no shards in"),
    ({"deepspeed": "{}/none.json"}, "none.json; this project brings ds_configs/zero2.json, ds_configs/zero2_offload"),
    ({"lora_checkpoint": "{}/none"}, "lora_checkpoint: no file at"),
    ({"resume": "{}/none"}, "resume: no checkpoint at"),
    ({"vae_path": "{}/*.bin"}, "vae_path: nothing matches"),
    ({"output_path": "{}/z.json/run"}, "output_path: "),
]


@pytest.mark.parametrize(("changes", "message"), PATH_ERRORS, ids=[f"{changes}" for changes, _ in PATH_ERRORS])
def test_a_wrong_path_is_named(files: dict[str, Path], tmp_path: Path, changes: dict[str, str], message: str) -> None:
    options = {name: text.format(tmp_path) for name, text in changes.items()}
    with pytest.raises((OSError, ValueError), match=re.escape(message)) as caught:
        check_paths(make_config(**files | options))
    assert "\n" not in str(caught.value)


def test_the_projects_own_deepspeed_files_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("zero2.json", "ds_configs/zero3_offload.json"):
        found = parse([*REQUIRED, "--deepspeed", name]).deepspeed
        assert found.is_file() and found.name == Path(name).name
        assert capsys.readouterr().out == f"deepspeed: no {name} here, so this project's own is taken: {found}\n"
    (tmp_path / "zero2.json").touch()
    for name in ("zero2.json", "elsewhere/zero2.json", "ds_configs/zero9.json", str(tmp_path / "zero3.json")):
        assert parse([*REQUIRED, "--deepspeed", name]).deepspeed == Path(name)
    assert not capsys.readouterr().out


def test_a_folder_without_permission_is_named(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="output_path: no permission to write in"):
        check_paths(make_config(**files))
