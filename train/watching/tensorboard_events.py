"""`--tensorboard`: the rows of metrics.jsonl as TensorBoard's events under the same names, by torch's own writer.

tensorboard --logdir RUN/tensorboard
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorboardEvents:
    """Events in RUN/tensorboard. A training that goes on from `start_step` hides those after it."""

    def __init__(self, run: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / FOLDER), purge_step=start_step + 1 if start_step else None)

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics; it holds `step`."""
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, row["step"])

    def images(self, step: int, sheet: Path, images: Sequence[tuple[Path, str]]) -> None:
        """The sheet as `samples`; single images lie in RUN/samples."""
        import numpy as np
        from PIL import Image

        self.writer.add_image(
            "samples", np.asarray(Image.open(sheet, formats=["PNG"]).convert("RGB")), step, dataformats="HWC"
        )

    def ended(self, summary: dict[str, Any], files: Sequence[Path]) -> None:
        """What the run came to, as a text."""
        self.writer.add_text("summary", "  \n".join(f"{name}: {value}" for name, value in summary.items()))

    def close(self) -> None:
        self.writer.close()
