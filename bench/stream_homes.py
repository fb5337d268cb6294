"""The training step on a transformer with random weights, its frozen base at one home or another.

    module = build("host-float8-20", Model(layers=60, heads=24, device=device, group=None), recompute=60)
    step = train_step(module, batch_of(module, 1024, device, seed=0))

A home is device | host | ranks | ranks_host, then -float8 or -int8, then -N for N resident blocks; or auto@G: what the
trainer chooses for a card of G GiB, under that limit; or what other libraries make of it (bench/other_streams.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from qwen_image.model.conditioning import Prompt
    from qwen_image.streaming.stream_blocks import BlockHomes
    from train.fit.memory_plan import Setup
    from train.step.flow_matching_module import FlowMatchingModule

ATTENTION = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
SIGMAS = (0.25, 0.5, 0.75)
OTHERS = ("fully_shard", "fully_shard_host", "deepspeed_leaf", "deepspeed_leaf_host")


@dataclass(frozen=True)
class Model:
    """The transformer's size, where it computes, and the ranks that may share it (None: this one alone)."""

    layers: int
    heads: int
    device: torch.device
    group: Any = None

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


class Home(NamedTuple):
    """Where the base lies, whether it is in float8, and how many blocks are recomputed."""

    homes: BlockHomes
    float8: bool
    recompute: int

    @property
    def precision(self) -> str:
        """Homes of one precision must compute the same."""
        return "float8" if self.float8 else self.homes.storage


def build(home: str, model: Model, recompute: int, compile_blocks: bool | None = None) -> FlowMatchingModule:
    """The step's module with its base at `home`, one of ours. Raises ValueError for a home that there isn't."""
    if home.startswith("auto@"):
        return build_for_card(float(home.removeprefix("auto@")), model)
    return assemble(parse(home, model, recompute), model, compile_blocks)


