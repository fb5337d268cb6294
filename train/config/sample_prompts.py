"""What images are made of: prompts as texts, or in a file that says more about each. For training and train/sample.py.

    - a lighthouse at dusk                        # prompts.yaml: a text alone, or
    - prompt: a lighthouse in a storm             # names as train/sample.py's flags
      negative_prompt: blurry
      width: 768
      height: 1152
      true_cfg_scale: 3.5
      num_inference_steps: 20
      seed: 7
      lora_strength: 0.8
    - prompt: make the cup blue                   # for edit models
      source_image: [cup.jpg]                     # or one name; up to three for -2509 and -2511
      source_pixels: 1048576                      # the area that they are stretched to

The same as JSON, one object (or text) a line, in prompts.jsonl. What isn't given is as the flags say; an image with a source
image and no size of its own has that image's, as inference does it. No torch here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

from annotated_types import Ge, Interval

from files.shown import shown
from qwen_image.encoders.source_images import size_as_source
from qwen_image.model.family import SOURCE_AREA, SOURCE_STEP
from train.config.typed_fields import Count, Number, Pixels, convert, did_you_mean

SUFFIXES = (".yaml", ".yml", ".jsonl")
HIGHEST_SEED = 2**63 - 1  # torch.Generator takes no more


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """One image: height × width pixels, in so many denoising steps under guidance (1: none), from the noise of `seed`.

    `lora_strength` is what the LoRA's update is multiplied with.
    """

    prompt: Annotated[str, "text"]
    negative_prompt: Annotated[str, "text"] = " "
    height: Annotated[Pixels, "pixels"] = 1024
    width: Annotated[Pixels, "pixels"] = 1024
    num_inference_steps: Annotated[Count, "steps"] = 50
    true_cfg_scale: Annotated[Annotated[float, Ge(1.0)], "guidance"] = 4.0
    seed: Annotated[Annotated[int, Interval(ge=0, le=HIGHEST_SEED)], "of the noise"] = 0
    lora_strength: Annotated[Number, "of the LoRA"] = 1.0
    source_image: Annotated[tuple[str, ...], "files"] = ()
    source_pixels: Annotated[Annotated[int, Ge(SOURCE_STEP**2)], "area of source images"] = SOURCE_AREA

    @property
    def guided(self) -> bool:
        """Whether each step asks the model twice."""
        return self.true_cfg_scale > 1

    @property
    def passes(self) -> int:
        """Forward passes of the transformer."""
        return self.num_inference_steps * (1 + self.guided)

    def facts(self) -> dict[str, Any]:
        """As it stands in the image's file; JSON."""
        found = asdict(self) | {"source_image": list(self.source_image)}
        return found if self.source_image else {n: v for n, v in found.items() if not n.startswith("source_")}

    def of_its_source(self) -> "SamplePrompt":
        """With the size that inference gives an edit: the last source image's (Qwen-Image-Edit has but one).

        Raises FileNotFoundError or ValueError for a file that isn't there or is no image.
        """
        if not self.source_image:
            return self
        width, height = size_as_source(Path(self.source_image[-1]).expanduser(), self.source_pixels)
        return replace(self, width=width, height=height)


class Told(NamedTuple):
    """A text with the source images that it is encoded with."""

    text: str
    source_image: tuple[str, ...]
    source_pixels: int


def tell(sample: SamplePrompt) -> tuple[Told, Told]:
    """A sample's prompt and negative prompt."""
    sources = sample.source_image, sample.source_pixels
    return Told(sample.prompt, *sources), Told(sample.negative_prompt, *sources)


HINTS: dict[str, Any] = get_type_hints(SamplePrompt, include_extras=True)


def is_prompt_file(text: str) -> bool:
    """Whether a prompt on the command line stands for a file of prompts: it ends as one does."""
    return text.endswith(SUFFIXES)


def read_prompts(
    texts: Sequence[str], defaults: SamplePrompt, count_seeds: bool = False, sized: bool = True
) -> tuple[SamplePrompt, ...]:
    """The images that `texts` ask for: prompts, or files of them. `count_seeds`: those not given count up from the default's.

    `sized`: the default's size is meant for edits, too. Raises FileNotFoundError, and ValueError with one line that names the
    file, the line and what is wrong there.
    """
    found: list[SamplePrompt] = []
    for text in texts:
        entries = _read_file(Path(text).expanduser()) if is_prompt_file(text) else iter([({"prompt": text}, "")])
        for entry, place in entries:
            given = {name: _checked(name, value, place) for name, value in entry.items()}
            seed = (defaults.seed + len(found) * count_seeds) % (HIGHEST_SEED + 1)
            asked = replace(defaults, **({"seed": seed} | given))
            found.append(asked if sized or {"height", "width"} & given.keys() else asked.of_its_source())
    return tuple(found)


def _checked(name: str, value: Any, place: str) -> Any:
    if name not in HINTS:
        raise ValueError(f"{place}: unknown name {shown(repr(name))}{did_you_mean(str(name), HINTS)}")
    try:
        checked = convert(value, HINTS[name])
    except ValueError as error:
        raise ValueError(f"{place}: {name} {error}".removeprefix(": ")) from None
    if name == "prompt" and not checked.strip():
        raise ValueError(f"{place}: the prompt is empty".removeprefix(": "))
    return checked


def _read_file(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each prompt of a file as a mapping, with its place for messages."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no file of prompts at {shown(path)} (a prompt that ends in {', '.join(SUFFIXES)} is taken for one)"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)} is not UTF-8 text: {error}") from None
    entries = list(_json_lines(path, text) if path.suffix == ".jsonl" else _yaml_list(path, text))
    if not entries:
        raise ValueError(f"{shown(path)} holds no prompts")
    for entry, place in entries:
        if isinstance(entry, str):
            entry = {"prompt": entry}
        if not isinstance(entry, dict) or "prompt" not in entry:
            raise ValueError(
                f"{place}: each is a text or has a prompt, with any of {', '.join(f.name for f in fields(SamplePrompt)[1:])}; "
                f"got {shown(repr(entry), 80)}"
            )
        yield entry, place


def _json_lines(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line), f"{shown(path)}, line {number}"
            except ValueError as error:
                raise ValueError(f"{shown(path)}, line {number} is no JSON: {error}") from None


def _yaml_list(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    import yaml

    try:
        root, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{shown(path)} is no YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return
    if not isinstance(root, yaml.SequenceNode):
        raise ValueError(f"{shown(path)} must be a list of prompts, each beginning with a dash")
    for node, entry in zip(root.value, content, strict=True):
        yield entry, f"{shown(path)}, line {node.start_mark.line + 1}"
