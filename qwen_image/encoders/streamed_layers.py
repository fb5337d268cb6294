"""A language model whose layers lie in host memory and are on the device only while they compute, for smaller cards.

    streamed = StreamedLayers(language_model, torch.bfloat16, device)           # built on the meta device
    load_weights(language_model, files, …, room=streamed.room)
    streamed.begin()

The 28 layers of Qwen2.5-VL-7B take 13 GB in bf16, two of them 0.9 GB; a forward pass moves each over PCIe once. The embedding
table, another gigabyte, stays in host memory, where looking up a caption's rows takes no time. The stream is that of the
transformer's blocks (qwen_image/streaming/): same kernels, so the same bits.
"""

from typing import Any

import torch

from qwen_image.streaming.block_layout import BlockLayout
from qwen_image.streaming.block_store import BlockStore
from qwen_image.streaming.block_stream import BlockStream

SLOTS = 2  # one layer computes, the next arrives
EMBEDDING = "embed_tokens.weight"
LAYERS = "layers."


class StreamedLayers:
    """The streamed layers of a transformers model that has `layers` and `embed_tokens`."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        layouts = {
            index: BlockLayout.of({name: (p.shape, dtype) for name, p in layer.named_parameters() if p.ndim == 2})
            for index, layer in enumerate(model.layers)
        }
        store = BlockStore(device, {index: layout.size for index, layout in layouts.items()})
        self.stream = BlockStream(layouts, store, device, SLOTS)
        self.views: dict[str, torch.Tensor] = {}
        for index, layout in layouts.items():
            for name, view in layout.views(store.room(index)).items():
                self.views[f"{LAYERS}{index}.{name}"] = view

    def room(self, name: str, shape: torch.Size) -> torch.Tensor | None:
        """Where the weights of parameter `name` are to be read to; None: onto the device."""
        if name == EMBEDDING:
            return torch.empty(shape, dtype=self.dtype)
        return self.views.pop(name, None)

    def begin(self) -> None:
        """The weights are there: from now on the layers compute with what the stream brings."""
        for index, layer in enumerate(self.model.layers):
            self.stream.bind_block(index, layer)
            layer.register_forward_pre_hook(lambda layer, inputs, index=index: self.stream.enter(index))
