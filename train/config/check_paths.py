"""Every path of a configuration, looked at before anything heavy is read."""

import glob
import math
import os
import re
import socket
from importlib.util import find_spec
from pathlib import Path

from files.shown import shown
from train.config.optimizer_args import check_package
from train.config.run_files import lora_file
from train.config.train_config import TrainConfig

LARGEST_WEIGHT = 1e6  # of a LoRA file: what it changes has values of about 1, and float32 ends at 3e38
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"  # of the checkout, or of the installed package


def find_deepspeed(path: Path) -> Path:
    """`path`; or, where there is no such file, this project's own of that name (`zero2.json`, `ds_configs/zero2.json`)."""
    ours = DS_CONFIGS / path.name
    if not path.exists() and path.parent in (Path(), Path("ds_configs")) and ours.is_file():
        return ours
    return path


def check_paths(config: TrainConfig) -> None:
    """Look at every path of `config` before anything heavy is read; creates nothing.

    Raises FileNotFoundError, NotADirectoryError or PermissionError with one line that names the option and the path.
    """
    if not config.deepspeed.is_file():
        ours = ", ".join(f"ds_configs/{path.name}" for path in sorted(DS_CONFIGS.glob("*.json")))
        raise FileNotFoundError(f"deepspeed: no file at {config.deepspeed}; this project brings {ours}")
    check_model(config)
    if config.lora_checkpoint is not None and not lora_file(config.lora_checkpoint).is_file():
        raise FileNotFoundError(f"lora_checkpoint: no file at {shown(config.lora_checkpoint)}")
    if config.resume not in ("auto", "never") and not Path(config.resume).exists():
        raise FileNotFoundError(f"resume: no checkpoint at {config.resume} (or say auto, or never)")
    for text in config.preset_lora_path:
        if not split_weight(text)[0].is_file():
            raise FileNotFoundError(f"preset_lora_path: no file at {split_weight(text)[0]}")
    config.samples()
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard: the package is missing: pip install tensorboard (this project's extra [tensorboard])"
        )
    check_package(config.optimizer)
    check_data(config)
    if config.local_model_copy is not None:
        local_folder(config.local_model_copy)
    check_writable(config.output_path)
    check_apart(config.output_path, model=config.model)
    for option, sources in (("data", config.data_sources), ("prior_data", config.prior_sources)):
        for source in sources:
            check_apart(config.output_path, **{option: source.address})


def check_data(config: TrainConfig) -> None:
    """`data` and `prior_data` are folders with shards, or something that only reading can tell about: remote, or a stream."""
    for option, sources in (("data", config.data_sources), ("prior_data", config.prior_sources)):
        for address in (source.address for source in sources):
            if "://" in address:
                check_writable(config.data_cache_path, "data_cache_path")
            elif config.loader == "indexed" or not (address.startswith("pipe:") or "{" in address):
                check_shards(option, Path(address))

    both = {place_of(source.address) for source in config.data_sources} & {
        place_of(source.address) for source in config.prior_sources
    }
    if both:
        raise ValueError(
            f"prior_data: {shown(min(both))} is data too: the prior is of other pictures than the subject's"
        )


def place_of(address: str) -> str:
    """One text for all spellings of a folder."""
    return address.rstrip("/") if "://" in address else str(Path(address).expanduser().resolve())


def check_shards(option: str, folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{option}: no folder at {folder}")
    if not (folder / "manifest.json").is_file() and not any(folder.glob("*.tar")):
        raise FileNotFoundError(
            f"{option}: no shards in {folder}; data_prep/make_shards.py makes them from an image folder"
        )


def split_weight(text: str) -> tuple[Path, float]:
    """`FILE:WEIGHT` or `FILE` (weight 1) as a pair; a run folder for its file (run_files.lora_file). Raises ValueError for
    a weight that is no finite number, FileNotFoundError for a run folder without a LoRA."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return lora_file(Path(text).expanduser()), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{text}: what follows the last colon is the LoRA's weight and must be a number, got {weight!r}"
        )
    if abs(number) > LARGEST_WEIGHT:
        raise ValueError(f"{text}: a LoRA's weight must lie in -{LARGEST_WEIGHT:g} … {LARGEST_WEIGHT:g}, got {weight}")
    return lora_file(Path(path).expanduser()), number


def check_model(config: TrainConfig) -> None:
    """`model` is a folder or looks like a hub id, and each component path matches something."""
    model = Path(config.model).expanduser()
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", config.model) is not None and not config.model.startswith(".")
    if model.exists():
        if not (model / "model_index.json").is_file() and not (config.transformer_path and config.vae_path):
            raise FileNotFoundError(f"model: {model} holds no model_index.json, so it is no Hugging Face model folder")
        if config.revision is not None:
            raise ValueError(f"revision ({config.revision}) belongs to a hub id, but model is the folder {model}")
    elif not hub_id:
        raise FileNotFoundError(f"model: no folder at {config.model}, and it is no hub id like Qwen/Qwen-Image")
    for name in ("transformer_path", "text_encoder_path", "vae_path", "tokenizer_path"):
        pattern = getattr(config, name)
        if pattern is not None and not glob.glob(os.path.expanduser(pattern)):
            raise FileNotFoundError(f"{name}: nothing matches {pattern}")


def local_folder(option: Path) -> Path:
    """The folder that `--local_model_copy` means on this node: $VARIABLES are its own. Raises ValueError for unknown ones."""
    text = os.path.expandvars(option.expanduser())
    if unknown := re.search(r"\$\{?\w+\}?", text):
        raise ValueError(
            f"local_model_copy: {unknown[0]} is not set on {socket.gethostname()}; give a folder on a disk of the node"
        )
    return Path(text)


def check_apart(output: Path, **read: str) -> None:
    """What is written lies beside what is read, not in it, around it or over it.

    `read`: option → folder; what is no folder here (a hub id, a URL) can't be met. Links are followed. Raises ValueError.
    """
    there = output.expanduser().resolve()
    for option, text in read.items():
        folder = Path(text).expanduser()
        if not folder.is_dir():
            continue
        source = folder.resolve()
        places = {"is": there == source, "lies in": source in there.parents, "lies around": there in source.parents}
        for how, found in places.items():
            if found:
                raise ValueError(
                    f"output_path: {shown(output)} {how} {option} ({shown(folder)}): choose another folder"
                )


def check_writable(folder: Path, option: str = "output_path") -> None:
    """`folder`, or the nearest parent that exists, is a folder we may write to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{option}: {nearest} is a file, so {folder} cannot be a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{option}: no permission to write in {nearest}")
