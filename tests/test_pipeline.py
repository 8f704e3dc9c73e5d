"""The pipeline's call: noise, scheduler arguments, outputs, callbacks, errors before any work."""

import importlib
import json
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, randomize
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.evaluation.protocol import image_shape
from ddpm_diffusers.hub import pipeline_files


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    "name", ["ddpm", "dpmsolver++", "euler_ancestral", "heun", "dpmsolver_sde", "sa_solver", "tcd"]
)
def test_image_i_of_a_list_of_generators_does_not_depend_on_the_batch(tiny_pipe, name):
    tiny_pipe.scheduler = make_scheduler(name, tiny_pipe.scheduler)
    batch = tiny_pipe(3, 4, generators(5, 6, 7), output_type="pt").images
    alone = tiny_pipe(1, 4, generators(7), output_type="pt").images
    again = tiny_pipe(3, 4, generators(5, 6, 7), output_type="pt").images
    assert torch.equal(batch, again)
    torch.testing.assert_close(batch[2:], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(batch[1], batch[2], atol=1e-2)


def test_ddpm_steps_are_those_of_the_stock_pipeline():
    """The stock pipeline is right for the one scheduler that scales nothing: an independent reference."""
    unet = randomize(diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
                     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=2,
                     add_attention=False, layers_per_block=1))  # fmt: skip
    scheduler = diffusers.DDPMScheduler()
    ours, stock = PixelDiffusionPipeline(unet, scheduler), diffusers.DDPMPipeline(unet, scheduler)
    images = [pipe(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0),
                   output_type="np").images for pipe in (ours, stock)]  # fmt: skip
    np.testing.assert_allclose(images[0], images[1], atol=1e-6)


def test_eta_reaches_ddim_as_in_the_stock_pipeline(tiny_unet):
    scheduler = diffusers.DDIMScheduler()
    ours, stock = PixelDiffusionPipeline(tiny_unet, scheduler), diffusers.DDIMPipeline(tiny_unet, scheduler)
    images = [pipe(batch_size=2, num_inference_steps=5, eta=0.7, generator=torch.Generator().manual_seed(0),
                   output_type="np").images for pipe in (ours, stock)]  # fmt: skip
    np.testing.assert_allclose(images[0], images[1], atol=1e-6)


def test_outputs(tiny_pipe):
    def sample(output_type, **kwargs):
        return tiny_pipe(2, 3, torch.Generator().manual_seed(0), output_type=output_type, **kwargs)

    latents, pt, array, pil = (sample(kind).images for kind in ("latent", "pt", "np", "pil"))
    assert latents.shape == pt.shape == (2, 1, 8, 8) and array.shape == (2, 8, 8, 1)
    assert latents.dtype == torch.float32 and latents.min() < 0
    torch.testing.assert_close(pt, (latents / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in pil] == ["L", "L"] and pil[0].size == (8, 8)
    np.testing.assert_array_equal(np.asarray(pil[1]), (array[1, :, :, 0] * 255).round().astype(np.uint8))
    as_tuple = sample("np", return_dict=False)
    assert isinstance(as_tuple, tuple) and np.array_equal(as_tuple[0], array)


def test_colour_and_other_sizes_come_from_the_unet_config():
    config = {**TINY, "in_channels": 3, "out_channels": 3, "sample_size": (8, 16)}
    pipe = PixelDiffusionPipeline(randomize(OptimizedUNet2DModel(**config)), diffusers.DDPMScheduler())
    (image,) = pipe(num_inference_steps=2).images
    assert image.mode == "RGB" and image.size == (16, 8)


def test_given_latents_are_the_starting_noise(tiny_pipe):
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    tiny_pipe.scheduler = make_scheduler("euler", tiny_pipe.scheduler)
    given = tiny_pipe(2, 3, latents=noise, output_type="pt").images
    drawn = tiny_pipe(2, 3, torch.Generator().manual_seed(3), output_type="pt").images
    assert torch.equal(given, drawn)
    assert torch.equal(noise, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)))  # left alone


def test_a_callback_may_ask_for_nothing(tiny_pipe):
    seen = []
    for names in ([], None):
        tiny_pipe(
            1, 2, callback_on_step_end=lambda *args: seen.append(args[3]), callback_on_step_end_tensor_inputs=names
        )
    assert seen == [{}] * 4


