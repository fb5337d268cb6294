"""Train a LoRA for Qwen-Image.

    deepspeed train/train_lora.py --deepspeed ds_configs/zero2.json --model Qwen/Qwen-Image --data ENCODED --output_path RUN
    deepspeed train/train_lora.py --config run.yaml --learning_rate 2e-4
    torchrun --nproc_per_node 8 train/train_lora.py --config run.yaml
    sbatch slurm/qwen_lora.sh run.yaml

`--help` lists every option (train/config/train_config.py defines them). RUN receives config.yaml, versions.json, metrics.jsonl,
lora-<step>.safetensors, lora.safetensors, checkpoints/, samples/ and wandb/. Exit codes: 0 done, 2 bad input,
3 loss or gradient no longer finite, 4 out of GPU memory, 85 asked to leave by SIGTERM or SIGUSR1 (checkpoint saved,
start again to go on).
"""

import os
import sys
import time
from dataclasses import replace

from files.shown import one_line, tolerant_output
from train.config.check_paths import check_paths
from train.config.command_line import parse
from train.config.train_config import TrainConfig
from train.process.out_of_memory import memory_ran_out

BAD_INPUT = 2
NOT_FINITE = 3
OUT_OF_MEMORY = 4


def main(argv: list[str] | None = None) -> int:
    tolerant_output()
    try:
        config = parse(argv)
        check_paths(config)
        return train(config)
    except (ValueError, OSError) as error:
        tell(str(error))
        return BAD_INPUT
    except RuntimeError as error:
        if not memory_ran_out(error):
            raise
        tell(
            f"{str(error).splitlines()[0]} Recompute more blocks (--activation_checkpointing full or a number) or make "
            "--batch_size smaller; sampling, validation and other programs on this GPU take memory too. "
            f"{config.output_path} holds what was saved: start again to go on"
        )
        return OUT_OF_MEMORY


