"""The default network against the same written down in functional torch."""

import math

import torch
import torch.nn.functional as F
from conftest import TINY, randomize

from ddpm_diffusers import OptimizedUNet2DModel

LEVELS = {"block_out_channels": (8, 8, 16), "down_layers_per_block": (0, 1), "up_layers_per_block": (1, 2)}


def written_down(state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    def linear(h, name):
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(h, name):
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(h, name):
        return F.group_norm(h, 4, state[f"{name}.weight"], state[f"{name}.bias"])

    def layers(h, name):
        for j in range(sum(key.startswith(f"{name}.layers.") and key.endswith("conv1.weight") for key in state)):
            block = f"{name}.layers.{j}"
            inner = norm(conv(F.gelu(norm(h, f"{block}.norm1")), f"{block}.conv1"), f"{block}.norm2")
            scale, shift = linear(time, f"{block}.time_scale_shift")[:, :, None, None].chunk(2, 1)
            inner = conv(F.gelu(inner * (1 + scale) + shift), f"{block}.conv2")
            h = inner + (conv(h, f"{block}.shortcut") if f"{block}.shortcut.weight" in state else h)
        return h

    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(32.0) / 31)
    time = torch.cat((angles.sin(), angles.cos()), 1)
    time = F.gelu(linear(F.gelu(linear(time, "time_embedding.linear_1")), "time_embedding.linear_2"))
    h = stem = conv(x, "stem")
    skips = []
    for i in range(2):
        h = layers(h, f"down_blocks.{i}")
        skips.append(h)
        h = conv(F.pixel_unshuffle(h, 2), f"down_blocks.{i}.pool.1")
    h = layers(h, "mid_block")
    for i in range(2):
        h = F.pixel_shuffle(conv(h, f"up_blocks.{i}.upsample.conv"), 2)
        h = layers(torch.cat((h, skips.pop()), 1), f"up_blocks.{i}")
    return conv(F.gelu(norm(torch.cat((h, stem), 1), "out_block.layers.0")), "out_block.layers.2")


@torch.no_grad()
def test_the_default_network_is_what_its_docstrings_say():
    torch.manual_seed(0)
    model = randomize(OptimizedUNet2DModel(**TINY | LEVELS))
    x, t = torch.randn(2, 1, 8, 16), torch.tensor([3, 951])
    expected = written_down(model.state_dict(), x, t)
    torch.testing.assert_close(model(x, t).sample, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01
