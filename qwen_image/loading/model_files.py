"""From a hub id, a local folder, single files or globs to the files of a model's components; no weight is read.

The family with Qwen-Image's transformer is supported (qwen_image/model/family.py); relatives are refused before anything large
is read.
"""

import glob
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from files.json_object import read_json_object
from files.plain_name import plain_name
from files.shown import shown
from qwen_image.model.family import EDIT_2509, EDIT_2511, MEMBERS, TEXT_TO_IMAGE, Member
from qwen_image.model.sizes import TransformerConfig

FINGERPRINT_PIECES = 64
COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
_UNSUPPORTED_FAMILIES = re.compile(r"qwen-image-(2\.1|layered)", re.IGNORECASE)
TIMESTEP_ZERO = "__index_timestep_zero__"  # an empty tensor by which ComfyUI marks files of Qwen-Image-Edit-2511


@dataclass(frozen=True)
class Component:
    """One part of the model: its configuration folder and its weight files (none for tokenizer and scheduler)."""

    folder: Path
    weights: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ModelFiles:
    """Where each component lies, and what to call the model in metadata."""

    name: str  # the hub id, or the local folder's name
    revision: str | None  # commit hash of a hub snapshot; None for local folders
    components: dict[str, Component]
    member: Member = TEXT_TO_IMAGE
    preprocessor: Path | None = None  # an edit model's preprocessor_config.json
    picture_positions: Literal["grid", "consecutive"] = "grid"  # qwen_image/encoders/text_encoder.py

    def __getitem__(self, component: str) -> Component:
        return self.components[component]

    def fingerprint(self, component: str) -> str:
        """16 hex digits over configuration, file sizes and FINGERPRINT_PIECES pieces of 4 KiB of each weight file.

        Cheap, not proof: two trained models of one architecture have equal headers, but not equal pieces.
        """
        config = self[component].folder / "config.json"
        digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
        digest.update(weights_fingerprint(self[component].weights).encode())
        return digest.hexdigest()[:16]


