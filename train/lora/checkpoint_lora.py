"""The LoRA in a checkpoint, which is read as a LoRA file: of a run that was stopped, or is still going on.

Its tensors are weight/NAME in float32, without the scale, and the optimizer's state, which nobody needs here (but that of
schedule-free, whose run means its average/NAME by its LoRA); the scale follows from what the checkpoint remembers of the run's
LoRA. So all it lacks of a LoRA file is the header.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from files.shown import shown
from train.config.run_files import FACTS, TENSORS
from train.lora.adapter_metadata import KEY


class Spelling(NamedTuple):
    """What stands before the keys that count, the header as diffusers would write it, and a line for people."""

    prefix: str
    metadata: dict[str, str]
    notes: tuple[str, ...]


def checkpoint_spelling(path: Path) -> Spelling | None:
    """How to read `path` if it is the tensors of a checkpoint, verified; None if it is anything else.

    Raises ValueError for a checkpoint that is damaged.
    """
    facts_path = path.parent / FACTS
    if path.name != TENSORS or not facts_path.is_file():
        return None
    try:
        facts = json.loads(facts_path.read_bytes())
        lora, step, sha256 = facts["client"]["lora"], int(facts["step"]), facts["sha256"]
        own = {"r": lora["rank"], "lora_alpha": lora["alpha"], "use_rslora": lora["rslora"], "use_dora": lora["dora"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"checkpoint {shown(path.parent)} is damaged: {FACTS} doesn't say what LoRA it is of"
        ) from None
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(
                f"checkpoint {shown(path.parent)} is damaged: {TENSORS} doesn't match its checksum; give the one before it, "
                "by its path"
            )
    header = {KEY: json.dumps({f"transformer.{name}": value for name, value in own.items()}), "step": str(step)}
    prefix = "average/" if "average" in facts.get("kinds", []) else "weight/"
    return Spelling(prefix, header, (f"the LoRA is that of step {step}, from the checkpoint {shown(path.parent)}",))
