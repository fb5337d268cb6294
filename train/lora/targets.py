"""Which linear layers a LoRA adapts (`--lora_target_modules`): by the endings of their names, or by named groups of these."""

from collections.abc import Iterable

from torch import nn

from qwen_image.model.transformer import DEAD_IN_LAST_BLOCK, QwenImageTransformer

GROUPS = {  # of the linear layers in every block; image stream and text stream alike
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "mlp": ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    "modulation": ("img_mod.1", "txt_mod.1"),
}
GROUPS["all"] = GROUPS["attention"] + GROUPS["mlp"] + GROUPS["modulation"]


def expand_groups(targets: Iterable[str]) -> tuple[str, ...]:
    """The endings that `targets` name, groups replaced by what is in them; each ending once, where it comes first."""
    return tuple(dict.fromkeys(ending for target in targets for ending in GROUPS.get(target, (target,))))


def linear_layers(transformer: QwenImageTransformer) -> list[str]:
    """Full names of all linear layers that a LoRA can adapt: those of the last block's dead text half are left out."""
    last = f"transformer_blocks.{transformer.config.num_layers - 1}."
    dead = tuple(last + name for name in DEAD_IN_LAST_BLOCK)
    return [name for name in _all_linear_layers(transformer) if not name.startswith(dead)]


def _all_linear_layers(transformer: QwenImageTransformer) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def resolve_targets(transformer: QwenImageTransformer, targets: Iterable[str]) -> list[str]:
    """Full names of the layers that `targets` (name endings such as `to_q` or `img_mlp.net.2`, or GROUPS) select.

    In model order. Raises ValueError for a target that no layer has, with the names and groups that exist, and where nothing
    but dead layers is left.
    """
    everything, names = _all_linear_layers(transformer), linear_layers(transformer)
    chosen: set[str] = set()
    for target in expand_groups(targets):
        matches = {name for name in everything if name == target or name.endswith("." + target)}
        if not matches:
            endings = sorted({name.split(".", 2)[2].removeprefix("attn.") for name in names if "blocks." in name})
            others = sorted(name for name in names if "blocks." not in name)
            raise ValueError(
                f"lora_target_modules: no linear layer is called {target!r}; there are {', '.join(endings + others)}, "
                f"and the groups {', '.join(GROUPS)}"
            )
        chosen |= matches
    adapted = [name for name in names if name in chosen]
    if not adapted:
        raise ValueError(
            f"lora_target_modules: {', '.join(sorted(chosen))} never gets a gradient (the last block's text half is dropped)"
        )
    return adapted


def base_layer(transformer: nn.Module, name: str) -> nn.Linear:
    """The frozen linear layer called `name`, whether or not it carries a LoRA."""
    module = transformer.get_submodule(name)
    layer = getattr(module, "base_layer", module)
    assert isinstance(layer, nn.Linear)
    return layer


def group_of(layer: str) -> str:
    """The target group of a linear layer with the stream that it works in: `attention, image`; `other` outside of blocks."""
    for group in ("attention", "mlp", "modulation"):
        if any(layer.endswith("." + ending) for ending in GROUPS[group]):
            text = any(part.startswith(("add_", "to_add_", "txt_")) for part in layer.split("."))
            return f"{group}, {'text' if text else 'image'}"
    return "other"
