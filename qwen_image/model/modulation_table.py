"""Modulation, and the table that gives it for the noise levels that occur.

Adaptive layer norm (AdaLN): each block shifts, scales and gates its two streams by vectors that depend on the noise level
alone, not on image or text. So for σ on a grid, like k/1000, all of them fit into a table: a row a time input, which is
1000·σ in the model's dtype. In bf16 there are 500 different ones, 2.2 GB in pinned host memory; a step copies 4.4 MB a sample.
qwen_image/model/modulation.py fills it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Modulation(NamedTuple):
    """Shifts, scales and gates at the noise levels of a batch, all blocks together."""

    blocks: torch.Tensor  # [blocks, 2 (image, text), B, 1, 6·D]
    final: torch.Tensor  # scale and shift before the output layer, [B, 1, 2·D]


def time_inputs(sigmas: Iterable[float], dtype: torch.dtype) -> list[float]:
    """The different time inputs 1000·σ (rounded to `dtype`) / 1000, as `predict_velocity` makes them, ascending."""
    sigma = torch.tensor(sorted(set(sigmas)), dtype=torch.float32)
    return torch.unique((sigma * 1000).to(dtype) / 1000).tolist()


class ModulationTable:
    """All blocks' modulation at the time inputs: `rows` [blocks, time inputs, 12 · D], image before text within a block, and
    norm_out's, `final` [time inputs, 2 · D].

    Bit-equal to computing a batch of one in place: each row was computed by itself, by the same modules. Raises
    ValueError on a time input that it was not built for. `replaced`: bytes of weights that it stands in for.

    Attributes:
        clean: the image modulation at the time input 0, [blocks, 1, 1, 6·D] on `device`: that of source images in models with
            `zero_cond_t` (the table then knows 0); None in others.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        final: torch.Tensor,
        times: list[float],
        device: torch.device,
        replaced: int = 0,
        zero_cond_t: bool = False,
    ):
        self.rows, self.final, self.device, self.replaced = rows, final, device, replaced
        self.places = {time: place for place, time in enumerate(times)}
        self.clean: torch.Tensor | None = None
        if zero_cond_t:
            row = rows[:, self.places[0.0]]  # [blocks, 12·D], image before text
            self.clean = row[:, None, None, : row.shape[1] // 2].clone().to(device)

    def lookup(self, timestep: torch.Tensor) -> Modulation:
        """Time inputs [B] (on the CPU, else the device is waited for) → all blocks' rows and norm_out's."""
        times = timestep.tolist()
        try:
            places = [self.places[time] for time in times]
        except KeyError as error:
            raise ValueError(
                f"the modulation table has no row for the time input {error.args[0]:g}; σ must lie on the grid k/1000 or "
                "in the schedule of the sample images"
            ) from None
        rows = self._arriving(self.rows[:, places])
        blocks = rows.view(len(rows), len(times), 2, 1, -1)
        # A CUDA graph's copies are contiguous: with strides of their own the compiler would take them for another case.
        return Modulation(blocks.transpose(1, 2).contiguous(), self._arriving(self.final[places])[:, None])

    def _arriving(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows
