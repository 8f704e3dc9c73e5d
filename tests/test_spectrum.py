"""Spectra, checkerboards and sharpness: closed forms and slow loops; and known damage, which each must show."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.evaluation import spectrum
from ddpm_diffusers.evaluation.damage import DAMAGE, blur, checker, noise
from ddpm_diffusers.evaluation.spectrum import (
    checkerboard,
    power_spectrum,
    radial_spectrum,
    ring_spectrum,
    sharpness,
)

PLACES = torch.arange(16)
COLUMNS, ROWS = PLACES[None, :].expand(16, 16), PLACES[:, None].expand(16, 16)
# where each pattern of +1 and -1 has its energy
PATTERNS = {
    "checkerboard": ((ROWS + COLUMNS) % 2, [(8, 8)]),
    "columns of period 2": (COLUMNS % 2, [(0, 8)]),
    "rows of period 2": (ROWS % 2, [(8, 0)]),
    "rows of period 4": (ROWS // 2 % 2, [(4, 0), (12, 0)]),
    "one cycle of columns in each half": (COLUMNS // 4 % 2, [(0, 2), (0, 6), (0, 10), (0, 14)]),
}


def random_images(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def loop_over_entries(power: torch.Tensor, distance) -> dict[int, list[float]]:
    """Entries by the distance of their frequency, in cycles an image, from 0."""
    cycles = np.fft.fftfreq(len(power), 1 / len(power))
    found = {}
    for i, u in enumerate(cycles):
        for j, v in enumerate(cycles):
            found.setdefault(distance(u, v), []).append(power[i, j].item())
    return found


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_has_all_its_energy_at_its_frequencies(name):
    pattern, entries = PATTERNS[name]
    power = power_spectrum((255 * pattern).to(torch.uint8).expand(3, 2, 16, 16))  # from -1 to 1
    assert power.dtype == torch.float64
    assert power.sum().item() == pytest.approx(16 * 16)
    assert sum(power[entry].item() for entry in entries) == pytest.approx(16 * 16)
    assert all(power[entry] > 1 for entry in entries)


def test_the_energy_is_that_of_the_pixels_about_their_images_mean(monkeypatch):
    images = random_images(50, 3, 16, 16)
    images[:25] //= 3  # darker ones
    x = images.double().numpy() / 127.5 - 1
    expected = np.square(x - x.mean(axis=(2, 3), keepdims=True)).sum(axis=(2, 3)).mean()
    power = power_spectrum(images)
    assert power.sum().item() == pytest.approx(expected)
    assert power[0, 0] < 1e-9
    monkeypatch.setattr(spectrum, "IMAGES_AT_A_TIME", 7)
    torch.testing.assert_close(power_spectrum(images), power)


def test_rings_and_circles_are_those_of_a_loop_over_entries():
    power = power_spectrum(random_images(2, 1, 12, 12))
    rings = loop_over_entries(power, lambda u, v: max(abs(u), abs(v)))
    circles = loop_over_entries(power, lambda u, v: round(math.hypot(u, v)))
    assert ring_spectrum(power).tolist() == pytest.approx([np.mean(rings[m]) for m in range(7)])
    assert radial_spectrum(power).tolist() == pytest.approx([np.mean(circles[r]) for r in range(7)])


@pytest.mark.parametrize("period", [2, 4])
def test_a_checkerboards_figure_is_the_contrast_of_its_ring_to_the_two_inside(period):
    images = random_images(9, 1, 24, 24)
    spectra = power_spectrum(images), power_spectrum(blur(images, 0.7))
    contrasts = []
    for power in spectra:
        rings = loop_over_entries(power, lambda u, v: max(abs(u), abs(v)))
        ring = 24 // period
        contrasts.append(10 * math.log10(np.mean(rings[ring]) / np.mean(rings[ring - 1] + rings[ring - 2])))
    assert abs(contrasts[0] - contrasts[1]) > 0.4
    assert checkerboard(*spectra, period) == pytest.approx(contrasts[0] - contrasts[1])


def test_sharpness_is_the_ratio_of_the_energies_from_a_quarter_of_the_side_on():
    power, real = power_spectrum(random_images(2, 1, 12, 12)), power_spectrum(random_images(9, 1, 12, 12, high=99))
    high, real_high = (
        sum(loop_over_entries(spectrum, lambda u, v: math.hypot(u, v) >= 3)[True]) for spectrum in (power, real)
    )
    assert sharpness(power, real) == pytest.approx(10 * math.log10(high / real_high))
    assert sharpness(real, power) == pytest.approx(-sharpness(power, real))


@pytest.mark.parametrize(
    ("name", "period", "other_period", "entries_of_ring"),
    [("checkerboard", 2, 4, 31), ("columns of period 2", 2, 4, 31), ("rows of period 4", 4, 2, 32)],
)
def test_a_pattern_over_white_noise_raises_its_figure_by_its_share_of_the_ring(
    name, period, other_period, entries_of_ring
):
    drawn = random_images(2000, 1, 16, 16, low=78, high=178)
    drawn = torch.cat([drawn, 255 - drawn])  # of opposite sign: over both, pattern and noise do not mix
    signs = 1 - 2 * PATTERNS[name][0]
    power, real = power_spectrum((drawn + 10 * signs).to(torch.uint8)), power_spectrum(drawn)
    # over any 100 numbers in a row the variance is (100^2 - 1) / 12; that of the pattern is all in one ring
    added = 10**2 * 16**2 / entries_of_ring
    assert checkerboard(power, real, period) == pytest.approx(10 * math.log10(1 + added / (9999 / 12)), abs=0.05)
    assert checkerboard(power, real, other_period) == pytest.approx(0, abs=1e-6)


def test_real_images_against_themselves_are_at_zero_and_fewer_grey_levels_change_no_contrast():
    images = 2 * random_images(100, 1, 16, 16, high=100)
    power = power_spectrum(images)
    assert sharpness(power, power) == checkerboard(power, power, 2) == checkerboard(power, power, 4) == 0
    halved = power_spectrum(images // 2)
    assert sharpness(halved, power) == pytest.approx(-20 * math.log10(2))
    assert checkerboard(halved, power, 2) == pytest.approx(0, abs=1e-6)


def test_images_that_cannot_be_measured_are_refused():
    with pytest.raises(TypeError, match=r"torch.float32; they must be uint8"):
        power_spectrum(torch.rand(2, 1, 8, 8))
    for shape in ((8, 8), (1, 8, 8), (2, 1, 8, 10), (2, 1, 9, 9), (2, 1, 4, 4)):
        with pytest.raises(ValueError, match="must be .N, C, H, H., H even and at least 6"):
            power_spectrum(random_images(*shape))
    with pytest.raises(ValueError, match="There are no images"):
        power_spectrum(random_images(0, 1, 8, 8))


@pytest.mark.parametrize(("side", "period"), [(8, 4), (10, 4), (14, 4), (12, 1), (12, 3)])
def test_a_period_that_has_no_ring_of_its_own_is_refused(side, period):
    power = power_spectrum(random_images(2, 1, side, side))
    with pytest.raises(ValueError, match=f"`period` is {period}; it must be 2 or 4, and divide .*, {side}, three"):
        checkerboard(power, power, period)


def test_spectra_of_images_of_different_size_are_refused():
    powers = [power_spectrum(random_images(2, 1, side, side)) for side in (8, 12)]
    for figure in (checkerboard, sharpness):
        with pytest.raises(ValueError, match="`power` is of images of 8x8 and `real_power` of 12x12 pixels"):
            figure(*powers)


@pytest.fixture(params=["synthetic-fashion", "fashion_mnist"])
def garments(request) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of 1,000 different images."""
    name = request.param if request.param == "synthetic-fashion" else request.getfixturevalue(request.param)
    dataset = load_images(name, resolution=28, max_samples=2000)
    return ImageArrays(dataset, (1, 28, 28)).__getitems__(range(2000)).split(1000)