def test_callback_sees_every_step_and_can_change_the_latents(tiny_pipe):
    seen = []

    def zero_at_the_end(pipe, i, t, tensors):
        seen.append((i, int(t), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else {}

    images = tiny_pipe(2, 4, callback_on_step_end=zero_at_the_end, output_type="latent").images
    assert seen == [(i, int(t), (2, 1, 8, 8)) for i, t in enumerate(tiny_pipe.scheduler.timesteps)]
    assert not images.any()


def test_a_callback_of_diffusers_gets_the_tensors_that_it_names(tiny_pipe):
    class Counts(PipelineCallback):
        calls, tensor_inputs = [], ["latents"]

        def callback_fn(self, pipe, i, t, tensors):
            self.calls.append(sorted(tensors))
            return tensors

    tiny_pipe(1, 3, callback_on_step_end=Counts(1.0, None), callback_on_step_end_tensor_inputs=[])
    assert Counts.calls == [["latents"]] * 3
    tiny_pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs` holds .'prompt_embeds'"):
        tiny_pipe(1, 3, callback_on_step_end=SDCFGCutoffCallback(0.5, None))


def test_interrupt_stops_the_network_and_leaves_the_pipeline_usable(tiny_pipe):
    calls = []
    tiny_pipe.unet.register_forward_hook(lambda *args: calls.append(1))

    def stop(pipe, i, t, tensors):
        pipe._interrupt = i == 1
        return tensors

    images = tiny_pipe(1, 6, callback_on_step_end=stop, output_type="pt").images
    assert len(calls) == 2 and images.shape == (1, 1, 8, 8)
    tiny_pipe(1, 6)
    assert len(calls) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ddpm", "dpmsolver++", "euler"])
def test_half_precision_weights_are_sampled_in_float32(tiny_pipe, name, dtype):
    tiny_pipe.scheduler = make_scheduler(name, tiny_pipe.scheduler)
    full = tiny_pipe(2, 5, torch.Generator().manual_seed(0), output_type="np").images
    tiny_pipe.to(dtype)
    assert tiny_pipe.unet.dtype == dtype
    half = tiny_pipe(2, 5, torch.Generator().manual_seed(0), output_type="np").images
    assert half.dtype == np.float32 and np.isfinite(half).all()
    assert np.abs(half - full).mean() < 0.03

    scheduler, generator = tiny_pipe.scheduler, torch.Generator().manual_seed(0)
    scheduler.set_timesteps(5)
    latents = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = tiny_pipe.unet(scheduler.scale_model_input(latents, t).to(dtype), t).sample.float()
        latents = scheduler.step(output, t, latents, generator=generator).prev_sample
    found = tiny_pipe(2, 5, torch.Generator().manual_seed(0), output_type="latent").images
    assert found.dtype == torch.float32 and torch.equal(found, latents)


def test_dpmsolver_sde_without_a_generator_is_not_bound_to_the_last_seed(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("dpmsolver_sde", tiny_pipe.scheduler)
    tiny_pipe(2, 3, generators(0, 1))
    noise = torch.zeros(3, 1, 8, 8)
    first, second = (tiny_pipe(3, 3, latents=noise, output_type="pt").images for _ in range(2))
    assert not torch.equal(first, second)


def test_dpmsolver_sde_keeps_a_seed_of_its_own(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("dpmsolver_sde", tiny_pipe.scheduler, noise_sampler_seed=3)
    noise = torch.zeros(2, 1, 8, 8)
    first, second = (tiny_pipe(2, 3, latents=noise, output_type="pt").images for _ in range(2))
    assert torch.equal(first, second)


def test_what_a_scheduler_had_of_its_own_does_not_move_the_noise_of_the_next(tiny_pipe):
    expected = tiny_pipe(1, 3, generators(0)[0], output_type="pt").images
    tiny_pipe.scheduler = make_scheduler("dpmsolver_sde", tiny_pipe.scheduler, noise_sampler_seed=3)
    tiny_pipe.scheduler = diffusers.DDPMScheduler.from_config(tiny_pipe.scheduler.config)
    assert torch.equal(tiny_pipe(1, 3, generators(0)[0], output_type="pt").images, expected)


def test_after_a_call_the_scheduler_adds_the_noise_of_the_timestep(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("euler", tiny_pipe.scheduler)
    tiny_pipe(1, 4)
    image, noise = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    timesteps = tiny_pipe.scheduler.timesteps
    noisy = [tiny_pipe.scheduler.add_noise(image, noise, t[None]).mean().item() for t in timesteps]
    assert noisy == pytest.approx(tiny_pipe.scheduler.sigmas[: len(timesteps)].tolist())


@pytest.mark.parametrize("generator", [0, (torch.Generator(),)])
def test_generators_are_one_or_a_list(tiny_pipe, generator):
    with pytest.raises(TypeError, match="`generator` holds .*; it must be a torch.Generator"):
        tiny_pipe(1, 2, generator=generator)


def test_a_subclass_with_an_optional_component_can_be_saved(tiny_pipe, tmp_path):
    class WithExtra(PixelDiffusionPipeline):
        _optional_components = ["extra"]

        def __init__(self, unet, scheduler, extra=None):
            super().__init__(unet, scheduler)
            self.register_modules(extra=extra)

    WithExtra(tiny_pipe.unet, tiny_pipe.scheduler).save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "unet_2d_optimized.py").is_file()
    assert not (tmp_path / "pipeline_pixel_diffusion.py").exists()


def test_steps_that_a_scheduler_cannot_take_are_refused(tiny_pipe):
    tiny_pipe.scheduler = make_scheduler("pndm", tiny_pipe.scheduler)
    with pytest.raises(ValueError, match="PNDMScheduler cannot take 2 `num_inference_steps`"):
        tiny_pipe(1, 2)
    tiny_pipe.scheduler = make_scheduler("tcd", tiny_pipe.scheduler)
    tiny_pipe(1, 60)


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    "scheduler, reason",
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "has no init_noise_sigma"),
        (diffusers.ScoreSdeVeScheduler(), "has no step"),
        (diffusers.RePaintScheduler(), "step needs original_image, mask, too"),
        (None, "has no set_timesteps"),
        (diffusers.IPNDMScheduler(), "has a noise schedule of its own"),
        (diffusers.EDMEulerScheduler(), "has a noise schedule of its own"),
        (diffusers.UnCLIPScheduler(), "step needs prev_timestep, too"),
        (
            diffusers.HeunDiscreteScheduler.from_config(diffusers.DDPMScheduler(**ZERO_SNR).config),
            "cannot follow a schedule with `rescale_betas_zero_snr=True`",
        ),
    ],
)
def test_a_scheduler_that_the_loop_cannot_call_is_refused(tiny_pipe, scheduler, reason):
    tiny_pipe = PixelDiffusionPipeline(tiny_pipe.unet, diffusers.DDPMScheduler(**ZERO_SNR))
    name = type(scheduler).__name__
    with pytest.raises(ValueError, match=f"{name} cannot be the pipeline's `scheduler`: .*{reason}"):
        tiny_pipe.scheduler = scheduler
    assert type(tiny_pipe.scheduler).__name__ == "DDPMScheduler"


def test_a_scheduler_that_knows_no_predicted_images_is_refused_for_such_a_network(tiny_pipe):
    pipe = PixelDiffusionPipeline(tiny_pipe.unet, diffusers.DDPMScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match="PNDMScheduler cannot be .*: its step knows no `prediction_type` 'sample'"):
        pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)


def test_by_default_it_makes_one_image_in_50_steps(tiny_pipe):
    calls = []
    tiny_pipe.unet.register_forward_hook(lambda *args: calls.append(1))
    assert len(tiny_pipe().images) == 1 and len(calls) == tiny_pipe.num_timesteps == 50


def test_a_noise_schedule_that_is_not_discrete_is_not_exchanged_for_one_that_is(tiny_pipe):
    pipe = PixelDiffusionPipeline(tiny_pipe.unet, diffusers.EDMEulerScheduler())
    pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
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
    # which the one in place does not know
    tiny_pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        tiny_pipe.scheduler.config, use_flow_sigmas=True
    )
    assert (
        "has {'use_flow_sigmas': True} where the scheduler in place had {'use_flow_sigmas': None}"
        in caplog.messages[-1]
    )


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
    assert "for `pipe.scheduler` then `DDIMScheduler.from_config(" in caplog.text
    DiffusionPipeline.from_pretrained(tmp_path, scheduler=diffusers.EDMEulerScheduler())
    assert "EDMEulerScheduler has {'beta_schedule': None} where the scheduler saved" in caplog.messages[-1]
    assert "for `pipe.scheduler` then one of `ddpm_diffusers.make_scheduler`" in caplog.messages[-1]
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    del config["prediction_type"]  # as in those of long ago
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    DiffusionPipeline.from_pretrained(tmp_path, scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"))
    assert "DDIMScheduler has {'prediction_type': 'v_prediction'}" in caplog.messages[-1]


def test_a_network_set_in_place_of_none_is_saved_and_none_is_not_pushed(tiny_pipe, tmp_path):
    unet = tiny_pipe.unet
    tiny_pipe.save_pretrained(tmp_path / "whole")
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "whole", unet=None)
    with pytest.raises(ValueError, match="has no `unet` to push"):
        pipe.push_to_hub("user/empty", token="hf_token")
    with pytest.raises(ValueError, match="has no `unet`: set `pipe.unet` first"):
        pipe()
    with pytest.raises(ValueError, match="was saved without its `unet`"):
        pipe.save_pretrained(tmp_path / "empty")
        pipeline_files(tmp_path / "empty")
    pipe.unet = unet
    pipe.save_pretrained(tmp_path / "set")
    loaded = PixelDiffusionPipeline.from_pretrained(tmp_path / "set").unet
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in unet.state_dict().items())


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


def test_what_is_saved_names_no_path_of_this_machine(tmp_path):
    stock = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = diffusers.UNet2DModel(8, 1, 1, norm_num_groups=4, **stock)
    PixelDiffusionPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "first")
    PixelDiffusionPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    saved = [path for path in (tmp_path / "second").rglob("*") if path.is_file()]
    assert saved and not [path for path in saved if str(tmp_path).encode() in path.read_bytes()]
    again = PixelDiffusionPipeline.from_pretrained(tmp_path / "second")
    assert again.unet.config.block_out_channels == [8]


def test_a_network_that_predicts_the_variance_needs_a_scheduler_that_learns_it():
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8,),
                                 norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                                 add_attention=False)  # fmt: skip
    pipe = PixelDiffusionPipeline(unet.eval(), diffusers.DDPMScheduler(variance_type="learned_range"))
    assert pipe(2, 3, output_type="pt").images.shape == (2, *image_shape(pipe)) == (2, 1, 8, 8)
    # DPM-Solver takes the first three channels for the noise
    for scheduler_class in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="1 `in_channels` and 2 `out_channels`; .* it must have 1: as many, or"):
            pipe(2, 3)


