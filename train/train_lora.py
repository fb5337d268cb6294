"""Train a LoRA for Qwen-Image.

    deepspeed train/train_lora.py --deepspeed ds_configs/zero2.json --model Qwen/Qwen-Image --data ENCODED --output_path RUN
    deepspeed train/train_lora.py --config run.yaml --learning_rate 2e-4
    torchrun --nproc_per_node 8 train/train_lora.py --config run.yaml
    sbatch slurm/qwen_lora.sh run.yaml

`--help` lists every option (train/config/train_config.py defines them). RUN receives config.yaml, deepspeed.json,
versions.json, metrics.jsonl, events.jsonl, lora-<step>.safetensors, lora.safetensors, checkpoints/, samples/ and wandb/. Exit
codes: 0 done, 2 bad input, 3 loss or gradient no longer finite, 4 out of GPU memory, 75 a rank was lost or hung (start again to
go on), 85 asked to leave by SIGTERM, SIGUSR1 or SIGHUP and 130 by Ctrl-C (checkpoint saved, start again to go on).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from files.shown import one_line, shown, tolerant_output
from qwen_image.out_of_memory import memory_ran_out
from train.config.check_paths import check_paths
from train.config.command_line import parse
from train.config.train_config import TrainConfig
from train.engine.deepspeed_log import quiet_deepspeed
from train.process import start_clock
from train.process.exit_codes import BAD_INPUT, DONE, INTERRUPTED, NOT_FINITE, OUT_OF_MEMORY, PREEMPTED, RANK_LOST
from train.process.first_error import blame, first_words, rank_was_lost, shared_gpu, tell_first, was_told
from train.process.launchers import LAUNCHERS
from train.process.peers import Peers
from train.process.watchdog import JOINING, LONG_SECONDS, Watchdog
from train.saving import last_lines
from train.saving.last_lines import GO_ON

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from qwen_image.pipeline import QwenImagePipeline
    from train.base_model.online_encoder import OnlineEncoder
    from train.base_model.prior_prompt import PriorPrompt
    from train.config.zero_plan import ZeroPlan
    from train.data.batch import Batch
    from train.fit.activation_checkpointing import PeakWatch
    from train.fit.memory_plan import Setup
    from train.loader.from_config import RunData
    from train.loader.worker_loader import Batches
    from train.lora.spec import LoraSpec
    from train.process.preemption import Preemption
    from train.process.ranks import Ranks
    from train.saving.checkpoints import Checkpoints, Resumed
    from train.saving.lora_export import LoraExport
    from train.watching.late_row import Part
    from train.watching.metrics import Metrics
    from train.watching.sample_images import Preview
    from train.watching.validation import Validation


def main(argv: list[str] | None = None) -> int:
    tolerant_output()
    start_clock.begin()
    LAUNCHERS.begin()
    try:
        config = parse(argv)
        check_paths(config)
        with ExitStack() as leaving:
            return train(config, leaving)
    except (ValueError, OSError) as error:
        tell(BAD_INPUT, str(error))
        return BAD_INPUT
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("files", "qwen_image", "data_prep", "train"):
            raise
        tell(BAD_INPUT, f"{sys.executable} has no package {error.name}: run make setup, or start another python")
        return BAD_INPUT
    except KeyboardInterrupt as asked:  # or its subclass AskedToLeave, where there is nothing to save
        waits = getattr(asked, "waits", False)
        if int(os.environ.get("RANK", "0")) == 0 or waits:
            print(last_lines.left_without_saving(str(asked) or "Ctrl-C", waits), file=sys.stderr, flush=True)
        return asked.agreed.exit_code if hasattr(asked, "agreed") else INTERRUPTED
    except RuntimeError as error:
        if (reason := shared_gpu(error)) is not None:
            tell(BAD_INPUT, reason)
            return BAD_INPUT
        if rank_was_lost(error):
            peers = Peers.from_environment()
            if peers is not None:
                return blame(peers, error).code
            tell(RANK_LOST, f"another rank has ended ({first_words(error)}); {GO_ON}")
            return RANK_LOST
        if not memory_ran_out(error):
            raise
        tell(
            OUT_OF_MEMORY,
            f"{str(error).splitlines()[0]} Recompute more blocks (--activation_checkpointing full or a number) or make "
            "--batch_size smaller; sampling, validation and other programs on this GPU take memory too. "
            f"{config.output_path} holds what was saved: start again to go on",
        )
        return OUT_OF_MEMORY


def tell(code: int, error: str) -> None:
    """For people: the reason to end, on standard error; under the job script for all ranks to agree on, too."""
    rank, peers = int(os.environ.get("RANK", "0")), Peers.from_environment()
    if peers is not None and (tell_first(peers, code, error) or was_told(peers, error)):
        return  # the job script says it, once and last
    if (
        peers is None and rank > 0
    ):  # nearly always the same error as rank 0's, whose exit makes the launcher end this process
        time.sleep(5)
    print(f"error: {one_line(error)}" + (f" (rank {rank})" if rank > 0 else ""), file=sys.stderr)


def tell_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A fault of the program: the traceback as always; under the job script its last line for all ranks as well."""
    peers = Peers.from_environment()
    if peers is not None and not isinstance(error, KeyboardInterrupt):
        tell_first(peers, 1, f"{kind.__name__}: {error} (traceback: {peers.node_log()})")
    sys.__excepthook__(kind, error, trace)


