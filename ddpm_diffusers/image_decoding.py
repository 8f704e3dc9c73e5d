"""Decode encoded images to uint8 rows, each once, with errors that name the image."""

import errno
import io
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Image
from datasets.utils import tqdm
from diffusers.utils import logging
from PIL import Image as PILImage
from PIL import ImageOps

from .synthetic_fashion import SYNTHETIC

logger = logging.get_logger(__name__)

ROWS = 64  # decoded at a time
MOST_DAMAGED = 10  # images that one error names
FETCHES = 16  # at a time, of images that are not in the data set's own files


def decode_images(
    table: pa.Table, indices: list[int], image_column, resolution, channels, size, progress: bool = False
) -> pa.Table:
    """Decode a table's images to uint8 rows, (C, H, W) each; `indices` number them in error messages.

    All must be squares as wide as `size`, (W, H); if it is None, each is cropped to its central square. Images that
    are missing or damaged are named together, the first ten, so that they can be repaired at once. `progress` shows a
    bar, since that of `map` moves once a table.
    """
    pixels = np.empty((len(table), channels, resolution, resolution), np.uint8)
    parts = [table.select([image_column]).slice(first, ROWS) for first in range(0, len(table), ROWS)]
    images = (encoded for part in parts for encoded in with_content(part).column(0))
    if progress:
        images = tqdm(images, desc="Images", total=len(table), leave=False)
    damaged = []
    for row, (index, encoded) in enumerate(zip(indices, images, strict=True)):
        encoded = encoded.as_py()
        try:
            image = decode_image(encoded, index)
        except DamagedImage as error:
            damaged.append(error)
            if len(damaged) == MOST_DAMAGED:
                break
            continue
        if size is None:
            image = central_square(image)
        elif image.size != (size[0], size[0]):
            raise ValueError(
                f"{called(encoded, index)} is {image.width}x{image.height}; images must be square and of one size (the"
                f" first is {size[0]}x{size[1]}): pass `center_crop` to use the central square of each."
            )
        try:
            image = image.convert("L" if channels == 1 else "RGB")
        except ValueError as error:
            raise ValueError(f"{called(encoded, index)} cannot be used ({error}): convert it.") from error
        if image.width != resolution:
            image = image.resize((resolution, resolution), PILImage.Resampling.BILINEAR)
        pixels[row] = np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)
    if damaged:
        raise DamagedImage("\n".join(map(str, damaged))) from damaged[0]
    return pixel_table(pixels, table.drop_columns([image_column]))


def with_content(table: pa.Table) -> pa.Table:
    """The one-column table of images, with those in archives, or on the Hub or another server, fetched as bytes."""
    absent = pc.is_null(pc.struct_field(table.column(0), "bytes")).to_pylist()
    paths = pc.struct_field(table.column(0), "path").to_pylist()
    if not any(is_absent and "://" in (path or "") for is_absent, path in zip(absent, paths, strict=True)):
        return table
    images = table.column(0).combine_chunks()
    with ThreadPoolExecutor(FETCHES) as pool:
        rows = list(pool.map(fetch, (images.slice(i, 1) for i in range(len(images)))))
    return pa.table({table.column_names[0]: pa.chunked_array(rows)})


def fetch(row: pa.StructArray) -> pa.StructArray:
    """One image with its bytes, which are empty if its archive is damaged there: decoding it then names the image."""
    try:
        content = Image().embed_storage(row, local_files=False).field("bytes")
    except (zipfile.BadZipFile, zlib.error, EOFError):
        content = pa.array([b""], pa.binary())
    # its own path: `embed_storage` would leave only the last part, for an image in an archive the archive's name
    return pa.StructArray.from_arrays([content, row.field("path")], ["bytes", "path"], mask=row.is_null())


def called(encoded: dict, index: int) -> str:
    """An image's number and, if its data set has it, its file."""
    return f"Image {index} of the data set" + (f" ({encoded['path']})" if encoded["path"] else "")


class DamagedImage(ValueError):
    """An image is missing or its data cannot be decoded, now or ever."""


def decode_image(encoded: dict | None, index: int) -> PILImage.Image:
    """Decode an Arrow row (bytes, or a file's path) to a PIL image: upright, opaque, 8 bits per channel."""
    if encoded is None:
        raise DamagedImage(
            f"Image {index} of the data set is missing (null): remove the row, or choose another column."
        )
    try:
        image = PILImage.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"])
        ImageOps.exif_transpose(image, in_place=True)  # also decodes it
    except Exception as error:  # PIL raises many types for damaged files
        # no memory or a failing disk says nothing about the image; a missing file (ENOENT) or PIL's own errors do
        of_the_machine = isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.ENOENT)
        raise (ValueError if of_the_machine else DamagedImage)(
            f"{called(encoded, index)} cannot be decoded ({error}): repair or remove it, or use the built-in set,"
            f" `dataset_name` {SYNTHETIC}."
        ) from error
    if image.mode in ("I", "F"):  # PIL would clip them
        raise ValueError(
            f"{called(encoded, index)} has 32-bit pixels (mode {image.mode!r}), whose range is unknown; images must"
            " have 8 bits a channel, or 16 bits of grey: convert them."
        )
    if image.mode.startswith("I;16"):
        values = np.array(image)
        values[values == image.info.get("transparency", -1)] = 0  # PIL's own handling has only 8 bits
        return PILImage.fromarray(np.round(values / 257).astype(np.uint8))  # 65535 to 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "black"), image)
    return image


def central_square(image: PILImage.Image) -> PILImage.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def has_colour(image: PILImage.Image) -> bool:
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels != pixels[..., :1]).any())


def size_of_all(first: pa.Table, channels: int, center_crop: bool) -> tuple[int, int] | None:
    """The size that all images must have, that of the `first` (a table of one row); None if each is cropped.

    Warns if colour will be lost.
    """
    image = decode_image(with_content(first).column(0)[0].as_py(), 0)
    if channels == 1 and has_colour(image):
        logger.warning("The images are in colour and are made grey; for colour, use a network with 3 `in_channels`.")
    return None if center_crop else image.size


def pixel_table(pixels: np.ndarray, others: pa.Table) -> pa.Table:
    """Append uint8 pixels to a table as an Arrow column `image`, one row per image, without copying them."""
    rows = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels[0].size)
    return others.append_column("image", rows)
