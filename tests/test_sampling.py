"""Sampling many images: the same ones however they are split, and the same as the pipeline's own."""

import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, torchrun
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from ddpm_diffusers.sampling import NotFiniteError, sample_images, to_pil


def test_an_image_is_what_the_pipeline_gives_for_its_seed(tiny_pipe):
    images = sample_images(tiny_pipe, 5, 3, batch_size=2, seed=7)
    assert images.dtype == torch.uint8 and images.shape == (5, 1, 8, 8)
    for first in (0, 2):
        generators = [torch.Generator().manual_seed(7 + i) for i in (first, first + 1)]
        expected = tiny_pipe(2, 3, generators).images
        assert to_pil(images)[first : first + 2] == expected
    assert len({image.numpy().tobytes() for image in images}) == 5


def test_how_many_are_asked_for_changes_none(tiny_pipe):
    assert torch.equal(sample_images(tiny_pipe, 3, 2, batch_size=2), sample_images(tiny_pipe, 6, 2, batch_size=2)[:3])


def test_one_progress_bar_at_most_is_shown_and_the_pipelines_own_is_left_as_it_was(tiny_pipe, capsys):
    tiny_pipe.set_progress_bar_config(desc="Denoising", ascii=True)
    sample_images(tiny_pipe, 4, 2, batch_size=2)
    assert capsys.readouterr().err == ""
    sample_images(tiny_pipe, 4, 2, batch_size=2, progress=True)
    shown = capsys.readouterr().err
    assert "Batches" in shown and "Denoising" not in shown
    tiny_pipe(1, 2)
    assert "Denoising: 100%|##########| 2/2" in capsys.readouterr().err


def test_a_pipeline_of_another_class_is_refused(tiny_unet):
    with pytest.raises(TypeError, match=r"is a DDPMPipeline; .* give `PixelDiffusionPipeline\(pipe.unet, pipe.sched"):
        sample_images(DDPMPipeline(tiny_unet, DDPMScheduler()), 2, 2)


def test_colour_keeps_its_channels():
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    images = to_pil(pixels)
    assert [image.mode for image in images] == ["RGB", "RGB"]
    assert images[1].getpixel((2, 1)) == tuple(pixels[1, :, 1, 2].tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_an_error(tiny_pipe, value):
    tiny_pipe.scheduler.config.clip_sample = False
    with torch.no_grad():
        tiny_pipe.unet.out_block.layers[-1].bias.fill_(value)
    with pytest.raises(NotFiniteError, match="DDPMScheduler made images with NaN or infinity in 1 steps"):
        sample_images(tiny_pipe, 2, 1)


@pytest.mark.parametrize("name", ["num_images", "batch_size"])
def test_numbers_below_one_are_refused(tiny_pipe, name):
    with pytest.raises(ValueError, match=f"`{name}` is 0; it must be a positive integer"):
        sample_images(tiny_pipe, **{"num_images": 2, "num_inference_steps": 2, "batch_size": 2, name: 0})


@pytest.mark.slow
def test_processes_share_the_batches_and_give_the_same_bits(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "pipe")
    expected = [np.asarray(image) for image in to_pil(sample_images(tiny_pipe, 21, 5, batch_size=4))]
    flags = {"model": tmp_path / "pipe", "num_images": 21, "batch_size": 4, "num_inference_steps": 5,
             "output_dir": tmp_path / "images"}  # fmt: skip
    result = subprocess.run(
        [*torchrun(3), ROOT / "train_scripts" / "generate.py", *(f"--{key}={value}" for key, value in flags.items())],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("21 images by DDPMScheduler") == 1  # by the main process alone
    found = [np.asarray(Image.open(tmp_path / "images" / f"{i:06d}.png")) for i in range(21)]
    np.testing.assert_array_equal(found, expected)


NAN_IN_ONE = """
import sys
import torch
from accelerate import PartialState
sys.path.insert(0, sys.argv.pop())
from launch import disconnect
from ddpm_diffusers import PixelDiffusionPipeline
from ddpm_diffusers.sampling import NotFiniteError, sample_images

state = PartialState(cpu=True)
pipe = PixelDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe.scheduler.register_to_config(clip_sample=False)
if state.process_index == 1:
    torch.nn.init.constant_(pipe.unet.out_block.layers[-1].bias, float("nan"))
try:
    sample_images(pipe, 4, 1, batch_size=2)
except NotFiniteError:
    open(f"{sys.argv[1]}/told-{state.process_index}", "w").close()
disconnect()
"""


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_is_an_error_in_all(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "script.py").write_text(NAN_IN_ONE)
    command = [*torchrun(2), str(tmp_path / "script.py"), str(tmp_path / "pipe"), str(ROOT / "train_scripts")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "pipe").glob("told-*")) == ["told-0", "told-1"]
