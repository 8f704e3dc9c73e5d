"""The pipeline's call: noise, outputs, callbacks, errors before any work."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY, randomize
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline, make_scheduler


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


@pytest.mark.parametrize("name, dtype", [("ddpm", torch.float16), ("euler", torch.bfloat16)])
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


@pytest.mark.parametrize("generator", [0, (torch.Generator(),)])
def test_generators_are_one_or_a_list(tiny_pipe, generator):
    with pytest.raises(TypeError, match="`generator` holds .*; it must be a torch.Generator"):
        tiny_pipe(1, 2, generator=generator)


def test_by_default_it_makes_one_image_in_50_steps(tiny_pipe):
    calls = []
    tiny_pipe.unet.register_forward_hook(lambda *args: calls.append(1))
    assert len(tiny_pipe().images) == 1 and len(calls) == tiny_pipe.num_timesteps == 50


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


def test_numbers_may_be_of_numpy(tiny_pipe):
    assert len(tiny_pipe(np.int64(2), np.int32(3), eta=np.float32(0)).images) == 2


def test_progress_bar_settings_are_used(tiny_pipe, capsys):
    tiny_pipe.set_progress_bar_config(disable=False, desc="sampling", ascii=True)
    tiny_pipe(1, 3)
    assert "sampling: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("kwargs, message", [
    ({"batch_size": 0}, "`batch_size` is 0; it must be a positive integer"),
    ({"batch_size": 2.0}, "`batch_size` is 2.0; it must be a positive integer"),
    ({"num_inference_steps": -1}, "`num_inference_steps` is -1; it must be a positive integer"),
    ({"num_inference_steps": 1001}, "`num_inference_steps` is 1001; it must not exceed the 1000 timesteps"),
    ({"output_type": "jpeg"}, "`output_type` is 'jpeg'; it must be one of 'pil', 'np', 'pt', 'latent'"),
    ({"batch_size": 2, "generator": generators(0)}, "`generator` holds 1 generators for a `batch_size` of 2"),
    ({"latents": torch.zeros(1, 1, 8, 9)}, r"`latents` has shape \(1, 1, 8, 9\); it must be .* \(1, 1, 8, 8\)"),
    ({"latents": [0.0]}, "`latents` is list; it must be a tensor of shape"),
    ({"latents": torch.zeros(8)}, r"`latents` has shape \(8,\); it must be a tensor"),
    ({"eta": 1.5}, r"`eta` is 1.5; it must be a number in \[0, 1\]"),
    ({"eta": "0.5"}, r"`eta` is '0.5'; it must be a number"),
    ({"eta": 0.5}, "`eta` is 0.5, but DDPMScheduler takes none"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"holds \['noise'\]; it may hold \['latents'\]"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_any_work(tiny_pipe, kwargs, message):
    tiny_pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        tiny_pipe(**kwargs)


def test_a_unet_without_sample_size_takes_its_size_from_the_latents(tiny_pipe):
    tiny_pipe.unet.register_to_config(sample_size=None)
    assert tiny_pipe(1, 2, latents=torch.randn(1, 1, 16, 8)).images[0].size == (8, 16)
    with pytest.raises(ValueError, match="`sample_size` is None: give `latents`"):
        tiny_pipe(1, 2)
