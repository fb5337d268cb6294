"""Which linear layers a LoRA adapts (`--lora_target_modules`), by the endings of their names."""

from collections.abc import Iterable

from torch import nn

from qwen_image.model.transformer import DEAD_IN_LAST_BLOCK, QwenImageTransformer


def linear_layers(transformer: QwenImageTransformer) -> list[str]:
    """Full names of all linear layers that a LoRA can adapt: those of the last block's dead text half are left out."""
    last = f"transformer_blocks.{transformer.config.num_layers - 1}."
    dead = tuple(last + name for name in DEAD_IN_LAST_BLOCK)
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(dead)
    ]


def resolve_targets(transformer: QwenImageTransformer, targets: Iterable[str]) -> list[str]:
    """Full names of the layers that `targets` (name endings such as `to_q` or `img_mlp.net.2`) select, in model order.

    Raises ValueError for a target that selects nothing, with the names that exist.
    """
    names = linear_layers(transformer)
    chosen: set[str] = set()
    for target in targets:
        matches = {name for name in names if name == target or name.endswith("." + target)}
        if not matches:
            endings = sorted({name.split(".", 2)[2].removeprefix("attn.") for name in names if "blocks." in name})
            others = sorted(name for name in names if "blocks." not in name)
            raise ValueError(
                f"lora_target_modules: no linear layer is called {target!r}; there are {', '.join(endings + others)}"
            )
        chosen |= matches
    return [name for name in names if name in chosen]


def base_layer(transformer: nn.Module, name: str) -> nn.Linear:
    """The frozen linear layer called `name`, whether or not it carries a LoRA."""
    module = transformer.get_submodule(name)
    layer = getattr(module, "base_layer", module)
    assert isinstance(layer, nn.Linear)
    return layer
