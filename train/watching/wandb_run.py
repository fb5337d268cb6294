"""The run in Weights & Biases (`--wandb_mode`): rows, images, a summary, and the LoRA files as an artifact where that is asked.

W&B watches the machine (GPU, host memory) by itself. A resumed training goes on in the same run, under the id that its
checkpoints hold; recorded offline, `wandb sync` adds the pieces together by that id.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from files.shown import one_line

WANDB_TIMEOUT_SECONDS = 30.0  # an unreachable server costs this once; then the run goes on offline


@dataclass(frozen=True)
class WandbOptions:
    """The run as W&B shows it. `config`: every option, and facts besides (versions, trainable parameters …).

    `artifact`: the LoRA files of the end are uploaded.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    name: str
    config: dict[str, Any]
    artifact: bool = False


class WandbRun:
    """A run that has begun. Its calls may raise whatever W&B does."""

    def __init__(self, run: Any, options: WandbOptions) -> None:
        self.run, self.options = run, options

    @classmethod
    def begin(cls, options: WandbOptions, folder: Path, wandb_id: str, start_step: int) -> "WandbRun | None":
        """None: disabled, not installed or failed, which is said. `start_step`: where a resumed training goes on."""
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
                "id": wandb_id,
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
            return cls(run, options)
        except Exception as error:
            complain(f"W&B is off ({first_line(error)}); metrics.jsonl holds everything")
            return None

    @property
    def is_offline(self) -> bool:
        """Whether the run waits on the disk for `wandb sync`."""
        return bool(getattr(self.run, "offline", False))

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics; it holds `step`."""
        self.run.log(row)

    def images(self, step: int, sheet: Path, images: Sequence[tuple[Path, str]]) -> None:
        """The sheet as `samples`, single images with their prompts as `samples/images`."""
        import wandb

        shown_there: dict[str, Any] = {"samples": wandb.Image(str(sheet))}
        if images:
            shown_there["samples/images"] = [wandb.Image(str(path), caption=caption) for path, caption in images]
        self.run.log({"step": step, **shown_there})

    def ended(self, summary: dict[str, Any], files: Sequence[Path]) -> None:
        """What the run came to, and its LoRA files."""
        self.run.summary.update(summary)
        if self.options.artifact and files:
            import wandb

            artifact = wandb.Artifact(f"{self.run.id}-lora", type="model", metadata=summary)
            for file in files:
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def complain(text: str) -> None:
    import sys

    print(f"warning: {one_line(text)}", file=sys.stderr, flush=True)
