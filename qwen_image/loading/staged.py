"""The transformer read tensor by tensor into what it becomes: merged, float8, or columns of the modulation table.

    transformer = load_staged(files, torch.bfloat16, "cuda", base_float8=True, sigmas=[k / 1000 for k in range(1, 1001)])

A tensor in the model's dtype lives only between the disk and what is made of it, so a float8 model of 13 GB never needs the
41 GB of the bf16 one. Threads read ahead by STAGED_BYTES while the device works.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import nn

from qwen_image.float8.linear import Float8Linear, use_float8
from qwen_image.loading.model_files import ModelFiles
from qwen_image.loading.safetensors_ranges import RangeReader
from qwen_image.loading.weights import empty_transformer, match_weights, replace_parameter
from qwen_image.model.modulation import TableBuilder
from qwen_image.model.transformer import QwenImageTransformer

STAGED_BYTES = 512 << 20  # read ahead: a second of a fast disk, and more than the largest tensor (113 MB)
TABULATED = ("img_mod", "txt_mod")
BLOCKS = "transformer_blocks."

Change = Callable[[str, torch.Tensor], torch.Tensor]  # a layer's full name and weight → what to use instead


def load_staged(
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    base_float8: bool = False,
    sigmas: Iterable[float] | None = None,
    change: Change | None = None,
    progress: bool = False,
) -> QwenImageTransformer:
    """The frozen transformer on `device`, in evaluation mode.

    Args:
        base_float8: quantize the blocks' projections and MLPs (qwen_image/float8/linear.py).
        sigmas: put a modulation table for them in the place of the modulation layers; None: keep the layers.
        change: applied to each linear layer's weight, in `dtype`, before anything else is made of it.

    Raises ValueError when names or shapes are another model's, before any weight is read.
    """
    transformer = empty_transformer(files)
    stored = match_weights(transformer, files["transformer"].weights)
    linear = {f"{name}.weight" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    if base_float8:
        use_float8(transformer, dtype)
    outside = [name for name in stored if not name.startswith(BLOCKS)]
    inside = [name for name in stored if name.startswith(BLOCKS)]
    total = sum(tensor.numel * tensor.dtype.itemsize for tensor in stored.values())
    with RangeReader(progress, total) as reader:
        stage = Stage(transformer, change, linear)

        def read(names: list[str]) -> None:
            for name in names:
                values = torch.empty(stored[name].shape, dtype=dtype, device=device)
                stage.add(name, values, reader.read(stored[name], values))
            stage.drain()

        read(outside)
        if sigmas is not None:
            stage.builder = TableBuilder(transformer, sigmas)
        read(sorted(inside, key=_block))  # stable: the files' order within a block
    if stage.builder is not None:
        stage.builder.finish()
    return transformer.eval()


def _block(name: str) -> int:
    return int(name.split(".")[1])


@dataclass
class Stage:
    """Tensors on their way from the disk, oldest first; what is complete is put into the transformer."""

    transformer: QwenImageTransformer
    change: Change | None
    linear: set[str]  # names of linear layers' weights
    builder: TableBuilder | None = None
    waiting: deque[tuple[str, torch.Tensor, list[Future[None]]]] = field(default_factory=deque)

    def add(self, name: str, values: torch.Tensor, arriving: list[Future[None]]) -> None:
        """`values` will be full when all of `arriving` is done."""
        self.waiting.append((name, values, arriving))
        while sum(values.numel() * values.element_size() for _, values, _ in self.waiting) > STAGED_BYTES:
            self._finish_oldest()

    def drain(self) -> None:
        while self.waiting:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        name, values, arriving = self.waiting.popleft()
        for future in arriving:
            future.result()
        if self.change is not None and name in self.linear:
            values = self.change(name.removesuffix(".weight"), values)
        layer = self.transformer.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Float8Linear) and name.endswith(".weight"):
            layer.quantize(values)
            return
        replace_parameter(self.transformer, name, nn.Parameter(values, requires_grad=False))
        if self.builder is not None and name.split(".")[2] in TABULATED:
            block = self.transformer.get_submodule(BLOCKS + name.split(".")[1])
            parts = [parameter for part in TABULATED for parameter in block.get_submodule(part).parameters()]
            if not any(parameter.is_meta for parameter in parts):
                self.builder.add_block(_block(name))
