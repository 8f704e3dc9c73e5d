"""The training script: the whole job in fresh processes, and in this one its variants and where weights come from."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import train_unconditional as script
from batches import open_images
from conftest import SCRIPT, UNET, WEIGHTS, reset_accelerate, run_training
from datasets import Dataset
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from small_runs import metrics_of, parse, train_in

from ddpm_diffusers import PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.checkpointing import list_checkpoints
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.grid import image_grid
from ddpm_diffusers.sampling import sample_images, to_pil


@pytest.fixture
def train(tmp_path):
    """Run the script here with tiny settings; returns its output folder."""
    return partial(train_in, tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run with the settings of `train` and what its card says of its data."""
    return train_in(tmp_path_factory.mktemp("plain"), "--dataset_id", "owner/garments")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The README's way, in fresh processes: 24 steps of two batches each, over 5 epochs."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    result = run_training(
        output_dir, "--max_train_samples", "330", "--train_batch_size", "32", "--gradient_accumulation_steps", "2",
        "--max_train_steps", "24", "--logging_steps", "4", "--checkpointing_steps", "9", "--eval_batch_size", "4",
        "--validation_steps", "12", "--learning_rate", "3e-3", "--logger", "tensorboard",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return output_dir, result


def test_a_run_ends_with_a_pipeline_that_samples(finished):
    output_dir, result = finished
    pipe = DiffusionPipeline.from_pretrained(str(output_dir))
    assert pipe(2, num_inference_steps=2).images[0].size == (8, 8)
    assert str(output_dir) in result.stderr + result.stdout and "24/24" in result.stderr
    assert [p.name for p in sorted((output_dir / "samples").iterdir())] == ["step-0000012.png", "step-0000024.png"]
    grid = output_dir / "samples" / "step-0000024.png"
    assert grid.read_bytes() == (output_dir / "samples.png").read_bytes()
    pipe.scheduler = make_scheduler("dpmsolver++", pipe.scheduler)
    assert Image.open(grid).tobytes() == image_grid(to_pil(sample_images(pipe, 4, 2))).tobytes()
    assert Image.open(grid).size == (112, 112)  # 2 x 2 images, enlarged to 56
    assert any((output_dir / "logs").rglob("events.out.tfevents*"))


def test_the_metrics_show_learning_and_a_schedule_of_optimizer_steps(finished):
    metrics = metrics_of(finished[0])
    assert metrics[-1]["step"] == 24 and metrics[-1]["epoch"] == 24 * 64 / 330
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert metrics[-1]["lr"] == 0  # accumulation does not stretch the schedule
    by_step = {row["step"]: row["lr"] for row in metrics}
    expected = 3e-3 * 0.5 * (1 + math.cos(math.pi * (12 - 2) / (24 - 2)))  # a tenth of warm-up
    assert by_step[12] == pytest.approx(expected)


