"""The sample grid against an assembly by numpy: order, padding, enlargement."""

import math

import numpy as np
import pytest
from PIL import Image

from ddpm_diffusers.grid import image_grid


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("count", "size", "columns", "min_side", "expected_columns", "factor"),
    [
        (1, (8, 8), None, 1, 1, 1),
        (5, (8, 8), None, 1, 3, 1),  # 3 + 2, one cell black
        (5, (8, 8), 2, 20, 2, 3),  # 8 -> 24, the first multiple of at least 20
        (7, (6, 10), 3, 12, 3, 2),  # width and height differ: the shorter side counts
        (3, (8, 8), 5, 8, 5, 1),  # fewer images than columns
        (4, (64, 64), None, 56, 2, 1),  # large enough already
    ],
)
def test_grid_is_the_images_row_by_row_enlarged_by_whole_factors(
    mode, count, size, columns, min_side, expected_columns, factor
):
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(1, 256, (count, size[1], size[0], channels), np.uint8)
    grid = image_grid([Image.fromarray(p.squeeze()) for p in pixels], columns, min_side)

    width, height = size[0] * factor, size[1] * factor
    rows = math.ceil(count / expected_columns)
    expected = np.zeros((rows * height, expected_columns * width, 3), np.uint8)
    for i, image in enumerate(pixels):
        row, column = divmod(i, expected_columns)
        enlarged = np.kron(image, np.ones((factor, factor, 1), np.uint8))  # each pixel a square, grey to all channels
        expected[row * height : (row + 1) * height, column * width : (column + 1) * width] = enlarged
    assert grid.size == (expected_columns * width, rows * height)
    np.testing.assert_array_equal(np.asarray(grid.convert("RGB")), expected)


@pytest.mark.parametrize("count", range(1, 20))
def test_default_columns_are_as_near_to_a_square_as_the_count_allows(count):
    width, height = image_grid([Image.new("L", (4, 4), 255)] * count, min_side=4).size
    assert width * height // 16 - count < width // 4  # no row is empty
    assert width // 4 - height // 4 in (0, 1)
