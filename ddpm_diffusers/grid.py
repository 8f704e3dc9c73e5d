"""Many images in one picture."""

import math

from diffusers.utils import make_image_grid
from PIL import Image


def image_grid(images: list[Image.Image], columns: int | None = None, min_side: int = 56) -> Image.Image:
    """Arrange images row by row, the last row padded with black.

    Args:
        images: At least one, all of one size and mode.
        columns: Images per row; by default, the grid is as close to a square as possible.
        min_side: If the shorter side is below this many pixels, images are enlarged to at least it, by a whole factor
            and without smoothing.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    factor = max(1, math.ceil(min_side / min(images[0].size)))
    size = (images[0].width * factor, images[0].height * factor)
    cells = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    cells += [Image.new(images[0].mode, size)] * (rows * columns - len(images))
    return make_image_grid(cells, rows=rows, cols=columns)
