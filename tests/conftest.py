"""Tiny real components, one thread a process, and caches that leave the user's alone."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, here and in the subprocesses
os.environ.pop("HF_HUB_OFFLINE", None)  # the tests have a Hub of their own
os.environ.pop("HF_ENDPOINT", None)

from pathlib import Path

import diffusers
import pytest
import torch

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline

diffusers.logging.disable_progress_bar()
torch.set_num_threads(1)

FASHION_MNIST = Path(os.environ.get("FASHION_MNIST", Path(__file__).parents[2] / "shared" / "fashion_mnist"))
TINY = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "block_norm_num_groups": 4,
        "down_layers_per_block": 1, "up_layers_per_block": 2}  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def private_caches(tmp_path_factory):
    """`HF_HOME` of the subprocesses; in this process datasets has read its own already."""
    import datasets

    home = tmp_path_factory.mktemp("hf_home")
    os.environ["HF_HOME"] = str(home)
    datasets.config.HF_DATASETS_CACHE = home / "datasets"


@pytest.fixture
def fashion_mnist() -> str:
    """The real data set's folder; the tests that need it are skipped elsewhere."""
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