def join(config: TrainConfig, leaving: ExitStack) -> tuple[Ranks, Preemption, Watchdog]:
    """Meet the other ranks; what has to end with the run, also after an error, is put into `leaving`."""
    from train.process.determinism import seed_everything
    from train.process.node_health import check_nodes
    from train.process.preemption import Preemption
    from train.process.ranks import join_process_group
    from train.step.speedups import choose_workspaces

    start_clock.reached("imports")
    quiet_deepspeed(int(os.environ.get("RANK", "0")), config.deepspeed_log)
    watchdog = leaving.enter_context(Watchdog.from_config(config))
    with watchdog.limited(JOINING, config.join_timeout):
        ranks = join_process_group(config.gpu_memory_limit, config.device)
    ranks.say(*check_nodes(ranks.device))
    choose_workspaces(ranks.device, config.deterministic)
    seed_everything(config.seed, config.deterministic)
    start_clock.reached("joining")
    return ranks, Preemption(), watchdog


def plan(config: TrainConfig, ranks: Ranks) -> tuple[ZeroPlan, RunData, LoraSpec, Setup]:
    """How ZeRO divides, what the data is, the LoRA, and the base as it will lie in memory; told. A collective."""
    from train.config.zero_plan import ZeroPlan
    from train.fit.base_choice import choose_base
    from train.fit.memory_plan import Setup
    from train.loader.from_config import RunData
    from train.lora.spec import LoraSpec

    zero = ZeroPlan.from_config(config, ranks.world)
    data = RunData.from_config(config, ranks)
    spec = LoraSpec.from_config(config)
    setup = choose_base(Setup.from_config(config, zero, spec, data, ranks), ranks)
    ranks.say(*zero.warnings(), *setup.base.lines(ranks.device))
    return zero, data, spec, setup


def encoders(
    config: TrainConfig, pipeline: QwenImagePipeline, data: RunData, setup: Setup, ranks: Ranks
) -> tuple[OnlineEncoder, Preview, PriorPrompt]:
    """What makes tensors of batches; and what the options' own prompts are for, encoded, with which a text encoder may go."""
    from train.base_model.online_encoder import OnlineEncoder
    from train.base_model.prior_prompt import PriorPrompt
    from train.base_model.prompt_encoder import prompt_encoder
    from train.watching.sample_images import Preview

    encoder = OnlineEncoder.of(pipeline, data)
    base, components = setup.base, config.prompt_components
    with prompt_encoder(pipeline, encoder, base.source, base.dtype, components) as for_prompts:
        preview = Preview.from_config(config, pipeline, for_prompts, ranks)
        prior = PriorPrompt.from_config(config, for_prompts, ranks.rank, base.home.sharing)
    return encoder, preview, prior


