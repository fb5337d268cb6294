"""`--dry_run`: everything about a run that is known before weights are read, told; nothing is written.

Whatever refuses a run early (data, options, memory, disk, a checkpoint of another run) refuses its dry run in the same words.
"""

import shutil
from collections.abc import Iterator

from data_prep.shard_format.shards import Bucket
from files.shown import shown, shown_bytes
from qwen_image.loading.model_files import ModelSource, is_here, to_download
from qwen_image.model.dtypes import DTYPES
from train.base_model.load_pipeline import check_data
from train.config.train_config import TrainConfig
from train.data.from_config import RunData
from train.data.shard_dataset import ShardDataset
from train.fit.base_choice import choice_lines, fastest_base
from train.fit.cheapest_change import check_memory
from train.fit.memory_plan import Machine, Setup, plan_memory
from train.lora.spec import LoraSpec
from train.process.exit_codes import DONE
from train.process.free_memory import GIB
from train.process.node_health import CPU_PARAMETERS
from train.process.ranks import Ranks
from train.reporting.expected_time import expected_time
from train.reporting.start_facts import start_facts, trainable_groups
from train.reporting.story import duration
from train.saving.checkpoints import Checkpoints
from train.saving.run_folder import check_room, needed_bytes

BUCKETS = 16
FILES = 8
CARDS = (24, 48, 80)  # GiB, for a machine without a GPU


def dry_run(config: TrainConfig, spec: LoraSpec, setup: Setup, data: RunData, ranks: Ranks) -> int:
    """Tell what the run would do; returns the exit code. A collective. Raises what refuses the run."""
    steps_done = 0
    if setup.base.here:
        if data.dataset.encoded:
            check_data(setup.base.source, data.dataset, setup.base.empty.config.joint_attention_dim)
        identity = setup.base.identity() | spec.identity() | data.identity() | config.identity(**data.decided)
        checkpoints = Checkpoints.from_config(config, ranks.say)
        found = checkpoints.find(config.resume)
        if checkpoints.is_finished(found, data.steps, identity, config.resume_ignore_data):
            return DONE
        steps_done = 0 if found is None else min(found.step, data.steps)
    ranks.say("dry run: no weights are read, nothing is written")
    ranks.say(*data_lines(data), *data.lines())
    if steps_done:
        ranks.say(f"goes on from the checkpoint of step {steps_done}: {data.steps - steps_done} steps are left")
    ranks.say(*lora_lines(spec, setup))
    memory = check_memory(setup, ranks)
    ranks.say(*without_gpu(setup, ranks))
    check_room(config, setup.trainable, data.steps)
    facts = start_facts(setup, spec, data, memory, ranks)
    expected = expected_time(config.output_path, facts, setup, config.gradient_accumulation_steps)
    if expected is None:
        ranks.say("time: unknown; no earlier run of its like on this hardware lies beside the run folder")
    else:
        start = f", after {duration(expected.start)} of start" if expected.start else ""
        whole = duration(expected.step * (data.steps - steps_done))
        ranks.say(f"time: about {whole}{start} ({expected.step:.3g} s a step; {expected.source})")
    ranks.say(*output_lines(config, setup, data))
    ranks.say(*download_lines(config, data) if ranks.is_main else ())
    ranks.say("done: nothing was written; the same command without --dry_run trains")
    return DONE


def data_lines(data: RunData) -> Iterator[str]:
    """The data set in one line, then its buckets with what they give an epoch."""
    dataset = data.dataset
    manifest = dataset.manifest
    kind = "latents and prompt embeddings" if dataset.encoded else "images, encoded while training"
    held_out = len(dataset.validation) if isinstance(dataset, ShardDataset) else 0
    samples = f"{len(dataset):,} samples" if len(dataset) else "samples that nobody has counted"
    size = sum(shard.bytes for shard in manifest.shards)
    shards = f" in {len(manifest.shards):,} shards, {shown_bytes(size)}" if manifest.shards else ""
    without = f", {held_out:,} held out" if held_out else ""
    yield f"data: {shown(dataset.name)}: {samples}{without}{shards}; {kind}; fingerprint {dataset.fingerprint[:12]}"
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
    return f"  {bucket.width:>5} × {bucket.height:<5} {bucket.count:>9,} samples{count}"


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


def output_lines(config: TrainConfig, setup: Setup, data: RunData) -> Iterator[str]:
    """What will lie in the run folder, and how much is free for it."""
    folder = config.output_path
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed = needed_bytes(config, setup.trainable, data.steps)
    one = setup.trainable * DTYPES[config.save_dtype].itemsize
    numbered = (data.steps - 1) // config.save_steps if config.save_steps else 0
    files = "lora.safetensors" + (f" and {numbered:,} of earlier steps, each" if numbered else "")
    pictures = ""
    if config.sample_prompts:
        times = data.steps // config.sample_every if config.sample_every else 1
        pictures = f", sample images {max(1, times):,} times"
    free = shown_bytes(shutil.disk_usage(nearest).free)
    yield f"files: {files} of {shown_bytes(one)}, checkpoints{pictures}: {shown_bytes(needed)} without the images"
    yield f"run folder: {shown(folder)}{'' if folder.exists() else ' (new)'}, {free} free"


def download_lines(config: TrainConfig, data: RunData) -> Iterator[str]:
    """What would be fetched: the model's files that aren't in the cache, and remote shards."""
    source = ModelSource.from_options(config)
    parts: tuple[str, ...] = ("transformer", "scheduler")
    if not data.dataset.encoded or config.sample_prompts:
        parts += ("text_encoder", "tokenizer", "vae")
    files: list[tuple[str, int]] = []
    if not is_here(source, parts):
        try:
            files = to_download(source, parts)
        except FileNotFoundError as error:
            yield f"download: {error}; memory and parameters above are those of every Qwen-Image"
        if files:
            whole = shown_bytes(sum(size for _, size in files))
            yield f"download: {whole} of {source.model}, in {len(files)} files, into the hub's cache"
            for name, size in sorted(files, key=lambda file: -file[1])[:FILES]:
                yield f"  {shown_bytes(size):>8}  {shown(name)}"
    elif "://" not in config.data:
        yield "download: nothing"
    if "://" in config.data:
        size = sum(shard.bytes for shard in data.dataset.manifest.shards)
        kept = min(size / 1e9, config.data_cache_gb)
        yield f"download: shards of {shown_bytes(size)} from {shown(config.data)}, up to {kept:.3g} GB kept in the cache"
