"""Source images in the transformer: diffusers' velocity with `img_shapes` of several images, `zero_cond_t` off and on."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from qwen_image.loading.weights import load_weights
from qwen_image.model.conditioning import Prompt, join, pack_latents, source_tokens
from qwen_image.model.modulation import replace_by_table
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.pipeline import predict_velocity
from train.step.flow_matching_module import FlowMatchingModule

# rows and columns of tokens: the target's, then those of one to three sources; portrait, landscape, square
LAYOUTS = {
    "one of the same size": ((4, 6), (4, 6)),
    "one, larger, portrait": ((3, 4), (8, 5)),
    "one, smaller, landscape": ((5, 4), (2, 7)),
    "two": ((4, 4), (4, 4), (6, 3)),
    "three": ((3, 5), (2, 9), (7, 2), (4, 4)),
}


@pytest.fixture(scope="module", params=[False, True], ids=["one row", "zero_cond_t"])
def pair(request, tiny_model):
    """diffusers' transformer and ours with the same weights."""
    source = QwenImageTransformer2DModel.from_pretrained(tiny_model / "transformer", torch_dtype=torch.float32)
    theirs = QwenImageTransformer2DModel.from_config(dict(source.config) | {"zero_cond_t": request.param}).eval()
    theirs.load_state_dict(source.state_dict())
    return theirs, load(tiny_model, request.param)


def load(tiny_model, zero_cond_t):
    config = TransformerConfig.from_config_file(tiny_model / "transformer" / "config.json")
    config = TransformerConfig(**vars(config) | {"zero_cond_t": zero_cond_t})
    with torch.device("meta"):
        ours = QwenImageTransformer(config)
    load_weights(ours, tuple((tiny_model / "transformer").glob("*.safetensors")), torch.float32)
    return ours.eval()


def inputs(layout, lengths=(7,), width=64):
    """Packed latents of the target, σ, and a prompt with the sources, of so many samples."""
    generator = torch.Generator().manual_seed(0)
    batch = len(lengths)
    latents, *sources = (
        torch.randn(batch, 16, 1, 2 * rows, 2 * columns, generator=generator) for rows, columns in LAYOUTS[layout]
    )
    embeds = [torch.randn(length, width, generator=generator) for length in lengths]
    sigma = torch.linspace(0.9, 0.2, batch)
    return latents, sigma, Prompt.from_list(embeds, sources=tuple(sources))


def diffusers_velocity(theirs, latents, sigma, prompt, layout):
    """As QwenImageEditPlusPipeline calls it: tokens of all images one after the other, the output cut to the first ones."""
    target = pack_latents(latents)
    return theirs(
        hidden_states=torch.cat([target, *(pack_latents(source) for source in prompt.sources)], 1),
        timestep=(sigma * 1000) / 1000,
        encoder_hidden_states=prompt.embeds,
        encoder_hidden_states_mask=None if prompt.mask is None else prompt.mask.long(),
        img_shapes=[[(1, rows, columns) for rows, columns in LAYOUTS[layout]]] * len(latents),
        return_dict=False,
    )[0][:, : target.shape[1]]