def tell(error: str) -> None:
    """For people: the reason to end, on standard error."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:  # nearly always the same error as rank 0's, whose exit makes the launcher end this process
        time.sleep(5)
    print(f"error: {one_line(error)}" + (f" (rank {rank})" if rank > 0 else ""), file=sys.stderr)


def train(config: TrainConfig) -> int:
    """Run the training that `config` describes, to its end or to a signal; returns the process's exit code."""
    import torch

    from qwen_image.float8.linear import keep_transposed
    from qwen_image.model.dtypes import DTYPES
    from train.base_model.load_pipeline import load_pipeline
    from train.base_model.load_transformer import check_base, read_presets
    from train.base_model.online_encoder import OnlineEncoder
    from train.config.deepspeed_json import load_deepspeed_config, warnings
    from train.data.batch_shapes import batch_shapes, largest_batch, text_padding
    from train.data.from_config import make_loader, make_order, open_data, sigma_sampling
    from train.data.sample_order import steps_of
    from train.engine.deepspeed_engine import initialize
    from train.engine.lr_scheduler import learning_rate, set_learning_rate
    from train.engine.optimizer_state import trainable_shapes
    from train.fit.activation_checkpointing import PeakWatch, plan_recomputation
    from train.fit.cuda_graphs_choice import start_graphs
    from train.fit.memory_plan import engine_bytes, memory_plan, planned_sizes
    from train.lora.inject import inject_lora, start_from
    from train.lora.lora_file import read_lora
    from train.lora.spec import LoraSpec
    from train.process.determinism import seed_everything
    from train.process.preemption import PREEMPTED, Preemption
    from train.process.ranks import join_process_group
    from train.saving.checkpoints import Checkpoints, check_same
    from train.saving.lora_export import LoraExport
    from train.saving.run_folder import needed_bytes, prepare_run_folder
    from train.step.flow_matching_module import FlowMatchingModule
    from train.step.offload_activations import ActivationOffload
    from train.step.speedups import apply_speedups, choose_workspaces, shapes_met
    from train.watching.late_row import LateRow
    from train.watching.loss_watch import LossWatch
    from train.watching.metrics import Metrics
    from train.watching.sample_images import Preview
    from train.watching.validation import Validation

    # ── Who we are; everything that can be refused before weights are read ────────────────────────────────────────────
    ranks = join_process_group()
    choose_workspaces(ranks.device, config.deterministic)
    preemption = Preemption()
    deepspeed_config = load_deepspeed_config(config.deepspeed, config, ranks.world)
    for warning in warnings(deepspeed_config):
        ranks.say(f"warning: {warning}")
    seed_everything(config)
    dataset = open_data(config, ranks.say)
    if config.text_padding is None:
        config = replace(config, text_padding=text_padding(config, dataset, ranks.device))
    order = make_order(config, dataset)
    accumulation = config.gradient_accumulation_steps
    global_batch = config.batch_size * accumulation * ranks.world
    total_steps = config.max_steps or 0
    if not total_steps:
        assert order is not None, "only a run with an order knows epochs"
        total_steps = steps_of(config.num_epochs or 1, order.length, ranks.world, accumulation)
    spec = LoraSpec.from_config(config)
    for line in check_base(config, deepspeed_config, spec, ranks.device):
        ranks.say(line)
    presets = read_presets(config)
    sizes = planned_sizes(config, deepspeed_config, spec)
    disk_bytes = needed_bytes(config, sizes.trainable, total_steps)
    plan = memory_plan(config, deepspeed_config, sizes, dataset, ranks)
    for line in plan.lines():
        ranks.say(line)
    versions = prepare_run_folder(config, deepspeed_config, disk_bytes) if ranks.is_main else {}
    checkpoints = Checkpoints(
        config.output_path, config.keep_checkpoints, config.keep_every, config.on_save_error, ranks.say
    )
    resumed = checkpoints.find(config.resume)

    # ── The frozen pipeline, its LoRA, and the engine around both ─────────────────────────────────────────────────────
    pipeline = load_pipeline(config, deepspeed_config, dataset, ranks, plan.encoders, spec, presets)
    options = config.max_prompt_tokens, config.text_multiple, ranks.device, plan.encoders == "swap"
    encoder = OnlineEncoder(pipeline.vae, pipeline.text_encoder, *options)
    preview = Preview(config, pipeline, encoder, ranks)
    transformer = pipeline.transformer
    assert transformer is not None
    adapted = inject_lora(transformer, spec, config.seed, DTYPES[config.trained_dtype])
    if config.lora_checkpoint is not None:
        filled = start_from(transformer, read_lora(config.lora_checkpoint, transformer), spec)
        ranks.say(f"starting from {config.lora_checkpoint}: {filled} of {len(adapted)} layers")
    speedups = apply_speedups(config, pipeline, spec, deepspeed_config["zero_optimization"]["stage"], ranks.device)
    transformer.checkpointed_blocks = sizes.checkpointed_blocks
    keep_transposed(transformer, sizes.checkpointed_blocks)
    if config.offload_activations:
        transformer.saved_inputs = ActivationOffload(ranks.device)
    module = FlowMatchingModule(transformer, config.loss_weighting, DTYPES[config.dtype])
    engine = initialize(module, config, deepspeed_config)
    export = LoraExport(config, spec, pipeline, dataset, ranks)
    validation = Validation(dataset, encoder, ranks.rank, ranks.world, ranks.device)

    # ── Going on where an earlier run stopped ─────────────────────────────────────────────────────────────────────────
    facts = {
        "model": {"transformer": pipeline.files.fingerprint("transformer")}
        | ({"presets": [preset.identity() for preset in presets]} if presets else {})
        | ({"base_precision": config.base_precision} if config.base_precision != "dtype" else {}),
        "lora": spec.to_dict(),
        "data": dataset.fingerprint,
        "order": {"loader": "webdataset"} if order is None else order.state(),
        "global_batch": global_batch,
        "config": config.to_dict(),
    }
    step = consumed = 0
    if resumed is not None:
        same_data = check_same(resumed, facts, config.resume_ignore_data, ranks.say)
        checkpoints.load(engine, resumed)
        step = resumed.step
        consumed = resumed.client["consumed"] if same_data else 0
        ranks.say(f"resumed from {resumed.path}")
        if step < total_steps and config.save_steps and step % config.save_steps == 0:
            export.write(engine, step)  # a kill may have come between the checkpoint and this file

    # ── What is about to happen, in numbers ───────────────────────────────────────────────────────────────────────────
    trainable = sum(torch.Size(shape).numel() for shape in trainable_shapes(engine).values())
    epochs = ""
    if order is not None:
        ranks.say(order.summary())
        epochs = f", {total_steps * global_batch / config.batch_size / order.length:.2f} epochs"
    ranks.say(
        f"{total_steps} steps of {global_batch} samples ({ranks.world} ranks × {accumulation} accumulated × "
        f"{config.batch_size}){epochs}"
    )
    ranks.say(
        f"LoRA of rank {spec.rank}, scale {spec.scale:g}, on {len(adapted)} layers: {trainable:,} trainable parameters"
    )
    largest = largest_batch(config, dataset)
    added = engine_bytes(deepspeed_config, trainable, config, ranks.world, resumed is not None)
    stage = deepspeed_config["zero_optimization"]["stage"]
    recomputation = plan_recomputation(config.activation_checkpointing, module, largest, added, stage, ranks.device)
    shapes, left = batch_shapes(config, dataset, config.text_multiple).shapes, (total_steps - step) * accumulation
    graphs = start_graphs(config, module, largest, shapes, left, stage, ranks.device)
    for line in [*speedups, *recomputation.lines(), *graphs]:
        ranks.say(line)

    # ── The loop ──────────────────────────────────────────────────────────────────────────────────────────────────────
    own = resumed is not None and resumed.path.resolve().is_relative_to(checkpoints.folder.resolve())
    wandb_id = resumed.client.get("wandb_id") if resumed is not None and own else None  # no other run's
    shown = {**versions, "trainable": trainable}
    metrics = Metrics(config, total_steps, global_batch, step, ranks.rank, shown, wandb_id)
    sampling = sigma_sampling(config, pipeline)
    loader = make_loader(config, dataset, order, sampling, ranks, consumed, metrics.say)

    def due(every: int) -> bool:
        return step == total_steps or (every > 0 and step % every == 0)

    def validate() -> None:
        if len(validation):
            with metrics.paused():
                metrics.record(step, validation_loss=validation.loss(module))

    def save_checkpoint() -> None:
        with metrics.paused():
            state = {"consumed": loader.consumed, "loss": watch.state(), "wandb_id": metrics.wandb_id}
            checkpoints.save(engine, step, facts | state)

    batches = iter(loader)
    written_every = config.validate_every, config.sample_every, config.save_steps, config.checkpoint_every
    watch = LossWatch(metrics.say, ranks.device, resumed.client.get("loss") if resumed is not None else None)
    peak = PeakWatch(recomputation, largest, ranks.device, metrics.say)
    late: LateRow | None = None
    if step == 0:
        validate()
    engine.train()
    while step < total_steps:
        for _ in range(accumulation):
            batch = next(batches)
            latents, prompt = encoder(batch)
            if config.lora_dropout > 0:  # its draws, too, belong to the micro-batch's place in the global stream
                torch.manual_seed(config.seed * 1_000_003 + batch.place)
            losses = engine(latents, batch.noise, batch.sigma, prompt)
            engine.backward(losses.mean())
            watch.saw(batch, losses)
            peak.saw(latents, prompt)
            set_learning_rate(engine, learning_rate(step, config, total_steps))
            engine.step()
        step += 1
        watch.stepped(step, engine)
        leave = preemption.agreed() and step < total_steps
        writes = leave or any(due(every) for every in written_every)
        if not watch.took(all_steps=writes) and config.on_nonfinite == "stop":
            export.finish()
            metrics.close()
            return NOT_FINITE
        loader.stepped()
        metrics.advance()

        if late is not None:
            late.write(metrics)
            late = None
        if due(config.log_steps):
            rate, norm = learning_rate(step - 1, config, total_steps), engine.get_global_grad_norm()
            late = LateRow.of(step, loss=watch.mean(), lr=rate, grad_norm=norm, epoch=loader.epoch)
        if late is not None and writes:
            late.write(metrics)
            late = None
        if due(config.validate_every):
            validate()
        if due(config.sample_every):
            with metrics.paused():
                grid = preview.write(step)
                if grid is not None:
                    metrics.image(step, "samples", grid)
        if due(config.save_steps) and step < total_steps:
            with metrics.paused():
                export.write(engine, step)
        if leave or due(config.checkpoint_every):
            save_checkpoint()
        if leave:
            export.finish()
            metrics.say(f"asked to leave: checkpoint of step {step} saved, exit code {PREEMPTED}")
            metrics.close()
            return PREEMPTED

    # ── The result ────────────────────────────────────────────────────────────────────────────────────────────────────
    peak.tell()
    path = export.write_final(engine, step)
    metrics.say("; ".join([f"LoRA of step {step}: {path}", *shapes_met(module)]))
    metrics.close()
    loader.close()
    return 0


if __name__ == "__main__":
    code = main()
    if "train.process.ranks" in sys.modules:  # else nothing was joined
        sys.modules["train.process.ranks"].leave_process_group()
    sys.exit(code)