def test_others_than_ddpm_take_a_learned_variance_only_from_predicted_noise():
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=6, block_out_channels=(8,),
                                 norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                                 add_attention=False)  # fmt: skip
    for prediction in ("epsilon", "v_prediction"):
        pipe = PixelDiffusionPipeline(unet.eval(), diffusers.DDPMScheduler(
            variance_type="learned_range", prediction_type=prediction))  # fmt: skip
        pipe(1, 2)
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        if prediction == "epsilon":
            pipe(1, 2)
    with pytest.raises(ValueError, match="with 3 channels and predicted noise also DPM-Solver"):
        pipe(1, 2)


def test_images_of_more_channels_than_pil_has_are_refused_before_any_work(tiny_pipe):
    tiny_pipe.unet = OptimizedUNet2DModel(**TINY | {"in_channels": 5, "out_channels": 5}).eval()
    assert tiny_pipe(1, 1, output_type="np").images.shape == (1, 8, 8, 5)
    tiny_pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match="images of 5 channels, which PIL has no mode for: pass `output_type` 'np'"):
        tiny_pipe(1, 1)


@pytest.mark.parametrize("name", ["pndm", "dpmsolver++", "unipc"])
def test_a_network_may_reuse_the_memory_of_its_output(tiny_pipe, name):
    """As one does that is compiled into a CUDA graph."""
    tiny_pipe.scheduler = make_scheduler(name, tiny_pipe.scheduler)
    expected = tiny_pipe(1, 8, generators(0), output_type="latent").images
    memory = torch.empty(1, 1, 8, 8)
    tiny_pipe.unet.register_forward_hook(lambda module, args, output: type(output)(memory.copy_(output.sample)))
    assert torch.equal(tiny_pipe(1, 8, generators(0), output_type="latent").images, expected)


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


