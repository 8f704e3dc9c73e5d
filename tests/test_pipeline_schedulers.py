"""The scheduler in the pipeline: its own noise, what is refused, told or carried over when it is exchanged."""

import json

import diffusers
import pytest
import torch
from conftest import TINY
from diffusers import DiffusionPipeline
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.evaluation.protocol import image_shape


@pytest.mark.parametrize("seed", [3, None])
def test_dpmsolver_sde_without_a_generator_has_its_own_seed_if_any_and_not_that_of_the_last_call(tiny_pipe, seed):
    tiny_pipe.scheduler = make_scheduler("dpmsolver_sde", tiny_pipe.scheduler, noise_sampler_seed=seed)
    tiny_pipe(2, 3, [torch.Generator().manual_seed(i) for i in (0, 1)])
    noise = torch.zeros(3, 1, 8, 8)
    first, second = (tiny_pipe(3, 3, latents=noise, output_type="pt").images for _ in range(2))
    assert torch.equal(first, second) == (seed is not None)


def test_what_a_scheduler_had_of_its_own_does_not_move_the_noise_of_the_next(tiny_pipe):
    expected = tiny_pipe(1, 3, torch.Generator().manual_seed(0), output_type="pt").images
    tiny_pipe.scheduler = make_scheduler("dpmsolver_sde", tiny_pipe.scheduler, noise_sampler_seed=3)
    tiny_pipe.scheduler = diffusers.DDPMScheduler.from_config(tiny_pipe.scheduler.config)
    found = tiny_pipe(1, 3, torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(found, expected)


def test_after_a_call_the_scheduler_adds_the_noise_of_the_timestep(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("euler", tiny_pipe.scheduler)
    tiny_pipe(1, 4)
    image, noise = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    timesteps = tiny_pipe.scheduler.timesteps
    noisy = [tiny_pipe.scheduler.add_noise(image, noise, t[None]).mean().item() for t in timesteps]
    assert noisy == pytest.approx(tiny_pipe.scheduler.sigmas[: len(timesteps)].tolist())


def test_steps_that_a_scheduler_cannot_take_are_refused(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("pndm", tiny_pipe.scheduler)
    with pytest.raises(ValueError, match="PNDMScheduler cannot take 2 `num_inference_steps`"):
        tiny_pipe(1, 2)
    tiny_pipe.scheduler = make_scheduler("tcd", tiny_pipe.scheduler)
    tiny_pipe(1, 60)


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("scheduler, reason", [
    (diffusers.FlowMatchEulerDiscreteScheduler(), "has no init_noise_sigma"),
    (diffusers.ScoreSdeVeScheduler(), "has no step"),
    (diffusers.RePaintScheduler(), "step needs original_image, mask, too"),
    (diffusers.DDPMWuerstchenScheduler(), "config has no num_train_timesteps"),
    (None, "has no set_timesteps"),
    (diffusers.IPNDMScheduler(), "has a noise schedule of its own"),
    (diffusers.EDMEulerScheduler(), "has a noise schedule of its own"),
    (diffusers.UnCLIPScheduler(), "step needs prev_timestep, too"),
    (diffusers.HeunDiscreteScheduler.from_config(diffusers.DDPMScheduler(**ZERO_SNR).config),
     "cannot follow a schedule with `rescale_betas_zero_snr=True`"),
])  # fmt: skip
def test_a_scheduler_that_the_loop_cannot_call_is_refused(tiny_pipe, scheduler, reason):
    tiny_pipe = PixelDiffusionPipeline(tiny_pipe.unet, diffusers.DDPMScheduler(**ZERO_SNR))
    name = type(scheduler).__name__
    with pytest.raises(ValueError, match=f"{name} cannot be the pipeline's `scheduler`: .*{reason}"):
        tiny_pipe.scheduler = scheduler
    assert type(tiny_pipe.scheduler).__name__ == "DDPMScheduler"


def test_a_noise_schedule_that_is_not_discrete_is_not_exchanged_for_one_that_is(tiny_pipe, caplog):
    pipe = PixelDiffusionPipeline(tiny_pipe.unet, diffusers.EDMEulerScheduler())
    pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert not caplog.messages
    ddim = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler cannot be .* has no discrete noise schedule"):
        pipe.scheduler = ddim


@pytest.mark.parametrize("scheduler_class", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_an_offset_beyond_the_noise_schedule_is_refused_before_any_work(tiny_pipe, scheduler_class):
    pipe = PixelDiffusionPipeline(tiny_pipe.unet, scheduler_class(20, steps_offset=1, timestep_spacing="leading"))
    pipe(1, 19)
    pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match="cannot take 20 .* `steps_offset` of 1 they reach timestep 20"):
        pipe(1, 20)


def test_a_new_scheduler_of_another_noise_schedule_is_told(tiny_pipe, caplog):
    tiny_pipe.scheduler = diffusers.DDIMScheduler.from_config(tiny_pipe.scheduler.config)
    tiny_pipe.scheduler = make_scheduler("euler", tiny_pipe.scheduler)
    assert not caplog.messages
    tiny_pipe.scheduler = diffusers.DDIMScheduler(beta_end=0.01, prediction_type="v_prediction")
    assert "DDIMScheduler has {'beta_end': 0.01, 'prediction_type': 'v_prediction'}" in caplog.messages[-1]
    config = tiny_pipe.scheduler.config  # which does not know the next
    tiny_pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(config, use_flow_sigmas=True)
    told = "has {'use_flow_sigmas': True} where the scheduler in place had {'use_flow_sigmas': None}"
    assert told in caplog.messages[-1]


@pytest.mark.parametrize("noise", [{"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.01] * 1000}])
def test_betas_that_the_noise_schedule_ignores_are_not_told(tiny_pipe, caplog, noise):
    pipe = PixelDiffusionPipeline(tiny_pipe.unet, diffusers.DDPMScheduler(**noise))
    pipe.scheduler = heun = diffusers.HeunDiscreteScheduler(**noise)  # which has other betas by default
    assert not caplog.messages and heun.config.beta_start != 0.0001
    torch.testing.assert_close(heun.alphas_cumprod, diffusers.DDPMScheduler(**noise).alphas_cumprod)


def test_from_pipe_looks_at_a_new_scheduler_as_an_exchange_does(tiny_pipe, caplog):
    PixelDiffusionPipeline.from_pipe(tiny_pipe, scheduler=make_scheduler("ddim", tiny_pipe.scheduler))
    assert not [message for message in caplog.messages if " has {" in message]
    PixelDiffusionPipeline.from_pipe(tiny_pipe, scheduler=diffusers.DDIMScheduler(beta_end=0.01))
    assert "DDIMScheduler has {'beta_end': 0.01}" in caplog.text


def test_a_scheduler_given_at_load_is_looked_at_as_an_exchange_is(tiny_pipe, tmp_path, caplog):
    tiny_pipe.save_pretrained(tmp_path)
    PixelDiffusionPipeline.from_pretrained(tmp_path, scheduler=make_scheduler("ddim", tiny_pipe.scheduler))
    assert not [message for message in caplog.messages if " has {" in message]
    DiffusionPipeline.from_pretrained(tmp_path, scheduler=diffusers.DDIMScheduler(beta_end=0.01))
    assert "DDIMScheduler has {'beta_end': 0.01}" in caplog.text and "saved with the network" in caplog.text
    DiffusionPipeline.from_pretrained(tmp_path, scheduler=diffusers.EDMEulerScheduler())
    assert "EDMEulerScheduler has {'beta_schedule': None} where the scheduler saved" in caplog.messages[-1]
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    del config["prediction_type"]  # as in those of long ago
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    DiffusionPipeline.from_pretrained(tmp_path, scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"))
    assert "DDIMScheduler has {'prediction_type': 'v_prediction'}" in caplog.messages[-1]


def test_a_subclass_that_passes_its_arguments_on_is_taken_for_what_it_is(tiny_pipe):
    class MyDDPM(diffusers.DDPMScheduler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    pipe = PixelDiffusionPipeline(tiny_pipe.unet, diffusers.DDPMScheduler(**ZERO_SNR))
    pipe.scheduler = MyDDPM(**ZERO_SNR)
    unet = OptimizedUNet2DModel(**TINY, out_channels=2)
    for scheduler_class in (MyDDPM, diffusers.DDPMParallelScheduler):
        pipe = PixelDiffusionPipeline(unet, scheduler_class(variance_type="learned_range"))
        assert pipe(1, 2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("steps", [50, 61])
def test_inversion_never_starts_at_the_noisiest_timestep(tiny_pipe, steps):
    """In 61 steps "trailing" spacing has a timestep -1, which would index the last."""
    trained = diffusers.DDPMScheduler(timestep_spacing="trailing")
    pipe = PixelDiffusionPipeline(tiny_pipe.unet, diffusers.DDIMInverseScheduler.from_config(trained.config))
    pipe.unet.forward = lambda sample, timestep: UNet2DOutput(sample=torch.zeros_like(sample))  # no noise
    latents = torch.ones(1, 1, 8, 8)
    images = pipe(1, steps, latents=latents, output_type="latent").images
    assert pipe.scheduler.timesteps.min() >= 0
    torch.testing.assert_close(images, latents * pipe.scheduler.alphas_cumprod[-1].sqrt(), rtol=0.2, atol=0)


def with_variance(channels: int) -> diffusers.UNet2DModel:
    """A network that predicts as many channels more, for the variance."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return diffusers.UNet2DModel(8, channels, 2 * channels, norm_num_groups=4, add_attention=False, **blocks).eval()


def test_a_network_that_predicts_the_variance_needs_a_scheduler_that_learns_it():
    pipe = PixelDiffusionPipeline(with_variance(1), diffusers.DDPMScheduler(variance_type="learned_range"))
    assert pipe(2, 3, output_type="pt").images.shape == (2, *image_shape(pipe)) == (2, 1, 8, 8)
    # DPM-Solver takes the first three channels for the noise
    for scheduler_class in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="1 `in_channels` and 2 `out_channels`; .* it must have 1: as many, or"):
            pipe(2, 3)


def test_others_than_ddpm_take_a_learned_variance_only_from_predicted_noise():
    for prediction in ("epsilon", "v_prediction"):
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range", prediction_type=prediction)
        pipe = PixelDiffusionPipeline(with_variance(3), scheduler)
        pipe(1, 2)
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        if prediction == "epsilon":
            pipe(1, 2)
    with pytest.raises(ValueError, match="with 3 channels and predicted noise also DPM-Solver"):
        pipe(1, 2)


def test_an_error_during_sampling_leaves_the_scheduler_usable(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("euler", tiny_pipe.scheduler)

    def stop(pipe, i, t, tensors):
        raise KeyboardInterrupt

    clean, noise = torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    tiny_pipe.scheduler.set_timesteps(4)
    timesteps = tiny_pipe.scheduler.timesteps[:3]
    expected = tiny_pipe.scheduler.add_noise(clean, noise, timesteps)
    with pytest.raises(KeyboardInterrupt):
        tiny_pipe(1, 4, callback_on_step_end=stop)
    assert torch.equal(tiny_pipe.scheduler.add_noise(clean, noise, timesteps), expected)