def test_each_damage_to_garments_moves_its_figure_further_the_more_there_is_of_it(garments):
    real = power_spectrum(garments[0])

    def figures(damage, amount):
        power = power_spectrum(damage(garments[1], amount))
        return checkerboard(power, real), sharpness(power, real)

    undamaged = figures(blur, 0)
    assert all(abs(figure) < 0.25 for figure in undamaged)
    checkered = [figures(checker, amount) for amount in (0, 0.01, 0.02, 0.05, 0.1)]
    assert all(lesser[0] + 0.5 < greater[0] for lesser, greater in zip(checkered, checkered[1:], strict=False))
    for cb2, hf in checkered[1:]:
        assert cb2 - undamaged[0] > 5 * abs(hf - undamaged[1])
    blurred = [figures(blur, amount) for amount in (0, 0.1, 0.25, 0.5, 1)]
    assert all(lesser[1] - 0.4 > greater[1] for lesser, greater in zip(blurred, blurred[1:], strict=False))
    noisy = [figures(noise, amount) for amount in (0, 0.05, 0.1, 0.25)]
    assert all(lesser[1] + 0.2 < greater[1] for lesser, greater in zip(noisy, noisy[1:], strict=False))
    assert all(cb2 < 1.5 for cb2, _ in blurred + noisy)  # neither passes for a checkerboard


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_leaves_images_as_they_are_at_0_and_uint8_at_1(kind):
    images = random_images(3, 2, 8, 6)
    given = images.clone()
    assert torch.equal(DAMAGE[kind](images, 0), images)
    damaged = DAMAGE[kind](images, 1)
    assert damaged.dtype == torch.uint8 and damaged.shape == images.shape and not torch.equal(damaged, images)
    assert torch.equal(DAMAGE[kind](images, 1), damaged) and torch.equal(images, given)


def test_blur_is_the_smoothing_of_both_directions():
    images = random_images(2, 3, 8, 6)
    smooth = images.double().numpy()
    for axis in (2, 3):
        smooth = scipy.ndimage.convolve1d(smooth, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    for amount in (0.25, 1):
        expected = (1 - amount) * images.double().numpy() + amount * smooth
        np.testing.assert_array_equal(blur(images, amount).numpy(), np.round(expected))


def test_checkers_and_noise_are_as_large_as_said_and_stop_at_black_and_white():
    grey = torch.full((50, 1, 16, 16), 100, dtype=torch.uint8)
    assert checker(grey, 0.2)[0, 0, :2, :2].tolist() == [[151, 49], [49, 151]]
    assert checker(grey, 0.8)[0, 0, :2, :2].tolist() == [[255, 0], [0, 255]]
    assert noise(grey, 0.05).double().std().item() == pytest.approx(0.05 * 255, rel=0.02)
    assert noise(grey, 0.05).double().mean().item() == pytest.approx(100, abs=0.5)
    assert noise(grey, 3).unique()[[0, -1]].tolist() == [0, 255]
