"""Photos to a LoRA in one go: pack, encode, train on every GPU of this machine, draw samples.

    python train/make_lora.py --photos PHOTOS --model Qwen/Qwen-Image --output_path MADE
    python train/make_lora.py --photos PHOTOS --model MODEL --output_path MADE --max_steps 1000 --base_precision float8
    python train/make_lora.py --photos PHOTOS --model MODEL --output_path MADE --prompt "a photo of my cat on the moon"

Each image has its caption beside it, or there is a metadata.csv (docs/data.md). The single commands are printed before they
run: copy one to change what this script doesn't ask for. MADE receives shards/, shards.html, encoded/, run/ (the run folder,
with lora.safetensors and report.html) and samples/. What is done is not done again: start the same command after an
interruption, or with a larger --max_steps. All flags but those below are train_lora.py's. The exit code is that of the
stage that failed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_prep.encoding.caption_variants import CaptionOptions
from files.atomic_files import write_file
from files.shown import one_line, shown, tolerant_output
from qwen_image.loading.model_flags import add_model_flags, model_options
from train.config.check_paths import check_apart
from train.process.exit_codes import BAD_INPUT, DONE, INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
STATE = "make_lora.json"  # in MADE: what the photos were, and which stage was done by which command
PROMPTS = 4  # captions that samples are drawn of where no --prompt is given
STEPS = 1000
VARIANTS = 8  # of each caption, where a flag leaves something to chance
ENCODERS = ("text_encoder", "vae", "tokenizer")
COMPONENTS = ("transformer", *ENCODERS)
DEFAULTS = {"max_steps": STEPS, "deepspeed": ROOT / "ds_configs" / "zero2.json"}


class StageFailed(Exception):
    """A command ended with an error, which stands above in its own words."""

    def __init__(self, title: str, code: int) -> None:
        super().__init__(f"{title}: ended with exit code {code}; its own message stands above")
        self.code = code


def main(argv: list[str] | None = None) -> int:
    tolerant_output()
    own, flags = build_parser().parse_known_args(argv)
    try:
        make(own, flags)
    except StageFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return failed.code
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    return DONE


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of images with captions")
    add_model_flags(parser, *COMPONENTS)
    parser.add_argument("--output_path", type=Path, required=True, metavar="MADE", help="folder for everything")
    parser.add_argument(
        "--caption_variants",
        type=int,
        help=f"so many forms of each caption are encoded, of which training draws ({VARIANTS} where a flag asks for chance)",
    )
    parser.add_argument("--max_pixels", type=int, help="area of the training images (make_shards.py's default)")
    parser.add_argument(
        "--prompt",
        action="append",
        help=f"of the sample images; repeat the flag for several (default: {PROMPTS} of the captions)",
    )
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of the sample images (20)")
    parser.add_argument("--gpus", type=int, help="how many train and encode (default: all)")
    return parser


def make(own: argparse.Namespace, flags: list[str]) -> None:
    """All stages one after the other. Raises StageFailed, and ValueError or OSError for what can't work from the start."""
    check_apart(own.output_path, photos=str(own.photos), model=own.model)
    made = own.output_path.resolve()
    shards, encoded, run, samples = (made / name for name in ("shards", "encoded", "run", "samples"))
    train, captions_are = train_flags(own, flags, encoded, run)
    gpus = number_of_gpus() if own.gpus is None else own.gpus
    state = State.open(made, own.photos)
    pack = {"dataset_base_path": own.photos.resolve(), "output_path": shards, "max_pixels": own.max_pixels}
    state.stage("pack the photos", command([], "data_prep/make_shards.py", **pack), shards / "manifest.json")
    look = command([], "data_prep/check_shards.py", str(shards), report=made / "shards.html")
    state.stage("look at what was packed", look, made / "shards.html")
    variants = own.caption_variants or (VARIANTS if captions_are.varies else None)
    encode = command(
        launcher(gpus),
        *("data_prep/encode_shards.py", *shlex.split(captions_are.flags())),
        **model_of(own, *ENCODERS),
        data=shards,
        output_path=encoded,
        caption_variants=variants,
    )
    state.stage("encode: latents and prompt embeddings", encode, encoded / "manifest.json")
    state.stage("train", [*launcher(gpus), "train/train_lora.py", *train], run / "lora.safetensors")
    prompts = prompts_of(shards, made, own.prompt)
    draw = command(
        [],
        *("train/sample.py", "--compare", *(f"--prompt={prompt}" for prompt in prompts)),
        **model_of(own, *COMPONENTS),
        lora=run / "lora.safetensors",
        output_path=samples,
        num_inference_steps=own.num_inference_steps,
    )
    state.stage("draw without and with the LoRA", draw, samples / "grid.png", newer_than=run / "lora.safetensors")
    print(f"\ndone: {shown(run / 'lora.safetensors')}; look at {shown(samples / 'grid.png')}", end="")
    print(f" and {shown(run / 'report.html')}" if (run / "report.html").exists() else "")


