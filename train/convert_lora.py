"""Write a LoRA file as another program spells it. docs/lora_files.md says which program reads which spelling.

    python train/convert_lora.py RUN/lora.safetensors style.safetensors --format comfyui
    python train/convert_lora.py dora.safetensors dora_comfyui.safetensors --format comfyui --model Qwen/Qwen-Image

Any spelling that this project reads goes in. The update stays what it was: alpha/rank is multiplied into lora_B (a LoKr's
w1), in the file's own dtype if that is exact, else in float32. A DoRA needs the base that it was trained on (--model, and
--transformer_path if it is another one): ComfyUI divides by other lengths than PEFT does, and reads it from v0.3.77 on.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.shown import one_line, shown, tolerant_output
from qwen_image.loading.model_flags import MODEL_HELP

if TYPE_CHECKING:
    from qwen_image.loading.model_files import ModelFiles
    from train.lora.lora_file import Layer, LoraFile

FORMATS = ("diffusers", "comfyui", "diffsynth", "kohya")
STALE = (
    "format",
    "dora_scale",
    "lora_adapter_metadata",
    "lora_scale_in_lora_B",
    "lokr_scale_in_w1",
)  # true of IN alone


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "input", metavar="IN", type=Path, help="LoRA file in any spelling that this project reads, or a run folder"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="file to write; must not exist")
    parser.add_argument("--format", required=True, choices=FORMATS, help="whose spelling OUT has")
    parser.add_argument("--model", help=f"what IN was trained on (a DoRA needs it): {MODEL_HELP['model']}")
    for name in ("revision", "transformer_path"):
        parser.add_argument(f"--{name}", help=MODEL_HELP[name])
    options = parser.parse_args(argv)
    tolerant_output()
    try:
        for line in convert(
            options.input, options.output, options.format, options.model, options.revision, options.transformer_path
        ):
            print(one_line(line))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def convert(
    source: Path,
    output: Path,
    lora_format: str,
    model: str | None = None,
    revision: str | None = None,
    transformer_path: str | None = None,
) -> list[str]:
    """Write `source` to `output` in the spelling of `lora_format`; returns lines for people.

    Raises what `read_lora` does (naming `--model` where another could be meant), FileExistsError, and ValueError for a DoRA
    whose base isn't given or that the spelling can't hold.
    """
    import torch

    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.loading.weights import empty_transformer
    from qwen_image.model.sizes import TransformerConfig
    from qwen_image.model.transformer import QwenImageTransformer
    from train.lora.lokr import SCALED, is_lokr
    from train.lora.lora_file import read_lora, write_lora
    from train.lora.lora_format import SPELLINGS

    if output.exists():
        raise FileExistsError(f"OUT: {shown(output)} exists already")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"OUT: there is no folder {shown(output.absolute().parent)}")
    files = None
    if model is not None:
        files = resolve_model(ModelSource(model, revision, transformer_path=transformer_path), ("transformer",))
        transformer = empty_transformer(files)
    else:
        with torch.device("meta"):
            transformer = QwenImageTransformer(TransformerConfig())
    try:
        lora = read_lora(source, transformer)
    except ValueError as error:
        if model is not None or "another model" not in str(error):
            raise
        raise ValueError(
            f"{error}; without --model a LoRA is taken as one of Qwen-Image: give the model it is of"
        ) from None
    layers, lines = lora.layers, list(lora.notes)
    if lora.is_dora:
        if not SPELLINGS[lora_format].endings.keys() & {"lora_magnitude_vector", "dora_scale"}:
            raise ValueError(
                f"{shown(source)} is a DoRA, which {lora_format} has no spelling for: merge it into the base with "
                "train/merge_lora.py"
            )
        layers, more = with_magnitudes(lora, lora_format, source, transformer, files)
        lines += more
    lokr = any(map(is_lokr, layers.values()))
    if lokr and not is_lokr(SPELLINGS[lora_format].endings):
        raise ValueError(
            f"{shown(source)} is a LoKr, which {lora_format} has no spelling for: merge it into the base with "
            "train/merge_lora.py"
        )
    exact = all(
        torch.equal(tensor.to(lora.dtype).float(), tensor)
        for layer in layers.values()
        for kind, tensor in layer.items()
        if kind in SCALED
    )
    dtype = lora.dtype if exact else torch.float32
    kept = {key: value for key, value in lora.metadata.items() if key not in STALE}
    included = {"lokr_scale_in_w1": "included"} if lokr else {"lora_scale_in_lora_B": "included"}
    write_lora(output, layers, lora_format, kept | included, dtype)
    rounded = "w1" if lokr else "lora_B"
    said = (
        "" if dtype == lora.dtype else f" (float32, since {name_of(lora.dtype)} would round {rounded} times its scale)"
    )
    return [*lines, f"wrote {shown(output)}: {len(layers)} layers as {lora_format} spells them, {name_of(dtype)}{said}"]


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def with_magnitudes(
    lora: "LoraFile", lora_format: str, source: Path, transformer: Any, files: "ModelFiles | None"
) -> "tuple[dict[str, Layer], list[str]]":
    """The layers of a DoRA with the magnitudes that the spelling stores, made from the base's weights; lines for people."""
    import torch

    from qwen_image.loading.safetensors_ranges import read_whole
    from qwen_image.loading.weights import match_weights
    from train.lora.dora import dora_scale, magnitude

    own, wanted = "lora_magnitude_vector", "dora_scale"
    if lora_format != "comfyui":
        own, wanted = wanted, own
    if not any(own in layer for layer in lora.layers.values()):
        return lora.layers, []
    if files is None:
        raise ValueError(f"{shown(source)} is a DoRA: its magnitudes depend on the base, so give it with --model")
    lines = []
    trained_on, given = lora.metadata.get("base_model_fingerprint"), files.fingerprint("transformer")
    if lora.metadata.get("preset_loras") and trained_on == given:
        raise ValueError(
            f"{shown(source)} was trained on a base with preset LoRAs merged in ({shown(lora.metadata['preset_loras'])}): "
            "merge them with train/merge_lora.py and give the result with --transformer_path"
        )
    if trained_on not in (None, given) and not lora.metadata.get("preset_loras"):
        lines.append(f"warning: {shown(source)} was trained on another base ({trained_on}) than this one ({given})")
    stored = match_weights(transformer, files["transformer"].weights)
    layers = {}
    for name, layer in lora.layers.items():
        layer = dict(layer)
        if own in layer:
            length, matrices = layer.pop(own), (layer["lora_A"], layer["lora_B"])
            weight = read_whole(stored[f"{name}.weight"], torch.float32)
            made = (
                dora_scale(weight, *matrices, length) if own != "dora_scale" else magnitude(weight, *matrices, length)
            )
            layer[wanted] = made
        layers[name] = layer
    return layers, lines


if __name__ == "__main__":
    sys.exit(main())
