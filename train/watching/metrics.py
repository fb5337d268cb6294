"""The numbers of a run: rows in metrics.jsonl, a progress bar or plain lines on stderr, Weights & Biases and TensorBoard.

Only rank 0 writes; on every other rank the same calls do nothing. W&B and TensorBoard may fail at any time without ending the
training.
A row of the training loop is written a step late (`log`), so that the host need not wait for the device: a run that an
error ends may lack its last row; what is resumed from a checkpoint has all before it.
"""

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from files.atomic_files import write_file
from files.folder_lock import require_owned
from files.shown import one_line
from train.config.train_config import TrainConfig
from train.process import start_clock
from train.watching.events import Events, Kind
from train.watching.late_row import LateRow, Part
from train.watching.step_clock import GpuClock, HostClock, Marks, StepClock, TimeSplit, seconds_of
from train.watching.step_statistics import FLOPS, PEAK, TOKENS
from train.watching.tensorboard_events import TensorboardEvents
from train.watching.wandb_run import WandbOptions, WandbRun, complain, first_line

Tracker = WandbRun | TensorboardEvents


class Metrics:
    """Writes what the training loop reports.

    Args:
        output_path: the run folder.
        total_steps: optimizer steps of the whole run.
        samples_per_step: global batch, for the speed.
        start_step: optimizer steps done before; rows after it, written by a run that got further, are removed.
        rank: only 0 writes.
        wandb_id: of the W&B run to go on in; None: a new one, whose id is then the attribute `wandb_id`.
        clock: of the steps; None: the GPU's, where there is one.
        tensorboard: write its events too.
        row_steps: optimizer steps from one row to the next.

    Attributes:
        split: marks within the steps, by which a row tells where their time went.
    """

    def __init__(
        self,
        output_path: Path,
        wandb: WandbOptions,
        total_steps: int,
        samples_per_step: int,
        start_step: int = 0,
        rank: int = 0,
        wandb_id: str | None = None,
        clock: StepClock | None = None,
        tensorboard: bool = False,
        row_steps: int = 10,
    ) -> None:
        self.active, self.rank = rank == 0, rank
        self.split = TimeSplit(None)
        self._late: LateRow | None = None
        self._late_spans: list[tuple[object, object]] = []
        self.wandb_id = wandb_id or uuid.uuid4().hex[:8]
        if not self.active:
            return
        from tqdm import tqdm

        self.total_steps, self.samples_per_step = total_steps, samples_per_step
        output_path.mkdir(parents=True, exist_ok=True)
        path = output_path / "metrics.jsonl"
        remove_rows_after(start_step, path)
        self._events, self._step = Events(output_path, new=start_step == 0), start_step
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._trackers: dict[str, Tracker] = {}
        if run := WandbRun.begin(wandb, output_path, self.wandb_id, start_step):
            self._trackers["W&B"] = run
        if tensorboard:
            self._trackers["TensorBoard"] = TensorboardEvents(output_path, start_step)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )
        self.clock: StepClock = clock or (GpuClock() if torch.cuda.is_available() else HostClock())
        self.split, self._late_marks = TimeSplit(self.clock, row_steps), list[Marks]()
        self._logged_step = start_step
        self._spans: list[tuple[object, object]] = []  # of training since the last row, between pauses
        self._running_since = self.clock.mark()

    @classmethod
    def from_config(
        cls,
        config: TrainConfig,
        total_steps: int,
        samples_per_step: int,
        start_step: int = 0,
        rank: int = 0,
        facts: dict[str, Any] | None = None,
        wandb_id: str | None = None,
    ) -> "Metrics":
        """`facts`: what W&B shows besides the configuration (versions, trainable parameters …)."""
        name = config.wandb_run_name or config.output_path.resolve().name
        shown_there = config.to_dict() | (facts or {})
        wandb = WandbOptions(config.wandb_mode, config.wandb_project, name, shown_there, config.wandb_artifact)
        sizes = total_steps, samples_per_step, start_step
        events = config.tensorboard
        return cls(config.output_path, wandb, *sizes, rank, wandb_id, tensorboard=events, row_steps=config.log_steps)

    def begun(self, step: int, facts: dict[str, Any], warnings: list[str]) -> None:
        """The first events of a start: what is known of the run (start_facts.py), and the warnings that came before it."""
        if self.active:
            text = f"resumed from the checkpoint of step {step}" if step else "training begins"
            self.event("resume" if step else "start", text, facts=facts)
            for line in warnings:
                self.event("warning", line)

    def advance(self) -> None:
        """One more optimizer step was launched: move the bar, and write the row that the step before had sent for."""
        if self.active:
            self._step += 1
            self._bar.update()
            self.flush()

    def log(self, step: int, parts: Sequence[Part] = (), /, **values: torch.Tensor | float) -> None:
        """A row for the optimizer steps since the last one, written by `advance` or `flush`. Waits for nothing.

        Values are numbers, or tensors of one element on the CPU or the current GPU; `parts` are written and not told. Speed
        is added: seconds_per_step, samples_per_second; of the parts' tokens and arithmetic the rates.
        """
        if self.active:
            self.flush()
            now = self.clock.mark()
            self._late, self._late_marks = LateRow.of(step, parts, **values), self.split.take()
            self._late_spans = [*self._spans, (self._running_since, now)]
            self._spans, self._running_since = [], now

    def flush(self) -> None:
        """Wait for the numbers of the last `log`, and write its row."""
        if self._late is not None:
            late, self._late = self._late, None
            numbers = late.read()
            values = {name: numbers.pop(name) for name in late.names}
            self._log(late.step, values, numbers, sum(self.clock.seconds(*span) for span in self._late_spans))

    def _log(self, step: int, values: dict[str, float], more: dict[str, float], seconds: float) -> None:
        steps = max(step - self._logged_step, 1)
        seconds = max(seconds / steps, 1e-9)
        self._logged_step = step
        speed = {"seconds_per_step": round(seconds, 4), "samples_per_second": round(self.samples_per_step / seconds, 4)}
        if TOKENS in more:
            speed["tokens_per_second"] = round(more.pop(TOKENS) / steps / seconds, 1)
            flops, peak = more.pop(FLOPS) / steps / seconds, more.pop(PEAK, None)
            speed["tflops_per_gpu"] = float(f"{flops / 1e12:.5g}")
            if peak:
                speed["mfu"] = round(flops / peak, 4)
        more |= seconds_of(self.clock, self._late_marks, seconds)
        self._write({"step": step, **values, **speed, **{name: rounded(value) for name, value in more.items()}})
        if self._bar.disable:
            left = time.strftime("%H:%M:%S", time.gmtime(seconds * max(self.total_steps - step, 0)))
            self._print(f"step {step}/{self.total_steps}  {shown(values)}  {seconds:.3g} s/step  {left} left")
        else:
            self._bar.set_postfix_str(shown(values))

    def record(self, step: int, **values: float) -> None:
        """A row of its own kind (a validation loss, say), without speed."""
        if self.active:
            self.flush()
            self._write({"step": step, **values})
            self._print("  ".join([f"step {step}/{self.total_steps}", shown(values), *shown_parts(values)]))

    def started(self, step: int) -> None:
        """The first step of this start was launched: wait for it, and tell what the time until here was spent on."""
        if not self.active:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start_clock.reached("first step")
        self._append(
            json.dumps({"step": step, "start": start_clock.parts(), "compiler": compiler_caches()}).encode() + b"\n"
        )
        took = {f"start/{part}": seconds for part, seconds in start_clock.parts().items()}
        self._try("W&B", lambda run: run.log(took))
        self.say(start_clock.line())

    @property
    def recorded(self) -> list[str]:
        """What has the rows besides metrics.jsonl, for the last lines."""
        if not self.active:
            return []
        run = self._trackers.get("W&B")
        offline = isinstance(run, WandbRun) and run.is_offline
        return [name for name in self._trackers if name != "W&B"] + ["W&B offline"] * offline

    def images(self, step: int, sheet: Path, images: Sequence[tuple[Path, str]] = ()) -> None:
        """Show the image file `sheet` in W&B and TensorBoard as `samples`, and in W&B single ones with what they show."""
        self.flush()
        if self.active:
            self._track(lambda tracker: tracker.images(step, sheet, images))

    def ended(self, summary: dict[str, Any], files: Sequence[Path] = ()) -> None:
        """What the run came to, for W&B's summary and TensorBoard; its LoRA files for `--wandb_artifact`."""
        if self.active:
            self._track(lambda tracker: tracker.ended(summary, files))

    def say(self, text: str, kind: Kind | None = "note") -> None:
        """A line for people on stderr, and an event of the run unless `kind` is None; a note "warning: …" is a warning."""
        if self.active:
            self._print(text)
            if kind is not None:
                self.event("warning" if kind == "note" and text.startswith("warning") else kind, text)

    def warn(self, text: str) -> None:
        """A warning, whatever it begins with, also on other ranks: of what they alone have met (a broken sample)."""
        self.say(text, kind="warning")
        if self.rank > 0:
            with suppress(OSError):
                print(f"{one_line(text)} (rank {self.rank})", file=sys.stderr, flush=True)

    def event(self, kind: Kind, text: str, **more: Any) -> None:
        """An event that needs no line on stderr."""
        if self.active:
            self._events.write(kind, self._step, text, **more)

    def _print(self, text: str) -> None:
        """A line on stderr, above the bar; a full disk behind it doesn't end the run."""
        with suppress(OSError):
            self._bar.write(one_line(text), file=sys.stderr)
            sys.stderr.flush()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (saving, validation, sample images) does not count as training time."""
        if not self.active:
            yield
            return
        self._spans.append((self._running_since, self.clock.mark()))
        try:
            yield
        finally:
            self._running_since = self.clock.mark()

    def close(self) -> None:
        """Write what is on its way; finish the bar, the file and the W&B run. May be called twice."""
        if not self.active:
            return
        self.flush()
        self.active = False
        self._bar.close()
        self._file.close()
        self._track(lambda tracker: tracker.close())

    def _write(self, row: dict[str, Any]) -> None:
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON has no NaN
        self._append(json.dumps(row).encode() + b"\n")
        self._track(lambda tracker: tracker.log(row))

    def _append(self, row: bytes) -> None:
        """Add a row to the file. On a full disk it waits for the next row, and is written with it if there is room then."""
        require_owned(Path(self._file.name))
        waited = bool(self._unwritten)
        self._unwritten += row
        self._open_where_it_was()
        size = os.fstat(self._file.fileno()).st_size
        try:
            left = self._unwritten
            while left:
                left = left[self._file.write(left) :]
            self._unwritten = b""
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            if not waited:
                complain(f"{self._file.name} can't be written ({error.strerror}); its rows wait until it can")

    def _open_where_it_was(self) -> None:
        """After somebody moved or removed the file (a rotation of logs), rows go to a new one of its name."""
        path, moved = Path(self._file.name), self._file
        with suppress(OSError):  # no such folder any more: rows go where they went
            if path.exists() and os.path.samestat(path.stat(), os.fstat(moved.fileno())):
                return
            self._file = path.open("ab", buffering=0)
            moved.close()

    def _try(self, name: str, call: Callable[[Tracker], Any]) -> None:
        """Call a tracker, if it is on; its first failure is told and ends it, not the training."""
        tracker = self._trackers.get(name)
        try:
            if tracker is not None:
                call(tracker)
        except Exception as error:
            complain(f"{name} failed and is off from here on ({first_line(error)}); metrics.jsonl holds everything")
            del self._trackers[name]

    def _track(self, call: Callable[[Tracker], Any]) -> None:
        for name in [*self._trackers]:
            self._try(name, call)


def remove_rows_after(step: int, path: Path) -> None:
    """Keep the rows of metrics.jsonl up to `step`, and nothing at step 0, where a new run begins.

    A line that a killed process left half-written goes too. The file is replaced at once or not at all.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if step else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_file(path, "".join(kept))


def rounded(value: float) -> float:
    """Six digits of what isn't a count."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def shown(values: dict[str, float]) -> str:
    """Numbers for people: 'loss 0.1234  lr 0.0001'; not their parts, which are called name/part."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)


def shown_parts(values: dict[str, float]) -> list[str]:
    """Parts of the first number that has them, for people: 'loss by σ 0.1: 1.2, 0.3: 1.1' of loss/sigma_0.1, loss/sigma_0.3."""
    families: dict[str, list[str]] = {}
    for name, value in values.items():
        family, _, part = name.partition("/sigma_")
        if part:
            families.setdefault(family, []).append(f"{part}: {value:.4g}")
    return [f"{family} by σ {', '.join(parts)}" for family, parts in [*families.items()][:1]]


def compiler_caches() -> dict[str, int]:
    """How often the compiler's caches had what was asked for, and why not where they couldn't: torch's own counters."""
    import torch._dynamo.utils

    counters = torch._dynamo.utils.counters
    names = {"aot_autograd": "autograd_cache_", "inductor": "fxgraph_cache_"}
    return {
        name: count
        for group, start in names.items()
        for name, count in counters[group].items()
        if name.startswith(start)
    }