def parse(home: str, model: Model, recompute: int) -> Home:
    """What a home's name says."""
    from qwen_image.streaming.stream_blocks import BlockHomes

    place, *words = home.split("-")
    odd = [word for word in words if word not in ("float8", "int8") and not word.isdigit()]
    if place not in ("device", "host", "ranks", "ranks_host") or odd:
        raise ValueError(
            f"there is no home {home}: say device, host, ranks, ranks_host, auto@GIB or {', '.join(OTHERS)}"
        )
    layers = model.layers
    resident = next((int(word) for word in words if word.isdigit()), layers if place == "device" else 0)
    on_device = frozenset(i * layers // resident for i in range(resident)) if resident else frozenset()
    homes = BlockHomes(
        on_device,
        model.group if place.startswith("ranks") else None,
        host=place != "ranks",
        storage="int8" if "int8" in words else "computed",
    )
    return Home(homes, "float8" in words, min(recompute, layers))


def choose_for_card(gib: float, model: Model) -> tuple[Home, Setup, list[str]]:
    """As train_lora.py would with --gpu_memory_limit and everything else left alone; the limit holds from now on."""
    import torch

    from qwen_image.free_memory import limit_device
    from qwen_image.loading.model_files import ModelSource
    from qwen_image.model.sizes import TransformerConfig
    from qwen_image.model.transformer import QwenImageTransformer
    from train.base_model.base_home import BaseHome
    from train.base_model.base_plan import BasePlan
    from train.config.zero_plan import ZeroPlan
    from train.fit.base_choice import choice_lines, fastest_base
    from train.fit.memory_plan import Machine, Setup, trainable_parameters
    from train.loader.batch_shapes import BatchShape
    from train.lora.spec import LoraSpec

    limit_device(model.device, gib)
    with torch.device("meta"):
        empty = QwenImageTransformer(TransformerConfig(num_layers=model.layers, num_attention_heads=model.heads))
    base = BasePlan(
        ModelSource("-"),
        empty,
        torch.bfloat16,
        BaseHome(model.layers),
        open_precision=True,
        open_home=True,
        can_tabulate=True,
        tabulated=True,
    )
    zero, spec = ZeroPlan(2, reduce_bucket_size=50_000_000), LoraSpec(ATTENTION, 32, 32.0)
    tokens = BatchShape(1, 1024, 1024, 128, False).tokens
    setup = Setup(base, zero, trainable_parameters(spec, base), torch.bfloat16, tokens, model.layers)
    machine = Machine.of(model.device)
    chosen = fastest_base(setup, machine)
    homes = chosen.base.home.homes(model.layers, chosen.base.int8)
    return Home(homes, chosen.base.float8, model.layers), setup, choice_lines(setup, chosen, machine)


def build_for_card(gib: float, model: Model) -> FlowMatchingModule:
    """The module on such a card, recomputing as many blocks as trial steps find necessary."""
    from train.fit.activation_checkpointing import plan_checkpointing
    from train.fit.memory_plan import engine_bytes
    from train.loader.batch_shapes import BatchShape

    home, setup, lines = choose_for_card(gib, model)
    module = assemble(home, model)
    added = engine_bytes(setup.zero, setup.trainable, setup.lora_dtype, 1, 1, resumed=False)
    plan = plan_checkpointing("auto", module, BatchShape(1, 1024, 1024, 128, False), added, model.device)
    print(*lines, *plan.lines(), sep="\n", flush=True)
    return module


def assemble(home: Home, model: Model, compile_blocks: bool | None = None) -> FlowMatchingModule:
    """The step's module, as training builds it, with drawn weights in the base and in lora_B."""
    import torch

    from bench.random_transformer import drawn_instead_of_read
    from demo.random_model import write_random_model
    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.loading.staged import Readers
    from qwen_image.streaming.stream_blocks import load_streamed
    from train.lora.spec import LoraSpec
    from train.step.build import StepOptions, build_step
    from train.step.flat_parameter import link

    with tempfile.TemporaryDirectory() as folder, drawn_instead_of_read():
        write_random_model(Path(folder) / "model", layers=model.layers, heads=model.heads, hollow=True)
        files = resolve_model(ModelSource(str(Path(folder) / "model")), ("transformer",))
        transformer = load_streamed(
            files,
            model.dtype,
            model.device,
            home.homes,
            base_float8=home.float8,
            sigmas=SIGMAS,
            readers=None if home.homes.group is None else Readers(home.homes.group),
        )
    options = StepOptions(
        dtype=model.dtype,
        lora_dtype=model.dtype,
        device=model.device,
        float8=home.float8,
        compile=model.device.type == "cuda" if compile_blocks is None else compile_blocks,
        checkpointed_blocks=home.recompute,
    )
    module = build_step(transformer, LoraSpec(ATTENTION, 32, 32.0), options).module
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.device)
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    link(module.matrices(), module.use_flat())
    return module


class Batch(NamedTuple):
    """One sample: latents and noise [1, 16, 1, H/8, W/8], σ [1] on the CPU, and a prompt of 128 tokens."""

    latents: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    prompt: Prompt


def batch_of(module: FlowMatchingModule, size: int, device: torch.device, seed: int, sigma: float = 0.5) -> Batch:
    """A sample of size × size pixels that the seed alone decides."""
    import torch

    from qwen_image.model.conditioning import Prompt

    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(1, 16, 1, size // 8, size // 8, generator=generator).to(device) for _ in range(2))
    width = module.transformer.config.joint_attention_dim
    embeds = torch.randn(1, 128, width, generator=generator).to(device, module.dtype)
    return Batch(latents, noise, torch.tensor([sigma]), Prompt(embeds, None))


def train_step(module: FlowMatchingModule, device: torch.device) -> Callable[..., torch.Tensor]:
    """A function that makes one step of AdamW over the given samples of this rank and returns their mean loss."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    flat = module.flat
    assert flat is not None
    optimizer = torch.optim.AdamW([flat], lr=1e-4, fused=device.type == "cuda")

    def step(*batches: Batch) -> torch.Tensor:
        losses = []
        for batch in batches:
            loss = module(*batch).mean()
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        if world > 1:
            assert flat.grad is not None
            dist.all_reduce(flat.grad)
            flat.grad.div_(world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    return step
