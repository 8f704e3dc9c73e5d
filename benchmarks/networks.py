"""The networks that are compared, and their training step."""

import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from counts import count
from diffusers.training_utils import EMAModel
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train_scripts"))
from cuda_graph import GraphedStep  # noqa: E402
from unets import make_unet  # noqa: E402

CONFIGS = ROOT / "train_scripts" / "configs"
PEER = "denoising-diffusion-pytorch"
NETWORKS = ("default", "guide", "baseline", "stock", PEER)


class Peer(nn.Module):
    """lucidrains' Unet at the widths (64, 64, 128), with its own two blocks and its attention at each level."""

    def __init__(self):
        super().__init__()
        self.unet = peer_class()(dim=64, dim_mults=(1, 1, 2), channels=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (self.unet(sample, timestep),)


def peer_class() -> type[nn.Module]:
    """The package's `Unet`, whose file also imports what only its trainer uses: torchvision, pytorch-fid, ema-pytorch.

    Empty modules stand in for those that are not installed during the import.
    """
    needed = {
        "torchvision": ("transforms", "utils"),
        "pytorch_fid": (),
        "pytorch_fid.fid_score": ("calculate_frechet_distance",),
        "pytorch_fid.inception": ("InceptionV3",),
        "ema_pytorch": ("EMA",),
    }
    absent = {name: names for name, names in needed.items() if find_spec(name.partition(".")[0]) is None}
    for name, names in absent.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(names))
    try:
        from denoising_diffusion_pytorch import Unet
    finally:
        for name in absent:
            del sys.modules[name]
    return Unet


def make_network(name: str, resolution: int) -> nn.Module:
    """The default, the peer or one of train_scripts/configs, for grey images, always with the same initial weights."""
    torch.manual_seed(0)
    if name == PEER:
        return Peer()
    config = {} if name == "default" else str(CONFIGS / f"{name}.json")
    return make_unet(config, resolution, num_train_timesteps=1000)


def installed(names: tuple[str, ...]) -> list[str]:
    """The names that can be measured here: only benchmarks/requirements.txt asks for the peer's package."""
    return [name for name in names if name != PEER or find_spec("denoising_diffusion_pytorch")]


def sizes(names: list[str], resolutions: list[int]) -> dict[str, dict]:
    """Parameters of the networks, and operations of their training step for an image, by resolution."""
    cpu = torch.device("cpu")
    made = {name: {size: make_network(name, size) for size in resolutions} for name in names}
    return {
        name: {
            "parameters": sum(parameter.numel() for parameter in next(iter(of_size.values())).parameters()),
            "operations_per_image": {
                size: count(make_training_step(network, 1, size, "no", cpu))["operations"]
                for size, network in of_size.items()
            },
        }
        for name, of_size in made.items()
    }


def make_training_step(
    network: nn.Module,
    batch_size: int,
    resolution: int,
    precision: str,
    device: torch.device,
    cuda_graph: bool = False,
) -> Callable[[], None]:
    """Forward, backward, AdamW and EMA on one batch on the device: the least that any training loop does.

    With `cuda_graph`, all but the EMA is launched as one, as in the training script on a GPU.
    """
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ema = EMAModel(network.parameters(), foreach=True)
    generator = torch.Generator(device).manual_seed(0)
    noisy = torch.randn(batch_size, 1, resolution, resolution, generator=generator, device=device)
    noise = torch.randn(noisy.shape, generator=generator, device=device)
    timesteps = torch.randint(1000, (batch_size,), generator=generator, device=device)

    def update() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = network(noisy, timesteps, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    update_network = GraphedStep(update, optimizer) if cuda_graph else update

    def step() -> None:
        update_network()
        ema.step(network.parameters())

    return step
