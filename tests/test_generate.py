"""The sampling script."""

from pathlib import Path

import generate as script
import numpy as np
import pytest
import torch
from command_line import parse_arguments
from conftest import reset_accelerate
from PIL import Image
from samplers import parse_scheduler, swap_scheduler

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.sampling import sample_images


@pytest.fixture
def generate(tiny_pipe, tmp_path, monkeypatch):
    """Run the script here on a tiny pipeline, with a file of flags and others; returns the folder of samples."""
    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "flags.yaml").write_text(f"model: {tmp_path / 'model'}\nscheduler: ddim\nnum_inference_steps: 4\n")

    def run(name: str, *flags: str) -> Path:
        reset_accelerate()
        argv = [str(tmp_path / "flags.yaml"), *flags, "--output_dir", str(tmp_path / name)]
        script.main(parse_arguments(script.GenerateArguments, argv, script.__doc__))
        return tmp_path / name

    return run


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("[0-9]*.png"))}


def test_image_i_is_of_seed_and_scheduler_whatever_the_batch(generate, capsys):
    sampler = ("--scheduler", "euler", "--num_images", "3")
    one = pixels(generate("one", *sampler, "--seed", "7", "--batch_size", "1"))
    assert "3 images by EulerDiscreteScheduler, 4 steps" in capsys.readouterr().out
    many = pixels(generate("many", *sampler, "--seed", "6"))
    assert list(one) == ["000007.png", "000008.png", "000009.png"]
    for name in ("000007.png", "000008.png"):
        assert np.abs(one[name] - many[name]).max() <= 1
    other = pixels(generate("other", "--num_images", "3", "--seed", "7"))  # by DDIM, of the file
    assert not np.array_equal(other["000007.png"], one["000007.png"])
    assert Image.open(generate("grid", "--num_images", "5") / "grid.png").size == (168, 112)  # images enlarged to 56


def test_timesteps_take_the_place_of_steps(generate, tmp_path, capsys):
    flags = tmp_path / "flags.yaml"
    flags.write_text(flags.read_text().replace("scheduler: ddim\nnum_inference_steps: 4", "scheduler: dpmsolver++"))
    chosen = pixels(generate("chosen", "--timesteps", "600", "30", "--num_images", "3"))
    assert "3 images by DPMSolverMultistepScheduler, 2 steps" in capsys.readouterr().out
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.scheduler = make_scheduler("dpmsolver++", pipe.scheduler)
    expected, other = (sample_images(pipe, 3, timesteps=timesteps) for timesteps in ([600, 30], [900, 500, 30]))
    assert np.array_equal(np.stack([*chosen.values()]), expected.squeeze(1)) and not torch.equal(expected, other)
    with pytest.raises(ValueError, match=r"`timesteps` is \[2, 9\]; it must hold"):
        generate("wrong", "--timesteps", "2", "9")
    with pytest.raises(ValueError, match="DDIMScheduler takes none"):
        generate("wrong", "--timesteps", "9", "--scheduler", "ddim")
    assert not (tmp_path / "wrong").exists()


def test_weights_in_half_precision_give_nearly_the_same(generate):
    full = pixels(generate("full", "--num_images", "2"))
    half = pixels(generate("half", "--num_images", "2", "--dtype", "bfloat16"))
    difference = np.abs(np.stack(list(full.values())) - np.stack(list(half.values())))
    assert 0 < difference.mean() < 0.03 * 255


@torch.no_grad()
def test_a_variant_has_weights_of_its_own(generate, tiny_pipe, tmp_path):
    plain = pixels(generate("plain", "--num_images", "1"))
    for parameter in tiny_pipe.unet.parameters():
        parameter.mul_(0.5)
    tiny_pipe.save_pretrained(tmp_path / "model", variant="fp16")
    assert np.array_equal(pixels(generate("again", "--num_images", "1"))["000000.png"], plain["000000.png"])
    variant = pixels(generate("variant", "--num_images", "1", "--variant", "fp16"))
    assert not np.array_equal(variant["000000.png"], plain["000000.png"])


