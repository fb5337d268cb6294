"""`--dry_run`: everything about a run that is known before weights are read, told; nothing is written.

Whatever refuses a run early (data, options, memory, disk, a checkpoint of another run) refuses its dry run in the same words.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.shard_format.shards import Bucket
from files.shown import shown, shown_bytes
from qwen_image.free_memory import GIB
from qwen_image.loading.model_files import ModelSource, is_here, to_download
from qwen_image.model.dtypes import DTYPES
from train.base_model.load_pipeline import check_data
from train.config.train_config import TrainConfig
from train.data.mixture import Mixture
from train.data.shard_dataset import ShardDataset
from train.fit.base_choice import choice_lines, fastest_base
from train.fit.cheapest_change import check_memory
from train.fit.memory_plan import Machine, Setup, plan_memory
from train.loader.from_config import RunData
from train.lora.spec import LoraSpec
from train.process.exit_codes import DONE
from train.process.node_health import CPU_PARAMETERS
from train.process.ranks import Ranks
from train.reporting.data_by_source import data_by_source, lines_by_source
from train.reporting.expected_time import Expectation, expected_time
from train.reporting.start_facts import start_facts, trainable_groups
from train.reporting.story import duration
from train.saving.checkpoints import Checkpoints

MODEL_PARTS, ENCODER_PARTS = ("transformer", "scheduler"), ("text_encoder", "tokenizer", "vae")
BUCKETS = 16
FILES = 8
CARDS = (24, 48, 80)  # GiB, for a machine without a GPU


class Written(NamedTuple):
    """What the run folder will hold: a LoRA file each `save_steps`, sample images each `sample_steps` (None: never)."""

    folder: Path
    file_bytes: int
    save_steps: int
    sample_steps: int | None

    @classmethod
    def from_config(cls, config: TrainConfig, trainable: int) -> "Written":
        every = config.sample_every if config.sample_prompts else None
        return cls(config.output_path, trainable * DTYPES[config.save_dtype].itemsize, config.save_steps, every)

    def lines(self, steps: int, needed: int) -> Iterator[str]:
        """For a run of so many `steps` that saves `needed` bytes."""
        nearest = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        numbered = (steps - 1) // self.save_steps if self.save_steps else 0
        files = "lora.safetensors" + (f" and {numbered:,} of earlier steps, each" if numbered else "")
        pictures = ""
        if self.sample_steps is not None:
            pictures = f", sample images {max(1, steps // self.sample_steps if self.sample_steps else 1):,} times"
        size = shown_bytes(self.file_bytes)
        yield f"files: {files} of {size}, checkpoints{pictures}: {shown_bytes(needed)} without the images"
        free = shown_bytes(shutil.disk_usage(nearest).free)
        yield f"run folder: {shown(self.folder)}{'' if self.folder.exists() else ' (new)'}, {free} free"


def dry_run(
    config: TrainConfig, spec: LoraSpec, setup: Setup, data: RunData, ranks: Ranks, check_room: Callable[[], int]
) -> int:
    """Tell what the run would do; returns the exit code. A collective. Raises what refuses the run.

    `check_room`: of train/saving/run_folder.py for this run.
    """
    accumulation, source, steps_done = config.gradient_accumulation_steps, ModelSource.from_options(config), 0
    if setup.base.here:
        check_data(source, data.dataset, setup.base)
        identity = setup.base.identity() | spec.identity() | data.identity() | config.identity(**data.decided)
        identity |= setup.optimizer.identity()
        checkpoints = Checkpoints.from_config(config, ranks.say)
        found = checkpoints.find(config.resume)
        if checkpoints.is_finished(found, data.steps, identity, config.resume_ignore_data):
            return DONE
        steps_done = 0 if found is None else min(found.step, data.steps)
    ranks.say("dry run: no weights are read, nothing is written", *data_lines(data), *data.lines())
    if steps_done:
        ranks.say(f"goes on from the checkpoint of step {steps_done}: {data.steps - steps_done} steps are left")
    ranks.say(*lora_lines(spec, setup), f"optimizer: {setup.optimizer.line()}", *setup.optimizer.warnings())
    ranks.say(*config.idle_options())
    memory = check_memory(setup, ranks)
    ranks.say(*without_gpu(setup, ranks))
    needed = check_room()
    facts = start_facts(setup, spec, data, memory, ranks)
    expected = expected_time(config.output_path, facts, setup, accumulation)
    ranks.say(time_line(expected, data.steps - steps_done))
    ranks.say(*Written.from_config(config, setup.trainable).lines(data.steps, needed))
    if ranks.is_main:
        parts = MODEL_PARTS + (ENCODER_PARTS if config.sample_prompts or not data.dataset.encoded else ())
        ranks.say(*model_lines(source, parts), *shard_lines(data, config.data_cache_gb))
    ranks.say("done: nothing was written; the same command without --dry_run trains")
    return DONE


def time_line(expected: Expectation | None, steps: int) -> str:
    if expected is None:
        return "time: unknown; no earlier run of its like on this hardware lies beside the run folder"
    start = f", after {duration(expected.start)} of start" if expected.start else ""
    return f"time: about {duration(expected.step * steps)}{start} ({expected.step:.3g} s a step; {expected.source})"


def data_lines(data: RunData) -> Iterator[str]:
    """The data set in one line, then its buckets with what they give an epoch."""
    dataset = data.dataset
    manifest = dataset.manifest
    kind = "latents and prompt embeddings" if dataset.encoded else "images, encoded while training"
    held_out = len(dataset.validation) if isinstance(dataset, ShardDataset | Mixture) else 0
    samples = f"{len(dataset):,} samples" if len(dataset) else "samples that nobody has counted"
    size = sum(shard.bytes for shard in manifest.shards)
    shards = f" in {len(manifest.shards):,} shards, {shown_bytes(size)}" if manifest.shards else ""
    without = f", {held_out:,} held out" if held_out else ""
    yield f"data: {shown(dataset.name)}: {samples}{without}{shards}; {kind}; fingerprint {dataset.fingerprint[:12]}"
    yield from (f"  {line}" for line in lines_by_source(data_by_source(data)))
    batches = {} if data.order is None else data.order.micro_batches_by_bucket()
    largest = sorted(manifest.buckets, key=lambda bucket: -bucket.count)
    for bucket in largest[:BUCKETS]:
        yield bucket_line(bucket, batches.get(bucket.id))
    if len(largest) > BUCKETS:
        rest = largest[BUCKETS:]
        yield f"  and {len(rest)} smaller buckets with {sum(bucket.count for bucket in rest):,} samples"
    shape = data.largest
    yield (
        f"largest micro-batch: {shape.batch} of {shape.width}×{shape.height}, {shape.text} text tokens each: {shape.tokens:,} "
        f"tokens; up to {data.shapes:,} shapes of a batch"
    )


def bucket_line(bucket: Bucket, micro_batches: int | None) -> str:
    count = "" if micro_batches is None else f"  {micro_batches:>8,} micro-batches an epoch"
    sources = "".join(f" + {width} × {height}" for width, height in bucket.sources)
    return f"  {bucket.width:>5} × {bucket.height:<5} {bucket.count:>9,} samples{count}{sources and '  with sources' + sources}"


def lora_lines(spec: LoraSpec, setup: Setup) -> list[str]:
    """The LoRA, then its trainable parameters by group."""
    groups = trainable_groups(setup, spec)
    lines = [spec.line(sum(entry["layers"] for entry in groups.values()), setup.trainable)]
    for name, entry in groups.items():
        lines.append(f"  {name:<18} {entry['layers']:>5} layers {entry['parameters']:>13,} parameters")
    return lines


def without_gpu(setup: Setup, ranks: Ranks) -> Iterator[str]:
    """Of a large model on a machine without a GPU, such as a cluster's login node: what cards would hold."""
    parameters = sum(parameter.numel() for parameter in setup.base.empty.parameters())
    if ranks.device.type != "cpu" or parameters < CPU_PARAMETERS:
        return
    yield f"no GPU here, and {parameters / 1e9:.1f} billion parameters: the run itself needs one. On such cards:"
    for card in CARDS:
        machine = Machine(card * GIB, Machine.of(ranks.device).host_free, multiplies_float8=True)
        chosen = fastest_base(setup, machine)
        plan = plan_memory(chosen, machine)
        verdict = "fits" if plan.likely_fits else "too little"
        how = choice_lines(setup, chosen, machine)
        told = how[0].partition(":")[0] if how else "as asked"
        yield f"  {card:>3} GiB: {verdict}, about {plan.bytes / GIB:.1f} GiB ({told})"


def model_lines(source: ModelSource, parts: tuple[str, ...]) -> Iterator[str]:
    """What would be fetched of the model."""
    if is_here(source, parts):
        yield "download: nothing of the model"
        return
    try:
        files = to_download(source, parts)
    except FileNotFoundError as error:
        yield f"download: {error}"
        return
    whole = shown_bytes(sum(size for _, size in files))
    yield f"download: {whole} of {source.model}, in {len(files)} files, into the hub's cache"
    for name, size in sorted(files, key=lambda file: -file[1])[:FILES]:
        yield f"  {shown_bytes(size):>8}  {shown(name)}"


def shard_lines(data: RunData, cache_gb: float) -> Iterator[str]:
    """What would be fetched of a remote data set."""
    dataset = data.dataset
    sets = [member.dataset for member in dataset.members] if isinstance(dataset, Mixture) else [dataset]
    remote = {each.name: sum(shard.bytes for shard in each.manifest.shards) for each in sets if "://" in each.name}
    for name, size in remote.items():
        kept = shown_bytes(min(size, cache_gb * 1e9 * size / max(1, sum(remote.values()))))
        yield f"download: shards of {shown_bytes(size)} from {shown(name)}, up to {kept} kept in the cache"
