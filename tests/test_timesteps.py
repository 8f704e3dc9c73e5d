"""Timesteps of one's own choice, in place of a number of steps."""

import inspect
import math

import diffusers
import pytest
import torch

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.evaluation import evaluate_pipeline
from ddpm_diffusers.sampling import sample_images
from ddpm_diffusers.schedulers import count_evaluations

TAKE_TIMESTEPS = [
    name
    for name, class_name in SCHEDULERS.items()
    if "timesteps" in inspect.signature(getattr(diffusers, class_name).set_timesteps).parameters
]


def test_several_schedulers_take_timesteps():
    assert {"ddpm", "euler", "heun", "dpmsolver++", "dpmsolver++_singlestep", "tcd"} <= set(TAKE_TIMESTEPS)


@pytest.mark.parametrize("name", TAKE_TIMESTEPS)
def test_the_timesteps_that_a_scheduler_would_choose_make_the_same_images(tiny_pipe, name):
    tiny_pipe.scheduler = make_scheduler(name, tiny_pipe.scheduler)
    as_sampled = {"output_type": "latent"}  # "pt" clips
    expected = tiny_pipe(2, 6, torch.Generator().manual_seed(0), **as_sampled).images
    chosen = tiny_pipe.scheduler.timesteps.tolist()
    timesteps = sorted({int(t) for t in chosen}, reverse=True)  # Heun's hold each but the first twice
    found = tiny_pipe(2, generator=torch.Generator().manual_seed(0), timesteps=timesteps, **as_sampled).images
    assert tiny_pipe.num_timesteps == count_evaluations(tiny_pipe.scheduler, 1, timesteps) == len(chosen)
    torch.testing.assert_close(found, expected)
    tiny_pipe(1, timesteps=[900, 500, 30])
    again = tiny_pipe(2, 6, torch.Generator().manual_seed(0), **as_sampled).images  # nothing of the list is left
    torch.testing.assert_close(again, expected)


def test_the_noise_is_that_of_the_timesteps(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("dpmsolver++", tiny_pipe.scheduler)
    seen = []
    tiny_pipe(1, timesteps=[900, 300, 20, 7], callback_on_step_end=lambda _, i, t, tensors: seen.append(int(t)) or {})
    assert seen == [900, 300, 20, 7]
    alphas_cumprod = tiny_pipe.scheduler.alphas_cumprod[seen].tolist()
    sigmas = [math.sqrt((1 - a) / a) for a in alphas_cumprod]
    assert tiny_pipe.scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0])


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - set(TAKE_TIMESTEPS)))
def test_a_scheduler_that_takes_none_says_so(tiny_pipe, name):
    tiny_pipe.scheduler = make_scheduler(name, tiny_pipe.scheduler)
    with pytest.raises(ValueError, match=f"`timesteps` is given, but {SCHEDULERS[name]} takes none: use"):
        tiny_pipe(timesteps=[900, 100])


@pytest.mark.parametrize("timesteps, error, message", [
    ([], ValueError, r"`timesteps` is \[\]; it must hold integers from 999 to 0, descending"),
    ([3, 10], ValueError, "descending"),
    ([5, 5], ValueError, "descending"),
    ([1000, 3], ValueError, "integers from 999 to 0"),
    ([10, -1], ValueError, "integers from 999 to 0"),
    ([10.0, 2.0], ValueError, "integers"),
    (15, TypeError, "`timesteps` is of type int; it must be a list of integers"),
    (torch.tensor([9, 2]), TypeError, "`timesteps` is of type Tensor"),
])  # fmt: skip
def test_bad_timesteps_are_refused(tiny_pipe, timesteps, error, message):
    tiny_pipe.scheduler = make_scheduler("dpmsolver++", tiny_pipe.scheduler)
    with pytest.raises(error, match=message):
        tiny_pipe(timesteps=timesteps)


def test_a_scheduler_with_noise_levels_of_its_own_takes_no_timesteps(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("dpmsolver++", tiny_pipe.scheduler, use_karras_sigmas=True)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler cannot take these `timesteps`: .*karras"):
        tiny_pipe(timesteps=[900, 100])


def test_timesteps_that_a_scheduler_would_change_are_refused(tiny_pipe):
    scheduler = diffusers.DPMSolverSinglestepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe = PixelDiffusionPipeline(tiny_pipe.unet, scheduler)
    with pytest.raises(ValueError, match="cannot take these `timesteps`: with its options it steps through others"):
        pipe(timesteps=[900, 600, 100])


def test_samples_and_their_record_are_of_these_timesteps(tiny_pipe):
    timesteps = [999, 500, 20]
    tiny_pipe.scheduler = make_scheduler("dpmsolver++", tiny_pipe.scheduler)
    sample_images(tiny_pipe, 2, timesteps=timesteps)
    assert tiny_pipe.scheduler.timesteps.tolist() == timesteps
    assert "timesteps" not in evaluate_pipeline(tiny_pipe, None, 2, 4)
    record = evaluate_pipeline(tiny_pipe, None, 2, timesteps=timesteps)
    assert tiny_pipe.scheduler.timesteps.tolist() == timesteps == record["timesteps"]
    assert record["num_inference_steps"] == record["evaluations"] == 3
