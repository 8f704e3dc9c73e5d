"""The whole way: train, push over the wire, load in a fresh process, the same bits; and what goes wrong on it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import huggingface_hub
import pytest
from arguments import TrainingArguments
from command_line import parse_arguments
from conftest import ROOT, UNET
from datasets import Dataset, Features, Image
from hub_server import HubServer, files_of
from PIL import Image as PILImage
from small_runs import train_here

from ddpm_diffusers.checkpointing import list_checkpoints

DRAWN = ["--dataset_name", "synthetic-fashion", "--max_train_samples", "64"]
FLAGS = ["--resolution", "8", "--unet_config", UNET, "--max_train_steps", "6", "--checkpointing_steps", "3",
         "--logging_steps", "2", "--eval_batch_size", "4", "--ddpm_num_inference_steps", "2",
         "--logger", "tensorboard", "--resume_from_checkpoint", "latest"]  # fmt: skip
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SAMPLE = """
import hashlib, sys
import torch
from diffusers import DiffusionPipeline
if sys.argv[2] == "installed":
    import ddpm_diffusers
else:
    sys.modules["ddpm_diffusers"] = None
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "absent")
images = pipe(3, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
print(hashlib.sha256(images.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


def environment(hub, home: Path, token: bool = False) -> dict:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", **hub.env(home, token)}


def train(env: dict, *flags, launcher=()) -> subprocess.CompletedProcess:
    script = str(ROOT / "train_scripts" / "train_unconditional.py")
    command = [sys.executable, *launcher, script, *FLAGS, *map(str, flags)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


def train_and_push(env: dict, *flags, launcher=()) -> subprocess.CompletedProcess:
    return train(env, *DRAWN, "--push_to_hub", *flags, launcher=launcher)


def sample(source, mode: str, env: dict) -> str:
    command = [sys.executable, "-c", SAMPLE, str(source), mode]
    result = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_train_and_push_and_a_fresh_process_samples_the_same_bits(hub, tmp_path):
    output_dir = tmp_path / "run"
    flags = ["--output_dir", output_dir, "--train_batch_size", "16", "--hub_model_id", "user/garments",
             "--hub_private_repo", "--hub_license", "mit", "--hub_token", hub.token]  # fmt: skip
    env = environment(hub, tmp_path / "home")
    result = train_and_push(env, *flags, launcher=TWO)
    assert result.returncode == 0, result.stderr
    assert f"Pushed: {hub.endpoint}/user/garments" in result.stdout + result.stderr
    repo = hub.repos["user/garments"]
    assert repo.private and len(repo.commits) == 2  # of the creation, and of the push
    assert set(repo.files) == {
        ".gitattributes", "README.md", "model_index.json", "pipeline_pixel_diffusion.py", "samples.png",
        "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/unet_2d_optimized.py",
    }  # fmt: skip
    here = sample(output_dir, "installed", env)
    for mode in ("installed", "absent"):
        assert sample("user/garments", mode, environment(hub, tmp_path / mode, token=True)) == here
    card = repo.files["README.md"].decode()
    assert 'from_pretrained("user/garments")' in card and "| global_batch_size | 32 |" in card
    assert "synthetic-fashion" in card and "license: mit" in card and str(tmp_path) not in card

    # the same command again goes on from the last checkpoint, and there is nothing new to commit
    again = train_and_push(env, *flags, launcher=TWO)
    assert again.returncode == 0 and len(repo.commits) == 2, again.stderr

    # the token went out in the header that it belongs in, and nowhere else; and there is no pickle
    seen = [result.stdout.encode(), result.stderr.encode(), again.stdout.encode(), again.stderr.encode()]
    seen += [*files_of(output_dir).values(), *files_of(tmp_path / "home").values(), *repo.files.values()]
    seen += [json.dumps(request, default=repr).encode() for request in hub.received]
    for data in seen:
        assert hub.token.encode() not in data
        assert not re.match(rb"\x80[\x02-\x05]", data) and b"data.pkl" not in data  # pickles; torch's zip of one
    assert len(seen) > 40


@pytest.mark.parametrize("flags, message", [
    (["--hub_token", "hf_in two"], "The Hub token is empty or holds white space"),
    ([], "There is no token of the Hub"),
])  # fmt: skip
def test_a_push_without_a_token_is_refused_before_any_work(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))  # not the developer's own
    with pytest.raises((PermissionError, ValueError), match=message) as error:
        train_here(*DRAWN, *FLAGS, "--push_to_hub", "--output_dir", tmp_path / "run", *flags)
    assert "hf_in two" not in "".join(traceback.format_exception(error.value))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_push_that_fails_loses_nothing_and_its_own_command_tries_again(hub, tmp_path):
    output_dir, env = tmp_path / "run", environment(hub, tmp_path / "home", token=True)
    hub.fault = lambda method, path: 403 if "/commit/" in path else None  # the right was taken away meanwhile
    try:
        result = train_and_push(env, "--output_dir", output_dir, "--hub_model_id", "user/late")
    finally:
        hub.fault = None
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("The push to user/late failed: the Hub answered 403")
    assert f"{output_dir} is kept; to try again: " in last and hub.token not in result.stderr
    assert sample(output_dir, "installed", env) and [path.name for path in list_checkpoints(output_dir)]
    command = last.partition("to try again: ")[2].split()
    pushed = subprocess.run([sys.executable, *command[1:]], env=env, cwd=ROOT, capture_output=True, text=True)
    assert pushed.returncode == 0, pushed.stderr
    assert "unet/diffusion_pytorch_model.safetensors" in hub.repos["user/late"].files


# streaming


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """96 grey images in four shards."""
    folder = tmp_path_factory.mktemp("private-images")
    for shard in range(4):
        pixels = [hashlib.shake_256(bytes([shard, i])).digest(144) for i in range(24)]
        images = [PILImage.frombytes("L", (12, 12), data) for data in pixels]
        Dataset.from_dict({"image": images}, features=Features({"image": Image()})).to_parquet(
            folder / f"train-{shard}-of-4.parquet"
        )
    return folder


STREAM = ["--streaming", "--shuffle_buffer_size", "10", "--train_batch_size", "16", "--max_train_steps", "14",
          "--learning_rate", "3e-3", "--logger", "none"]  # fmt: skip


@pytest.mark.parametrize("processes, workers", [
    (1, 2),
    pytest.param(1, 0, marks=pytest.mark.slow),
    pytest.param(2, 0, marks=pytest.mark.slow),
], ids=["workers", "alone", "two"])  # fmt: skip
def test_streamed_training_resumes_exactly_and_its_card_names_no_folder(
    parquet, processes, workers, tmp_path, monkeypatch
):
    monkeypatch.chdir(parquet.parent)
    data = parquet.name if processes == 1 else parquet  # launched elsewhere

    def stream(output_dir: Path) -> Path:
        flags = [*STREAM, "--dataset_name", data, "--dataloader_num_workers", workers, "--output_dir", output_dir]
        if processes == 1:
            train_here(*FLAGS, *flags)
        else:
            result = train(dict(os.environ), *flags, launcher=TWO)
            assert result.returncode == 0, result.stderr
        return output_dir

    whole, resumed = stream(tmp_path / "whole"), tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-9", resumed / "checkpoint-9")  # in the middle of a pass and of a block
    shutil.copyfile(whole / "metrics.jsonl", resumed / "metrics.jsonl")
    stream(resumed)
    for name in ("metrics.jsonl", "unet/diffusion_pytorch_model.safetensors", "checkpoint-14/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    assert not any("epoch" in line for line in (whole / "metrics.jsonl").read_text().splitlines())
    assert parquet.name not in (whole / "README.md").read_text()


def test_streaming_asks_for_what_it_needs():
    for flags, message in (
        (["--streaming"], "`--streaming` needs `--max_train_steps`"),
        ([*STREAM, "--max_train_steps", "2", "--dataset_name", "synthetic-fashion"], "synthetic-fashion is drawn"),
        ([*STREAM, "--max_train_steps", "2", "--max_train_samples", "9"], "`--streaming` reads the whole data set"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arguments(TrainingArguments, flags, "?")