def train(config: TrainConfig, leaving: ExitStack) -> int:
    """Run the training that `config` describes, to its end or to a signal; returns the process's exit code."""
    from train.base_model.load_pipeline import load_pipeline
    from train.engine.deepspeed_engine import initialize
    from train.fit.cheapest_change import check_memory
    from train.fit.fit_step import fit_step
    from train.flow.timestep_sampling import SigmaSampling
    from train.process.node_health import check_size
    from train.reporting.dry_run import dry_run
    from train.reporting.start_facts import start_facts
    from train.reporting.start_table import StartTable
    from train.saving.checkpoints import Checkpoints
    from train.saving.lora_export import LoraExport
    from train.saving.run_folder import check_room, prepare_run_folder
    from train.saving.run_folder_lock import lock_run_folder
    from train.step.build import StepOptions, build_step
    from train.watching.metrics import Metrics
    from train.watching.validation import Validation

    # ── Who we are; everything that can be refused before weights are read ────────────────────────────────────────────
    ranks, preemption, watchdog = join(config, leaving)
    zero, data, spec, setup = plan(config, ranks)
    if config.dry_run:
        return dry_run(config, spec, setup, data, ranks, partial(check_room, config, setup.trainable, data.steps))
    optimizer = setup.optimizer
    identity = setup.base.identity() | spec.identity() | data.identity() | config.identity(**data.decided)
    identity |= optimizer.identity()
    checkpoints = Checkpoints.from_config(config, ranks.say)
    found = checkpoints.find(config.resume)
    if checkpoints.is_finished(found, data.steps, identity, config.resume_ignore_data):
        return DONE
    data.check_unchanged(found.client if found else {}, config.resume_ignore_data, ranks)
    memory = check_memory(setup, ranks)
    check_size(ranks.device, config.device, setup.base.empty)
    check_room(config, setup.trainable, data.steps)
    lock_run_folder(config.output_path, ranks, leaving)
    found = checkpoints.find(config.resume)  # again: who had the folder until now may have saved one more

    # ── The frozen pipeline, its LoRA, and the engine around both ─────────────────────────────────────────────────────
    pipeline = load_pipeline(setup.base, data.dataset, memory.encoders, ranks, config.local_model_copy)
    encoder, preview, prior = encoders(config, pipeline, data, setup, ranks)
    options = StepOptions.from_config(config, setup.base.float8, ranks.device, setup.checkpointed_blocks)
    assert pipeline.transformer is not None
    step = build_step(pipeline.transformer, spec, options, ranks.say)
    engine = initialize(step.module, optimizer, zero, config.ema_decay)
    export = LoraExport.from_config(config, spec, pipeline.files, data.dataset.fingerprint, ranks)
    validation = Validation.from_config(config, data.dataset, encoder, ranks)

    # ── Going on where an earlier run stopped; then numbers, and what is fastest that fits ────────────────────────────
    resumed = checkpoints.resume(engine, found, identity, config.resume_ignore_data)
    facts = prepare_run_folder(config, zero.settings, data.decided, ranks.is_main) | {"trainable": setup.trainable}
    export.write_again(engine, resumed.step, data.steps)
    ranks.say(*data.lines(), spec.line(len(step.adapted), setup.trainable))
    fit = fit_step(config, setup, step.module, data, resumed.step, ranks.device)
    ranks.say(*step.lines, *fit.lines)

    # ── The loop ──────────────────────────────────────────────────────────────────────────────────────────────────────
    sizes = data.steps, data.global_batch, resumed.step, ranks.rank
    metrics = Metrics.from_config(config, *sizes, facts | data.decided, resumed.wandb_id)
    started = start_facts(setup, spec, data, memory, ranks)
    table = StartTable.from_config(config, setup, started, resumed.step, fit.checkpointing.predicted)
    ranks.say(*table.lines())
    metrics.begun(resumed.step, started, ranks.warned)
    loader = data.loader(SigmaSampling.from_config(config, pipeline.schedule), resumed.consumed, metrics.warn)
    guards = fit.peak_watch(metrics.say), preemption, watchdog
    loop = Loop(config, data.steps, resumed, engine, encoder, prior, loader, metrics, *guards)
    return loop.run(Outputs(validation, preview, export, checkpoints, identity))


class Outputs(NamedTuple):
    """What a run writes every so many steps; `identity` is what a checkpoint remembers of the run."""

    validation: Validation
    preview: Preview
    export: LoraExport
    checkpoints: Checkpoints
    identity: dict[str, Any]


