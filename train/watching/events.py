"""What happened to a run besides its numbers: events.jsonl, a JSON object a line, for train/report.py.

    events = Events(output_path, new=True)
    events.write("saved", step=500, text="checkpoint of step 500: …")

Each has `time` (UTC), `step`, `event` (its kind) and `text`; the start of a run has facts besides, under `facts`. The file
goes on over resumed runs: it tells what was lost, too. Events are for looking at afterwards: one that can't be written is
left out.
"""

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from files.folder_lock import require_owned

EVENTS = "events.jsonl"
Kind = Literal["start", "resume", "saved", "skip", "warning", "note", "end"]


class Events:
    """Adds to events.jsonl in a run folder. `new`: a run begins at step 0, and an earlier one's events go."""

    def __init__(self, folder: Path, new: bool) -> None:
        self.path = folder / EVENTS
        if new:
            with suppress(OSError):
                require_owned(self.path)
                self.path.unlink(missing_ok=True)

    def write(self, kind: Kind, step: int, text: str, **more: Any) -> None:
        """One event, on the disk when this returns as far as the system's buffers."""
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"time": moment, "step": step, "event": kind, "text": text, **more}
        line = json.dumps(row).encode() + b"\n"
        require_owned(self.path)
        with suppress(OSError), open(self.path, "ab", buffering=0) as file:
            file.write(line)
