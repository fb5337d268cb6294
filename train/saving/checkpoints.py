"""Checkpoints of a run: all that is needed to go on as if nothing had happened, at any number of ranks.

    checkpoints = Checkpoints(output_path, keep=2)
    found = checkpoints.find("auto")                            # verified; None: begin at the beginning
    resumed = checkpoints.resume(engine, found, identity)       # ValueError names what differs
    …
    checkpoints.save(engine, step, identity | progress)         # JSON; its parts model, lora, data, order are compared

LoRA weights, the optimizer's state and the client's state are in it; the frozen base is not, only its fingerprint. What lies
on the disk, and how it stays whole: train/saving/checkpoint_folder.py. How ZeRO's pieces become whole tensors and pieces again:
train/engine/optimizer_state.py.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from files.folder_lock import FolderLost
from files.shown import shown
from train.config.train_config import DEFAULTS, TrainConfig
from train.engine import whole_state
from train.engine.ema import EMA
from train.engine.optimizer_state import (
    ema_of,
    gather,
    read_counters,
    read_kinds,
    restore,
    trainable_shapes,
    whole_of,
)
from train.saving.checkpoint_folder import (
    FORMAT_VERSION,
    TENSORS,
    Checkpoint,
    Say,
    newest_whole,
    prune,
    write_checkpoint,
)
from train.saving.final_file import FINAL, final_file_is_whole


@dataclass(frozen=True)
class Resumed:
    """Where training begins: at the beginning, or where a checkpoint left it.

    Attributes:
        step: optimizer steps done.
        consumed: micro-batches that all ranks together had consumed.
        loss: `LossWatch.state()`, so that the next row averages over the same steps as if nothing had happened.
        wandb_id: of the W&B run to go on in; None for another run's checkpoint.
        best: `Best.state()` of the run that goes on; None for another run's checkpoint, or other data.
        path: of the checkpoint; None at the beginning.
        client: all that the checkpoint remembers of its run.
    """

    step: int = 0
    consumed: int = 0
    loss: dict[str, Any] | None = None
    wandb_id: str | None = None
    best: dict[str, Any] | None = None
    path: Path | None = None
    client: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints in `output_path`/checkpoints.

    Args:
        keep: so many of the newest stay, 0 for all; besides those at multiples of `keep_every` steps.
        on_error: a checkpoint that can't be written (a full disk) ends the run with an OSError (`stop`), or is reported
            and left out (`continue`). Earlier ones are untouched either way.
        say: where notes go.
        lora_format: the spelling of the run's LoRA file (for `is_finished`).
    """

    def __init__(
        self,
        output_path: Path,
        keep: int = 2,
        keep_every: int = 0,
        on_error: Literal["stop", "continue"] = "stop",
        say: Say = print,
        lora_format: str = "diffusers",
    ) -> None:
        self.lora_format = lora_format
        self.output_path, self.folder = output_path, output_path / "checkpoints"
        self.keep, self.keep_every, self.on_error, self.say = keep, keep_every, on_error, say

    @classmethod
    def from_config(cls, config: TrainConfig, say: Say) -> "Checkpoints":
        kept = config.keep_checkpoints, config.keep_every, config.on_save_error
        return cls(config.output_path, *kept, say, config.lora_format)

    def save(self, engine: Any, step: int, client: dict[str, Any]) -> Path | None:
        """Write the checkpoint of optimizer step `step`; a collective. Its folder, or None if it could not be written.

        All ranks see the same outcome, an error too.
        """
        kinds, shapes, counters = read_kinds(engine), trainable_shapes(engine), read_counters(engine)
        folder = self.folder / f"step-{step:08d}"
        facts = {"format_version": FORMAT_VERSION, "step": step, "counters": counters, "kinds": kinds, "client": client}
        facts |= {"shapes": {name: list(shape) for name, shape in shapes.items()}, "world": dist.get_world_size()}
        others: dict[str, torch.Tensor] = {}
        if (optimizer := whole_of(engine)) is not None:
            others, facts["groups"] = whole_state.irregular(optimizer), whole_state.progress(optimizer)
        wholes = gather(engine, kinds)
        problem: OSError | None = None
        if dist.get_rank() == 0:
            try:
                write_checkpoint(folder, facts, wholes, others)
                prune(folder, self.keep, self.keep_every, self.say)
            except OSError as error:
                problem = error
        for _ in wholes:  # the other ranks' share; after an error also the rest of rank 0's: they wait for it
            pass
        return folder if settle(problem, f"checkpoint {folder} not written", self.on_error, self.say) else None

    def find(self, resume: str = "auto") -> Checkpoint | None:
        """The checkpoint to go on from, verified; the same on all ranks (rank 0 looks). None: begin at the beginning.

        `auto`: the newest of this run that is whole, None if it has none at all; `never`: None; else the path of a
        checkpoint, of a folder of them, or of a run. Each damaged one that is passed over is named.

        Raises FileNotFoundError for a path without checkpoints, ValueError when all are damaged.
        """
        if resume == "never":
            return None
        outcome: list[Any] = [None]
        if not dist.is_initialized() or dist.get_rank() == 0:
            path = self.output_path if resume == "auto" else Path(resume)
            try:
                outcome = [newest_whole(path, resume == "auto", self.say)]
            except (ValueError, OSError) as error:
                outcome = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(outcome, device=object_device())
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def is_finished(
        self, found: Checkpoint | None, steps: int, identity: dict[str, Any], ignore_data: bool = False
    ) -> bool:
        """Whether the run of `steps` optimizer steps is over and its LoRA file is there, which is said; a collective.

        That is so when `found` is this run's own, of its last step or a later one, and the file is whole, of that step, and
        spelled as asked. Raises ValueError for a checkpoint of another run, finished or not, as going on from it would: here
        nothing was read or written yet.
        """
        if found is None:
            return False
        check_same(found, identity, ignore_data, say=lambda line: None)
        if found.step < steps or not found.path.resolve().is_relative_to(self.folder.resolve()):
            return False
        outcome: list[Any] = [False]
        if not dist.is_initialized() or dist.get_rank() == 0:
            outcome = [final_file_is_whole(self.output_path, found.step, self.lora_format)]
        if dist.is_initialized():
            dist.broadcast_object_list(outcome, device=object_device())
        if outcome[0]:
            path = shown(self.output_path / FINAL)
            self.say(
                f"already done: LoRA of step {found.step}: {path}; to go on, raise --max_steps or --num_epochs (this run "
                f"ends at {steps})"
            )
        return bool(outcome[0])

    def resume(
        self, engine: Any, found: Checkpoint | None, identity: dict[str, Any], ignore_data: bool = False
    ) -> Resumed:
        """Go on from what `find` found, or begin. Raises ValueError for a checkpoint of another run (`check_same`)."""
        if found is None:
            return Resumed()
        same_data = check_same(found, identity, ignore_data, self.say)
        self.load(engine, found)
        self.say(f"resumed from {found.path}")
        own = found.path.resolve().is_relative_to(self.folder.resolve())
        return Resumed(
            step=found.step,
            consumed=found.client["consumed"] if same_data else 0,
            loss=found.client.get("loss"),
            wandb_id=found.client.get("wandb_id") if own else None,
            best=found.client.get("best") if own and same_data else None,  # else other samples may be held out
            path=found.path,
            client=found.client,
        )

    def load(self, engine: Any, checkpoint: Checkpoint) -> None:
        """Put a checkpoint into an engine, whatever number of ranks wrote it. No collectives; every rank reads the file.

        Raises ValueError when the trained parameters differ in name or shape, naming the first that does.
        """
        from safetensors import safe_open

        here, there = trainable_shapes(engine), checkpoint.shapes
        for name in [*here, *there]:
            if here.get(name) != there.get(name):
                raise ValueError(
                    f"checkpoint {checkpoint.path} is of another LoRA: {name} is {there.get(name, 'missing')} in it and "
                    f"{here.get(name, 'missing')} in this run"
                )
        if (ema_of(engine) is None) != (EMA not in checkpoint.kinds):
            self.say(
                f"checkpoint {checkpoint.path} holds no moving average: it begins at the weights of step {checkpoint.step}"
                if ema_of(engine) is not None
                else f"the moving average in checkpoint {checkpoint.path} is left out: this run has no --ema_decay"
            )
        with safe_open(checkpoint.path / TENSORS, framework="pt") as file:
            regular = {f"{kind}/{name}" for kind in checkpoint.kinds for name in there}
            others = {key: file.get_tensor(key) for key in [*file.keys()] if key not in regular}
            found = checkpoint.kinds, checkpoint.counters, others, checkpoint.groups
            restore(engine, lambda kind, name: file.get_tensor(f"{kind}/{name}"), *found)
        engine.global_steps = checkpoint.step
        engine.micro_steps = checkpoint.step * engine.gradient_accumulation_steps()
        engine.global_samples = checkpoint.step * engine.train_batch_size()