def weights_fingerprint(files: Iterable[Path], blocks: int = FINGERPRINT_PIECES) -> str:
    """sha256 that tells weight files apart without reading all of them: sizes and `blocks` pieces of 4 KiB of each.

    Two checkpoints of one architecture have equal headers and differ in the values, which the pieces catch.
    """
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with open(path, "rb") as file:
            for block in range(blocks):
                file.seek(size * block // blocks)
                digest.update(file.read(4096))
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelSource:
    """What a user says of the model: a folder in the Hugging Face layout or a hub id, and overrides of components.

    A `*_path` is a folder, a safetensors file or a glob of them; files take their configuration from `model`. `model_family`
    is a key of qwen_image.model.family.MEMBERS, or "auto" (None too): as the files tell.
    """

    model: str
    revision: str | None = None
    model_family: str | None = None
    transformer_path: str | None = None
    text_encoder_path: str | None = None
    vae_path: str | None = None
    tokenizer_path: str | None = None
    picture_positions: Literal["grid", "consecutive"] | None = None

    @classmethod
    def from_options(cls, options: Any) -> "ModelSource":
        """The source that an object with these attributes (parsed flags, a configuration) describes.

        An attribute that it lacks is None: not every command has a flag for every component (model_flags.py).
        """
        values: dict[str, Any] = {field.name: getattr(options, field.name, None) for field in fields(cls)}
        return cls(**values)

    def override(self, component: str) -> str | None:
        return getattr(self, f"{component}_path", None)


def resolve_model(
    source: ModelSource, components: tuple[str, ...] = COMPONENTS, *, local_only: bool = False
) -> ModelFiles:
    """Find the files of `components`, downloading a hub id's snapshot (unless `local_only`).

    Raises FileNotFoundError for what is missing and ValueError for models of other families.
    """
    root, name, commit = _model_folder(source, components, local_only)
    found = {c: _component(root, c, source.override(c)) for c in components}
    preprocessor = root / "processor" / "preprocessor_config.json"
    return ModelFiles(
        name,
        commit,
        found,
        _member(root, source, found.get("transformer")),
        preprocessor if preprocessor.is_file() else None,
        source.picture_positions or "grid",
    )


def _model_folder(source: ModelSource, components: tuple[str, ...], local_only: bool) -> tuple[Path, str, str | None]:
    model = source.model
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder, folder.resolve().name, None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise FileNotFoundError(
            f"model folder {model} does not exist; give a folder in the Hugging Face layout or a hub id such as Qwen/Qwen-Image"
        )
    if _UNSUPPORTED_FAMILIES.search(model):
        raise ValueError(
            f"{model} is not supported: only Qwen-Image, Qwen-Image-2512 and Qwen-Image-Edit, -2509, -2511 can be trained"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = _patterns(source, components)
    try:
        snapshot = Path(
            snapshot_download(model, revision=source.revision, allow_patterns=patterns, local_files_only=local_only)
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{model} is no local folder and could not be fetched from the hub: {reason}"
        ) from error
    return snapshot, model, snapshot.name


def _patterns(source: ModelSource, components: tuple[str, ...]) -> list[str]:
    """Of a hub repository's files, those that `components` need."""
    patterns = ["model_index.json", "transformer/config.json", "processor/preprocessor_config.json"]
    for component in components:
        patterns += [f"{component}/*.json", f"{component}/*.txt", f"{component}/*.jinja"]
        if not source.override(component):
            patterns.append(f"{component}/*.safetensors")
    return patterns


def is_here(source: ModelSource, components: tuple[str, ...]) -> bool:
    """Whether `resolve_model` would download nothing: always so for a folder, whatever it lacks."""
    if Path(source.model).expanduser().is_dir():
        return True
    try:
        resolve_model(source, components, local_only=True)
    except FileNotFoundError:
        return False
    return True


def to_download(source: ModelSource, components: tuple[str, ...]) -> list[tuple[str, int]]:
    """Files of a hub id that `resolve_model` would download, with their bytes. Asks the hub, and writes nothing.

    Raises FileNotFoundError, with one line, where the hub doesn't know the model or can't be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    try:
        found = HfApi().model_info(source.model, revision=source.revision, files_metadata=True)
    except Exception as error:  # whatever the network brings
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{source.model}: the hub can't be asked for its files: {shown(reason, 160)}"
        ) from error
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    wanted = filter_repo_objects(sizes, allow_patterns=_patterns(source, components))
    there = {name for name in sizes if isinstance(try_to_load_from_cache(source.model, name, revision=found.sha), str)}
    return [(name, sizes[name]) for name in wanted if name not in there]


def presumed_member(source: ModelSource) -> Member:
    """Of a hub id whose files are not here yet: by --model_family, else by its name."""
    if source.model_family not in (None, "auto"):
        return MEMBERS[source.model_family or ""]
    named = re.search(r"edit(-25(09|11))?", source.model, re.IGNORECASE)
    return MEMBERS[named[0].lower()] if named else TEXT_TO_IMAGE


def _member(root: Path, source: ModelSource, transformer: Component | None) -> Member:
    """Which member of the family: by --model_family, else by ComfyUI's mark, the pipeline's class and `zero_cond_t`.

    Raises ValueError for another family, and where the files contradict each other or the flag.
    """
    index = root / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{source.model}: model_index.json is missing, so this is no model folder in the Hugging Face layout"
        )
    pipeline = read_json_object(index).get("_class_name")
    if not any(pipeline in member.pipelines for member in MEMBERS.values()):
        raise ValueError(
            f"{source.model} is a {pipeline}; only models of QwenImagePipeline (Qwen-Image, Qwen-Image-2512), "
            "QwenImageEditPipeline and QwenImageEditPlusPipeline can be trained so far"
        )
    asked = MEMBERS[source.model_family] if source.model_family not in (None, "auto") else None
    if transformer is not None and source.transformer_path and _is_marked(transformer):
        if asked not in (None, EDIT_2511):
            raise ValueError(
                f"{source.transformer_path} holds {TIMESTEP_ZERO}, which marks {EDIT_2511.name}, but --model_family says "
                f"{source.model_family}"
            )
        return EDIT_2511
    if asked is not None:
        return asked
    config = (transformer.folder if transformer is not None else root / "transformer") / "config.json"
    zero_cond_t = bool(config.is_file() and read_json_object(config).get("zero_cond_t"))
    if pipeline in EDIT_2511.pipelines:
        if not config.is_file():
            raise FileNotFoundError(
                f"{config} is missing, which would tell {EDIT_2509.name} from {EDIT_2511.name}: say --model_family edit-2509 "
                "or edit-2511"
            )
        return EDIT_2511 if zero_cond_t else EDIT_2509
    if zero_cond_t:
        raise ValueError(
            f"{config}: zero_cond_t is set, which marks {EDIT_2511.name}, but {index} names a {pipeline}: say --model_family "
            "edit-2511 if it is one"
        )
    return next(member for member in MEMBERS.values() if pipeline in member.pipelines)


def _is_marked(transformer: Component) -> bool:
    """Whether the weights carry ComfyUI's mark of Qwen-Image-Edit-2511; reads headers alone."""
    from qwen_image.loading.safetensors_ranges import read_headers

    try:
        return TIMESTEP_ZERO in read_headers(transformer.weights)
    except ValueError:  # a damaged file is told of by whoever reads it
        return False


def _component(root: Path, component: str, override: str | None) -> Component:
    folder = root / component
    if override is None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{root}: component {component}/ is missing; copy it there or give its path by flag"
            )
        return Component(folder, _folder_weights(folder, component))
    path = Path(override).expanduser()
    if path.is_dir():
        return Component(path, _folder_weights(path, component))
    files = tuple(Path(match) for match in sorted(glob.glob(str(path))))
    if not files:
        raise FileNotFoundError(f"--{component}_path {override} matches no file")
    wrong = [file.name for file in files if file.suffix != ".safetensors"]
    if wrong:
        raise ValueError(f"--{component}_path {override}: {wrong[0]} is no .safetensors file")
    return Component(folder, files)


def _folder_weights(folder: Path, component: str) -> tuple[Path, ...]:
    """The safetensors files of one component's folder: those of its index, or the only ones there."""
    if component in ("tokenizer", "scheduler"):
        return ()
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        weight_map = read_json_object(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{indexes[0]} has no weight_map; download it again")
        names = sorted({plain_name(name, indexes[0]) for name in weight_map.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, first {shown(missing[0])}"
            )
        return tuple(folder / name for name in names)
    files = tuple(path for path in sorted(folder.glob("*.safetensors")) if ".fp16." not in path.name)
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors file found")
    return files


def transformer_config(files: ModelFiles) -> TransformerConfig:
    """Raises FileNotFoundError without a configuration, ValueError for a relative's."""
    config_file = files["transformer"].folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file} is missing; single files take their configuration from --model's folder"
        )
    return replace(TransformerConfig.from_config_file(config_file), zero_cond_t=files.member.zero_cond_t)
