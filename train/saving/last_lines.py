"""What a run says when it ends: what is there, where, and what comes next. Pure text, of values."""

import shlex
from collections.abc import Collection
from pathlib import Path

GO_ON = "start the same command again to go on from the newest checkpoint"


def left(reason: str, step: int, saved: int, exit_code: int) -> str:
    """A run that was asked to leave after optimizer step `step`; `saved`: the step of its newest checkpoint, 0 for none."""
    checkpoint = f"checkpoint of step {saved} saved" if saved == step else newest(saved)
    return f"{reason or 'another rank was asked to leave'}: {checkpoint}, exit code {exit_code}; {GO_ON}"


def no_data(error: str, step: int, saved: int) -> str:
    """A run that can't read its next batch, after optimizer step `step`; `error` says why."""
    checkpoint = f"checkpoint of step {saved} saved" if saved == step > 0 else newest(saved)
    return f"error: {error}; {checkpoint}, exit code 2; when the data can be read, {GO_ON}"


def left_without_saving(reason: str, waits: bool) -> str:
    """A run that was asked to leave where nothing can be saved: before its first step, or since other ranks wait for data."""
    why = "other ranks still wait for data and can't save" if waits else "ended outside of a step"
    return f"{reason}: {why}, no new checkpoint; {GO_ON}"


def not_finite(spoiled: str, saved: int, learning_rate: float, gave_up: bool) -> str:
    """A run that loss or gradient ended; `spoiled`: the step, with what is known of it."""
    why = "too many steps were left out" if gave_up else "ended, as --on_nonfinite stop says"
    advice = f"try --learning_rate {learning_rate / 10:.2g}, --lr_warmup_steps 100, --max_grad_norm 0.1"
    single = (
        "" if gave_up else "; if it is always the same sample, look at it, or leave such steps out: --on_nonfinite skip"
    )
    return f"error: {spoiled}; {why}, exit code 3; {newest(saved)}, no LoRA written; {advice}{single}"


def newest(saved: int) -> str:
    return f"newest checkpoint: step {saved}" if saved else "no checkpoint yet"


def next_commands(model: str, run: Path, recorded: Collection[str], edits: bool = False) -> list[str]:
    """What may come next, a command a line; `recorded`: what else has the rows, `W&B offline` and `TensorBoard`.

    `edits`: prompts of the model speak of source images.
    """
    sample = ["python", "train/sample.py", "--model", model, "--prompt", "…", "--output_path", "images"]
    sample += ["--source_image", "…"] if edits else []
    numbered = any(run.glob("lora-*.safetensors"))
    commands = {"with and without the LoRA": [*sample, "--lora", str(run), "--compare"]}
    if numbered:
        sheet = [*sample, "--checkpoints", str(run), "--strengths", "0", "0.5", "1"]
        commands["its checkpoints at three strengths"] = sheet
    commands["merged into the base"] = [
        *("python", "train/merge_lora.py", "--model", model, "--lora", str(run), "--output_path", "merged")
    ]
    if "TensorBoard" in recorded:
        commands["curves"] = ["tensorboard", "--logdir", str(run / "tensorboard")]
    lines = {what: shlex.join(words) for what, words in commands.items()}
    if "W&B offline" in recorded:
        lines["upload to W&B"] = f"wandb sync {shlex.quote(str(run / 'wandb'))}/offline-run-*"
    width = max(map(len, lines))
    return ["what may come next:"] + [f"  {what:<{width}}  {command}" for what, command in lines.items()]


def done(seconds: float, steps: int, broken: int) -> str:
    """A run that took its last step: how long it took. What may come next stands above (`next_commands`)."""
    hours, rest = divmod(round(seconds), 3600)
    took = f"{steps} steps in {hours}:{rest // 60:02d}:{rest % 60:02d}"
    replaced = f" ({broken} broken samples replaced or left out)" if broken else ""
    return f"done: {took}{replaced}; more steps: the same command with a larger --max_steps"
