"""Checkerboards and sharpness from the mean power spectrum of images, in dB relative to that of real images.

An upsampling that treats even and odd pixels differently leaves energy at period 2, on the outermost ring of the
spectrum, or, one level deeper in the network, at period 4. Blur takes energy from all high frequencies, so read a
checkerboard's figure only together with the sharpness.
"""

import torch

IMAGES_AT_A_TIME = 1000


def power_spectrum(images: torch.Tensor) -> torch.Tensor:
    """Mean of |X|^2 over images and channels, with X the orthonormal Fourier transform of x.

    x is an image scaled to [-1, 1], minus the mean of each of its channels.

    Args:
        images: uint8 (N, C, H, H), H even and at least 6; uint8, so that real and generated images are rounded alike.

    Returns:
        float64 (H, H); entry (u, v) is the energy at u and v cycles per image, in the order of torch.fft.fftfreq.

    Raises:
        TypeError: If the images are not uint8.
        ValueError: If they have another shape, or there are none.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"`images` are of {images.dtype}; they must be uint8, so that all are rounded alike.")
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.shape[2] % 2 or images.shape[2] < 6:
        raise ValueError(
            f"`images` have shape {tuple(images.shape)}; they must be (N, C, H, H), H even and at least 6."
        )
    if len(images) == 0:
        raise ValueError("There are no images; give at least one.")
    power = torch.zeros(images.shape[-2:], dtype=torch.float64, device=images.device)
    for part in images.split(IMAGES_AT_A_TIME):
        x = part.float() / 127.5 - 1  # (B, C, H, H)
        x = x - x.mean(dim=(2, 3), keepdim=True)
        power += torch.fft.fft2(x, norm="ortho").abs().square().double().mean(1).sum(0)
    return power / len(images)


def ring_spectrum(power: torch.Tensor) -> torch.Tensor:
    """Mean of `power` over the square rings max(|u|, |v|) = 0, 1, ..., H/2: (H/2 + 1,)."""
    return mean_by(ring_index(power), power)


def radial_spectrum(power: torch.Tensor) -> torch.Tensor:
    """Mean of `power` over the circles of radius 0, 1, ..., H/2, each (u, v) on the nearest: (H/2 + 1,)."""
    return mean_by(radii(power).round().long(), power)[: len(power) // 2 + 1]


def checkerboard(power: torch.Tensor, real_power: torch.Tensor, period: int = 2) -> float:
    """Excess energy at a period of `period` pixels, in dB (CB2, CB4): 0 as in real images, above 0 a checkerboard.

    The ring of that period, m = H / period, is compared with the two rings inside it, which blur changes, too.

    Args:
        power, real_power: As returned by `power_spectrum`.
        period: 2, or 4 if H is divisible by 4 and at least 12.

    Raises:
        ValueError: If the period is not 2 or 4, or does not divide H, or does so fewer than three times, or if the
            spectra are of images of different size.
    """
    check_same_size(power, real_power)
    side = len(power)
    if period not in (2, 4) or side % period or side // period < 3:
        raise ValueError(
            f"`period` is {period}; it must be 2 or 4, and divide the side of the images, {side}, three times or more."
        )
    rings, m = ring_index(power), side // period  # (H, H), and the ring of this period

    def contrast(power: torch.Tensor) -> torch.Tensor:
        return 10 * torch.log10(power[rings == m].mean() / power[(rings == m - 1) | (rings == m - 2)].mean())

    return (contrast(power) - contrast(real_power)).item()


def sharpness(power: torch.Tensor, real_power: torch.Tensor) -> float:
    """Energy at radius H/4 and beyond, in dB relative to real images (HF): below 0 is blur, above 0 noise.

    Args:
        power, real_power: As returned by `power_spectrum`.

    Raises:
        ValueError: If they are of images of different size.
    """
    check_same_size(power, real_power)
    high = radii(power) >= len(power) / 4
    return (10 * torch.log10(power[high].sum() / real_power[high].sum())).item()


def check_same_size(power: torch.Tensor, real_power: torch.Tensor) -> None:
    side, real_side = len(power), len(real_power)
    if side != real_side:
        raise ValueError(
            f"`power` is of images of {side}x{side} and `real_power` of {real_side}x{real_side} pixels; they must be"
            " of one size."
        )


def frequencies(power: torch.Tensor) -> torch.Tensor:
    """|u| = min(u, H - u), in cycles per image, (H,)."""
    u = torch.arange(len(power), device=power.device)
    return torch.minimum(u, len(power) - u)


def ring_index(power: torch.Tensor) -> torch.Tensor:
    """max(|u|, |v|): the square ring that each entry lies on, int64 (H, H)."""
    u = frequencies(power)
    return torch.maximum(u[:, None], u[None, :])


def radii(power: torch.Tensor) -> torch.Tensor:
    """sqrt(u^2 + v^2): the distance of each entry from frequency 0, float64 (H, H)."""
    u = frequencies(power).double()
    return torch.hypot(u[:, None], u[None, :])


def mean_by(index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Mean of the `values` at each index 0, 1, ..., (max index + 1,)."""
    sums = torch.bincount(index.flatten(), values.flatten())
    return sums / torch.bincount(index.flatten())