def test_numbers_may_be_of_numpy(tiny_pipe):
    assert len(tiny_pipe(np.int64(2), np.int32(3), eta=np.float32(0)).images) == 2


@pytest.mark.parametrize("network", ["ours", "stock"])
def test_from_pipe_takes_a_network_of_any_class(tiny_pipe, network):
    if network == "stock":
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        tiny_pipe.unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    stock = DDPMPipeline(tiny_pipe.unet, tiny_pipe.scheduler)
    ddim = make_scheduler("ddim", tiny_pipe.scheduler)
    for pipe in (PixelDiffusionPipeline.from_pipe(stock), PixelDiffusionPipeline.from_pipe(tiny_pipe, scheduler=ddim)):
        assert type(pipe) is PixelDiffusionPipeline and pipe.unet is tiny_pipe.unet
    assert pipe.scheduler is ddim and tiny_pipe.scheduler is stock.scheduler
    transformer = diffusers.DiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, norm_num_groups=4)
    other = diffusers.DiTPipeline(transformer, diffusers.AutoencoderKL(), tiny_pipe.scheduler)  # it has no `unet`
    assert PixelDiffusionPipeline.from_pipe(other, unet=tiny_pipe.unet).unet is tiny_pipe.unet


@pytest.mark.parametrize("name, class_name", [
    ("pipeline_pixel_diffusion", "PixelDiffusionPipeline"), ("unet_2d_optimized", "OptimizedUNet2DModel"),
])  # fmt: skip
def test_the_code_that_is_saved_is_what_runs(tiny_pipe, tmp_path, monkeypatch, name, class_name):
    code = (ROOT / "ddpm_diffusers" / f"{name}.py").read_text()
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    copied = getattr(importlib.import_module(name), class_name)
    file.write_text("changed while it ran")
    made = copied(**tiny_pipe.components) if class_name == "PixelDiffusionPipeline" else copied()
    made.save_config(tmp_path / "saved")
    assert (tmp_path / "saved" / f"{name}.py").read_text() == code
    made.save_config(tmp_path)  # beside itself
    assert file.read_text() == code
    del sys.modules[name]


