"""`--keep_best`: the LoRA with the lowest validation loss so far, as lora-best.safetensors.

What was best is remembered in checkpoints, so that a resumed run chooses as an uninterrupted one would.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config.train_config import DEFAULTS
from train.saving.final_file import lora_facts

BEST = "lora-best.safetensors"
MEASURED_BY = (
    "masked_loss",
    "mask_min_weight",
    "trigger_word",
    "caption_prefix",
    "caption_suffix",
    "caption_alternatives",
    "max_prompt_tokens",
)  # options that validation measures by: under others the same LoRA has another loss


def measured_otherwise(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Options of `MEASURED_BY` that differ between a checkpoint's config and a run's; a missing one is as by default."""
    if not before:
        return []
    then, today = ({name: config.get(name, DEFAULTS[name]) for name in MEASURED_BY} for config in (before, now))
    for values in (then, today):
        if not values["masked_loss"]:
            values["mask_min_weight"] = None  # without the masked loss it means nothing
    return [name for name in MEASURED_BY if then[name] != today[name]]


@dataclass
class Best:
    """The best validation of a run.

    Attributes:
        step: when; None: none yet.
        loss: its validation loss.
        averaged: it was that of the moving average.
        before: the loss before the first step, without a trained LoRA.
    """

    enabled: bool = False
    step: int | None = None
    loss: float = math.inf
    averaged: bool = False
    before: float | None = None

    @classmethod
    def resumed(
        cls,
        enabled: bool,
        state: dict[str, Any] | None,
        run: Path,
        say: Callable[[str], None],
        changed: Sequence[str] = (),
    ) -> "Best":
        """As a checkpoint remembers it. `run`: the folder, whose file may be of a step that is trained again.

        changed: options by which validation now measures something else (`measured_otherwise`): what was best is forgotten.
        """
        best = cls(enabled)
        if not enabled or not state:
            return best
        if changed:
            say(
                f"validation losses of before can't be compared with those that come ({', '.join(changed)} changed): which "
                "step is best is decided anew from here on"
            )
            return best
        best.before = state["before"]
        there = lora_facts(run / BEST).get("step")
        if state["step"] is not None and there == str(state["step"]):
            best.step, best.loss, best.averaged = state["step"], state["loss"], state["averaged"]
        elif there is not None:
            say(f"{BEST} is of step {there}, after the checkpoint: which step is best is decided anew from here on")
        elif state["step"] is not None:
            say(f"{BEST} of step {state['step']} is gone: which step is best is decided anew from here on")
        return best

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint; JSON."""
        if not self.enabled:
            return None
        loss = self.loss if math.isfinite(self.loss) else None
        return {"step": self.step, "loss": loss, "averaged": self.averaged, "before": self.before}

    def improves(self, step: int, loss: float, averaged_loss: float | None) -> bool:
        """Take in a validation; whether it is the best so far of those after the first step. NaN never is."""
        if step == 0:
            self.before = loss
            return False
        averaged = averaged_loss is not None and not averaged_loss >= loss
        lowest = averaged_loss if averaged and averaged_loss is not None else loss
        if not self.enabled or not lowest < self.loss:
            return False
        self.step, self.loss, self.averaged = step, lowest, averaged
        return True

    def summary(self) -> dict[str, Any]:
        """For W&B's summary; nothing where none was found."""
        return {} if self.step is None else {"best_step": self.step, "best_validation_loss": self.loss}

    def line(self) -> str | None:
        """For people, at the end."""
        if self.step is None:
            return None
        line = f"best validation loss {self.loss:.4g} at step {self.step}{' (moving average)' if self.averaged else ''}: {BEST}"
        if self.before is not None and not self.loss < self.before:
            line += f"; without the LoRA it was {self.before:.4g}, lower still: it does not generalize"
        return line
