"""Tiny real components, one thread a process, and caches and a Hub that leave the user's alone."""

# ruff: noqa: E402 (the environment is set before the imports)
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, here and in the subprocesses
for name in list(os.environ):  # a token, a mirror, a cache
    if name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_")):
        del os.environ[name]

import json
from pathlib import Path

import datasets
import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline
from ddpm_diffusers.sampling import to_pil
from ddpm_diffusers.synthetic_fashion import draw_garments

diffusers.logging.disable_progress_bar()
torch.set_num_threads(1)

FASHION_MNIST = Path(os.environ.get("FASHION_MNIST", Path(__file__).parents[2] / "shared" / "fashion_mnist"))
TINY = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "block_norm_num_groups": 4,
        "down_layers_per_block": 1, "up_layers_per_block": 2, "mid_block_layers": 2}  # fmt: skip
UNET = json.dumps({name: value for name, value in TINY.items() if name != "sample_size"})  # for `--unet_config`


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