def test_progress_bar_settings_are_used(tiny_pipe, capsys):
    tiny_pipe.set_progress_bar_config(disable=False, desc="sampling", ascii=True)
    tiny_pipe(1, 3)
    assert "sampling: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"batch_size": 0}, "`batch_size` is 0; it must be a positive integer"),
        ({"batch_size": 2.0}, "`batch_size` is 2.0; it must be a positive integer"),
        ({"num_inference_steps": -1}, "`num_inference_steps` is -1; it must be a positive integer"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` is 1001; it must not exceed the 1000 timesteps"),
        ({"output_type": "jpeg"}, "`output_type` is 'jpeg'; it must be one of 'pil', 'np', 'pt', 'latent'"),
        ({"batch_size": 2, "generator": generators(0)}, "`generator` holds 1 generators for a `batch_size` of 2"),
        ({"latents": torch.zeros(1, 1, 8, 9)}, r"`latents` has shape \(1, 1, 8, 9\); it must be \(1, 1, 8, 8\)"),
        ({"latents": [0.0]}, "`latents` must be a tensor of shape .* it is list"),
        ({"latents": torch.zeros(8)}, r"`latents` must be a tensor of shape .* it is of shape \(8,\)"),
        ({"eta": 1.5}, r"`eta` is 1.5; it must be a number in \[0, 1\]"),
        ({"eta": "0.5"}, r"`eta` is '0.5'; it must be a number"),
        ({"eta": 0.5}, "`eta` is 0.5, but DDPMScheduler takes none"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"holds \['noise'\]; it may hold \['latents'\]"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tiny_pipe, kwargs, message):
    tiny_pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        tiny_pipe(**kwargs)


def test_a_unet_without_sample_size_takes_its_size_from_the_latents(tiny_pipe):
    tiny_pipe.unet.register_to_config(sample_size=None)
    assert tiny_pipe(1, 2, latents=torch.randn(1, 1, 16, 8)).images[0].size == (8, 16)
    with pytest.raises(ValueError, match="`sample_size` is None: give `latents`"):
        tiny_pipe(1, 2)
