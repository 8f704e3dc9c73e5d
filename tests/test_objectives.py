"""Noise, timesteps, targets and loss weights against closed forms."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

from ddpm_diffusers.objectives import draw_noise_and_timesteps, loss_weights, training_target

TYPES = ("epsilon", "sample", "v_prediction")


def draw(batch, num_train_timesteps, seed=0, size=2):
    generator = torch.Generator().manual_seed(seed)
    return draw_noise_and_timesteps((batch, 3, size, size), num_train_timesteps, generator)


def alpha_and_sigma(scheduler, timesteps):
    """float64 (B, 1, 1, 1), from the scheduler's own float32 table."""
    alpha_squared = scheduler.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


@pytest.mark.parametrize(
    ("batch", "num_train_timesteps"), [(1, 1000), (7, 1000), (8, 1000), (128, 1000), (16, 16), (64, 10), (5, 1)]
)
def test_a_timestep_lies_in_each_stratum(batch, num_train_timesteps):
    edges = np.arange(batch + 1) * num_train_timesteps / batch
    seen = []
    for seed in range(50):
        timesteps = draw(batch, num_train_timesteps, seed)[1]
        assert timesteps.dtype == torch.int64 and timesteps.shape == (batch,)
        seen.append(np.sort(timesteps.numpy()))
    seen = np.stack(seen)
    assert (seen >= np.floor(edges[:-1])).all() and (seen <= edges[1:]).all()
    assert seen.min() >= 0 and seen.max() < num_train_timesteps


@pytest.mark.parametrize(("batch", "num_train_timesteps"), [(6, 50), (32, 20)])
def test_every_member_of_the_batch_has_a_uniform_timestep(batch, num_train_timesteps):
    # the first member, one a draw, so that the counts are of independent timesteps; 6 does not divide 50, 32 > 20
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros(num_train_timesteps)
    for _ in range(10_000):
        counts[draw_noise_and_timesteps((batch, 1, 1, 1), num_train_timesteps, generator)[1][0]] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_stratified_timesteps_vary_less_than_independent_ones():
    generator = torch.Generator().manual_seed(0)
    means = [draw_noise_and_timesteps((16, 1, 1, 1), 1000, generator)[1].double().mean() for _ in range(500)]
    # a stratum is 1/16 as wide as the range: the variance falls by 16^2
    assert torch.stack(means).var() < 2 * (1000**2 / 12 / 16) / 16**2


def test_noise_is_float32_and_standard_normal():
    noise = draw(200, 1000, size=16)[0]
    assert noise.dtype == torch.float32 and noise.shape == (200, 3, 16, 16)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3


def test_the_generator_alone_decides_what_is_drawn():
    torch.manual_seed(1)
    first = draw(9, 1000, seed=3)
    torch.manual_seed(2)
    again, other = draw(9, 1000, seed=3), draw(9, 1000, seed=4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_target_is_the_closed_form_and_leads_back_to_the_image(prediction_type, schedule):
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((40, 1, 4, 4), generator=generator, dtype=torch.float64) * 2 - 1
    noise, timesteps = draw_noise_and_timesteps(images.shape, 1000, generator)
    noise = noise.double()
    alpha, sigma = alpha_and_sigma(scheduler, timesteps)
    target = training_target(scheduler, images, noise, timesteps)
    expected = {"epsilon": noise, "sample": images, "v_prediction": alpha * noise - sigma * images}[prediction_type]
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)

    # what the scheduler itself takes a perfect prediction for
    noisy = scheduler.add_noise(images, noise, timesteps)
    for i in range(0, 40, 13):
        step = scheduler.step(target[i : i + 1], int(timesteps[i]), noisy[i : i + 1], generator=generator)
        tolerance = 1e-6 / float(alpha[i])  # noise prediction divides by alpha
        torch.testing.assert_close(step.pred_original_sample[0], images[i], rtol=0, atol=tolerance)


@pytest.mark.parametrize("snr_gamma", [0.5, 5.0])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_min_snr_weighs_the_same_error_alike_for_each_prediction_type(schedule, snr_gamma):
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.arange(0, 1000, 7)
    shape = (len(timesteps), 1, 2, 2)
    images, guess, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, sigma = alpha_and_sigma(DDPMScheduler(beta_schedule=schedule), timesteps)
    noise_guess = (alpha * images + sigma * noise - alpha * guess) / sigma  # the same guess, said in noise
    guesses = {"epsilon": noise_guess, "sample": guess, "v_prediction": alpha * noise_guess - sigma * guess}

    snr = (alpha / sigma).square().flatten()
    expected = snr.clamp(max=snr_gamma) * (guess - images).square().mean(dim=(1, 2, 3))
    for prediction_type in TYPES:
        scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type)
        weights = loss_weights(scheduler, timesteps, snr_gamma)
        target = training_target(scheduler, images, noise, timesteps)
        errors = (guesses[prediction_type] - target).square().mean(dim=(1, 2, 3))
        assert weights.shape == timesteps.shape
        torch.testing.assert_close(weights * errors, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_finite_without_any_signal(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    weights = loss_weights(scheduler, torch.tensor([998, 999]), 5.0)
    assert weights[1] == {"epsilon": 1, "v_prediction": 0}[prediction_type] and weights.isfinite().all()


def test_a_prediction_type_that_is_none_is_refused():
    scheduler = DDPMScheduler(prediction_type="flow")
    with pytest.raises(ValueError, match="`prediction_type` is 'flow'; it must be epsilon, sample or v_prediction"):
        training_target(scheduler, *[torch.zeros(1, 1, 2, 2)] * 2, torch.tensor([0]))
    with pytest.raises(ValueError, match="it must be epsilon, sample or v_prediction"):
        loss_weights(scheduler, torch.tensor([0]), 5.0)


def test_weights_are_one_without_gamma():
    weights = loss_weights(DDPMScheduler(), torch.tensor([0, 3, 999]), None)
    assert weights.dtype == torch.float32 and weights.tolist() == [1, 1, 1]
