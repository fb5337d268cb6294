"""What CUDA graphs need from the model, and (with a GPU) that replaying gives what launching gives."""

from collections.abc import Callable

import pytest
import torch

from qwen_image.model.conditioning import Prompt
from qwen_image.model.modulation import replace_by_table
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer
from train.lora.inject import inject_lora
from train.lora.spec import LoraSpec
from train.step.cuda_graphs import few_blocks, fresh_leaves
from train.step.flow_matching_module import FlowMatchingModule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = 6


@pytest.fixture
def module() -> FlowMatchingModule:
    torch.manual_seed(0)
    transformer = QwenImageTransformer(
        TransformerConfig(num_layers=LAYERS, num_attention_heads=1, joint_attention_dim=16)
    )
    for name, parameter in transformer.named_parameters():
        parameter.data.normal_(0, 0.05) if parameter.ndim > 1 or "bias" in name else parameter.data.fill_(1.0)
    transformer.requires_grad_(False).to(DEVICE)
    replace_by_table(transformer, [k / 1000 for k in range(1, 1001)])
    inject_lora(transformer, LoraSpec(("to_q", "add_k_proj", "img_mlp.net.2"), 2, 2.0))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return FlowMatchingModule(transformer, "none", torch.float32)


def batch(height: int, width: int, text: int, padding: int, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(2, 16, 1, height, width, generator=generator).to(DEVICE) for _ in range(2))
    mask = None
    if padding:
        mask = torch.ones(2, text, dtype=torch.bool)
        mask[1, text - padding :] = False
        mask = mask.to(DEVICE)
    embeds = torch.randn(2, text, 16, generator=generator).to(DEVICE)
    return latents, noise, torch.tensor([0.25, 0.875]), Prompt(embeds, mask)


@pytest.mark.parametrize(
    ("recomputed", "expected", "still"), [(0, 3, 0), (LAYERS, 3, 3), (3, 4, 2), (1, 3, 1), (LAYERS - 1, 3, 2)]
)
def test_few_blocks_are_one_of_each_kind(
    module: FlowMatchingModule, recomputed: int, expected: int, still: int
) -> None:
    """First (its input needs no gradient), recomputed, kept, last: what is compiled and warmed up before a capture."""
    transformer = module.transformer
    transformer.checkpointed_blocks = recomputed
    whole = list(transformer.transformer_blocks)
    with few_blocks(transformer):
        blocks = list(transformer.transformer_blocks)
        assert blocks[0] is whole[0] and blocks[-1] is whole[-1] and len(blocks) == expected
        assert transformer.checkpointed_blocks == still
        module(*batch(4, 4, 5, 0, seed=1)).sum().backward()
    assert list(transformer.transformer_blocks) == whole and transformer.checkpointed_blocks == recomputed


def test_fresh_leaves_share_memory_and_keep_hooks_out(module: FlowMatchingModule) -> None:
    """DeepSpeed's hooks hang on the parameters; what is captured must not reach them."""
    reached: list[str] = []
    trained = module.matrices()
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda _: reached.append("hook"))
    arguments = batch(4, 6, 5, 2, seed=2)
    with fresh_leaves(module.transformer) as leaves:
        assert [leaf.data_ptr() for leaf in leaves] == [parameter.data_ptr() for parameter in trained]
        assert [id(p) for p in module.matrices()] == [id(leaf) for leaf in leaves]
        module(*arguments).sum().backward()
        gradients = [leaf.grad for leaf in leaves]
    assert not reached and [id(p) for p in module.matrices()] == [id(p) for p in trained]
    module(*arguments).sum().backward()
    assert len(reached) == len(trained)
    for gradient, parameter in zip(gradients, trained, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def gradients_of(module: FlowMatchingModule, arguments: tuple) -> tuple[torch.Tensor, list[torch.Tensor]]:
    losses = module(*arguments)
    receivers = [module.flat] if module.flat is not None else module.matrices()
    gradients = torch.autograd.grad((losses * losses.new_tensor([1.0, 3.0])).sum(), receivers)
    return losses.detach().clone(), [gradient.reshape(-1).clone() for gradient in gradients]


def random_mask(latents: torch.Tensor, seed: int) -> torch.Tensor:
    size, generator = (len(latents), *latents.shape[-2:]), torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(DEVICE)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("recomputed", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_replayed_equals_launched(module: FlowMatchingModule, flat: bool, recomputed: int, masked: bool) -> None:
    """Two shapes in turn, weights changed in between: the graphs read them where they lie.

    With a masked loss each batch has another mask, the last one none.
    """
    module.transformer.checkpointed_blocks = recomputed
    if flat:
        module.use_flat()
    arguments = [batch(4, 4, 5, 0, 1), batch(4, 8, 7, 3, 2), batch(4, 4, 5, 0, 3), batch(4, 8, 7, 3, 4)]
    if masked:
        module.mask_min_weight = 0.1
        arguments[:3] = [(*each, random_mask(each[0], seed)) for seed, each in enumerate(arguments[:3])]

    def all_of_them(change: Callable[[], None]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        results = []
        for each in arguments:
            results.append(gradients_of(module, each))
            change()
        return results

    start = [parameter.detach().clone() for parameter in module.matrices()]

    def shrink() -> None:
        for parameter in module.matrices():
            parameter.data.mul_(0.9)

    launched = all_of_them(shrink)
    for parameter, values in zip(module.matrices(), start, strict=True):
        parameter.data.copy_(values)
    module.use_graphs()
    replayed = all_of_them(shrink)
    assert module.graphs is not None and len(module.graphs.pairs) == 2
    for (loss, gradients), (loss_again, gradients_again) in zip(launched, replayed, strict=True):
        torch.testing.assert_close(loss, loss_again)
        torch.testing.assert_close(torch.cat(gradients), torch.cat(gradients_again))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_shapes_share_memory(module: FlowMatchingModule) -> None:
    """The first shape is the largest: the others take no memory of theirs but what they keep between steps."""
    module.use_graphs()
    assert module.graphs is not None
    gradients_of(module, batch(64, 64, 32, 0, 0))
    torch.cuda.empty_cache()
    first = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for size in range(10, 34, 2):
        gradients_of(module, batch(size, 64, 32, 0, size))
    torch.cuda.empty_cache()
    assert len(module.graphs.pairs) == 13
    allocated, reserved = torch.cuda.memory_allocated() - first[0], torch.cuda.memory_reserved() - first[1]
    assert allocated < 16 << 20 and reserved < 32 << 20  # inputs and positions; workspaces would be 64 MiB each


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU to wait for")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_pass_waits_for_nothing(module: FlowMatchingModule, graphs: bool, masked: bool) -> None:
    """From a batch on the device and σ on the host to the gradients: else the device would wait for the host in turn."""
    if graphs:
        module.use_graphs()
    arguments = batch(4, 8, 7, 3, 1)
    if masked:
        module.mask_min_weight = 0.1
        arguments = (*arguments, random_mask(arguments[0], 0))
    gradients_of(module, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(module(*arguments).mean(), module.matrices())
    finally:
        torch.cuda.set_sync_debug_mode("default")
