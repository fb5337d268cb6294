"""CUDA graphs whose fetches of streamed blocks are part of them, against the same steps launched kernel by kernel."""

from pathlib import Path

import pytest
import torch

from demo.random_model import write_random_model
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.loading.staged import load_staged
from qwen_image.model.conditioning import Prompt
from qwen_image.streaming.stream_blocks import BlockHomes, load_streamed
from train.lora.spec import LoraSpec
from train.step.build import StepOptions, build_step
from train.step.flat_parameter import link
from train.step.flow_matching_module import FlowMatchingModule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
TARGETS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def module_of(folder: Path, homes: BlockHomes | None, float8: bool, recomputed: int) -> FlowMatchingModule:
    device = torch.device("cuda")
    files = resolve_model(ModelSource(str(folder)), ("transformer",))
    options = {"base_float8": float8, "sigmas": [0.5, 0.7]}
    if homes is None:
        transformer = load_staged(files, torch.bfloat16, device, **options)
    else:
        transformer = load_streamed(files, torch.bfloat16, device, homes, **options)
        transformer.block_stream.poisoned = True
    options = StepOptions(
        dtype=torch.bfloat16,
        lora_dtype=torch.bfloat16,
        device=device,
        seed=1,
        float8=float8,
        checkpointed_blocks=recomputed,
    )
    module = build_step(transformer, LoraSpec(TARGETS, 4, 4.0), options).module
    generator = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    link(module.matrices(), module.use_flat())
    return module


def steps(module: FlowMatchingModule, between: bool = False) -> list[torch.Tensor]:
    results = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        side = 8 if seed % 2 else 12
        latents, noise = (torch.randn(1, 16, 1, side, side, generator=generator).cuda() for _ in range(2))
        prompt = Prompt(torch.randn(1, 6, 64, generator=generator).cuda().bfloat16(), None)
        loss = module(latents, noise, torch.tensor([0.5]), prompt)
        results += [loss.detach().clone(), *torch.autograd.grad(loss.mean(), [module.flat])]
        if between:
            with torch.no_grad():
                module(latents, noise, torch.tensor([0.7]), prompt)
    return results


@pytest.mark.parametrize("storage", ["bfloat16", "float8", "int8"])
@pytest.mark.parametrize("recomputed", [0, 6])
@pytest.mark.parametrize("on_device", [(), (1, 4)], ids=str)
def test_replayed_with_fetches_equals_launched(tmp_path, storage, recomputed, on_device):
    write_random_model(tmp_path / "model", layers=6, heads=2, text_dim=64)
    homes = BlockHomes(frozenset(on_device), storage="int8" if storage == "int8" else "computed", slots=2)
    float8 = storage == "float8"
    launched = steps(module_of(tmp_path / "model", homes, float8, recomputed))
    if storage != "int8":
        resident = steps(module_of(tmp_path / "model", None, float8, recomputed))
        assert all(torch.equal(a, b) for a, b in zip(launched, resident, strict=True))
    module = module_of(tmp_path / "model", homes, float8, recomputed)
    module.use_graphs()
    for between in (False, True):
        replayed = steps(module, between)
        assert all(torch.isfinite(each).all() for each in replayed)
        for a, b in zip(replayed, launched, strict=True):
            torch.testing.assert_close(a, b)
    assert len(module.graphs.pairs) == 2
