"""The training script: the whole job in real processes, its variants in this one, and clear errors."""

import json
import math
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import run
import torch
import train_unconditional as script
from arguments import DEFINES_THE_RUN
from command_line import parse_arguments
from conftest import ROOT, SCRIPT, SMALL_RUN, UNET, WEIGHTS, reset_accelerate, run_training
from datasets import Dataset
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from ddpm_diffusers.checkpointing import list_checkpoints
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.hub import add_figures
from ddpm_diffusers.synthetic_fashion import draw_garments


def parse(*argv: str) -> script.TrainingArguments:
    return parse_arguments(script.TrainingArguments, list(argv), script.__doc__)


@pytest.fixture
def train(tmp_path):
    """Run the script here with tiny settings; returns its output folder."""
    return partial(train_in, tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights after a run with the settings of `train` alone."""
    return load_file(train_in(tmp_path_factory.mktemp("plain")) / WEIGHTS)


def train_in(folder: Path, *flags: str) -> Path:
    reset_accelerate()
    length = [] if "--num_epochs" in flags else ["--max_train_steps", "3"]
    network = [] if "--pretrained_model_name_or_path" in flags else ["--unet_config", UNET]
    at = SMALL_RUN.index("--unet_config")
    defaults = [*SMALL_RUN[:at], *SMALL_RUN[at + 2 :], *network, *length, "--output_dir", str(folder / "run")]
    script.main(parse(*defaults, *flags))
    return Path(parse(*defaults, *flags).output_dir)


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


def metrics_of(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_a_pipeline_that_samples(finished):
    output_dir, result = finished
    pipe = DiffusionPipeline.from_pretrained(str(output_dir))
    assert pipe(2, num_inference_steps=2).images[0].size == (8, 8)
    assert str(output_dir) in result.stderr + result.stdout and "24/24" in result.stderr
    assert [p.name for p in sorted((output_dir / "samples").iterdir())] == ["step-0000012.png", "step-0000024.png"]
    assert Image.open(output_dir / "samples" / "step-0000024.png").size == (112, 112)  # 2 x 2 images, enlarged to 56
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


@pytest.mark.parametrize("flags", [
    ["--prediction_type", "v_prediction"],
    ["--prediction_type", "sample", "--ddpm_beta_schedule", "squaredcos_cap_v2"],
    ["--snr_gamma", "5"],
    ["--random_flip"],
    ["--mixed_precision", "bf16"],
    ["--unet_config", '{"in_channels": 3, "out_channels": 3, "block_out_channels": [8, 8]}',
     "--logger", "tensorboard"],
], ids=" ".join)  # fmt: skip
def test_variants(train, plain, flags):
    output_dir = train(*flags)
    trained = load_file(output_dir / WEIGHTS)
    assert trained.keys() != plain.keys() or not all(torch.equal(trained[name], plain[name]) for name in plain)
    pipe = DiffusionPipeline.from_pretrained(str(output_dir))
    (image,) = pipe(num_inference_steps=2).images
    assert image.mode == ("RGB" if pipe.unet.config.in_channels == 3 else "L")
    given = dict(zip(flags[::2], flags[1::2], strict=False))
    assert pipe.scheduler.config.prediction_type == given.get("--prediction_type", "epsilon")
    assert pipe.scheduler.config.beta_schedule == given.get("--ddpm_beta_schedule", "scaled_linear")


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


def test_gradient_checkpointing_takes_memory_not_precision(train, plain):
    assert script.make_unet(UNET, 8, 1000, gradient_checkpointing=True).is_gradient_checkpointing
    trained = load_file(train("--gradient_checkpointing") / WEIGHTS)
    for name, weight in plain.items():
        torch.testing.assert_close(trained[name], weight)


def test_the_stock_unet_trains_by_the_same_script(train):
    output_dir = train("--unet_config", str(ROOT / "train_scripts" / "configs" / "stock.json"))
    assert isinstance(DiffusionPipeline.from_pretrained(str(output_dir)).unet, UNet2DModel)


def test_training_goes_on_from_the_weights_of_a_saved_pipeline(train, tmp_path, caplog):
    source = train("--output_dir", str(tmp_path / "source"))
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

    (tmp_path / "empty").mkdir()
    for flags, message in (
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
def test_a_run_from_a_saved_pipeline_resumes_without_it_and_publishes_no_path(train, tmp_path, made_by, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Path("runs", "source")  # as an id of the Hub would look
    if made_by == "this script":
        train("--output_dir", str(source))
    else:
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, add_attention=False, **blocks)
        DDPMPipeline(unet, DDPMScheduler(beta_schedule="scaled_linear")).save_pretrained(source)
    begin = ["--pretrained_model_name_or_path", str(source), "--checkpointing_steps", "2"]
    whole = load_file(train(*begin, "--output_dir", str(tmp_path / "whole")) / WEIGHTS)
    output_dir = train(*begin)
    shutil.rmtree(output_dir / "checkpoint-3")
    shutil.rmtree(source)
    train(*begin, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(weight, whole[name]) for name, weight in load_file(output_dir / WEIGHTS).items())
    assert str(source) not in (output_dir / "unet" / "config.json").read_text()
    card = (output_dir / "README.md").read_text()
    assert str(source) not in card and "from the weights of a model that is not on the Hub" in card


def test_real_fashion_mnist(train, fashion_mnist):
    output_dir = train("--dataset_name", fashion_mnist, "--resolution", "16", "--num_epochs", "1")
    assert DiffusionPipeline.from_pretrained(str(output_dir))(num_inference_steps=2).images[0].size == (16, 16)


def arguments_of(output_dir: Path) -> dict:
    return json.loads((output_dir / "run.json").read_text())["arguments"]


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
    arguments = arguments_of(output_dir)
    assert arguments["max_train_steps"] == 5  # 2 x 18 images in batches of 8
    squares = Dataset.from_dict({"picture": [Image.fromarray(image[:, 2:14]) for image in pixels[:18]]})
    squares.save_to_disk(tmp_path / "squares")
    images = load_images(str(tmp_path / "squares"), resolution=8, channels=3, image_column="picture")
    assert arguments["data"] == f"{ImageArrays(images, (3, 8, 8)).fingerprint()}, order 2"

    output_dir = train("--dataset_name", str(tmp_path / "squares"), "--image_column", "picture", "--max_train_samples",
                       "12", "--output_dir", str(tmp_path / "grey"))  # fmt: skip
    images = load_images(str(tmp_path / "squares"), resolution=8, image_column="picture", max_samples=12)
    assert arguments_of(output_dir)["data"] == f"{ImageArrays(images, (1, 8, 8)).fingerprint()}, order 2"


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(train, tmp_path):
    with pytest.raises(SystemExit, match="At step .* the loss is .*(nan|inf).*--learning_rate"):
        train("--learning_rate", "1e30", "--max_train_steps", "20", "--lr_scheduler", "constant",
              "--logging_steps", "1", "--checkpointing_steps", "20")  # fmt: skip
    assert not (tmp_path / "run" / "model_index.json").exists() and not list_checkpoints(tmp_path / "run")


def test_the_folder_of_another_run_is_left_alone(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_index.json").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: choose another"):
        train()
    with pytest.raises(ValueError, match=r"holds files and no run\.json: .* may be something else"):
        train("--overwrite_output_dir")
    assert [p.read_text() for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_overwriting_leaves_no_checkpoint_of_the_run_before(train):
    (train("--checkpointing_steps", "1") / "damaged-checkpoint-7").mkdir()
    output_dir = train("--overwrite_output_dir", "--max_train_steps", "2", "--checkpointing_steps", "2")
    assert [path.name for path in output_dir.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert [row["step"] for row in metrics_of(output_dir)] == [2]


def test_resuming_a_finished_run_only_saves_again_and_leaves_figures_in_its_card(train):
    output_dir = train("--checkpointing_steps", "3")
    weights, metrics = (output_dir / WEIGHTS).read_bytes(), metrics_of(output_dir)
    figure = {"dataset_type": "owner/images", "dataset_name": "images", "metric_type": "fid", "metric_value": 2.5}
    card = add_figures((output_dir / "README.md").read_text(), [figure])
    (output_dir / "README.md").write_text(card)
    train("--checkpointing_steps", "3", "--resume_from_checkpoint", "latest")
    assert (output_dir / WEIGHTS).read_bytes() == weights and metrics_of(output_dir) == metrics
    assert (output_dir / "README.md").read_text() == card and "2.5" in card
    train("--checkpointing_steps", "3", "--resume_from_checkpoint", "latest", "--hub_license", "mit")
    published = ModelCard.load(output_dir / "README.md")
    assert published.data.license == "mit" and published.text == ModelCard(card).text


def test_a_run_that_resumed_and_ended_is_not_resumed_once_more(train):
    output_dir = train("--checkpointing_steps", "2")
    shutil.rmtree(output_dir / "checkpoint-3")  # as if stopped by a signal after step 2
    for _ in range(2):
        train("--resume_from_checkpoint", "latest")
        card, metrics = (output_dir / "README.md").stat(), (output_dir / "metrics.jsonl").read_bytes()
        assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2", "checkpoint-3"]
    train("--resume_from_checkpoint", "latest")
    assert (output_dir / "README.md").stat() == card and (output_dir / "metrics.jsonl").read_bytes() == metrics


def test_resuming_where_there_is_no_checkpoint_leaves_the_folder_alone(train):
    output_dir = train()
    before = (output_dir / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="is not empty"):
        train("--resume_from_checkpoint", "latest", "--seed", "1")
    assert (output_dir / WEIGHTS).read_bytes() == before


def as_if_killed_before_its_first_checkpoint(output_dir: Path) -> None:
    (output_dir / "model_index.json").unlink()
    (output_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')


def test_a_run_killed_before_its_first_checkpoint_starts_again_by_the_same_command(train):
    output_dir = train("--resume_from_checkpoint", "latest")
    weights, metrics = (output_dir / WEIGHTS).read_bytes(), (output_dir / "metrics.jsonl").read_bytes()
    as_if_killed_before_its_first_checkpoint(output_dir)
    train("--resume_from_checkpoint", "latest")
    assert (output_dir / WEIGHTS).read_bytes() == weights
    assert (output_dir / "metrics.jsonl").read_bytes() == metrics


def test_nor_from_other_weights_than_it_began_with(train, tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "pretrained")
    pretrained = ["--pretrained_model_name_or_path", str(tmp_path / "pretrained"), "--ddpm_beta_schedule", "linear"]
    output_dir = train(*pretrained)
    as_if_killed_before_its_first_checkpoint(output_dir)
    with pytest.raises(ValueError, match=r"another run \(pretrained_model_name_or_path: '.*' there, None here\)"):
        train("--resume_from_checkpoint", "latest", "--ddpm_beta_schedule", "linear")
    train(*pretrained, "--resume_from_checkpoint", "latest")
    checkpoint = train("--output_dir", str(tmp_path / "first"), "--checkpointing_steps", "1") / "checkpoint-1"
    output_dir = train("--overwrite_output_dir", "--resume_from_checkpoint", str(checkpoint))
    as_if_killed_before_its_first_checkpoint(output_dir)
    with pytest.raises(ValueError, match="it began at .*checkpoint-1 and has no checkpoint yet"):
        train("--resume_from_checkpoint", "latest")


def test_latest_does_not_take_over_the_folder_of_another_run(train):
    output_dir = train()
    as_if_killed_before_its_first_checkpoint(output_dir)
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds another run \(seed: 0 there, 1 here\)"):
        train("--resume_from_checkpoint", "latest", "--seed", "1")
    (output_dir / "run.json").unlink()  # and not a folder that is no run's
    with pytest.raises(ValueError, match="is not empty, and has no checkpoint to go on from: choose another"):
        train("--resume_from_checkpoint", "latest")
    del before[output_dir / "run.json"]
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before


def test_nor_of_a_run_of_another_network(train):
    as_if_killed_before_its_first_checkpoint(train())
    other = json.dumps(json.loads(UNET) | {"up_layers_per_block": 1})
    with pytest.raises(ValueError, match=r"holds another run \(up_layers_per_block: 2 there, 1 here\)"):
        train("--resume_from_checkpoint", "latest", "--unet_config", other)


DROPOUT = json.dumps({"_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
                      "block_out_channels": [8, 8], "norm_num_groups": 4, "down_block_types": ["DownBlock2D"] * 2,
                      "up_block_types": ["UpBlock2D"] * 2, "add_attention": False, "dropout": 0.5})  # fmt: skip


@pytest.mark.parametrize("unet", [UNET, DROPOUT], ids=["ours", "with dropout"])
def test_what_comes_after_a_checkpoint_comes_again_exactly(train, unet):
    flags = ["--unet_config", unet, "--max_train_steps", "6", "--checkpointing_steps", "2", "--validation_steps", "4",
             "--learning_rate", "3e-3", "--random_flip", "--logging_steps", "3"]  # fmt: skip
    output_dir = train(*flags)
    names = [WEIGHTS, "metrics.jsonl", "samples/step-0000004.png", "samples/step-0000006.png"]
    before = [(output_dir / name).read_bytes() for name in names]
    shutil.rmtree(output_dir / "checkpoint-6")
    (output_dir / "samples" / "step-0000004.png").unlink()  # as if killed between the checkpoint and the grid
    train(*flags, "--resume_from_checkpoint", "latest")
    assert [(output_dir / name).read_bytes() for name in names] == before


def test_an_older_checkpoint_of_the_same_folder_is_not_gone_back_to(train):
    output_dir = train("--checkpointing_steps", "1")
    before = sorted(path.name for path in output_dir.rglob("*"))
    with pytest.raises(ValueError, match="checkpoint-1 is not the last checkpoint of"):
        train("--checkpointing_steps", "1", "--resume_from_checkpoint", str(output_dir / "checkpoint-1"))
    assert sorted(path.name for path in output_dir.rglob("*")) == before


def test_a_damaged_checkpoint_is_kept_under_another_name(train):
    output_dir = train("--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    (output_dir / "checkpoint-3" / "manifest.json").unlink()
    train("--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest")
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2", "checkpoint-3"]
    assert (output_dir / "damaged-checkpoint-3" / WEIGHTS).is_file()


def test_the_card_names_the_data_set_of_the_hub_that_a_local_one_is_a_copy_of(train):
    card = ModelCard((train("--dataset_id", "owner/garments") / "README.md").read_text())
    assert card.data.datasets == ["owner/garments"]
    assert "Trained on [owner/garments](https://huggingface.co/datasets/owner/garments)." in card.text


def test_what_is_overwritten_does_not_pass_for_the_new_run(train):
    output_dir = train("--validation_steps", "1")
    with pytest.raises(SystemExit):
        train(
            "--overwrite_output_dir",
            "--learning_rate",
            "1e30",
            "--max_train_steps",
            "20",
            "--lr_scheduler",
            "constant",
        )
    assert {path.name for path in output_dir.iterdir() if path.is_file()} == {
        ".lock", "run.json", "metrics.jsonl", "speed.jsonl", "pipeline_pixel_diffusion.py"
    }  # fmt: skip
    assert not [path for path in output_dir.iterdir() if path.is_dir()]


def test_a_flag_that_is_unknown_is_named_without_its_value():
    with pytest.raises(ValueError, match="^--hub_tokn, --rate is no flag of this script") as error:
        parse("--hub_tokn", "hf_secret", "--rate=hf_secret", "--resolution", "8")
    assert "hf_secret" not in str(error.value)


def test_a_half_written_line_of_metrics_does_not_stop_a_resume(train):
    output_dir = train("--checkpointing_steps", "2", "--max_train_steps", "2")
    with open(output_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    train("--checkpointing_steps", "2", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert [row["step"] for row in metrics_of(output_dir)] == [2, 4]


def test_a_longer_run_goes_on_at_its_own_rate_without_the_card_of_the_shorter(train, tiny_pipe):
    output_dir = train("--checkpointing_steps", "1", "--max_train_steps", "2")  # whose rate has come to 0
    half = output_dir / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shorter = (output_dir / WEIGHTS).read_bytes()
    half.write_bytes(shorter)  # as `save_pretrained(variant="fp16")` adds one
    longer = ["--checkpointing_steps", "1", "--max_train_steps", "4", "--resume_from_checkpoint", "latest"]
    output_dir = train(*longer)
    assert not half.exists() and (output_dir / WEIGHTS).is_file()  # it was of the shorter run
    second, third = (load_file(output_dir / f"checkpoint-{step}" / WEIGHTS) for step in (2, 3))
    assert not any(torch.equal(second[name], third[name]) for name in second if name.endswith("weight"))
    assert "| max_train_steps | 4 |" in (output_dir / "README.md").read_text()
    (output_dir / WEIGHTS).write_bytes(shorter)  # as if killed after its last checkpoint
    (output_dir / "README.md").write_text("of the shorter")
    train(*longer)
    assert "| max_train_steps | 4 |" in (output_dir / "README.md").read_text()
    record = {"arguments": {"max_train_steps": 6}, "unet": {}}
    script.open_run(output_dir, True, 4, record, ())
    assert (output_dir / "README.md").exists()  # until there are other weights
    script.save_pipeline(tiny_pipe, output_dir)
    assert not (output_dir / "README.md").exists() and (output_dir / "model_index.json").exists()


def test_a_network_may_be_a_mapping_of_a_file(tmp_path):
    settings = {"dataset_name": "synthetic-fashion", "max_train_samples": 32, "resolution": 8, "max_train_steps": 1,
                "mixed_precision": False, "unet_config": json.loads(UNET), "eval_batch_size": 1,
                "ddpm_num_inference_steps": 1, "output_dir": str(tmp_path / "run")}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(settings))  # False is what YAML takes `no` for
    reset_accelerate()
    script.main(parse(str(tmp_path / "run.json")))
    assert (tmp_path / "run" / WEIGHTS).is_file() and any((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))


def test_a_checkpoint_may_be_given_by_its_name_in_the_folder(train):
    flags = ("--checkpointing_steps", "2", "--max_train_steps", "2")
    weights = (train(*flags) / WEIGHTS).read_bytes()
    assert (train(*flags, "--resume_from_checkpoint", "checkpoint-2") / WEIGHTS).read_bytes() == weights


def test_a_checkpoint_under_another_name_is_no_last_one(train, tmp_path):
    output_dir = train("--checkpointing_steps", "3")
    (output_dir / "checkpoint-3").rename(output_dir / "best")
    with pytest.raises(ValueError, match="best is not the last checkpoint of"):
        train("--resume_from_checkpoint", "best")


def test_a_config_for_another_size_is_told(train, tmp_path, caplog):
    output_dir = train("--unet_config", str(ROOT / "train_scripts" / "configs" / "guide.json"), "--resolution", "12")
    caplog.clear()
    train("--unet_config", str(output_dir / "unet" / "config.json"), "--output_dir", str(tmp_path / "smaller"))
    assert "was for images of `sample_size` 12; this one is for `--resolution` 8." in caplog.text


def test_a_schedule_that_does_not_reach_noise_is_told(train, caplog):
    train("--ddpm_num_steps", "1000")
    assert "of the image is left" not in caplog.text
    train("--ddpm_num_steps", "100", "--overwrite_output_dir")  # the square root of the last alpha_bar is 0.697
    assert "After 100 timesteps of `--ddpm_beta_schedule` scaled_linear, 70% of the image is left" in caplog.text


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(train):
    train("--checkpointing_steps", "3")
    with pytest.raises(ValueError, match="is at step 3, beyond the 2 steps of this run"):
        train("--resume_from_checkpoint", "latest", "--max_train_steps", "2")


CHANGED = {
    "data": ["--dataset_name", "DRAWN"],
    "global_batch_size": ["--train_batch_size", "8"],
    "mixed_precision": ["--mixed_precision", "bf16"],
    "resolution": ["--resolution", "16"],
    "random_flip": ["--random_flip"],
    "prediction_type": ["--prediction_type", "sample"],
    "ddpm_num_steps": ["--ddpm_num_steps", "500"],
    "ddpm_beta_schedule": ["--ddpm_beta_schedule", "linear"],
    "snr_gamma": ["--snr_gamma", "5"],
    "seed": ["--seed", "1"],
    "optimizer": ["--optimizer", "muon"],
    "learning_rate": ["--learning_rate", "1e-3"],
    "lr_scheduler": ["--lr_scheduler", "constant"],
    "adam_beta1": ["--adam_beta1", "0.8"],
    "adam_beta2": ["--adam_beta2", "0.99"],
    "adam_weight_decay": ["--adam_weight_decay", "0"],
    "adam_epsilon": ["--adam_epsilon", "1e-6"],
    "max_grad_norm": ["--max_grad_norm", "2"],
    "use_ema": ["--no_use_ema"],
    "ema_max_decay": ["--ema_max_decay", "0.99"],
}


def test_a_run_with_anything_that_defines_it_changed_is_not_a_resumed_one(train, tmp_path):
    assert set(CHANGED) == set(DEFINES_THE_RUN)
    train("--checkpointing_steps", "3")
    garments = draw_garments(range(1000, 1064), resolution=8)[0][:, 0]  # as many, of the same size
    drawn = Dataset.from_dict({"image": [Image.fromarray(image) for image in garments]})
    drawn.save_to_disk(tmp_path / "drawn")
    for name, flags in CHANGED.items():
        flags = [str(tmp_path / "drawn") if flag == "DRAWN" else flag for flag in flags]
        with pytest.raises(ValueError, match=rf"another run \(.*\b{name}: .* there, .* here"):
            train("--resume_from_checkpoint", "latest", *flags)


@pytest.mark.parametrize("flags, message", [
    (["--resolution", "0"], "`--resolution` is 0; it must be a whole number of at least 1"),
    (["--resolution", "9"], "`sample_size` is 9; it must be divisible by 2"),
    (["--learning_rate", "nan"], "`--learning_rate` is nan; it must be a positive number"),
    (["--prediction_type", "noise"], "`--prediction_type` is 'noise'; it must be one of epsilon, v_prediction"),
    (["--mixed_precision", "fp8"], "`--mixed_precision` is 'fp8'"),
    (["--train_batch_size", "0"], "`--train_batch_size` is 0; it must be a whole number of at least 1"),
    (["--unet_config", '{"widths": [8]}'], r"`--unet_config` holds \['widths'\], which are no arguments"),
    (["--unet_config", '{"_class_name": "Transformer2DModel"}'], "must be one of OptimizedUNet2DModel, UNet2DModel"),
    (["--unet_config", "missing.json"], "`--unet_config` is 'missing.json', which is no file"),
    (["--dataset_name", "no/such/folder"], "cannot be read.*synthetic-fashion"),
    (["--dataset_id", "owner/a/b"], "`--dataset_id` is 'owner/a/b'; it must be owner/name on the Hub"),
    (["--resume_from_checkpoint", "nowhere"], "is no complete checkpoint: it has no manifest.json"),
    (["--unet_config", '{"in_channels": 3}'], "are 3 and 1; both must be 1"),
    (["--unet_config", "{3}"], "is no JSON"),
    (["--lr_scheduler", "piecewise_constant"], "`--lr_scheduler` is 'piecewise_constant'; it must be one of cosine"),
    (["--lr_scheduler", "constant", "--lr_warmup_steps", "1"], "`--lr_warmup_steps` is 1; it must be 0 with"),
    (["--lr_scheduler", "polynomial", "--lr_warmup_steps", "3"],
     r"`--lr_warmup_steps` is 3; it must be in \[0, 2\] for a run of 3 steps"),
    (["--lr_warmup_steps", "9"], r"`--lr_warmup_steps` is 9; it must be in \[0, 3\]"),
    (["--adam_beta2", "1"], r"`--adam_beta2` is 1.0; it must be in \[0, 1\)"),
    (["--adam_weight_decay", "-0.1"], "`--adam_weight_decay` is -0.1; it must be a number of at least 0"),
    (["--gradient_checkpointing", "--unet_config", '{"norm_type": "batch"}'], "would be updated twice a step"),
    (["--ddpm_num_inference_steps", "2000"], "`--ddpm_num_inference_steps` is 2000; it must not exceed"),
    (["--seed", "-1"], "`--seed` is -1"),
    (["--num_epochs=5"], "`--num_epochs` is 5 and `--max_train_steps` 3: give one alone"),
    (["--train_data_dir", ".", "--output_dir", "run"], "`--output_dir` run lies in ., where the images are"),
    (["--dataloader_num_workers", "-1"], "`--dataloader_num_workers` is -1; it must be a whole number of at least 0"),
    (["--unet_config", str(SCRIPT.parent / "configs" / "stock.json"), "--resolution", "10"],
     "cannot take images of `--resolution` 10"),
    (["--unet_config", '{"_class_name": "UNet2DModel", "block_out_channels": [8, 12, 16, 16], "norm_num_groups": 8}'],
     r"`--unet_config` describes no UNet2DModel \(num_channels"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_is_written(train, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        train(*flags)
    assert not (tmp_path / "run").exists()


def test_arguments_come_from_a_file_and_flags_win(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "resolution: 28\nlearning_rate: 1e-3\nuse_ema: false\nunet_config: {block_out_channels: [8, 8]}\n"
        "snr_gamma: null\n"
    )
    args = parse(str(tmp_path / "run.yaml"), "--learning_rate", "0.002")
    assert (args.resolution, args.learning_rate, args.use_ema, args.num_epochs) == (28, 0.002, False, 5)
    assert script.make_unet(args.unet_config, 28, 500).config.num_train_timesteps == 500
    (tmp_path / "length.yaml").write_text("max_train_steps: 600")
    args = parse(str(tmp_path / "length.yaml"), "--num_epochs", "2")
    assert (args.num_epochs, args.max_train_steps) == (2, None)  # one length replaces the other
    assert parse(str(tmp_path / "length.yaml"), "--num-epochs=2").max_train_steps is None
    assert parse(f"--unet_config={tmp_path / 'unet.json'}").unet_config == str(tmp_path / "unet.json")  # no such file
    (tmp_path / "run.json").write_text('{"unet_config": {"norm_eps": 1e-05}}')
    assert parse(str(tmp_path / "run.json")).unet_config == {"norm_eps": 1e-05}  # for YAML, a string
    saved = str(Path(__file__).parent / "checkpoint_v0.1" / "unet" / "config.json")
    assert script.make_unet(saved, 8, 1000).config.mid_block_layers == 2  # as when it is loaded
    (tmp_path / "list.yaml").write_text("epochs: [2, 0.5]\nsections: [operators]")
    assert parse_arguments(run.BenchmarkArguments, [str(tmp_path / "list.yaml")], "?").epochs == [2, 0.5]
    for wrong, message in (
        ("epochs: ['2']", r"must be of type list\[float\]"),
        ("epochs: []", "and not empty"),
        ("sections: [1]", r"list\[str\]"),
    ):
        (tmp_path / "list.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            parse_arguments(run.BenchmarkArguments, [str(tmp_path / "list.yaml")], "?")
    for text, message in (
        ('{"resolutoin": 28}', "resolutoin"),
        ("[1]", "holds a list; it must hold arguments by name"),
        ("{seed: 1}", r"run\.json cannot be read \(Expecting property name"),
        ('{"train_batch_size": 16.0}', "`train_batch_size` in .*run.json is 16.0; it must be of type int"),
        ('{"learning_rate": null}', "`learning_rate` in .* is None; it must be of type float"),
        ('{"use_ema": 1}', "`use_ema` in .* is 1; it must be of type bool"),
        ('{"seed": true}', "`seed` in .* is True; it must be of type int"),
        ('{"snr_gamma": [5]}', r"`snr_gamma` in .* is \[5\]; it must be of type float"),
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(str(tmp_path / "run.json"))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"There is no file .*run\.json"):
        parse(str(tmp_path / "run.json"))
