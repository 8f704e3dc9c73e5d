"""A run's folder: what resumes in it exactly, what is refused, and what is overwritten."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from arguments import DEFINES_THE_RUN
from conftest import UNET, WEIGHTS
from datasets import Dataset
from diffusers import DiffusionPipeline
from hub_server import files_of
from huggingface_hub import ModelCard
from PIL import Image
from run_folder import LogLines, choose_start, open_run, save_pipeline
from safetensors.torch import load_file
from small_runs import metrics_of, train_in

from ddpm_diffusers.checkpointing import list_checkpoints
from ddpm_diffusers.hub import add_figures
from ddpm_diffusers.synthetic_fashion import draw_garments

LATEST = ("--resume_from_checkpoint", "latest")


@pytest.fixture
def train(tmp_path):
    """Run the script here with tiny settings; returns its output folder."""
    return partial(train_in, tmp_path)


@pytest.fixture(scope="module")
def checkpointed_run(tmp_path_factory) -> Path:
    return train_in(tmp_path_factory.mktemp("checkpointed"), "--checkpointing_steps", "1")


@pytest.fixture
def checkpointed(checkpointed_run, tmp_path) -> Path:
    """Where `train` writes: a finished run of three steps, with a checkpoint of each."""
    return shutil.copytree(checkpointed_run, tmp_path / "run")


@pytest.fixture
def plain(checkpointed) -> Path:
    """The same without a checkpoint."""
    for path in list_checkpoints(checkpointed):
        shutil.rmtree(path)
    return checkpointed


# going on


DROPOUT = json.dumps({"_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
                      "block_out_channels": [8, 8], "norm_num_groups": 4, "down_block_types": ["DownBlock2D"] * 2,
                      "up_block_types": ["UpBlock2D"] * 2, "add_attention": False, "dropout": 0.5})  # fmt: skip


@pytest.mark.parametrize("unet", [UNET, DROPOUT], ids=["ours", "diffusers' with dropout"])
def test_what_comes_after_a_checkpoint_comes_again_exactly(train, unet):
    flags = ["--unet_config", unet, "--max_train_steps", "6", "--checkpointing_steps", "2", "--validation_steps", "4",
             "--learning_rate", "3e-3", "--random_flip", "--logging_steps", "3"]  # fmt: skip
    output_dir = train(*flags)
    names = [WEIGHTS, "metrics.jsonl", "samples/step-0000004.png", "samples/step-0000006.png"]
    before = [(output_dir / name).read_bytes() for name in names]
    shutil.rmtree(output_dir / "checkpoint-6")
    (output_dir / "samples" / "step-0000004.png").unlink()  # as if killed between the checkpoint and the grid
    train(*flags, *LATEST)
    assert [(output_dir / name).read_bytes() for name in names] == before
    trained = DiffusionPipeline.from_pretrained(str(output_dir)).unet
    assert type(trained).__name__ == json.loads(unet).get("_class_name", "OptimizedUNet2DModel")


def test_resuming_a_finished_run_only_saves_again_and_leaves_figures_in_its_card(train, checkpointed):
    weights, metrics = (checkpointed / WEIGHTS).read_bytes(), metrics_of(checkpointed)
    figure = {"dataset_type": "owner/images", "dataset_name": "images", "metric_type": "fid", "metric_value": 2.5}
    card = add_figures((checkpointed / "README.md").read_text(), [figure])
    (checkpointed / "README.md").write_text(card)
    train("--checkpointing_steps", "1", *LATEST)
    assert (checkpointed / WEIGHTS).read_bytes() == weights and metrics_of(checkpointed) == metrics
    assert (checkpointed / "README.md").read_text() == card and "2.5" in card
    train("--checkpointing_steps", "1", *LATEST, "--hub_license", "mit")
    published = ModelCard.load(checkpointed / "README.md")
    assert published.data.license == "mit" and published.text == ModelCard(card).text


def test_a_run_that_resumed_and_ended_is_not_resumed_once_more(train, checkpointed):
    shutil.rmtree(checkpointed / "checkpoint-3")  # as if stopped by a signal after step 2
    train(*LATEST)
    assert list_checkpoints(checkpointed)[-1].name == "checkpoint-3"
    card, metrics = (checkpointed / "README.md").stat(), (checkpointed / "metrics.jsonl").read_bytes()
    train(*LATEST)
    assert (checkpointed / "README.md").stat() == card and (checkpointed / "metrics.jsonl").read_bytes() == metrics


def test_a_damaged_checkpoint_is_kept_under_another_name(train, checkpointed):
    (checkpointed / "checkpoint-3" / "manifest.json").unlink()
    train("--checkpointing_steps", "1", "--checkpoints_total_limit", "2", *LATEST)
    assert [path.name for path in list_checkpoints(checkpointed)] == ["checkpoint-2", "checkpoint-3"]
    assert (checkpointed / "damaged-checkpoint-3" / WEIGHTS).is_file()


@pytest.mark.parametrize("last_step, kept", [(3, [2]), (4, [2, 4]), (math.inf, [2, 4])])
def test_metrics_past_the_checkpoint_and_half_written_ones_are_cut(tmp_path, last_step, kept):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6, "lo')
    LogLines(tmp_path / "metrics.jsonl", last_step).write({"step": 8})
    assert [row["step"] for row in metrics_of(tmp_path)] == [*kept, 8]


def test_a_longer_run_goes_on_at_its_own_rate_without_the_card_of_the_shorter(train, checkpointed, tiny_pipe):
    half = checkpointed / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shorter = (checkpointed / WEIGHTS).read_bytes()  # whose rate has come to 0
    half.write_bytes(shorter)  # as `save_pretrained(variant="fp16")` adds one
    longer = ["--checkpointing_steps", "1", "--max_train_steps", "5", *LATEST]
    (checkpointed / "README.md").write_text("with my own words")
    train(*longer)
    assert not half.exists() and (checkpointed / WEIGHTS).is_file()  # it was of the shorter run
    assert (checkpointed / "README.before.md").read_text() == "with my own words"
    third, fourth = (load_file(checkpointed / f"checkpoint-{step}" / WEIGHTS) for step in (3, 4))
    assert not any(torch.equal(third[name], fourth[name]) for name in third if name.endswith("weight"))
    assert "| max_train_steps | 5 |" in (checkpointed / "README.md").read_text()
    (checkpointed / WEIGHTS).write_bytes(shorter)  # as if killed after its last checkpoint
    (checkpointed / "README.md").write_text("of the shorter")
    train(*longer)
    assert "| max_train_steps | 5 |" in (checkpointed / "README.md").read_text()
    record = {"arguments": {"max_train_steps": 7}, "unet": {}}
    open_run(checkpointed, True, 5, record)
    assert (checkpointed / "README.md").exists()  # until there are other weights
    save_pipeline(tiny_pipe, checkpointed)
    assert not (checkpointed / "README.md").exists() and (checkpointed / "model_index.json").exists()


# starting again


def kill_before_its_first_checkpoint(output_dir: Path) -> None:
    (output_dir / "model_index.json").unlink()
    (output_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')


def test_a_run_killed_before_its_first_checkpoint_starts_again_by_the_same_command(train, plain):
    assert choose_start(plain / "new", "latest", overwrite=False) == (None, False)
    weights, metrics = (plain / WEIGHTS).read_bytes(), (plain / "metrics.jsonl").read_bytes()
    kill_before_its_first_checkpoint(plain)
    (plain / WEIGHTS).unlink()
    train(*LATEST)
    assert (plain / WEIGHTS).read_bytes() == weights and (plain / "metrics.jsonl").read_bytes() == metrics


def test_a_run_starts_again_from_no_other_weights_than_before(train, tiny_pipe, tmp_path, checkpointed_run, caplog):
    tiny_pipe.save_pretrained(tmp_path / "pretrained")
    pretrained = ["--pretrained_model_name_or_path", str(tmp_path / "pretrained"), "--ddpm_beta_schedule", "linear"]
    output_dir = train(*pretrained)
    kill_before_its_first_checkpoint(output_dir)
    with pytest.raises(ValueError, match=r"another run \(pretrained_model_name_or_path: '.*' there, None here\)"):
        train(*LATEST, "--ddpm_beta_schedule", "linear")
    train(*pretrained, *LATEST)
    first = str(checkpointed_run / "checkpoint-1")
    output_dir = train("--overwrite_output_dir", "--resume_from_checkpoint", first)
    assert f"Resumed from {first} at step 1." in caplog.text
    kill_before_its_first_checkpoint(output_dir)
    with pytest.raises(ValueError, match="it began at .*checkpoint-1 and has no checkpoint yet"):
        train(*LATEST)


def test_latest_does_not_take_over_the_folder_of_another_run(train, plain):
    before = files_of(plain)
    with pytest.raises(ValueError, match="is not empty"):  # it is finished
        train(*LATEST, "--seed", "1")
    assert files_of(plain) == before
    kill_before_its_first_checkpoint(plain)
    before = files_of(plain)
    with pytest.raises(ValueError, match=r"holds another run \(seed: 0 there, 1 here\)"):
        train(*LATEST, "--seed", "1")
    other = json.dumps(json.loads(UNET) | {"up_layers_per_block": 1})
    with pytest.raises(ValueError, match=r"holds another run \(up_layers_per_block: 2 there, 1 here\)"):
        train(*LATEST, "--unet_config", other)
    (plain / "run.json").unlink()  # and not a folder that is no run's
    with pytest.raises(ValueError, match=r"is not empty, and has no run\.json, so it may hold something other"):
        train(*LATEST)
    del before["run.json"]
    assert files_of(plain) == before


# refused


def test_in_its_folder_a_run_goes_on_from_its_last_checkpoint_alone(train, checkpointed):
    last = checkpointed / "checkpoint-3"
    for given in ("checkpoint-3", str(last)):  # its name in the folder, or its path
        assert choose_start(checkpointed, given, overwrite=False) == (last, True)
    last.rename(checkpointed / "best")
    before = files_of(checkpointed)
    for given in ("checkpoint-1", str(checkpointed / "checkpoint-1"), "best"):
        with pytest.raises(ValueError, match=f"{given} is not the last checkpoint of"):
            train("--resume_from_checkpoint", given)
    assert files_of(checkpointed) == before


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(train, checkpointed):
    with pytest.raises(ValueError, match="is at step 3, beyond the 2 steps of this run"):
        train(*LATEST, "--max_train_steps", "2")


CHANGED = {
    "data": ["--dataset_name", "DRAWN"], "global_batch_size": ["--train_batch_size", "8"],
    "mixed_precision": ["--mixed_precision", "bf16"], "resolution": ["--resolution", "16"],
    "random_flip": ["--random_flip"], "prediction_type": ["--prediction_type", "sample"],
    "ddpm_num_steps": ["--ddpm_num_steps", "500"], "ddpm_beta_schedule": ["--ddpm_beta_schedule", "linear"],
    "snr_gamma": ["--snr_gamma", "5"], "seed": ["--seed", "1"], "optimizer": ["--optimizer", "muon"],
    "learning_rate": ["--learning_rate", "1e-3"], "lr_scheduler": ["--lr_scheduler", "constant"],
    "adam_beta1": ["--adam_beta1", "0.8"], "adam_beta2": ["--adam_beta2", "0.99"],
    "adam_weight_decay": ["--adam_weight_decay", "0"], "adam_epsilon": ["--adam_epsilon", "1e-6"],
    "max_grad_norm": ["--max_grad_norm", "2"], "ema_max_decay": ["--ema_max_decay", "0.99"],
    "use_ema": ["--no_use_ema"],
}  # fmt: skip


def test_a_run_with_anything_that_defines_it_changed_is_not_a_resumed_one(train, checkpointed, tmp_path):
    assert set(CHANGED) == set(DEFINES_THE_RUN)
    garments = draw_garments(range(1000, 1064), resolution=16)[0][:, 0]  # as many
    drawn = Dataset.from_dict({"image": [Image.fromarray(image) for image in garments]})
    drawn.save_to_disk(tmp_path / "drawn")
    flags = [str(tmp_path / "drawn") if flag == "DRAWN" else flag for changed in CHANGED.values() for flag in changed]
    with pytest.raises(ValueError, match="is a checkpoint of another run") as refusal:
        train(*LATEST, *flags)
    for name in CHANGED:
        assert re.search(rf"\b{name}: [^;]* there, [^;]* here", str(refusal.value)), name


# overwritten


def test_the_folder_of_another_run_is_left_alone(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_index.json").write_text("mine")
    for flags in ((), ("--overwrite_output_dir",)):
        with pytest.raises(ValueError, match=r"is not empty, and has no run\.json, so .* or empty it"):
            train(*flags)
    assert [p.read_text() for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_loss_that_is_not_finite_stops_the_run_and_nothing_overwritten_passes_for_it(train, checkpointed):
    (checkpointed / "damaged-checkpoint-7").mkdir()
    with pytest.raises(SystemExit, match="At step 2 the loss is .*(nan|inf).*--learning_rate"):
        train("--overwrite_output_dir", "--learning_rate", "1e30", "--lr_scheduler", "constant",
              "--logging_steps", "1", "--checkpointing_steps", "2")  # fmt: skip
    assert {path.name for path in checkpointed.iterdir()} == {
        ".lock", "run.json", "metrics.jsonl", "speed.jsonl", "pipeline_pixel_diffusion.py"
    }  # fmt: skip
    for file in ("metrics.jsonl", "speed.jsonl"):
        assert [row["step"] for row in metrics_of(checkpointed, file)] == [1]


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(train, tmp_path):
    with pytest.raises(SystemExit, match="not finite after the last step: nothing was saved"):
        train("--max_train_steps", "1", "--learning_rate", "1e39", "--lr_scheduler", "constant")
    assert not {"model_index.json", "unet", "README.md"} & {path.name for path in (tmp_path / "run").iterdir()}