def train_flags(
    own: argparse.Namespace, flags: list[str], encoded: Path, run: Path
) -> tuple[list[str], CaptionOptions]:
    """The trainer's flags, checked by the trainer's own parser: a typing error must not wait until all is encoded. And what
    they make of captions, which is done in encoding."""
    from train.config.command_line import parse

    given = {flag.split("=")[0].removeprefix("--") for flag in flags}
    if taken := given & {"data", "output_path"}:
        raise ValueError(f"--{sorted(taken)[0]} can't be given: this script chooses it, in --output_path")
    defaults = {} if given & {"config"} else DEFAULTS
    if given & {"num_epochs", "max_steps"}:
        defaults = {name: value for name, value in defaults.items() if name != "max_steps"}
    all_flags = [word for name, value in defaults.items() if name not in given for word in (f"--{name}", str(value))]
    model = [word for name, text in model_of(own, *COMPONENTS).items() for word in (f"--{name}", text)]
    all_flags += [*model, "--data", str(encoded), "--output_path", str(run), *flags]
    return all_flags, CaptionOptions.from_options(parse(all_flags))


def model_of(own: argparse.Namespace, *components: str) -> dict[str, str]:
    """The model's options that were given, of those that a command which reads `components` has: one model for all stages."""
    return {name: text for name in model_options(*components) if (text := getattr(own, name)) is not None}


def command(start: list[str], script: str, *arguments: str, **options: Any) -> list[str]:
    """The words of a command; options that are None are left out."""
    given = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return [*(start or ["python"]), script, *arguments, *(word for pair in given for word in pair)]


def launcher(gpus: int) -> list[str]:
    """What starts a script on so many GPUs. One needs no launcher, which would take 6 to 9 s."""
    if gpus <= 1:
        return ["python"]
    return ["deepspeed", "--num_gpus", str(gpus), "--master_port", str(free_port())]


class State:
    """What was done already, by which command; kept in MADE/make_lora.json."""

    def __init__(self, path: Path, photos: str, done: dict[str, list[str]]) -> None:
        self.path, self.photos, self.done = path, photos, done

    @classmethod
    def open(cls, made: Path, photos: Path) -> State:
        """Raises FileNotFoundError without photos, ValueError when those of an earlier start were others."""
        now, path = listing(photos), made / STATE
        try:
            before = json.loads(path.read_text())
            known, done = before["photos"], before["done"]
        except FileNotFoundError:
            made.mkdir(parents=True, exist_ok=True)
            return cls(path, now, {})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} can't be read ({error}): delete it, and what is done will be looked at again"
            ) from None
        if known != now:
            raise ValueError(
                f"the files in {photos} are not those that {made} was begun with: choose another --output_path, or delete "
                f"{made} to begin anew"
            )
        return cls(path, now, done)

    def stage(self, title: str, words: list[str], result: Path, newer_than: Path | None = None) -> None:
        """Run a command unless the same one made `result` before. Raises StageFailed with its exit code."""
        same = words[script_in(words) :]  # on how many GPUs doesn't matter
        is_old = newer_than is not None and result.exists() and result.stat().st_mtime < newer_than.stat().st_mtime
        if self.done.get(title) == same and result.exists() and not is_old:
            print(f"── {title}: done before")
            return
        print(f"\n── {title}\n$ {shlex.join(word.removeprefix(f'{Path.cwd()}{os.sep}') for word in words)}", flush=True)
        start = time.perf_counter()
        code = run_to_the_end(words)
        if code:
            raise StageFailed(title, code)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
        self.done[title] = same
        write_file(self.path, json.dumps({"photos": self.photos, "done": self.done}, indent=1))


