"""The step set up in one place: what its options switch on changes no loss and no gradient beyond rounding."""

from typing import Any

import pytest
import torch

from tests.helpers.small_transformer import small_transformer
from train.loader.batch_shapes import BatchShape, random_arguments
from train.lora.inject import inject_lora, lora_parameters, short_name
from train.lora.lora_file import save_lora
from train.lora.spec import LoraSpec
from train.step.build import Step, StepOptions, build_step

CPU = torch.device("cpu")
SPEC = LoraSpec(("to_q", "to_k", "to_v", "img_mlp.net.2"), 3, 6.0)
SHAPE = BatchShape(2, 64, 96, 12, True)


def step(spec: LoraSpec = SPEC, **options: Any) -> Step:
    built = build_step(
        small_transformer(), spec, StepOptions(dtype=torch.float32, lora_dtype=torch.float32, device=CPU, **options)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in built.module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return built


def gradients(built: Step) -> list[torch.Tensor]:
    loss = built.module(*random_arguments(SHAPE, 24, CPU)).mean()
    return [loss.detach(), *torch.autograd.grad(loss, built.module.matrices())]


@pytest.mark.parametrize(
    "options", [{"fuse": False}, {"checkpointed_blocks": 2}, {"checkpointed_blocks": 1, "offload_activations": True}]
)
def test_options_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.step.offload_activations.SMALLEST_BYTES", 0)
    for plain, other in zip(gradients(step()), gradients(step(**options)), strict=True):
        torch.testing.assert_close(other, plain, rtol=2e-5, atol=1e-6)


def test_what_is_switched_on() -> None:
    built = step(checkpointed_blocks=1, loss_weighting="bsmntw")
    transformer = built.module.transformer
    assert transformer.checkpointed_blocks == 1 and built.module.weighting == "bsmntw"
    assert transformer.transformer_blocks[0].attn.image_projection is not None
    assert step(fuse=False).module.transformer.transformer_blocks[0].attn.image_projection is None
    dropping = LoraSpec(SPEC.target_modules, 3, 6.0, dropout=0.5)
    other = step(dropping).module.transformer
    assert other.draws_random_numbers and other.transformer_blocks[0].attn.image_projection is None
    assert len(built.adapted) == len(set(built.adapted)) and all(".to_" in n or "img_mlp" in n for n in built.adapted)


def test_a_lora_to_start_from_is_in_the_first_step(tmp_path: Any) -> None:
    transformer = small_transformer()
    inject_lora(transformer, SPEC)
    weights = {short_name(name): torch.randn_like(p) for name, p in transformer.named_parameters() if p.requires_grad}
    path = tmp_path / "lora.safetensors"
    save_lora(path, weights, SPEC, {}, torch.float32)
    said: list[str] = []
    options = StepOptions(dtype=torch.float32, lora_dtype=torch.float32, device=CPU, lora_checkpoint=path)
    built = build_step(small_transformer(), SPEC, options, said.append)
    for name, parameter in lora_parameters(built.module.transformer).items():
        torch.testing.assert_close(parameter.detach(), weights[name])
    assert said == [f"starting from {path}: {len(built.adapted)} of {len(built.adapted)} layers"]


def test_a_masked_step_learns_where_the_mask_is() -> None:
    """All white is the plain step; a mask of one half is the loss of that half; without the option masks are not looked at."""
    arguments = random_arguments(SHAPE, 24, CPU)
    latents = arguments[0]
    white = torch.full((SHAPE.batch, *latents.shape[-2:]), 255, dtype=torch.uint8)
    half = white.clone()
    half[:, :, : latents.shape[-1] // 2] = 0
    plain, masked = step().module, step(mask_min_weight=0.0).module
    with torch.no_grad():
        losses = plain(*arguments)
        assert torch.equal(plain(*arguments, half), losses)
        torch.testing.assert_close(masked(*arguments, white), losses)
        assert torch.equal(masked(*arguments), masked(*arguments, white)), "no mask is a white one"
        left = masked(*arguments, 255 - half)
        torch.testing.assert_close((left + masked(*arguments, half)) / 2, losses)
        assert not torch.allclose(left, losses, rtol=1e-3)
