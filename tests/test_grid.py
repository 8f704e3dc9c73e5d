"""The sample grid against an assembly by numpy: order, padding, enlargement."""

import math

import numpy as np
import pytest
from PIL import Image

from ddpm_diffusers.grid import image_grid


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("count", "size", "columns", "factor"),
    [
        (1, (8, 8), 1, 7),  # 56 pixels
        (5, (20, 20), 3, 3),  # 3 + 2, one cell black; 60 is the first multiple of at least 56
        (7, (6, 10), 3, 10),  # width and height differ: the shorter side counts
        (4, (64, 64), 2, 1),  # large enough already
    ],
)
def test_grid_is_the_images_row_by_row_enlarged_by_whole_factors(mode, count, size, columns, factor):
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(1, 256, (count, size[1], size[0], channels), np.uint8)
    grid = image_grid([Image.fromarray(p.squeeze()) for p in pixels])

    width, height = size[0] * factor, size[1] * factor
    rows = math.ceil(count / columns)
    expected = np.zeros((rows * height, columns * width, 3), np.uint8)
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        enlarged = np.kron(image, np.ones((factor, factor, 1), np.uint8))  # each pixel a square, grey to all channels
        expected[row * height : (row + 1) * height, column * width : (column + 1) * width] = enlarged
    assert grid.size == (columns * width, rows * height)
    np.testing.assert_array_equal(np.asarray(grid.convert("RGB")), expected)


def test_the_grid_is_as_near_to_a_square_as_the_count_allows():
    for count in range(1, 20):
        width, height = (side // 56 for side in image_grid([Image.new("L", (56, 56), 255)] * count).size)
        assert width * height - count < width  # no row is empty
        assert width - height in (0, 1)
