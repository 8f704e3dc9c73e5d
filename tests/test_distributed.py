"""Several processes: the same training as one, and exact resumes, replicated or sharded."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, WEIGHTS, run_training, torchrun
from safetensors.torch import load_file
from small_runs import train_here

from ddpm_diffusers import OptimizedUNet2DModel

FLAGS = ["--max_train_samples", "330", "--train_batch_size", "64", "--learning_rate", "3e-3", "--logging_steps", "7"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]


def train(output_dir: Path, launcher: list[str], *flags: str, **env: str) -> subprocess.CompletedProcess:
    return run_training(output_dir, *FLAGS, *flags, launcher=launcher, **env)


def trained(*args: str, **env: str) -> Path:
    result = train(*args, **env)
    assert result.returncode == 0, result.stderr
    return args[0]


def trained_here(output_dir: Path, *flags: str) -> Path:
    """By the one process of this test."""
    train_here(*SMALL_RUN, "--output_dir", output_dir, *FLAGS, *flags)
    return output_dir


def relative_difference(first: Path, second: Path) -> float:
    """Of the largest kind: over each tensor by itself."""
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).norm().item() / first[name].norm().item() for name in first)


FORTY = ["--max_train_steps", "40", "--checkpointing_steps", "20"]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Forty steps of 64 images in one process, in float32, over 7 epochs."""
    return trained_here(tmp_path_factory.mktemp("one") / "run", *FORTY, "--train_batch_size", "64")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("two") / "run", torchrun(2), *FORTY, "--train_batch_size", "32")


def losses(output_dir: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[row[name] for name in row if name.startswith("loss")] for row in rows])  # (lines, 5)


def norms(output_dir: Path) -> torch.Tensor:
    return torch.tensor([json.loads(line)["grad_norm"] for line in (output_dir / "metrics.jsonl").open()])  # (lines,)


def assert_follows(one: Path, other: Path) -> None:
    assert relative_difference(one / WEIGHTS, other / WEIGHTS) < 1e-5
    assert relative_difference(one / "checkpoint-40" / WEIGHTS, other / "checkpoint-40" / WEIGHTS) < 1e-5
    torch.testing.assert_close(losses(one), losses(other), rtol=1e-5, atol=0)
    torch.testing.assert_close(norms(one), norms(other), rtol=1e-3, atol=0)


def test_two_processes_follow_one(one, two):
    assert_follows(one, two)


@pytest.mark.parametrize("processes, batch_size, accumulation", [
    (1, 16, 4),
    (2, 16, 2),
    (4, 16, 1),
])  # fmt: skip
@pytest.mark.slow
def test_any_split_of_the_global_batch_follows(one, processes, batch_size, accumulation, tmp_path):
    flags = ["--train_batch_size", str(batch_size), "--gradient_accumulation_steps", str(accumulation)]
    assert_follows(one, trained(tmp_path / "run", torchrun(processes), *FORTY, *flags))