def test_the_averaged_weights_are_saved_and_no_pickle_is(finished):
    output_dir, _ = finished
    final = load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")
    last = list_checkpoints(output_dir)[-1]
    averaged = load_file(last / "unet_ema" / "diffusion_pytorch_model.safetensors")
    trained = load_file(last / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(final[name], averaged[name]) for name in final)
    assert not any(torch.equal(final[name], trained[name]) for name in final if name.endswith("weight"))
    assert not [path for path in output_dir.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_the_saved_scheduler_is_that_of_the_training_and_starts_at_its_last_timestep(train):
    flags = ["--prediction_type", "sample", "--ddpm_beta_schedule", "squaredcos_cap_v2", "--ddpm_num_steps", "900"]
    config = DiffusionPipeline.from_pretrained(str(train(*flags))).scheduler.config
    assert (config.prediction_type, config.beta_schedule) == ("sample", "squaredcos_cap_v2")
    assert (config.num_train_timesteps, config.timestep_spacing) == (900, "trailing")


def test_lower_precision_is_for_the_network_alone(train, tmp_path):
    """Noise, targets and weights stay in float32: losses differ by the network's rounding alone."""
    full = metrics_of(train("--logging_steps", "1", "--output_dir", str(tmp_path / "full")))
    output_dir = train("--logging_steps", "1", "--mixed_precision", "bf16")
    assert {weight.dtype for weight in load_file(output_dir / WEIGHTS).values()} == {torch.float32}
    first, *others = zip(metrics_of(output_dir), full, strict=True)
    assert first[0]["loss"] == first[1]["loss"]  # the first prediction is 0 in any precision
    for ours, expected in others:
        assert ours["loss"] == pytest.approx(expected["loss"], rel=0.01) and ours["loss"] != expected["loss"]


def test_muon_moves_the_inner_kernels_and_adamw_the_rest(train):
    output_dir = train("--optimizer", "muon", "--checkpointing_steps", "3")
    state = load_file(output_dir / "checkpoint-3" / "optimizer.safetensors")
    averages = {key.removesuffix(".exp_avg") for key in state if key.endswith(".exp_avg")}
    squares = {key.removesuffix(".exp_avg_sq") for key in state if key.endswith(".exp_avg_sq")}
    kernels = {name for name, weight in load_file(output_dir / WEIGHTS).items() if weight.ndim == 4}
    assert averages - squares == kernels - {"stem.weight", "out_block.layers.2.weight"}  # which read or write images


def test_without_an_average_the_trained_weights_are_saved(train):
    output_dir = train("--no_use_ema", "--checkpointing_steps", "3")
    trained = load_file(output_dir / "checkpoint-3" / WEIGHTS)
    assert all(torch.equal(weight, trained[name]) for name, weight in load_file(output_dir / WEIGHTS).items())
    assert not (output_dir / "checkpoint-3" / "unet_ema").exists()


def test_samples_that_are_not_finite_do_not_end_a_run_whose_weights_are(train, caplog):
    """One step so large that sampling overflows; the loss before it, and the weights after it, are finite."""
    output_dir = train("--learning_rate", "1e20", "--no_use_ema", "--max_train_steps", "1")
    assert "There is no grid of samples at step 1: DPMSolverMultistepScheduler made images with NaN" in caplog.text
    assert (output_dir / WEIGHTS).is_file() and not (output_dir / "samples.png").exists()
    assert "samples.png" not in (output_dir / "README.md").read_text()


EXTRAS_HIDDEN = """
import runpy, sys
for name in ("torchmetrics", "matplotlib", "scipy", "torchsde", "gradio", "tensorboard"):
    sys.modules[name] = None
folder, *sys.argv = sys.argv[1:]
sys.path.insert(0, folder)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_and_sampling_need_no_extra(tmp_path):
    (tmp_path / "hidden.py").write_text(EXTRAS_HIDDEN)
    hidden = [sys.executable, str(tmp_path / "hidden.py"), str(SCRIPT.parent)]
    done = run_training(tmp_path / "run", "--max_train_steps", "2", launcher=hidden)
    assert done.returncode == 0, done.stderr
    generate = [SCRIPT.with_name("generate.py"), "--model", tmp_path / "run", "--num_inference_steps", "2",
                "--num_images", "2", "--scheduler", "ddim", "--output_dir", tmp_path / "samples"]  # fmt: skip
    done = subprocess.run([*hidden, *map(str, generate)], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "samples" / "000001.png").is_file(), done.stderr
    done = subprocess.run([*hidden, str(SCRIPT.with_name("evaluate.py"))], capture_output=True, text=True)
    assert 'ddpm_diffusers.evaluation needs torchmetrics: pip install "ddpm-diffusers[eval]"' in done.stderr


def test_settings_come_from_a_file_the_network_a_mapping_in_it(tmp_path):
    """In colour, with the logger by default."""
    network = {**json.loads(UNET), "in_channels": 3, "out_channels": 3}
    settings = {"dataset_name": "synthetic-fashion", "max_train_samples": 32, "resolution": 8, "max_train_steps": 1,
                "mixed_precision": False, "unet_config": network, "eval_batch_size": 1,
                "ddpm_num_inference_steps": 1, "output_dir": str(tmp_path / "run")}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(settings))  # False is what YAML takes `no` for
    reset_accelerate()
    script.main(parse(str(tmp_path / "run.json")))
    (image,) = DiffusionPipeline.from_pretrained(str(tmp_path / "run"))(num_inference_steps=2).images
    assert image.mode == Image.open(tmp_path / "run" / "samples" / "step-0000001.png").mode == "RGB"
    assert any((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))


def test_real_fashion_mnist(train, fashion_mnist):
    output_dir = train("--dataset_name", fashion_mnist, "--resolution", "16", "--num_epochs", "1")
    assert DiffusionPipeline.from_pretrained(str(output_dir))(num_inference_steps=2).images[0].size == (16, 16)


def test_ones_own_images_are_cropped_and_seen_as_often_as_asked(train, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 16, 3), dtype=np.uint8)
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "mine" / f"{i:02d}.png")
    output_dir = train(
        "--train_data_dir", str(tmp_path / "mine"), "--split", "train[:90%]", "--center_crop", "--num_epochs", "2",
        "--train_batch_size", "4", "--gradient_accumulation_steps", "2",
        "--unet_config", json.dumps(json.loads(UNET) | {"in_channels": 3, "out_channels": 3}),
    )  # fmt: skip
    arguments = json.loads((output_dir / "run.json").read_text())["arguments"]
    assert arguments["max_train_steps"] == 5  # 2 x 18 images in batches of 8
    squares = Dataset.from_dict({"picture": [Image.fromarray(image[:, 2:14]) for image in pixels[:18]]})
    squares.save_to_disk(tmp_path / "squares")
    images = load_images(str(tmp_path / "squares"), resolution=8, channels=3, image_column="picture")
    assert arguments["data"] == f"{ImageArrays(images, (3, 8, 8)).fingerprint()}, order 2"

    flags = ("--dataset_name", str(tmp_path / "squares"), "--image_column", "picture", "--max_train_samples", "12")
    _, count, text = open_images(parse(*flags, "--resolution", "8"), (1, 8, 8))
    images = load_images(str(tmp_path / "squares"), resolution=8, image_column="picture", max_samples=12)
    assert (count, text) == (12, f"{ImageArrays(images, (1, 8, 8)).fingerprint()}, order 2")


def test_the_card_names_the_data_set_of_the_hub_that_a_local_one_is_a_copy_of(plain):
    card = ModelCard((plain / "README.md").read_text())
    assert card.data.datasets == ["owner/garments"]
    assert "Trained on [owner/garments](https://huggingface.co/datasets/owner/garments)." in card.text


def test_training_goes_on_from_the_weights_of_a_saved_pipeline(train, plain, tmp_path, caplog, monkeypatch):
    source = shutil.copytree(plain, tmp_path / "source")
    begin = ["--pretrained_model_name_or_path", str(source)]
    tuned = train(*begin, "--learning_rate", "1e-9", "--resolution", "16")
    assert "was for images of `sample_size` 8; this one is for `--resolution` 16" in caplog.text
    assert DiffusionPipeline.from_pretrained(str(tuned)).unet.config.sample_size == 16
    weights = load_file(source / WEIGHTS)
    for name, weight in load_file(tuned / WEIGHTS).items():
        torch.testing.assert_close(weight, weights[name], atol=1e-7, rtol=0)
    card = (tuned / "README.md").read_text()
    assert "It started from the weights of a model that is not on the Hub." in card
    published = [path for path in tuned.rglob("*") if path.suffix in (".json", ".md") and path.name != "run.json"]
    assert published and not [path for path in published if str(tmp_path) in path.read_text()]

    own = train(*begin, "--output_dir", str(tmp_path / "own size"))
    assert json.loads((own / "run.json").read_text())["arguments"]["resolution"] == 8

    (tmp_path / "empty").mkdir()
    wide = PixelDiffusionPipeline.from_pretrained(plain)
    wide.unet.register_to_config(sample_size=(8, 16))
    wide.save_pretrained(tmp_path / "wide")

    class Own(type(wide.unet)):
        pass

    for name, found in (("Own", Own), ("ModelMixin", ModelMixin)):  # as diffusers looks for it when it loads
        monkeypatch.setattr(sys.modules[__name__], name, found, raising=False)
    wide.unet = Own.from_config(wide.unet.config)
    wide.save_pretrained(tmp_path / "own class")
    for flags, message in (
        ((begin[0], str(tmp_path / "own class")), "is of class Own, which is neither diffusers' nor this package's"),
        ((begin[0], str(tmp_path / "wide")), r"has a `sample_size` of .8, 16.: give `--resolution`"),
        ((*begin, "--prediction_type", "sample"), "`prediction_type` epsilon, .*: pass `--prediction_type epsilon`"),
        ((*begin, "--ddpm_beta_schedule", "linear"), "pass `--ddpm_beta_schedule scaled_linear`"),
        ((*begin, "--unet_config", "{}"), "Give `--unet_config` or `--pretrained_model_name_or_path`"),
        ((begin[0], str(tmp_path / "empty")), "empty cannot be loaded .*: give a saved pipeline"),
        ((*begin, "--output_dir", str(source), "--overwrite_output_dir"), "which the run would start from"),
    ):
        with pytest.raises(ValueError, match=message):
            train("--output_dir", str(tmp_path / "refused"), *flags)
    assert not (tmp_path / "refused").exists() and load_file(source / WEIGHTS).keys() == weights.keys()


@pytest.mark.parametrize("made_by", ["this script", "diffusers"])
def test_a_run_from_a_saved_pipeline_resumes_without_it_and_publishes_no_path(
    train, plain, tmp_path, made_by, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    source = Path("runs", "source")  # as an id of the Hub would look
    if made_by == "this script":
        shutil.copytree(plain, source)
    else:
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, add_attention=False, **blocks)
        DDPMPipeline(unet, DDPMScheduler(beta_schedule="scaled_linear")).save_pretrained(source)
    begin = ["--pretrained_model_name_or_path", str(source), "--checkpointing_steps", "2", "--output_dir", "runs/own"]
    output_dir = train(*begin)
    whole = load_file(output_dir / WEIGHTS)
    for path in (output_dir / "checkpoint-3", output_dir / "unet", source):  # as if killed after step 2
        shutil.rmtree(path)
    (output_dir / "README.md").unlink()
    train(*begin, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(weight, whole[name]) for name, weight in load_file(output_dir / WEIGHTS).items())
    assert str(source) not in (output_dir / "unet" / "config.json").read_text()
    card = (output_dir / "README.md").read_text()
    assert 'from_pretrained("runs/own")' in card  # from here
    assert str(source) not in card and "from the weights of a model that is not on the Hub" in card
