"""The numbers of a run: rows in metrics.jsonl, a progress bar or plain lines on stderr, and Weights & Biases.

Only rank 0 writes; on every other rank the same calls do nothing. W&B may fail at any time without ending the training.
"""

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from files.atomic_files import write_file
from files.shown import one_line
from train.config.train_config import TrainConfig

WANDB_TIMEOUT_SECONDS = 30.0  # an unreachable server costs this once; then the run goes on offline


class Metrics:
    """Writes what the training loop reports.

    Args:
        config: gives the run folder, the W&B options and the configuration that W&B shows.
        total_steps: optimizer steps of the whole run.
        samples_per_step: global batch, for the speed.
        start_step: optimizer steps done before; rows after it, written by a run that got further, are removed.
        rank: only 0 writes.
        wandb_id: of the W&B run to go on in; None: a new one, whose id is then the attribute `wandb_id`.
        facts: what W&B shows besides the configuration (versions, trainable parameters, data fingerprint …).
    """

    def __init__(
        self,
        config: TrainConfig,
        total_steps: int,
        samples_per_step: int,
        start_step: int = 0,
        rank: int = 0,
        facts: dict[str, Any] | None = None,
        wandb_id: str | None = None,
    ) -> None:
        self.active = rank == 0
        self.wandb_id = wandb_id or uuid.uuid4().hex[:8]
        if not self.active:
            return
        from tqdm import tqdm

        self.total_steps, self.samples_per_step = total_steps, samples_per_step
        config.output_path.mkdir(parents=True, exist_ok=True)
        path = config.output_path / "metrics.jsonl"
        remove_rows_after(start_step, path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._run = self._start_wandb(config, start_step, facts or {})
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )
        self._logged_step, self._logged_at = start_step, time.perf_counter()

    def advance(self) -> None:
        """One optimizer step is done: move the bar (it needs no value, so nothing waits for the device)."""
        if self.active:
            self._bar.update()

    def log(self, step: int, **values: float) -> None:
        """A row for the optimizer steps since the last call; speed is added: seconds_per_step, samples_per_second."""
        if not self.active:
            return
        now = time.perf_counter()
        seconds = (now - self._logged_at) / max(step - self._logged_step, 1)
        self._logged_step, self._logged_at = step, now
        speed = {"seconds_per_step": round(seconds, 4), "samples_per_second": round(self.samples_per_step / seconds, 4)}
        self._write({"step": step, **values, **speed})
        if self._bar.disable:
            left = time.strftime("%H:%M:%S", time.gmtime(seconds * max(self.total_steps - step, 0)))
            self.say(f"step {step}/{self.total_steps}  {shown(values)}  {seconds:.3g} s/step  {left} left")
        else:
            self._bar.set_postfix_str(shown(values))

    def record(self, step: int, **values: float) -> None:
        """A row of its own kind (a validation loss, say), without speed."""
        if self.active:
            self._write({"step": step, **values})
            self.say(f"step {step}/{self.total_steps}  {shown(values)}")

    def image(self, step: int, name: str, path: Path) -> None:
        """Show the image file `path` in W&B under `name`."""
        if self.active and self._run is not None:
            import wandb

            self._try(lambda: self._run.log({"step": step, name: wandb.Image(str(path))}))

    def say(self, text: str) -> None:
        """A line on stderr, above the bar; a full disk behind it doesn't end the run."""
        if self.active:
            with suppress(OSError):
                self._bar.write(one_line(text), file=sys.stderr)
                sys.stderr.flush()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (saving, validation, sample images) does not count as training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.active:
                self._logged_at += time.perf_counter() - began

    def close(self) -> None:
        """Finish the bar, the file and the W&B run. May be called twice."""
        if not self.active:
            return
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

    def _start_wandb(self, config: TrainConfig, start_step: int, facts: dict[str, Any]) -> Any:
        """A W&B run, or None: disabled, not installed or failed. A resumed training goes on in the same run."""
        mode = config.wandb_mode if config.wandb_mode != "auto" else os.environ.get("WANDB_MODE", "auto")
        if mode == "disabled":
            return None
        try:
            import wandb

            if mode == "auto":
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"  # is there a key?
            options: dict[str, Any] = {
                "project": config.wandb_project,
                "name": config.wandb_run_name or config.output_path.resolve().name,
                "dir": str(config.output_path),
                "id": self.wandb_id,
                "config": config.to_dict() | facts,
                "settings": wandb.Settings(init_timeout=WANDB_TIMEOUT_SECONDS, console="off", silent=True),
            }
            first_try: dict[str, Any] = {"mode": mode, "resume": "allow" if start_step and mode == "online" else None}
            try:
                run = wandb.init(**first_try, **options)
            except Exception as error:
                if mode != "online":
                    raise
                complain(f"W&B cannot be reached, so this run is recorded offline ({first_line(error)})")
                run = wandb.init(mode="offline", **options)
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
    """Numbers for people: 'loss 0.1234  lr 0.0001'."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def complain(text: str) -> None:
    print(f"warning: {one_line(text)}", file=sys.stderr, flush=True)
