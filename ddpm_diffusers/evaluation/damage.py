"""Known kinds of damage to real images, which the figures must tell apart."""

import torch
import torch.nn.functional as F


def blur(images: torch.Tensor, amount: float) -> torch.Tensor:
    """Blend uint8 (N, C, H, W), by `amount` in [0, 1], with a copy smoothed by (1, 2, 1) / 4 in both directions."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    x = images.float()  # (N, C, H, W)
    smooth = F.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]  # (N * C, 1, H + 2, W + 2)
    smooth = F.conv2d(F.conv2d(smooth, kernel.view(1, 1, 3, 1)), kernel.view(1, 1, 1, 3)).view_as(x)
    return to_uint8(torch.lerp(x, smooth, amount))


def checker(images: torch.Tensor, amount: float) -> torch.Tensor:
    """Brighten even pixels of uint8 (N, C, H, W) and darken odd ones by `amount` times the range, clipped to it."""
    rows, columns = torch.arange(images.shape[2])[:, None], torch.arange(images.shape[3])
    signs = 1.0 - 2 * ((rows + columns) % 2)  # (H, W)
    return to_uint8(images.float() + 255 * amount * signs)


def noise(images: torch.Tensor, amount: float) -> torch.Tensor:
    """Add Gaussian noise with a standard deviation of `amount` times the range to uint8 (N, C, H, W)."""
    draws = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return to_uint8(images.float() + 255 * amount * draws)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


DAMAGE = {"blur": blur, "checker": checker, "noise": noise}
