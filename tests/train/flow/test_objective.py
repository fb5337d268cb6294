"""σ draws, weights and the loss, against formulas written out again here."""

import math

import pytest
import torch

from qwen_image.noise_schedule import SigmaSchedule
from train.data.draws import sample_draws, sample_generator
from train.flow.objective import add_noise, flow_matching_loss, loss_weight, velocity_target
from train.flow.timestep_sampling import SigmaSampling, diffsynth_sigmas, draw_sigma

NAMES = ["qwen_shift", "logit_normal", "uniform", "shift", "diffsynth"]


def draws(sampling, tokens=4096, count=4000):
    return torch.tensor([draw_sigma(sampling, tokens, sample_generator(7, 0, i)) for i in range(count)])


@pytest.mark.parametrize("name", NAMES)
def test_every_sigma_lies_on_the_grid(name):
    steps = draws(SigmaSampling(name), count=500) * 1000
    assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.min() >= 1 and steps.max() <= 1000


@pytest.mark.parametrize(
    "sampling,median",
    [
        (SigmaSampling("uniform"), 0.5),
        (SigmaSampling("logit_normal"), 0.5),
        (SigmaSampling("logit_normal", logit_mean=1.0), 1 / (1 + math.exp(-1))),
        (SigmaSampling("shift"), 2.2 / 3.2),
        (SigmaSampling("qwen_shift"), 2.001 / 3.001),  # e^μ at 1024² is 2.001
        (SigmaSampling("diffsynth"), None),
    ],
    ids=lambda value: value.name if isinstance(value, SigmaSampling) else "",
)
def test_the_median_of_each_distribution(sampling, median):
    if median is None:
        median = diffsynth_sigmas().median().item()
    assert draws(sampling).median().item() == pytest.approx(median, abs=0.02)


def test_larger_images_get_more_noise_under_qwen_shift():
    assert draws(SigmaSampling(), tokens=6889).mean() > draws(SigmaSampling(), tokens=1024).mean() + 0.03


def test_logit_std_spreads_the_draws():
    assert draws(SigmaSampling("logit_normal", logit_std=2.0)).std() > draws(SigmaSampling("logit_normal")).std() + 0.05


def test_draws_belong_to_seed_epoch_and_sample():
    def draw(*place):
        return sample_draws(*place, (16, 4, 6), SigmaSampling(), 0.5)

    assert torch.equal(draw(1, 2, 3).noise, draw(1, 2, 3).noise) and draw(1, 2, 3).sigma == draw(1, 2, 3).sigma
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(draw(1, 2, 3).noise, draw(*other).noise)
    assert draw(1, 2, 3).noise.shape == (16, 4, 6) and draw(1, 2, 3).noise.dtype == torch.float32


def test_sigma_and_dropout_do_not_depend_on_the_latents_size():
    small, large = (sample_draws(0, 0, 5, (16, s, s), SigmaSampling("uniform"), 0.5) for s in (2, 8))
    assert small.sigma == large.sigma and small.drop_caption == large.drop_caption


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_caption_dropout_hits_its_share(share):
    dropped = [sample_draws(0, 0, i, (1, 2, 2), SigmaSampling(), share).drop_caption for i in range(2000)]
    assert sum(dropped) / 2000 == pytest.approx(share, abs=0.04 if 0 < share < 1 else 0)


def diffsynth_schedule():
    """DiffSynth-Studio 2.1.12, `FlowMatchScheduler("Qwen-Image").set_timesteps(1000, training=True)`, from its text."""
    sigmas = torch.linspace(1.0, 0.0, 1001)[:-1]
    sigmas = math.exp(0.8) / (math.exp(0.8) + (1 / sigmas - 1))
    one_minus = 1 - sigmas
    sigmas = 1 - one_minus / (one_minus[-1] / (1 - 0.02))
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    shifted = bell - bell.min()
    return sigmas, shifted * (1000 / shifted.sum())


def diffsynth_loss(predict, latents, noise, sigma):
    """Its FlowMatchSFTLoss for one sample: nearest point of the schedule decides noise level and weight."""
    sigmas, weights = diffsynth_schedule()
    place = (sigmas - sigma).abs().argmin()
    noised = (1 - sigmas[place]) * latents + sigmas[place] * noise
    return torch.nn.functional.mse_loss(predict(noised), noise - latents) * weights[place]


def test_loss_equals_diffsynths_for_the_same_noise_and_sigma():
    generator = torch.Generator().manual_seed(0)
    sigmas, _ = diffsynth_schedule()
    for place in (0, 1, 250, 611, 998, 999):
        latents, noise = torch.randn(2, 1, 16, 1, 8, 8, generator=generator)
        sigma = sigmas[place : place + 1]
        expected = diffsynth_loss(lambda x: 0.3 * x + 0.1, latents, noise, sigma)
        prediction = 0.3 * add_noise(latents, noise, sigma) + 0.1
        loss = flow_matching_loss(prediction, velocity_target(latents, noise), loss_weight("bsmntw", sigma))
        torch.testing.assert_close(loss[0], expected, rtol=2e-5, atol=1e-6)


def test_drawn_sigmas_are_diffsynths_rounded_to_the_grid():
    sigmas, _ = diffsynth_schedule()
    drawn = draws(SigmaSampling("diffsynth"), count=300)
    assert (drawn[:, None] - sigmas[None]).abs().min(1).values.max() <= 0.5e-3 + 1e-6
    torch.testing.assert_close(diffsynth_sigmas().float(), sigmas, atol=1e-6, rtol=0)


def test_weights():
    sigma = torch.tensor([0.02, 0.5, 1.0])
    assert loss_weight("none", sigma).tolist() == [1, 1, 1]
    assert loss_weight("sigma_sqrt", sigma).tolist() == pytest.approx([2500, 4, 1])
    assert loss_weight("cosmap", sigma)[1].item() == pytest.approx(4 / math.pi)
    bell = loss_weight("bsmntw", diffsynth_sigmas())
    assert bell.mean().item() == pytest.approx(1, abs=1e-5) and bell.min().item() == pytest.approx(0, abs=1e-6)


def test_noise_and_target_are_those_of_rectified_flow():
    latents, noise = torch.full((2, 1, 1, 2, 2), 3.0), torch.full((2, 1, 1, 2, 2), -1.0)
    noised = add_noise(latents, noise, torch.tensor([0.0, 0.25]))
    assert noised[0].unique().tolist() == [3.0] and noised[1].unique().tolist() == [2.0]
    assert velocity_target(latents, noise).unique().tolist() == [-4.0]


def test_loss_is_each_samples_mean_in_float32_times_its_weight():
    prediction = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    loss = flow_matching_loss(prediction, torch.zeros(2, 3, 4), torch.tensor([1.0, 0.5]))
    assert loss.dtype == torch.float32 and loss.tolist() == [1.0, 0.5]


def test_schedule_belongs_to_qwen_image(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"use_dynamic_shifting": false, "shift": 3.0}')
    with pytest.raises(ValueError, match="belongs to another model"):
        SigmaSchedule.from_config_file(path)