def test_only_samples_are_overwritten_and_only_if_asked(generate):
    folder = generate("samples", "--num_images", "3")
    for name in ("mine.png", "2024-mine.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match="is not empty: choose another, or pass `--overwrite`"):
        generate("samples", "--num_images", "1")
    generate("samples", "--num_images", "1", "--overwrite")
    names = {path.name for path in folder.iterdir() if path.name != ".lock"}
    assert names == {"000000.png", "grid.png", "mine.png", "2024-mine.png"}
    (folder / "grid.png").unlink()
    (folder / "20240131.png").write_bytes(b"")  # as a folder of photographs may have it
    generate("samples", "--num_images", "1", "--overwrite")
    assert (folder / "20240131.png").exists()


def test_samples_that_came_while_it_loaded_are_kept(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "model")
    args = script.GenerateArguments(
        model=str(tmp_path / "model"), num_inference_steps=1, output_dir=str(tmp_path / "samples")
    )
    (tmp_path / "samples").mkdir()  # by another process, now that this one has found none
    for name in ("grid.png", "000000.png"):
        (tmp_path / "samples" / name).write_bytes(b"theirs")
    with pytest.raises(ValueError, match="is not empty: choose another, or pass `--overwrite`"):
        script.main(args)
    assert (tmp_path / "samples" / "000000.png").read_bytes() == b"theirs"


@pytest.mark.parametrize("flags, message", [
    (["--scheduler", "eular"], "'eular' is unknown; it must be one of ddpm"),
    (["--scheduler", "ddim:beta_end=wide"], "`beta_end` is 0.02 in the scheduler"),
    (["--scheduler", "ddim:eta"], "The scheduler is 'ddim:eta'; it must be NAME or NAME:OPTION=VALUE"),
    (["--num_images", "0"], "`--num_images` is 0; it must be at least 1"),
    (["--timesteps", "9", "2"], "Give either `--num_inference_steps` or `--timesteps`"),  # the file has the former
    (["--seed", "-2"], "`--seed` is -2; it must be in [0, 2^32)"),
    (["--guidance_scale", "0.5"], "`--guidance_scale` is 0.5; it must be a number from 1"),
    (["--guidance_scale", "2"], "`guidance_scale` is 2.0, but the pipeline has no `guiding_unet`"),
    (["--dtype", "half"], "`--dtype` is 'half'; it must be float32, float16 or bfloat16"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_is_written(generate, tmp_path, flags, message):
    with pytest.raises(ValueError) as error:
        generate("none", *flags)
    assert message in str(error.value) and not (tmp_path / "none").exists()


def test_more_channels_than_png_holds_are_refused_before_sampling(generate, tiny_pipe, tmp_path):
    tiny_pipe.unet = OptimizedUNet2DModel(**{**tiny_pipe.unet.config, "in_channels": 6, "out_channels": 6})
    tiny_pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="makes images of 6 channels; a PNG file holds at most 4"):
        generate("none")
    assert not (tmp_path / "none").exists()


def test_the_options_of_the_own_scheduler_are_kept_and_told(tiny_pipe):
    own = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
    tiny_pipe.scheduler = make_scheduler("dpmsolver++", tiny_pipe.scheduler, **own)
    assert swap_scheduler(tiny_pipe, None) == own
    config = tiny_pipe.scheduler.config
    assert config.use_karras_sigmas and config.algorithm_type == "sde-dpmsolver++"
    assert swap_scheduler(tiny_pipe, "dpmsolver++:solver_order=1") == {"solver_order": 1}
    assert not tiny_pipe.scheduler.config.use_karras_sigmas  # another scheduler was asked for, by its name


def test_schedulers_are_given_with_options_of_any_type():
    parsed = parse_scheduler("ddim:clip_sample=False,clip_sample_range=0.5,timestep_spacing=leading")
    assert parsed == ("ddim", {"clip_sample": False, "clip_sample_range": 0.5, "timestep_spacing": "leading"})
    assert parse_scheduler("dpmsolver++") == ("dpmsolver++", {})
    for text in ("ddim:clip_sample", "ddim:=1", "ddim:clip_sample=true,", "ddim:trained_betas=[0.1,0.2]"):
        with pytest.raises(ValueError, match="must be NAME or NAME:OPTION=VALUE,OPTION=VALUE"):
            parse_scheduler(text)
