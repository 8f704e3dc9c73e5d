"""Many images in one picture."""

import math

from diffusers.utils import make_image_grid
from PIL import Image

MIN_SIDE = 56  # pixels; smaller images are enlarged to at least this, by a whole factor and without smoothing


def image_grid(images: list[Image.Image]) -> Image.Image:
    """Arrange images of one size and mode row by row, as near to a square as possible, padded with black."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    factor = max(1, math.ceil(MIN_SIDE / min(images[0].size)))
    size = (images[0].width * factor, images[0].height * factor)
    cells = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    cells += [Image.new(images[0].mode, size)] * (rows * columns - len(images))
    return make_image_grid(cells, rows=rows, cols=columns)