class Loop:
    """Optimizer steps, and what is watched and written between them.

    Attributes:
        step: optimizer steps done, those before a resumed run began included.
        total_steps: of the whole run.
        saved: the step of the newest checkpoint.
        no_data: why there is no next batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        total_steps: int,
        resumed: Resumed,
        engine: Any,
        encoder: OnlineEncoder,
        prior: PriorPrompt,
        loader: Batches,
        metrics: Metrics,
        peak: PeakWatch,
        preemption: Preemption,
        watchdog: Watchdog,
    ) -> None:
        from train.engine.lr_scheduler import LearningRate
        from train.engine.optimizer import Optimizer
        from train.engine.optimizer_state import ema_of
        from train.lora.spec import LoraSpec
        from train.process.preemption import how_to_stop
        from train.saving.checkpoint_clock import CheckpointClock
        from train.saving.keep_best import Best, measured_otherwise
        from train.watching.lora_norms import LoraNorms
        from train.watching.loss_watch import LossWatch
        from train.watching.step_statistics import StepStatistics

        self.config, self.total_steps, self.step, self.saved = config, total_steps, resumed.step, resumed.step
        self.engine, self.encoder, self.prior, self.loader, self.metrics = engine, encoder, prior, loader, metrics
        self.peak, self.preemption, self.watchdog = peak, preemption, watchdog
        self.ema = ema_of(engine)
        changed = measured_otherwise(resumed.client.get("config"), config.to_dict())
        self.best = Best.resumed(config.keep_best, resumed.best, config.output_path, metrics.say, changed)
        self.checkpoint_clock = CheckpointClock(config.checkpoint_minutes)
        self.learning_rate = LearningRate.from_config(config, total_steps)
        self.watch = LossWatch(partial(metrics.say, kind="skip"), engine.device, resumed.loss)
        has_prior = bool(config.prior_data or config.prior_prompt)
        self.statistics = StepStatistics(engine.module.transformer.config, engine.device, has_prior)
        self.norms = LoraNorms(engine.module.transformer, LoraSpec.from_config(config).scale)
        self.began, self.first_step, self.no_data = time.monotonic(), self.step, ""
        warnings = [*Optimizer.from_config(config).warnings(), *config.idle_options()]
        for line in [*warnings, *self.learning_rate.lines_on_resuming(self.step, resumed.client)]:
            metrics.say(line)
        metrics.say(f"run folder: {shown(config.output_path)} ({how_to_stop()})")
        if self.step >= total_steps:
            metrics.say(
                f"already at step {self.step} of {total_steps}: nothing is left to train; to go on, raise --max_steps"
            )

    def run(self, outputs: Outputs) -> int:
        """Train until the last step is done, one is not finite, or the run is asked to leave; returns the exit code."""
        from train.engine.optimizer import applied_rate
        from train.process.preemption import Agreed, AskedToLeave, NoData

        config, metrics, watch = self.config, self.metrics, self.watch
        written_every = config.validate_every, config.sample_every, config.save_steps, config.checkpoint_every
        batches, code = iter(self.loader), DONE
        if self.step == 0:
            self.validate(outputs)
            with metrics.paused(), self.peak.apart():
                outputs.preview.write_base()
        start_clock.reached("validation")
        self.engine.train()
        self.preemption.begin()
        while self.step < self.total_steps and code == DONE:
            try:
                self.optimizer_step(batches)
            except AskedToLeave as asked:  # waited for data in vain
                if not asked.together:
                    raise
                return self.leave_between_steps(outputs, asked.agreed.exit_code)
            except NoData as error:
                self.no_data = str(error)
                return self.leave_between_steps(outputs, BAD_INPUT)
            self.watchdog.stepped()
            if self.step == self.first_step + 1:
                metrics.started(self.step)
            agreed = self.preemption.agreed(self.checkpoint_clock.is_due())
            checkpoint = agreed > Agreed.GO_ON and self.step < self.total_steps
            writes = checkpoint or any(map(self.due, written_every))
            if not watch.took(all_steps=writes) and (config.on_nonfinite == "stop" or watch.gave_up):
                code = NOT_FINITE
                break
            self.loader.stepped()
            metrics.advance()
            if self.due(config.log_steps):
                rate, norm = applied_rate(self.engine), self.engine.get_global_grad_norm()
                parts = self.parts()
                metrics.log(self.step, parts, loss=watch.mean(), lr=rate, grad_norm=norm, epoch=self.loader.epoch)
            if writes:
                metrics.flush()
                with self.watchdog.longer("validation, sample images or saving"):
                    self.write(outputs, checkpoint)
            if agreed >= Agreed.LEAVE and self.step < self.total_steps:
                code = agreed.exit_code
        return self.end(outputs, code)

    def optimizer_step(self, batches: Iterator[Batch]) -> None:
        """Forward and backward pass of each micro-batch, then the optimizer. Waits for nothing, if it is AdamW."""
        import torch

        split = self.metrics.split
        split.begin()
        for _ in range(self.config.gradient_accumulation_steps):
            with self.watchdog.waiting(f"data from {shown(', '.join(self.config.data))}"):
                batch = self.preemption.receive(batches)
            latents, prompt = self.encoder(batch)
            split.reached("data")
            example = self.prior(self.engine.module, batch.place, latents, batch.noise, batch.sigma, prompt)
            if self.config.lora_dropout > 0:  # its draws, too, belong to the micro-batch's place in the global stream
                torch.manual_seed(self.config.seed * 1_000_003 + batch.place)
            if example.is_prior:  # nothing of the batch's samples is left but their size
                weight = torch.full_like(latents[:, 0, 0, 0, 0], self.config.prior_weight, dtype=torch.float32)
                batch = replace(batch, mask=None, loss_weight=weight, prior=torch.ones_like(batch.drop))
            losses = self.engine(example.latents, example.noise, batch.sigma, example.prompt, batch.mask)
            split.reached("forward")
            objective = losses if batch.loss_weight is None else losses * batch.loss_weight
            self.engine.backward(objective.mean())
            split.reached("backward")
            self.statistics.saw(batch, losses, latents, example.prompt)
            self.watch.saw(batch, losses)
            self.peak.saw(latents, example.prompt)
            self.learning_rate.set(self.engine, self.step)
            self.engine.step()
            split.reached("optimizer")
        self.step += 1
        applied = self.watch.stepped(self.step, self.engine)
        if self.ema is not None:
            self.ema.update(self.step, applied)

    def parts(self) -> list[Part]:
        """What a row tells besides: statistics of the steps' samples, a collective, and on the main rank norms of the LoRA."""
        from train.engine.averaged_weights import lora_weights

        found = [self.statistics.row(self.watch.skipped, self.loader.broken)]
        if self.metrics.active:
            with lora_weights(self.engine):
                was_off, norms = self.norms.off, self.norms.row()
            if norms is not None:
                found.append(norms)
            elif not was_off:
                self.metrics.say(f"warning: {self.norms.off}")
        return found

    def leave_between_steps(self, outputs: Outputs, code: int) -> int:
        """Save what the steps so far have made, and end: the next one has no data. A collective."""
        if not self.watch.took(all_steps=True) and (self.config.on_nonfinite == "stop" or self.watch.gave_up):
            code = NOT_FINITE
        elif self.step > self.saved:
            self.metrics.flush()
            with self.watchdog.longer("saving"):
                self.save_checkpoint(outputs)
        return self.end(outputs, code)

    def due(self, every: int) -> bool:
        """Whether what comes `every` so many steps (0: at the end only) comes now."""
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def write(self, outputs: Outputs, checkpoint: bool) -> None:
        """What is due at this step, in this order; a checkpoint also when `checkpoint` (the run leaves, or time is up)."""
        from train.engine.averaged_weights import averaged_weights, lora_weights

        if self.due(self.config.validate_every):
            self.validate(outputs)
        if self.due(self.config.sample_every):
            averaged = None if self.ema is None else partial(averaged_weights, self.engine)
            with self.metrics.paused(), self.peak.apart(), lora_weights(self.engine):
                sheet = outputs.preview.write(self.step, averaged)
                if sheet is not None:
                    self.metrics.images(self.step, sheet.grid, sheet.images)
        if self.due(self.config.save_steps) and self.step < self.total_steps:
            with self.metrics.paused():
                path = outputs.export.write(self.engine, self.step)
            self.metrics.say(f"LoRA of step {self.step}: {shown(path)}", "saved")
        if checkpoint or self.due(self.config.checkpoint_every):
            self.save_checkpoint(outputs)

    def save_checkpoint(self, outputs: Outputs) -> None:
        with self.metrics.paused():
            progress = {"consumed": self.loader.consumed, "loss": self.watch.state()}
            state = outputs.identity | progress | {"wandb_id": self.metrics.wandb_id, "best": self.best.state()}
            written = outputs.checkpoints.save(self.engine, self.step, state)
        if written is not None:
            self.saved = self.step
            self.metrics.say(f"checkpoint of step {self.step}: {shown(written)}", "saved")
            self.watchdog.checkpointed(self.step, written)
        self.checkpoint_clock.restart()

    def write_report(self) -> None:
        from train.reporting.run_report import report_at_the_end

        if self.config.report == "auto" and self.metrics.active:
            self.metrics.say(report_at_the_end(self.config.output_path))

    def validate(self, outputs: Outputs) -> None:
        """Measure, and keep the LoRA if it is the best so far."""
        from train.engine.averaged_weights import averaged_weights, lora_weights

        validation, module = outputs.validation, self.engine.module
        if not len(validation):
            return
        with self.metrics.paused():
            with lora_weights(self.engine):
                found = validation.measure(module)
            if self.ema is not None and self.step > 0:  # before the first step it is the weights
                with averaged_weights(self.engine):
                    found |= validation.measure(module, "ema_")
            self.metrics.record(self.step, **found)
            if "validation_loss" in found and self.best.improves(
                self.step, found["validation_loss"], found.get("ema_validation_loss")
            ):
                outputs.export.write_best(self.engine, self.best)

    def end(self, outputs: Outputs, code: int) -> int:
        """The one ending: the LoRA if the run is done, files that are being written, a last line, then all is closed."""
        from qwen_image.free_memory import peak_bytes
        from train.process.ranks import sum_over_ranks
        from train.step.speedups import shapes_met

        export = outputs.export
        self.watchdog.begin("the last files", LONG_SECONDS)
        self.preemption.end()
        if code in (PREEMPTED, INTERRUPTED):
            line = last_lines.left(self.preemption.reason, self.step, self.saved, code)
        elif code == BAD_INPUT:
            line = last_lines.no_data(self.no_data, self.step, self.saved)
        elif code == NOT_FINITE:
            line = last_lines.not_finite(
                self.watch.spoiled, self.saved, self.config.peak_learning_rate, self.watch.gave_up
            )
        else:
            self.peak.tell()
            path = export.write_final(self.engine, self.step)
            notes = [f"LoRA of step {self.step}: {path}", *shapes_met(self.engine.module), *export.notes(path)]
            self.metrics.say("; ".join(notes), "saved")
            if best := self.best.line():
                self.metrics.say(best, "saved")
            edits = outputs.preview.pipeline.files.member.most_sources > 0
            where = self.config.model, self.config.output_path
            for each in last_lines.next_commands(*where, self.metrics.recorded, edits):
                self.metrics.say(each, kind=None)
            steps = self.step - self.first_step
            broken = sum_over_ranks(self.loader.broken)
            line = last_lines.done(time.monotonic() - self.began, steps, broken)
        export.finish()
        self.metrics.flush()
        files = [path for path in outputs.export.files() if code == DONE]
        self.metrics.ended({"exit_code": code, "steps": self.step, **self.best.summary()}, files)
        self.metrics.event("end", line, exit_code=code, peak_bytes=peak_bytes(self.engine.device))
        self.write_report()
        failed = code in (NOT_FINITE, BAD_INPUT)
        if not (failed and self.watchdog.peers):  # else the job script says it last, for all ranks
            self.metrics.say(line, kind=None)
        self.metrics.close()
        self.loader.close()
        if failed:
            self.watchdog.failed(code, line)
        return code


if __name__ == "__main__":
    sys.excepthook = tell_exception
    code = main()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # from here on Python would die of a second notice, and lose the code
    if "train.process.ranks" in sys.modules:  # else nothing was joined
        sys.modules["train.process.ranks"].leave_process_group()
    sys.exit(code)
