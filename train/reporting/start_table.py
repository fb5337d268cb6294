"""The table that a run begins with: what, how much, how long, and the memory that it takes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.shown import shown
from qwen_image.free_memory import GIB
from train.config.train_config import TrainConfig
from train.fit.memory_plan import Setup
from train.reporting.data_by_source import lines_by_source
from train.reporting.expected_time import expected_time
from train.reporting.story import duration


@dataclass(frozen=True)
class StartTable:
    """Rows of a name and a text, for people.

    Attributes:
        facts: of start_facts.py.
        every: by what is written, how many steps lie between; 0 = at the end only.
        time: how long it will take.
        steps_done: of the run that goes on; 0 for a new one.
        predicted: bytes at the peak, as a trial step found; None where there was none.
    """

    model: str
    output: Path
    facts: dict[str, Any]
    every: dict[str, int]
    time: str
    steps_done: int = 0
    predicted: int | None = None

    @classmethod
    def from_config(
        cls, config: TrainConfig, setup: Setup, facts: dict[str, Any], steps_done: int, predicted: int | None
    ) -> "StartTable":
        """Looks for earlier runs of its like beside the run folder, for the time."""
        every = {"LoRA": config.save_steps, "checkpoint": config.checkpoint_every}
        if config.validation_samples:
            every["validation"] = config.validate_every
        if config.sample_prompts:
            every["images"] = config.sample_every
        time = "told with the first row of metrics"
        expected = expected_time(config.output_path, facts, setup, config.gradient_accumulation_steps)
        if expected is not None:
            seconds = expected.step * (facts["steps"] - steps_done)
            time = f"about {duration(seconds)} ({expected.step:.3g} s a step; {expected.source})"
        return cls(config.model, config.output_path, facts, every, time, steps_done, predicted)

    def lines(self) -> list[str]:
        """One row a line, the names in a column of their own."""
        return [f"  {name:<8} {text}" for name, text in self.rows()]

    def rows(self) -> Iterator[tuple[str, str]]:
        """Each name with its text."""
        hardware, base, data, lora = (self.facts[name] for name in ("hardware", "base", "data", "lora"))
        left = self.facts["steps"] - self.steps_done
        yield "run", f"{shown(self.output)}, " + (f"goes on from step {self.steps_done}" if self.steps_done else "new")
        yield "model", f"{shown(self.model)}, {base['blocks']} blocks, base in {base['precision']}"
        yield "on", f"{hardware['ranks']} × {hardware['device']}, ZeRO stage {base['zero_stage']}"
        held_out = f", {data['held_out']:,} held out" if data["held_out"] else ""
        yield "data", f"{shown(data['name'])}: {data['samples']:,} samples in {len(data['buckets'])} buckets{held_out}"
        for line in lines_by_source(data.get("sources", [])):
            yield "", line
        layers = sum(group["layers"] for group in lora["groups"].values())
        yield "LoRA", f"{lora['trainable']:,} parameters on {layers} layers ({'; '.join(lora['groups'])})"
        if "optimizer" in self.facts:
            yield "by", self.facts["optimizer"]
        yield "steps", f"{left:,} of {self.facts['global_batch']:,} samples each; {self.written()}"
        yield "memory", self.memory()
        yield "time", self.time

    def written(self) -> str:
        """How often what is written."""
        by_steps: dict[int, list[str]] = {}
        for name, steps in self.every.items():
            by_steps.setdefault(steps, []).append(name)
        return "; ".join(
            f"{', '.join(names)} " + (f"every {steps}" if steps else "at the end") for steps, names in by_steps.items()
        )

    def memory(self) -> str:
        plan, total = self.facts["memory"]["device"], self.facts["hardware"]["device_bytes"]
        size, how = (self.predicted, "by a trial step") if self.predicted else (sum(plan.values()), "by the plan")
        of_card = f" of {total / GIB:.0f} on each GPU" if total else " in each rank"
        return f"{size / GIB:.2f} GiB{of_card}, {how}"
