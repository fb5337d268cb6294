"""The numbers of a run: rows in metrics.jsonl, a progress bar or plain lines on stderr, and Weights & Biases.

Only rank 0 writes; on every other rank the same calls do nothing. W&B may fail at any time without ending the training.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from files.atomic_files import write_file
from files.folder_lock import require_owned
from files.shown import one_line
from train.config.train_config import TrainConfig
from train.process import start_clock
from train.watching.events import Events, Kind
from train.watching.step_clock import GpuClock, HostClock, StepClock

WANDB_TIMEOUT_SECONDS = 30.0  # an unreachable server costs this once; then the run goes on offline


class LateRow(NamedTuple):
    """A row whose numbers are still on their way from the device; on the host once `arrived` has happened (None: they are).

    Read in the step that made them, they would keep the host from launching the next one.
    """

    step: int
    names: tuple[str, ...]
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, **values: torch.Tensor | float) -> "LateRow":
        """Send for `values`: numbers, or tensors of one element on the CPU or the current GPU. Waits for nothing."""
        tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
        if not any(tensor.is_cuda for tensor in tensors):
            known = [value.item() if isinstance(value, torch.Tensor) else value for value in values.values()]
            return cls(step, tuple(values), torch.tensor(known, dtype=torch.float64), None)
        numbers = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
        for place, value in enumerate(values.values()):
            numbers[place].copy_(torch.as_tensor(value, dtype=torch.float64).detach().reshape(()), non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        return cls(step, tuple(values), numbers, arrived)

    def read(self) -> dict[str, float]:
        """The numbers by name, waited for."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True))


@dataclass(frozen=True)
class WandbOptions:
    """The run as W&B shows it. `config`: every option, and facts besides (versions, trainable parameters …)."""

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    name: str
    config: dict[str, Any]


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
    ) -> None:
        self.active = rank == 0
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
        self._run = self._start_wandb(wandb, output_path, start_step)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )
        self.clock: StepClock = clock or (GpuClock() if torch.cuda.is_available() else HostClock())
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
        wandb = WandbOptions(config.wandb_mode, config.wandb_project, name, config.to_dict() | (facts or {}))
        return cls(config.output_path, wandb, total_steps, samples_per_step, start_step, rank, wandb_id)

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

    def log(self, step: int, **values: torch.Tensor | float) -> None:
        """A row for the optimizer steps since the last one, written by `advance` or `flush`. Waits for nothing.

        Values are numbers, or tensors of one element on the CPU or the current GPU. Speed is added: seconds_per_step,
        samples_per_second.
        """
        if self.active:
            self.flush()
            now = self.clock.mark()
            self._late = LateRow.of(step, **values)
            self._late_spans = [*self._spans, (self._running_since, now)]
            self._spans, self._running_since = [], now

    def flush(self) -> None:
        """Wait for the numbers of the last `log`, and write its row."""
        if self._late is not None:
            late, self._late = self._late, None
            values = late.read()
            self._log(late.step, values, sum(self.clock.seconds(*span) for span in self._late_spans))

    def _log(self, step: int, values: dict[str, float], seconds: float) -> None:
        seconds = max(seconds / max(step - self._logged_step, 1), 1e-9)
        self._logged_step = step
        speed = {"seconds_per_step": round(seconds, 4), "samples_per_second": round(self.samples_per_step / seconds, 4)}
        self._write({"step": step, **values, **speed})
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
        if self._run is not None:
            self._try(lambda: self._run.log({f"start/{part}": s for part, s in start_clock.parts().items()}))
        self.say(start_clock.line())

    def images(self, step: int, sheet: Path, images: Sequence[tuple[Path, str]] = ()) -> None:
        """Show the image file `sheet` in W&B as `samples`, and single ones with what they show as `samples/images`."""
        self.flush()
        if self.active and self._run is not None:
            import wandb

            shown_there = {"samples": wandb.Image(str(sheet))}
            if images:
                shown_there["samples/images"] = [wandb.Image(str(path), caption=caption) for path, caption in images]
            self._try(lambda: self._run.log({"step": step, **shown_there}))

    def say(self, text: str, kind: Kind | None = "note") -> None:
        """A line for people on stderr, and an event of the run unless `kind` is None; a note "warning: …" is a warning."""
        if self.active:
            self._print(text)
            if kind is not None:
                self.event("warning" if kind == "note" and text.startswith("warning") else kind, text)

    def warn(self, text: str) -> None:
        """A warning, whatever it begins with."""
        self.say(text, kind="warning")

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
        if self._run is not None:
            self._try(lambda: self._run.finish())

    def _write(self, row: dict[str, Any]) -> None:
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON has no NaN
        self._append(json.dumps(row).encode() + b"\n")
        if self._run is not None:
            self._try(lambda: self._run.log(row))

    def _append(self, row: bytes) -> None:
        """Add a row to the file. On a full disk it waits for the next row, and is written with it if there is room then."""
        require_owned(Path(self._file.name))
        waited = bool(self._unwritten)
        self._unwritten += row
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

    def _start_wandb(self, options: WandbOptions, folder: Path, start_step: int) -> Any:
        """A W&B run, or None: disabled, not installed or failed. A resumed training goes on in the same run."""
        mode = options.mode if options.mode != "auto" else os.environ.get("WANDB_MODE", "auto")
        if mode == "disabled":
            return None
        try:
            import wandb

            if mode == "auto":
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"  # is there a key?
            shared: dict[str, Any] = {
                "project": options.project,
                "name": options.name,
                "dir": str(folder),
                "id": self.wandb_id,
                "config": options.config,
                "settings": wandb.Settings(init_timeout=WANDB_TIMEOUT_SECONDS, console="off", silent=True),
            }
            first_try: dict[str, Any] = {"mode": mode, "resume": "allow" if start_step and mode == "online" else None}
            try:
                run = wandb.init(**first_try, **shared)
            except Exception as error:
                if mode != "online":
                    raise
                complain(f"W&B cannot be reached, so this run is recorded offline ({first_line(error)})")
                run = wandb.init(mode="offline", **shared)
            run.define_metric("*", step_metric="step")  # W&B's own step could not go back when training resumes
            return run
        except Exception as error:
            complain(f"W&B is off ({first_line(error)}); metrics.jsonl holds everything")
            return None

    def _try(self, call: Callable[[], Any]) -> None:
        """Call W&B; its first failure is told and ends W&B, not the training."""
        try:
            call()
        except Exception as error:
            complain(f"W&B failed and is off from here on ({first_line(error)}); metrics.jsonl holds everything")
            self._run = None


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


def shown(values: dict[str, float]) -> str:
    """Numbers for people: 'loss 0.1234  lr 0.0001'; not their parts, which are called name/part."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)


def shown_parts(values: dict[str, float]) -> list[str]:
    """The parts of numbers, for people: 'loss by σ 0.1: 1.2, 0.3: 1.1' of loss/sigma_0.1 and loss/sigma_0.3."""
    families: dict[str, list[str]] = {}
    for name, value in values.items():
        family, _, part = name.partition("/sigma_")
        if part:
            families.setdefault(family, []).append(f"{part}: {value:.4g}")
    return [f"{family} by σ {', '.join(parts)}" for family, parts in families.items()]


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


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def complain(text: str) -> None:
    print(f"warning: {one_line(text)}", file=sys.stderr, flush=True)
