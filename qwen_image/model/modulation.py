"""The modulation layers of a transformer, and a table put in their place.

`img_mod` and `txt_mod` of every block and `norm_out.linear` depend on the time input alone: 6.8 of Qwen-Image's 20.4
billion parameters, 13.6 GB in bf16. While they are frozen, their outputs can be computed once for all noise levels
(qwen_image/model/modulation_table.py) and the weights dropped from the device.
"""

from collections.abc import Iterable

import torch
from torch import nn

from qwen_image.model.modulation_table import ModulationTable, time_inputs
from qwen_image.model.transformer import Block, QwenImageTransformer


class TableBuilder:
    """A table in the making: block after block, so that no more than one block's modulation need be in memory.

    Needs the weights of `time_text_embed`, `norm_out` and `proj_out` from the start. The rows lie in host memory, pinned if
    the transformer is on a GPU.
    """

    @torch.no_grad()
    def __init__(self, transformer: QwenImageTransformer, sigmas: Iterable[float]):
        parameter = transformer.proj_out.weight
        self.transformer = transformer
        self.times = time_inputs(sigmas, parameter.dtype)
        self.freed = 0
        inputs = torch.tensor(self.times, device=parameter.device, dtype=parameter.dtype)
        self.embedded = [transformer.embed_time(time) for time in inputs.split(1)]
        self.blocks = len(transformer.transformer_blocks)
        self.width = transformer.config.inner_dim
        shape = len(self.times), (12 * self.blocks + 2) * self.width
        self.rows = torch.empty(shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
        final = torch.cat([transformer.final_modulation(temb).flatten(1) for temb in self.embedded])
        self.rows[:, 12 * self.blocks * self.width :] = final

    @torch.no_grad()
    def columns(self, index: int) -> torch.Tensor:
        """The table's columns of block `index` from its weights: [time inputs, 12·D] on their device."""
        block = self.transformer.transformer_blocks[index]
        assert isinstance(block, Block)
        return torch.cat([torch.cat(block.modulation(temb), dim=-1).flatten(1) for temb in self.embedded])

    def room(self, device: torch.device) -> torch.Tensor:
        """Uninitialized columns, for what another process computes."""
        return torch.empty(len(self.times), 12 * self.width, dtype=self.rows.dtype, device=device)

    def add_block(self, index: int, columns: torch.Tensor | None = None) -> None:
        """Put in the `columns` of block `index` (None: compute them) and drop the weights that they stand for."""
        block = self.transformer.transformer_blocks[index]
        assert isinstance(block, Block)
        width = 12 * self.width
        self.rows[:, index * width : (index + 1) * width] = self.columns(index) if columns is None else columns
        self._drop(block.img_mod, block.txt_mod)

    def finish(self) -> int:
        """Put the table, now that all blocks were added, in the place of the layers; returns the bytes it replaced."""
        self._drop(self.transformer.norm_out, self.transformer.time_text_embed)
        device = self.transformer.proj_out.weight.device
        table = ModulationTable(self.rows, self.times, self.blocks, device, self.freed)
        self.transformer.modulation_table = table
        return self.freed

    def _drop(self, *modules: nn.Module) -> None:
        for owner in (owner for module in modules for owner in module.modules()):
            for name, parameter in list(owner.named_parameters(recurse=False)):
                self.freed += parameter.numel() * parameter.element_size()
                delattr(owner, name)


def modulation_layers(transformer: QwenImageTransformer) -> list[nn.Module]:
    """The modules that a table replaces."""
    blocks = [block for block in transformer.transformer_blocks if isinstance(block, Block)]
    return [module for block in blocks for module in (block.img_mod, block.txt_mod)] + [
        transformer.norm_out,
        transformer.time_text_embed,
    ]


def is_frozen(transformer: QwenImageTransformer) -> bool:
    """Whether nothing of the modulation is trained or carries a LoRA."""
    names = [name for module in modulation_layers(transformer) for name, _ in module.named_parameters()]
    trained = any(p.requires_grad for module in modulation_layers(transformer) for p in module.parameters())
    return not trained and not any("lora_" in name for name in names)


def replace_by_table(transformer: QwenImageTransformer, sigmas: Iterable[float]) -> int:
    """Build the table and drop the weights it replaces; returns the bytes freed on the device.

    Raises ValueError when LoRA or training reaches the modulation: then it is no constant.
    """
    if not is_frozen(transformer):
        raise ValueError("a modulation table needs frozen modulation, but LoRA targets img_mod, txt_mod or norm_out")
    builder = TableBuilder(transformer, sigmas)
    for index in range(builder.blocks):
        builder.add_block(index)
    return builder.finish()
