"""The frozen matrices of one block as one flat buffer of bytes with a fixed layout.

One buffer a block is one copy or one all-gather a block. Matrices that a fused projection multiplies with at once
(q, k and v of a stream) lie side by side without a gap, in the order in which the block registers them. Vectors (biases, norms,
the scales of 8-bit rows) are not in here: they stay on the device, 0.4 MB a block of Qwen-Image.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

ALIGNMENT = 256  # bytes; what the compiler, vector loads and copy engines take for aligned


@dataclass(frozen=True)
class Piece:
    """One matrix within the buffer: `name` of the parameter in the block, and its place in bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The matrix over uint8 [bytes], with a version counter of its own.

        Autograd's check for changes in place would otherwise fail at each refill, of which it can't know that the contents
        are right again when they are read (block_stream.py sees to that).
        """
        return flat[self.offset : self.offset + self.size].view(self.dtype).view(self.shape).data


@dataclass(frozen=True)
class BlockLayout:
    """All matrices of a block, and the bytes that they take together."""

    pieces: tuple[Piece, ...]
    size: int

    @classmethod
    def of(cls, matrices: dict[str, tuple[torch.Size, torch.dtype]]) -> "BlockLayout":
        """The layout of matrices by name, in this order; those of one owner and one shape lie side by side."""
        pieces: list[Piece] = []
        end = 0
        for name, (shape, dtype) in matrices.items():
            if not (pieces and beside(pieces[-1], name, dtype)):
                end = -(-end // ALIGNMENT) * ALIGNMENT
            pieces.append(Piece(name, shape, dtype, end))
            end += pieces[-1].size
        return cls(tuple(pieces), -(-end // ALIGNMENT) * ALIGNMENT)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The matrices over a buffer uint8 [≥ size]."""
        return {piece.name: piece.view(flat) for piece in self.pieces}


def beside(before: Piece, name: str, dtype: torch.dtype) -> bool:
    """Whether matrix `name` follows without a gap: layers of one parent, as q, k and v are, rows of one length."""
    return before.name.rpartition(".")[0].rpartition(".")[0] == name.rpartition(".")[0].rpartition(".")[0] and (
        before.dtype == dtype and before.size % 16 == 0
    )


def frozen_matrices(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of a block's two-dimensional weights that aren't trained, in the order of registration."""
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2 and not parameter.requires_grad:
            yield name, parameter


def put_parameter(module: nn.Module, name: str, values: torch.Tensor) -> None:
    """Let the frozen parameter `name` be `values`, without a copy."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
