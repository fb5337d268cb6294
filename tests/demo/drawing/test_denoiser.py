"""Text encoder and transformer: what learns is what inference computes, and it learns."""

from __future__ import annotations

import pytest
import torch

from demo.drawing.course import Course
from demo.drawing.denoiser import CAPTION_DROPOUT, Captions, draw_sigma, encode, learn
from demo.drawing.model_folder import Parts
from train.flow.timestep_sampling import SigmaSampling
from train.flow.timestep_sampling import draw_sigma as one_sigma

TEXTS = [["a red circle on white", "white: a red circle"], ["a blue star at night", "night sky: a blue star"]]
CPU = torch.device("cpu")


@pytest.fixture
def parts() -> Parts:
    return Parts([text for each in TEXTS for text in each], seed=0, device=CPU)


def test_prompts_are_inferences_own(parts: Parts):
    captions = Captions(parts.text_encoder, TEXTS, CPU)
    ours = encode(
        parts.text_encoder.language_model, captions.ids[:, 1].long(), captions.padding, parts.text_encoder.template_drop
    )
    theirs = parts.text_encoder.encode([texts[1] for texts in TEXTS])
    length = theirs.embeds.shape[1]
    torch.testing.assert_close(ours.embeds[:, :length], theirs.embeds)
    assert not ours.embeds[:, length:].any()
    assert theirs.mask is not None
    assert torch.equal(ours.mask[:, :length], theirs.mask)
    assert not ours.mask[:, length:].any()


def test_some_captions_are_dropped(parts: Parts):
    captions = Captions(parts.text_encoder, TEXTS, CPU)
    drawn = captions.draw(torch.zeros(2000, dtype=torch.long), torch.Generator().manual_seed(0))
    kinds = [(drawn == ids).all(1).float().mean().item() for ids in (*captions.empty, *captions.ids[0])]
    assert sum(kinds) == pytest.approx(1)
    assert kinds[0] == pytest.approx(CAPTION_DROPOUT / 2, abs=0.02)
    assert kinds[1] == pytest.approx(CAPTION_DROPOUT / 2, abs=0.02)
    assert min(kinds[2:]) > 0.4


def test_sigma_is_qwen_shift_but_wider():
    generator = torch.Generator().manual_seed(0)
    sigma = draw_sigma(4000, 64, CPU, generator)
    one_by_one = torch.tensor([one_sigma(SigmaSampling(), 64, generator) for _ in range(1000)])
    assert 0 < sigma.min() < sigma.max() < 1
    assert sigma.median() == pytest.approx(one_by_one.median().item(), abs=0.03)
    assert sigma.std() > one_by_one.std()


def test_learning_lowers_the_loss_and_leaves_averages(parts: Parts, capsys: pytest.CaptureFixture[str]):
    latents = torch.randn(2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    captions = Captions(parts.text_encoder, TEXTS, CPU)
    before = {name: value.clone() for name, value in parts.transformer.state_dict().items()}
    text_before = [value.clone() for value in parts.text_encoder.language_model.parameters()]
    course = Course("transformer", 0, steps=60, warm_up=5, every=59)
    learn(parts.transformer, parts.text_encoder, latents, captions, course, batch=16, seed=0)
    told = [float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert told[-1] < 0.75 * told[0]
    assert all(value.dtype == torch.float32 for value in parts.transformer.state_dict().values())
    assert not torch.equal(before["proj_out.weight"], parts.transformer.proj_out.weight)
    pairs = zip(text_before, parts.text_encoder.language_model.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in pairs)
    assert not any(parameter.requires_grad for parameter in parts.transformer.parameters())
