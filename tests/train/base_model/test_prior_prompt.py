"""Prior preservation by the base's own prediction: what is trained, against a loop written out here; and when it is."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_image.model.conditioning import Prompt, pack_latents
from qwen_image.pipeline import predict_velocity
from tests.helpers.small_transformer import small_transformer
from tests.helpers.training_run import losses, train
from train.base_model.prior_prompt import PriorPrompt, believed
from train.flow.objective import add_noise, velocity_target
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec
from train.step.flow_matching_module import FlowMatchingModule

WIDTH = 24  # of the small transformer's prompt embeddings
SAMPLES = 2


def random_batch(seed: int = 0, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Prompt]:
    """Latents, noise, σ and a prompt without padding."""
    draw = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(SAMPLES, 16, 1, 4, 6, generator=draw) for _ in range(2))
    sigma = torch.tensor([0.25, 0.8])
    return latents.bfloat16(), noise, sigma, Prompt(torch.randn(SAMPLES, tokens, WIDTH, generator=draw), None)


def module_with_lora(moved: bool, **shape) -> FlowMatchingModule:
    transformer = small_transformer()
    inject_lora(transformer, LoraSpec(("to_q", "add_k_proj", "img_mlp.net.2"), 3, 6.0, **shape))
    if moved:
        draw = torch.Generator().manual_seed(1)
        for name, parameter in lora_parameters(transformer).items():
            if not name.endswith("lora_A"):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return FlowMatchingModule(transformer, "none", torch.float32)


def always(embeds: torch.Tensor, **more) -> PriorPrompt:
    return PriorPrompt([embeds], share=1.0, seed=0, **more)


@given(st.integers(0, 2**31), st.floats(0.001, 1.0))
def test_what_the_base_believes_has_the_same_noised_latents_and_its_velocity(seed, sigma):
    draw = torch.Generator().manual_seed(seed)
    latents, noise, velocity = (torch.randn(2, 16, 1, 2, 2, generator=draw) for _ in range(3))
    at = torch.tensor([sigma, 1.0])
    told, told_noise = believed(latents, noise, at, velocity)
    assert torch.allclose(add_noise(told, told_noise, at), add_noise(latents, noise, at), atol=2e-6)
    assert torch.allclose(velocity_target(told, told_noise), velocity, atol=2e-6)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("flat", [False, True], ids=["each", "flat"])
def test_loss_and_gradients_are_those_of_a_loop_over_two_models(dora, flat):
    module, base = module_with_lora(moved=True, dora=dora), small_transformer()
    before = {name: p.detach().clone() for name, p in lora_parameters(module.transformer).items()}
    latents, noise, sigma, prompt = random_batch()
    class_prompt = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))

    # The loop: a base that never met the LoRA, the class prompt alone, unpadded.
    alone = Prompt(class_prompt.expand(SAMPLES, -1, -1), None)
    reference = copy.deepcopy(module.transformer)
    noised = pack_latents(add_noise(latents, noise, sigma))
    with torch.no_grad():
        target = predict_velocity(base, noised, sigma, alone, 2, 3)
    errors = (predict_velocity(reference, noised, sigma, alone, 2, 3) - target).square().flatten(1).mean(1)
    errors.mean().backward()
    wanted = {name: p.grad for name, p in lora_parameters(reference).items()}

    if flat:
        from train.step.flat_parameter import link

        link(module.matrices(), module.use_flat())
    example = always(class_prompt)(module, 0, latents, noise, sigma, prompt)
    assert example.is_prior
    for name, parameter in lora_parameters(module.transformer).items():
        assert torch.equal(parameter, before[name]), f"{name} is as before, bit for bit"
    found = module(example.latents, example.noise, sigma, example.prompt)
    assert torch.allclose(found, errors, rtol=1e-4) and found.min() > 1e-4
    found.mean().backward()
    if module.flat is not None:
        gradients = torch.cat([wanted[name].reshape(-1) for name in lora_parameters(module.transformer)])
        assert torch.allclose(module.flat.grad, gradients, rtol=1e-3, atol=1e-6)
        return
    for name, parameter in lora_parameters(module.transformer).items():
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6), name


def test_a_lora_that_has_learned_nothing_loses_nothing():
    module = module_with_lora(moved=False)
    latents, noise, sigma, prompt = random_batch()
    example = always(torch.ones(3, WIDTH))(module, 0, latents, noise, sigma, prompt)
    assert module(example.latents, example.noise, sigma, example.prompt).max() < 1e-9


@pytest.mark.parametrize("tokens,mask", [(7, True), (3, False), (2, True)], ids=["shorter", "equal", "longer"])
def test_a_class_prompt_takes_the_length_that_the_batch_has(tokens, mask):
    """So that no further shape is compiled and captured; a longer one takes its own, padded like all."""
    *_, prompt = random_batch(tokens=tokens)
    told = always(torch.ones(3, WIDTH), text_padding=4 if tokens < 3 else 1).repeated(torch.ones(3, WIDTH), prompt)
    assert told.embeds.shape == (SAMPLES, {7: 7, 3: 3, 2: 4}[tokens], WIDTH)
    assert (told.mask is not None) == mask
    assert told.mask is None or told.mask.sum(1).tolist() == [3] * SAMPLES
    assert (told.embeds[:, 3:] == 0).all() and (told.embeds[:, :3] == 1).all()


@given(st.floats(0.02, 0.98), st.integers(0, 1000), st.integers(1, 3))
def test_the_share_is_kept_and_the_prompts_take_turns(share, seed, prompts):
    prior = PriorPrompt([torch.ones(1, WIDTH)] * prompts, share, seed)
    drawn = [prior.drawn(place) for place in range(4000)]
    count = sum(each is not None for each in drawn)
    assert abs(count - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5 + 1
    for which in range(prompts):
        assert abs(drawn.count(which) - count / prompts) < 5 * count**0.5 + 1


def test_without_prompts_nothing_is_drawn():
    latents, noise, sigma, prompt = random_batch()
    example = PriorPrompt([], 0.5, 0)(module_with_lora(moved=True), 0, latents, noise, sigma, prompt)
    assert example.latents is latents and example.noise is noise and example.prompt is prompt


def test_ranks_that_share_weights_make_equally_many_passes_and_train_the_same(monkeypatch):
    module, passes = module_with_lora(moved=True), []
    real = FlowMatchingModule.velocity
    monkeypatch.setattr(FlowMatchingModule, "velocity", lambda self, *a: passes.append(1) or real(self, *a))
    embeds, counts = [torch.ones(3, WIDTH)], []
    for rank in range(4):
        passes.clear()
        for step in range(6):
            place = 4 * step + rank
            batch = random_batch(place)
            shared = PriorPrompt(embeds, 0.2, 3, rank, sharing=4)(module, place, *batch)
            n = len(passes)
            alone = PriorPrompt(embeds, 0.2, 3)(module, place, *batch)
            del passes[n:]
            assert torch.equal(shared.latents, alone.latents) and torch.equal(shared.prompt.embeds, alone.prompt.embeds)
        counts.append(len(passes))
    assert len(set(counts)) == 1 and 0 < counts[0] < 6


@pytest.mark.parametrize(
    "more,message",
    [
        (("--prior_prompt", " "), "prior_prompt must not be empty"),
        (("--prior_prompt", "a dog", "--prior_prompt_share", "0"), "prior_prompt_share (0) must lie between 0 and 1"),
        (("--prior_prompt", "a dog", "--prior_prompt_share", "1"), "prior_prompt_share (1) must lie between 0 and 1"),
        (("--prior_prompt", "a dog"), "sample_prompts and prior_prompt need the model's text encoder"),
        (("--sample_prompts", "a dog"), "sample_prompts and prior_prompt need the model's text encoder"),
    ],
    ids=["empty", "never", "always", "no encoder", "no encoder for samples"],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_read(
    small_model, small_data, tmp_path: Path, capsys, monkeypatch, more, message
):
    def read(*arguments, **more):
        raise AssertionError("the model is read")

    monkeypatch.setattr("train.base_model.load_pipeline.load_pipeline", read)
    assert train(small_model, small_data, tmp_path / "run", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_edit_models_are_refused(tiny_edit_models, small_data, tmp_path: Path, capsys):
    assert train(tiny_edit_models["edit-2509"], small_data, tmp_path / "run", "--prior_prompt", "a dog") == 2
    assert "prior_prompt is for text to image, and the model is Qwen-Image-Edit-2509" in capsys.readouterr().err


def test_a_share_without_prompts_is_nothing(small_model, small_data, tmp_path: Path):
    assert train(small_model, small_data, tmp_path / "plain") == 0
    assert train(small_model, small_data, tmp_path / "share", "--prior_prompt_share", "0.9") == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "share")


def test_the_run_says_what_the_share_means():
    assert PriorPrompt([], 0.5, 0).lines() == []
    (line,) = PriorPrompt([torch.ones(1, WIDTH)] * 2, 0.35, 0).lines()
    assert line == "prior_prompt: 35% of the micro-batches, whatever they hold, train one of 2 class prompts instead"
