"""Tiny real components, one thread a process, and caches and a Hub that leave the user's alone."""

# ruff: noqa: E402 (the environment is set before the imports)
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = str(ROOT)  # for the subprocesses
os.environ["OMP_NUM_THREADS"] = "1"  # before torch, here and in the subprocesses
for name in list(os.environ):  # a token, a mirror, a cache, a proxy, settings of accelerate
    if name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "ACCELERATE_")) or name.lower().endswith("_proxy"):
        del os.environ[name]
os.environ["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU, but for what says otherwise

import json
import subprocess
import sys

import datasets
import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import ResNetConfig, ResNetModel

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline
from ddpm_diffusers.sampling import to_pil
from ddpm_diffusers.synthetic_fashion import draw_garments

diffusers.logging.disable_progress_bar()
torch.set_num_threads(1)

FASHION_MNIST = Path(os.environ.get("FASHION_MNIST", Path(__file__).parents[2] / "shared" / "fashion_mnist"))
TINY = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "block_norm_num_groups": 4,
        "down_layers_per_block": 1, "up_layers_per_block": 2, "mid_block_layers": 2}  # fmt: skip
UNET = json.dumps({name: value for name, value in TINY.items() if name != "sample_size"})  # for `--unet_config`

SCRIPT = ROOT / "train_scripts" / "train_unconditional.py"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SMALL_RUN = ["--dataset_name", "synthetic-fashion", "--max_train_samples", "64", "--resolution", "8",
             "--train_batch_size", "16", "--unet_config", UNET, "--eval_batch_size", "2",
             "--ddpm_num_inference_steps", "2", "--logger", "none"]  # fmt: skip
ONE_ON_CPU = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def run_training(
    output_dir: Path, *flags: str, launcher: list[str] = ONE_ON_CPU, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """The training script in processes of its own; flags come after those of `SMALL_RUN`, and so override them."""
    command = [*launcher, SCRIPT, *SMALL_RUN, "--output_dir", output_dir, *flags]
    env = {**os.environ, **environment}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300, cwd=cwd)


def assert_says(error: pytest.ExceptionInfo, words: list[str]) -> None:
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.fixture(autouse=True, scope="session")
def private_caches(tmp_path_factory):
    """`HF_HOME` of the subprocesses; in this process datasets has read its own already."""
    home = tmp_path_factory.mktemp("hf_home")
    os.environ["HF_HOME"] = str(home)
    datasets.config.HF_DATASETS_CACHE = home / "datasets"


@pytest.fixture(scope="session")
def garments(tmp_path_factory) -> str:
    """A data set of drawn garments with a train and a test split, on the disk."""
    splits = {}
    for split, numbers in (("train", range(300)), ("test", range(300, 500))):
        images = to_pil(torch.from_numpy(draw_garments(numbers, resolution=16, channels=1)[0]))
        splits[split] = datasets.Dataset.from_dict({"image": images})
    folder = tmp_path_factory.mktemp("data") / "garments"
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def reset_accelerate() -> None:
    """Let a script that runs in this process start as in a fresh one."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def fashion_mnist() -> str:
    """The real data set's folder; the tests that need it are skipped where it is not."""
    if "FASHION_MNIST" in os.environ:
        assert FASHION_MNIST.is_dir(), f"FASHION_MNIST is {FASHION_MNIST}, which is no folder"
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"real Fashion-MNIST is not at {FASHION_MNIST} (set FASHION_MNIST to its folder)")
    return str(FASHION_MNIST)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights with nothing left at zero, so that every path of the network shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def tiny_unet() -> OptimizedUNet2DModel:
    torch.manual_seed(0)
    return randomize(OptimizedUNet2DModel(**TINY))


@pytest.fixture
def tiny_pipe(tiny_unet) -> PixelDiffusionPipeline:
    pipe = PixelDiffusionPipeline(tiny_unet, diffusers.DDPMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def extractor_folder(tmp_path_factory) -> Path:
    """A feature extractor for grey images that knows nothing."""
    folder = tmp_path_factory.mktemp("extractor")
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], image_size=8)
    ResNetModel(config).save_pretrained(folder)
    return folder
