"""The modulation layers of a transformer, and a table put in their place.

`img_mod` and `txt_mod` of every block and `norm_out.linear` depend on the time input alone: 6.8 of Qwen-Image's 20.4
billion parameters, 13.6 GB in bf16. While they are frozen, their outputs can be computed once for all noise levels
(qwen_image/model/modulation_table.py) and the weights dropped from the device.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from qwen_image.model.modulation_table import ModulationTable, time_inputs
from qwen_image.model.transformer import Block, QwenImageTransformer


class TableBuilder:
    """A table in the making: block after block, so that no more than one block's modulation need be in memory.

    Needs the weights of `time_text_embed`, `norm_out` and `proj_out` from the start. The rows lie in host memory of
    `allocate(elements, dtype)`, which a GPU's should be page-locked.
    """

    @torch.no_grad()
    def __init__(
        self,
        transformer: QwenImageTransformer,
        sigmas: Iterable[float],
        allocate: Callable[[int, torch.dtype], torch.Tensor] = lambda elements, dtype: torch.empty(
            elements, dtype=dtype
        ),
    ):
        parameter = transformer.proj_out.weight
        self.transformer = transformer
        zero = [0.0] if transformer.config.zero_cond_t else []  # of source images, which are clean
        self.times = time_inputs([*sigmas, *zero], parameter.dtype)
        self.freed = 0
        self.device = parameter.device
        inputs = torch.tensor(self.times, device=self.device, dtype=parameter.dtype)
        self.embedded = [transformer.embed_time(time) for time in inputs.split(1)]
        self.final = torch.cat([transformer.final_modulation(temb).flatten(1) for temb in self.embedded]).cpu()
        shape = len(transformer.transformer_blocks), len(self.times), 12 * transformer.config.inner_dim
        self.rows = allocate(math.prod(shape), parameter.dtype).view(shape)
        self.recorded: RecordedModulation | None = None

    @torch.no_grad()
    def columns(self, index: int) -> torch.Tensor:
        """What the table holds of block `index`, from its weights: [time inputs, 12·D] on their device.

        On a GPU good until it is called again.
        """
        block = self.transformer.transformer_blocks[index]
        assert isinstance(block, Block)
        if self.device.type != "cuda":
            return modulation_of(block, self.embedded)
        if self.recorded is None:
            self.recorded = RecordedModulation(block, self.embedded)
        return self.recorded(block)

    def room(self, device: torch.device) -> torch.Tensor:
        """Uninitialized columns, for what another process computes."""
        return torch.empty(self.rows.shape[1:], dtype=self.rows.dtype, device=device)

    def add_block(self, index: int, columns: torch.Tensor | None = None) -> None:
        """Put in the `columns` of block `index` (None: compute them) and drop the weights that they stand for."""
        block = self.transformer.transformer_blocks[index]
        assert isinstance(block, Block)
        self.rows[index].copy_(self.columns(index) if columns is None else columns, non_blocking=True)
        self._drop(block.img_mod, block.txt_mod)

    def finish(self) -> int:
        """Put the table, now that all blocks were added, in the place of the layers; returns the bytes it replaced."""
        self.recorded = None
        self._drop(self.transformer.norm_out, self.transformer.time_text_embed)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the last blocks may still be on their way
        zero_cond_t = self.transformer.config.zero_cond_t
        table = ModulationTable(self.rows, self.final, self.times, self.device, self.freed, zero_cond_t)
        self.transformer.modulation_table = table
        return self.freed

    def _drop(self, *modules: nn.Module) -> None:
        for owner in (owner for module in modules for owner in module.modules()):
            for name, parameter in list(owner.named_parameters(recurse=False)):
                self.freed += parameter.numel() * parameter.element_size()
                delattr(owner, name)


def modulation_of(block: Block, embedded: Sequence[torch.Tensor]) -> torch.Tensor:
    """[time inputs, 12·D]: each row computed by itself, as in a batch of one, so that no bit differs from that."""
    return torch.cat([torch.cat(block.modulation(temb), dim=-1).flatten(1) for temb in embedded])


class RecordedModulation:
    """`modulation_of` as a CUDA graph over copies of a block's modulation layers.

    Five small kernels a time input: launched one by one they take longer than reading the weights does (bench/LOG.md).
    """

    def __init__(self, block: Block, embedded: Sequence[torch.Tensor]):
        self.layers = copy.deepcopy(nn.ModuleList([block.img_mod, block.txt_mod]))
        stand_in = copy.copy(block)
        stand_in._modules = dict(block._modules, img_mod=self.layers[0], txt_mod=self.layers[1])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            modulation_of(stand_in, embedded[:1])  # cuBLAS makes itself ready, which a capture must not see
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Threads that read files go on calling CUDA while this one captures.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.columns = modulation_of(stand_in, embedded)

    def __call__(self, block: Block) -> torch.Tensor:
        given = [*block.img_mod.parameters(), *block.txt_mod.parameters()]
        for own, values in zip(self.layers.parameters(), given, strict=True):
            own.copy_(values)
        self.graph.replay()
        return self.columns


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
    for index in range(len(builder.rows)):
        builder.add_block(index)
    return builder.finish()