def run_to_the_end(words: list[str]) -> int:
    """The command's exit code. Ctrl-C reaches it, too: it is waited for, since it may be saving; a second one ends all."""
    ours = str(Path(sys.executable).parent)  # holds python and deepspeed
    environment = os.environ | {"PATH": os.pathsep.join([ours, os.environ.get("PATH", "")])}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    script = script_in(words)
    words = [*words[:script], str(ROOT / words[script]), *words[script + 1 :]]
    with subprocess.Popen(words, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()


def script_in(words: list[str]) -> int:
    """The place of the script, after its launcher."""
    return next(place for place, word in enumerate(words) if word.endswith(".py"))


def listing(photos: Path) -> str:
    """A digest of the names, sizes and times of change of the files in the folder."""
    if not photos.is_dir():
        raise FileNotFoundError(f"--photos {photos} is no folder")
    files = [path for path in sorted(photos.rglob("*")) if path.is_file()]
    if not files:
        raise FileNotFoundError(f"--photos {photos} holds no files")
    facts = [(str(p.relative_to(photos)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def prompts_of(shards: Path, made: Path, given: list[str] | None) -> list[str]:
    """What samples are drawn of: `given`, or captions of a few packed samples, those that say something, each once.

    Pairs need source images besides: those samples' own, written to MADE/sources with a file of prompts that names them; of
    several given prompts the first has the first sample's, and so on.
    """
    from data_prep.shard_format.shards import ShardReader, members_of, read_index, read_manifest

    index, manifest, reader = read_index(shards), read_manifest(shards), ShardReader(shards)
    sources_of = {bucket.id: bucket.sources for bucket in manifest.buckets}
    found: dict[str, list[bytes]] = {}
    columns = index.shard, index.txt_offset, index.txt_size, index.bucket, index.sources_offset, index.sources_size
    for shard, offset, size, bucket, first, length in zip(*(map(int, column) for column in columns), strict=True):
        text = reader.read(shard, offset, size).decode(errors="replace").strip()
        if text and text not in found:
            found[text] = members_of(reader.read(shard, first, length)) if sources_of[bucket] else []
        if len(found) == PROMPTS:
            break
    reader.close()
    pictures = list(found.values())
    prompts = given or list(found) or ["a photo"]
    if not any(pictures):
        return prompts
    return [str(write_prompts(made, prompts, pictures, suffix=f".{manifest.payload}"))]


def write_prompts(made: Path, prompts: list[str], pictures: list[list[bytes]], suffix: str) -> Path:
    """MADE/samples.yaml, a prompt each with the source images that go with it, which are written to MADE/sources."""
    import yaml

    (made / "sources").mkdir(exist_ok=True)
    entries = []
    for number, prompt in enumerate(prompts):
        paths = []
        for place, image in enumerate(pictures[number % len(pictures)], start=1):
            paths.append(str(made / "sources" / f"{number:03d}-{place}{suffix}"))
            write_file(Path(paths[-1]), image)
        entries.append({"prompt": prompt, "source_image": paths})
    file = made / "samples.yaml"
    write_file(file, yaml.safe_dump(entries, allow_unicode=True, sort_keys=False))
    return file


@functools.cache
def number_of_gpus() -> int:
    """How many torch sees."""
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    """A TCP port that nobody listens on, so that two runs on one machine don't meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