def test_another_number_of_processes_goes_on(one, two, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(two / "checkpoint-20", tmp_path / "run" / "checkpoint-20")
    flags = [*FORTY, "--train_batch_size", "64", "--resume_from_checkpoint", "latest"]
    resumed = trained_here(tmp_path / "run", *flags)
    assert relative_difference(one / WEIGHTS, resumed / WEIGHTS) < 1e-5
    torch.testing.assert_close(losses(one)[2:], losses(resumed), rtol=1e-5, atol=0)  # the line that 20 falls into, too


@pytest.mark.slow
def test_an_error_ends_connected_processes(two, tmp_path):
    finished = shutil.copytree(two, tmp_path / "finished")
    begun = shutil.copytree(two, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoint-*", "model_index*"))
    for folder, changed, message in (
        (finished, ["--max_train_steps", "30"], "at step 40, beyond the 30 steps"),  # found by both
        (begun, ["--seed", "1"], "holds another run (seed"),  # by the main process, while the other waits for it
    ):
        flags = [*FORTY, "--train_batch_size", "32", "--resume_from_checkpoint", "latest", *changed]
        result = train(folder, torchrun(2), *flags)
        assert result.returncode and message in result.stderr


NO_GPU = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}  # accelerate is to look for one, and find none
UNCONNECTED = "2 processes were launched, but accelerate connects 1"


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher sets it
    with pytest.raises(ValueError, match=UNCONNECTED):
        trained_here(tmp_path / "run", *FORTY)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_of_torchrun_without_a_gpu_for_each_are_refused(tmp_path):
    result = train(tmp_path / "run", torchrun(2), *FORTY, **NO_GPU)
    assert result.returncode and UNCONNECTED in result.stderr
    assert not (tmp_path / "run").exists()


TWENTY = ["--max_train_steps", "20", "--checkpointing_steps", "8"]


def sharded(output_dir: Path, kind: str, *flags: str) -> Path:
    """On two CPU processes, by the config that stands in train_scripts/accelerate."""
    config = {"fsdp": "fsdp2.yaml", "deepspeed": "deepspeed_zero2.yaml"}[kind]
    launcher = [
        *ACCELERATE,
        str(ROOT / "train_scripts" / "accelerate" / config),
        str(ROOT / "tests" / "on_cpu.py"),
        kind,
    ]
    return trained(output_dir, launcher, *TWENTY, "--train_batch_size", "32", *flags, DS_ACCELERATOR="cpu", **NO_GPU)


def assert_resumes_exactly(uninterrupted: Path, resumed: Path, kind: str, *flags: str) -> None:
    resumed.mkdir()
    shutil.copytree(uninterrupted / "checkpoint-8", resumed / "checkpoint-8")
    shutil.copyfile(uninterrupted / "metrics.jsonl", resumed / "metrics.jsonl")
    sharded(resumed, kind, *flags, "--resume_from_checkpoint", "latest")
    averaged = f"unet_ema/{Path(WEIGHTS).name}"
    last = [f"checkpoint-20/{name}" for name in (WEIGHTS, averaged, "optimizer.safetensors")]
    for name in (WEIGHTS, "metrics.jsonl", *last):
        assert (uninterrupted / name).read_bytes() == (resumed / name).read_bytes(), name
    unet = OptimizedUNet2DModel.from_pretrained(uninterrupted / "checkpoint-20" / "unet_ema")
    for name, weight in load_file(uninterrupted / WEIGHTS).items():
        assert torch.equal(unet.state_dict()[name], weight)


@pytest.mark.slow
def test_sharded_training_follows_one_process_and_resumes_exactly(tmp_path):
    shards = sharded(tmp_path / "fsdp", "fsdp", "--mixed_precision", "no")
    whole = trained_here(tmp_path / "one", *TWENTY, "--train_batch_size", "64")
    for name in (f"checkpoint-20/{WEIGHTS}", "checkpoint-20/optimizer.safetensors", WEIGHTS):
        assert relative_difference(whole / name, shards / name) < 1e-5
    torch.testing.assert_close(norms(whole), norms(shards), rtol=1e-3, atol=0)
    assert_resumes_exactly(shards, tmp_path / "resumed", "fsdp", "--mixed_precision", "no")


@pytest.mark.slow
@pytest.mark.parametrize("kind, flags", [
    ("fsdp", ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "2"]),
    pytest.param("deepspeed", [], marks=[pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")]),
])  # fmt: skip
def test_other_sharded_trainings_resume_exactly(kind, flags, tmp_path):
    uninterrupted = sharded(tmp_path / "uninterrupted", kind, *flags)
    assert_resumes_exactly(uninterrupted, tmp_path / "resumed", kind, *flags)


@pytest.mark.slow
def test_sharding_that_could_not_be_saved_is_refused_before_the_training(tmp_path):
    config = (ROOT / "train_scripts" / "accelerate" / "fsdp2.yaml").read_text()
    config = config.replace("fsdp_version: 2", "fsdp_version: 1") + "  fsdp_sync_module_states: false\n"
    (tmp_path / "fsdp1.yaml").write_text(config)
    launcher = [*ACCELERATE, str(tmp_path / "fsdp1.yaml"), str(ROOT / "tests" / "on_cpu.py"), "fsdp"]
    done = train(tmp_path / "run", launcher, "--max_train_steps", "2")
    assert done.returncode and "The network could not be saved under FSDP 1, which the config asks for" in done.stderr
    assert not (tmp_path / "run").exists()
    launcher[-3] = str(ROOT / "train_scripts" / "accelerate" / "fsdp2.yaml")
    done = train(tmp_path / "run", launcher, "--max_train_steps", "2", "--optimizer", "muon")
    assert done.returncode and "`--optimizer muon` needs whole kernels" in done.stderr
    assert not (tmp_path / "run").exists()