NO_MATTER = (
    "config.resume",
    "config.resume_ignore_data",
    "config.output_path",
    "config.checkpoint_minutes",
)  # options that change nothing of the training


def check_same(checkpoint: Checkpoint, current: dict[str, Any], ignore_data: bool = False, say: Say = print) -> bool:
    """Compare the parts `model`, `lora`, `data` and `order` of the client state with this run's; True if all agree.

    Raises ValueError naming every difference. `ignore_data` lets another data set or order pass, says what differs, and
    returns False: then the position in the old stream means nothing, and the new one starts at its beginning.
    Options and a global batch that have changed are said: they are allowed, but the curve is another one.
    """
    fatal = [d for part in ("model", "lora") for d in differences(checkpoint.client.get(part), current.get(part), part)]
    if fatal:
        raise ValueError(f"checkpoint {checkpoint.path} does not fit this run: {'; '.join(fatal)}")
    theirs, ours = (str(facts.get("optimizer") or "adamw") for facts in (checkpoint.client, current))
    if theirs != ours:
        raise ValueError(
            f"checkpoint {checkpoint.path} holds the state of optimizer {theirs}, which {ours} can't go on with: go on with "
            "that one, or begin a new run in another --output_path with its LoRA, by --lora_checkpoint"
        )
    data = [d for part in ("data", "order") for d in differences(checkpoint.client.get(part), current.get(part), part)]
    if data and not ignore_data:
        other = "on other data" if checkpoint.client.get("data") != current.get("data") else "in another order"
        raise ValueError(
            f"checkpoint {checkpoint.path} was trained {other}: {'; '.join(data)} "
            "(--resume_ignore_data goes on with this run's data, from its beginning)"
        )
    for part in ("global_batch", "config"):
        before, now = checkpoint.client.get(part), current.get(part)
        if part == "config" and before and now:  # options that did not exist yet were as they are by default
            defaults = {name: DEFAULTS[name] for name in now if name in DEFAULTS}
            before = {n: str(v) if isinstance(v, Path) else v for n, v in defaults.items()} | before
        for line in differences(before, now, part):
            if part in checkpoint.client and line.split()[0] not in NO_MATTER:
                say(f"resuming with another option: {line}")
    if data:
        say(f"resuming on other data, from its beginning: {'; '.join(data)}")
    return not data


def differences(saved: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values: `lora.rank is 16 in the checkpoint, 32 in this run`, one entry a leaf."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*saved, *now]))
        nested = [differences(saved.get(k), now.get(k), f"{name}.{k}" if name else str(k)) for k in keys]
        return [line for lines in nested for line in lines]
    as_json = [json.loads(json.dumps(value)) for value in (saved, now)]  # a tuple comes back as a list
    if as_json[0] == as_json[1]:
        return []
    return [f"{name} is {json.dumps(saved)} in the checkpoint, {json.dumps(now)} in this run"]


def settle(problem: OSError | None, what: str, on_error: str, say: Say) -> bool:
    """Whether no rank had a problem with writing; a collective. If one had: OSError on all ranks (`stop`), or a line."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is None:
        return True
    line = f"{what}: {first.strerror or first}"
    if isinstance(first, FolderLost):
        raise first
    if on_error == "stop":
        raise OSError(line)
    say(f"{line}; training goes on, what was written before is intact")
    return False


def object_device() -> torch.device:
    """Where torch.distributed sends pickled objects from: NCCL can't send from the CPU."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
