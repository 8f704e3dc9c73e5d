"""A training whose steps are CUDA graphs against one that launches its kernels one by one, and when it is which."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, TorchDynamoPlugin
from cuda_graph import GraphedStep, can_capture
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train_unconditional.py"
UNET = {"block_out_channels": [8, 16], "norm_num_groups": 4, "block_norm_num_groups": 4}
STOCK = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16],
    "norm_num_groups": 4, "layers_per_block": 1, "add_attention": False, "dropout": 0.2,
    "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
}  # fmt: skip
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def train(output_dir: Path, *flags: str) -> str:
    command = [sys.executable, SCRIPT, "--dataset_name", "synthetic-fashion", "--max_train_samples", "64",
               "--resolution", "8", "--train_batch_size", "16", "--unet_config", json.dumps(UNET), "--max_train_steps",
               "12", "--logging_steps", "1", "--eval_batch_size", "2", "--ddpm_num_inference_steps", "2", "--logger",
               "none", "--output_dir", output_dir, *flags]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stderr


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}  # no counts of batches


def metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def distance(result: dict, reference: dict) -> float:
    """Of all weights, relative to their size."""
    squares = [
        (((result[name] - weight).double() ** 2).sum(), (weight.double() ** 2).sum())
        for name, weight in reference.items()
    ]
    difference, size = torch.tensor(squares).sum(0)
    return float(difference / size) ** 0.5


@on_a_gpu
@pytest.mark.parametrize("flags", [pytest.param((), id="plain"), *(
    pytest.param(flags, id=name, marks=pytest.mark.slow) for name, flags in {
        "objective": ("--random_flip", "--snr_gamma", "5", "--prediction_type", "v_prediction"),
        "pinned, samples between": ("--dataloader_num_workers", "2", "--validation_steps", "5"),
        "bf16": ("--mixed_precision", "bf16"),
        "BatchNorm": ("--unet_config", json.dumps({**UNET, "norm_type": "batch"})),
        "dropout": ("--unet_config", json.dumps(STOCK)), "Muon": ("--optimizer", "muon"),
    }.items())])  # fmt: skip
def test_the_training_is_the_same(tmp_path, flags):
    assert "each a CUDA graph" in train(tmp_path / "graphed", *flags)
    assert "each a CUDA graph" not in train(tmp_path / "plain", *flags, "--no_cuda_graph")
    graphed, plain = metrics(tmp_path / "graphed"), metrics(tmp_path / "plain")
    assert len(graphed) == len(plain) == 12
    for ours, reference in zip(graphed, plain, strict=True):  # loss, gradient norm, learning rate, at each step
        assert ours == pytest.approx(reference, rel=2e-2 if "bf16" in flags else 1e-3)
    assert distance(weights(tmp_path / "graphed"), weights(tmp_path / "plain")) < (2e-2 if "bf16" in flags else 1e-3)


@on_a_gpu
def test_it_resumes(tmp_path):
    flags = ("--checkpointing_steps", "6", "--resume_from_checkpoint", "latest")
    train(tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    assert "at step 6" in train(tmp_path / "resumed", *flags)
    assert distance(weights(tmp_path / "resumed"), weights(tmp_path / "whole")) < 1e-3


@on_a_gpu
@pytest.mark.slow
def test_a_compiled_step_is_captured(tmp_path):
    assert "each a CUDA graph" in train(tmp_path / "compiled", "--compile")
    train(tmp_path / "plain", "--no_cuda_graph")
    assert distance(weights(tmp_path / "compiled"), weights(tmp_path / "plain")) < 1e-2


@on_a_gpu
@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ("--gradient_accumulation_steps", "2"), ("--gradient_checkpointing",), ("--mixed_precision", "fp16"),
], ids=["accumulation", "checkpointing", "fp16"])  # fmt: skip
def test_what_cannot_be_captured_is_launched_kernel_by_kernel(tmp_path, flags):
    assert "each a CUDA graph" not in train(tmp_path, *flags, "--max_train_steps", "5")


@on_a_gpu
def test_a_replay_takes_tensors_and_learning_rate_as_they_are_by_then():
    weight = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, eps=0.0, fused=True)

    def step(target):
        loss = (weight * target.to("cuda", non_blocking=True)).sum()
        loss.backward()
        optimizer.step()  # by lr times the gradient's sign
        optimizer.zero_grad()
        return loss.detach()

    graphed = GraphedStep(step, optimizer)
    expected = torch.zeros(3)
    for turn in range(8):
        target = torch.tensor([1.0, -1.0, 1.0 if turn % 2 else -1.0])
        rate = optimizer.param_groups[0]["lr"] = 1.0 / (1 + turn)
        loss = graphed(target.pin_memory() if turn % 2 else target)
        torch.testing.assert_close(loss.cpu(), (expected * target).sum())
        expected -= rate * target.sign()
        torch.testing.assert_close(weight.detach().cpu(), expected)
        group = optimizer.param_groups[0]
        assert isinstance(group["lr"], float) and not group["capturable"]
        assert (graphed.graph is None) == (turn < GraphedStep.CALLS_BEFORE_CAPTURE)


@pytest.mark.parametrize("change", [
    {}, {"device": torch.device("cpu")}, {"distributed_type": DistributedType.MULTI_GPU},
    {"gradient_accumulation_steps": 2}, {"scaler": torch.amp.GradScaler("cpu")},
    {"state": SimpleNamespace(dynamo_plugin=TorchDynamoPlugin(backend="inductor", mode="reduce-overhead"))},
    {"gradient_checkpointing": True},
], ids=lambda change: next(iter(change), "nothing"))  # fmt: skip
def test_only_whole_steps_on_one_gpu_are_captured(change):
    accelerator = {
        "device": torch.device("cuda"),
        "distributed_type": DistributedType.NO,
        "gradient_accumulation_steps": 1,
        "scaler": None,
        "state": SimpleNamespace(dynamo_plugin=TorchDynamoPlugin()),
        "gradient_checkpointing": False,
    } | change
    checkpointing = accelerator.pop("gradient_checkpointing")
    assert can_capture(SimpleNamespace(**accelerator), checkpointing) == (not change)