@pytest.mark.parametrize("lengths", [(7,), (5, 12)], ids=["single", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_velocity_equals_diffusers(pair, layout, lengths):
    theirs, ours = pair
    latents, sigma, prompt = inputs(layout, lengths)
    expected = diffusers_velocity(theirs, latents, sigma, prompt, layout)
    actual = predict_velocity(ours, pack_latents(latents), sigma, prompt, *LAYOUTS[layout][0])
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_sources_their_order_and_their_noise_level_matter(pair, tiny_model):
    """Else the comparison above would pass for a model that sees no sources."""
    _, ours = pair
    latents, sigma, prompt = inputs("two")
    prompt = prompt._replace(sources=(prompt.sources[0], torch.randn(1, 16, 1, 8, 8)))

    def velocity(model, sources):
        return predict_velocity(model, pack_latents(latents), sigma, prompt._replace(sources=sources), 4, 4)

    whole = velocity(ours, prompt.sources)
    assert (velocity(ours, ()) - whole).abs().max() > 0.01
    assert (velocity(ours, prompt.sources[:1]) - whole).abs().max() > 0.01
    assert (velocity(ours, prompt.sources[::-1]) - whole).abs().max() > 0.01
    other = load(tiny_model, not ours.config.zero_cond_t)
    assert (velocity(other, prompt.sources) - whole).abs().max() > 0.01
    assert torch.equal(velocity(other, ()), velocity(ours, ())), "without sources there is one row"


@pytest.mark.parametrize("layout", ["one, larger, portrait", "three"])
def test_gradients_are_a_plain_loops(pair, layout):
    """The loss of a batch sees the target's tokens alone; its gradients are those of diffusers' model, sample by sample."""
    theirs, ours = pair
    latents, sigma, prompt = inputs(layout, (5, 12))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    names = ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.1.attn.add_k_proj.weight"]
    names += ["transformer_blocks.1.img_mod.1.weight", "transformer_blocks.0.img_mlp.net.2.weight", "img_in.weight"]
    grads = {}
    for model in (theirs, ours):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for name in names:
            model.get_parameter(name).requires_grad_()
    losses = []
    for i in range(2):
        mask = slice(None) if prompt.mask is None else prompt.mask[i]
        alone = Prompt(prompt.embeds[i : i + 1, mask], None, tuple(each[i : i + 1] for each in prompt.sources))
        noised = (1 - sigma[i]) * latents[i : i + 1] + sigma[i] * noise[i : i + 1]
        velocity = diffusers_velocity(theirs, noised, sigma[i : i + 1], alone, layout)
        losses.append((velocity - pack_latents(noise[i : i + 1] - latents[i : i + 1])).square().mean())
    (sum(losses) / 2).backward()
    grads["theirs"] = [theirs.get_parameter(name).grad for name in names]
    mine = FlowMatchingModule(ours, "none", torch.float32)(latents, noise, sigma, prompt)
    mine.mean().backward()
    torch.testing.assert_close(mine.detach(), torch.stack(losses).detach(), atol=1e-5, rtol=1e-5)
    for name, expected in zip(names, grads["theirs"], strict=True):
        error = (ours.get_parameter(name).grad - expected).norm() / expected.norm()
        assert error < 1e-4, (name, error)
    ours.requires_grad_(False)


@torch.no_grad()
def test_the_table_holds_the_row_of_clean_tokens(tiny_model):
    grid = [k / 1000 for k in range(1, 1001)]
    for zero_cond_t in (False, True):
        ours = load(tiny_model, zero_cond_t)
        latents, _, prompt = inputs("three")
        sigma = torch.tensor([0.3])
        direct = predict_velocity(ours, pack_latents(latents), sigma, prompt, 3, 5)
        replace_by_table(ours, grid)
        assert torch.equal(predict_velocity(ours, pack_latents(latents), sigma, prompt, 3, 5), direct)
        assert (ours.modulation_table.clean is not None) == zero_cond_t
        assert len(ours.modulation_table.places) == 1000 + zero_cond_t


@torch.no_grad()
def test_recomputed_blocks_take_the_same_rows(tiny_model):
    ours = load(tiny_model, zero_cond_t=True)
    latents, sigma, prompt = inputs("two", (5, 12))
    expected = predict_velocity(ours, pack_latents(latents), sigma, prompt, 4, 4)
    with torch.enable_grad():
        ours.checkpointed_blocks = 2
        leaf = pack_latents(latents).requires_grad_()
        velocity = predict_velocity(ours, leaf, sigma, prompt, 4, 4)
        velocity.square().sum().backward()
        recomputed = leaf.grad.clone()
        ours.checkpointed_blocks, leaf.grad = 0, None
        predict_velocity(ours, leaf, sigma, prompt, 4, 4).square().sum().backward()
    assert torch.equal(velocity.detach(), expected)
    assert torch.equal(recomputed, leaf.grad)


def test_source_tokens_come_after_the_targets():
    latents, sources = torch.zeros(2, 6, 64), (torch.ones(2, 16, 1, 4, 6), torch.full((2, 16, 1, 2, 2), 2.0))
    assert join(latents, ()) is latents
    tokens = join(latents, sources)
    grids = Prompt(torch.zeros(2, 1, 8), None, sources).grids(2, 3)
    assert grids == ((2, 3), (2, 3), (1, 1)) and tokens.shape == (2, 13, 64)
    assert tokens[:, :, 0].tolist() == [[0.0] * 6 + [1.0] * 6 + [2.0]] * 2
    assert source_tokens(grids, torch.device("cpu")).flatten().tolist() == [False] * 6 + [True] * 7
    assert source_tokens(((2, 3),), torch.device("cpu")) is None
