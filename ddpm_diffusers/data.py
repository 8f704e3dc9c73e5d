"""From data sets to batches: each image is decoded once, to uint8 in the Arrow cache, and read memory-mapped.

A batch gathers rows of those arrays: no Python code runs per image, nothing is decoded twice, and a data set may be
larger than memory.
"""

import glob
import hashlib
import io
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets import config as datasets_config
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from diffusers.utils import logging
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from PIL import Image as PILImage
from PIL import ImageOps

from . import synthetic_fashion
from .pipeline_pixel_diffusion import check_positive

logger = logging.get_logger(__name__)

SYNTHETIC = "synthetic-fashion"
SYNTHETIC_SIZE = 20_000
ROWS = 64  # decoded at a time
FETCHES = 16  # at a time, of images that are not in the data set's own files
CHUNK_BYTES = 2**26  # per record batch: large, so that a batch gathers from few; bounded, to bound memory


class ImageArrays(torch.utils.data.Dataset):
    """The images of a data set as uint8 tensors.

    Args:
        dataset: Data set with an `image` column of fixed-size uint8 rows, as returned by `load_images`.
        shape: (C, H, W) of one row.
    """

    def __init__(self, dataset: Dataset, shape: tuple[int, int, int]):
        self.dataset, self.shape = dataset, shape
        column = dataset.with_format("arrow")[:].column("image")
        # views of the memory-mapped file, (rows, C, H, W) each
        self.chunks = [
            part.flatten().to_numpy(zero_copy_only=True).reshape(len(part), *shape) for part in column.chunks
        ]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks])

    def __reduce__(self):
        return ImageArrays, (self.dataset, self.shape)  # worker processes map the file: the images are not copied

    def __len__(self) -> int:
        return int(self.ends[-1])

    def fingerprint(self) -> str:
        """Identify the content, wherever stored, by count, shape and a hash of up to 4,096 evenly spaced images."""
        spread = np.unique(np.linspace(0, len(self) - 1, 4096).astype(int))
        digest = hashlib.sha256(f"{len(self)} {self.shape}".encode())
        digest.update(self.__getitems__(spread).numpy())
        return f"{len(self)} images of {self.shape}, {digest.hexdigest()[:16]}"

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image, uint8 (C, H, W)."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        """The images of a batch, uint8 (B, C, H, W); torch's DataLoader calls this once per batch."""
        indices = np.asarray(indices)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"Indices run from {indices.min()} to {indices.max()}, but the images from 0 to {len(self) - 1}."
            )
        which = np.searchsorted(self.ends, indices, side="right")
        batch = np.empty((len(indices), *self.shape), np.uint8)
        for i in np.unique(which):
            rows = which == i
            batch[rows] = self.chunks[i][indices[rows] - self.ends[i] + len(self.chunks[i])]
        return torch.from_numpy(batch)


class ShuffledBatches(torch.utils.data.Sampler):
    """A `batch_sampler` of one process's batches of a run; for given sizes, batch i depends on (seed, i) alone.

    The shuffled epochs are concatenated and cut into batches: each epoch visits every image exactly once, in a new
    order, and a batch may contain the end of one epoch and the start of the next, so that no image is left out.

    Args:
        num_images: Number of images in the data set.
        batch_size: Indices per batch.
        seed: Seed of the orders.
        batches: Which of the run's batches this process takes, such as `range(start + rank, stop, num_processes)`.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, batches: range):
        self.num_images, self.batch_size, self.seed, self.batches = num_images, batch_size, seed, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        order_of = None
        for i in self.batches:
            parts, place = [], i * self.batch_size
            while place < (i + 1) * self.batch_size:
                epoch, first = divmod(place, self.num_images)
                if epoch != order_of:
                    order_of, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
                parts.append(order[first : first + (i + 1) * self.batch_size - place])
                place += len(parts[-1])
            yield np.concatenate(parts)


def as_batch(images: torch.Tensor) -> torch.Tensor:
    """`collate_fn` for `ImageArrays`: a batch is already one tensor."""
    return images


def load_images(
    dataset_name: str = "zalando-datasets/fashion_mnist",
    *,
    resolution: int,
    channels: int = 1,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str = "image",
    center_crop: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
) -> Dataset:
    """Load a data set, decoded to one resolution. Transparency becomes black; 16-bit grey is scaled to 8 bits.

    Args:
        dataset_name: A data set on the Hub, a local folder (parquet, images or zip archives of them, or Arrow from
            `save_to_disk`), or `"synthetic-fashion"`, the built-in set of drawn garments.
        resolution: Height and width to resize to (bilinear, antialiased).
        channels: 1 for grey, 3 for RGB.
        dataset_config_name: Configuration to use, if the data set has several.
        train_data_dir: Folder of images, used instead of `dataset_name`: all in it and its subfolders are the split
            "train", unless it holds only folders named after splits (`train`, `test`, ...).
        split: Split to read, or a part of it, such as `"train[:90%]"` (with `save_to_disk` data, whole splits only).
        image_column: Column that holds the images.
        center_crop: Crop each image to its central square first. Without it, all must be square and of one size.
        max_samples: Use only this many images, the first ones; of the built-in set, draw this many.
        seed: Seed of the built-in set.
        cache_dir: Cache folder of `datasets` and of the decoded images.

    Returns:
        A `Dataset` with `image`, rows of channels * resolution^2 uint8 in (C, H, W) order, and `label` if the data set
        has one.

    Raises:
        ValueError: If a data set, split, column, image or size cannot be used; the message says what to do.
        ConnectionError: If the Hub cannot be reached.
    """
    check_positive(resolution=resolution, max_samples=1 if max_samples is None else max_samples)
    if channels not in (1, 3):
        raise ValueError(f"`channels` is {channels!r}; it must be 1 (grey) or 3 (RGB).")
    if dataset_name == SYNTHETIC and train_data_dir is None:
        if split != "train":
            raise ValueError(f"`split` is {split!r}; {SYNTHETIC} has 'train' alone: draw others with another `seed`.")
        return draw_synthetic(max_samples or SYNTHETIC_SIZE, seed, resolution, channels, cache_dir)

    source = open_dataset(dataset_name, dataset_config_name, train_data_dir, split, cache_dir)
    check_image_column(source.features, image_column)
    if len(source) == 0:
        raise ValueError(f"Split {split!r} of the data set is empty: pass another `split`.")
    if max_samples is not None:
        source = source.select(range(min(max_samples, len(source))))

    kept = [image_column] + [name for name in ("label",) if name in source.column_names]
    labels = {name: source.features[name] for name in kept[1:]}
    pixels = channels * resolution**2
    first = with_content(source.with_format("arrow")[:1].select([image_column])).column(0)[0].as_py()
    first = decode_image(first, 0)
    warn_if_colour_is_lost(first, channels)
    settings = {
        "image_column": image_column,
        "resolution": resolution,
        "channels": channels,
        "size": None if center_crop else first.size,
    }
    decoded = (
        source.select_columns(kept)
        .with_format("arrow")
        .map(
            decode_images,
            with_indices=True,
            batched=True,
            batch_size=max(1, CHUNK_BYTES // pixels),
            writer_batch_size=max(1, CHUNK_BYTES // pixels),
            features=Features({"image": List(Value("uint8"), length=pixels), **labels}),
            remove_columns=[image_column],
            fn_kwargs=settings,
            cache_file_name=cache_file(cache_dir, source._fingerprint, settings),
            desc=f"Decoding to {resolution}x{resolution}",
        )
    )
    return decoded.with_format(None)


def check_image_column(features: Features, image_column: str) -> None:
    if image_column not in features:
        raise ValueError(
            f"The data set has no column {image_column!r}; it has {', '.join(features)}: pass one of them as"
            " `image_column`."
        )
    if not isinstance(features[image_column], Image):
        raise ValueError(
            f"Column {image_column!r} holds {features[image_column]}, not images: pass the column of images as"
            " `image_column`."
        )


def open_dataset(
    dataset_name, dataset_config_name, train_data_dir, split, cache_dir, streaming=False
) -> Dataset | IterableDataset:
    """`load_dataset` with errors that say what to do; `train_data_dir` and saved data sets are never streamed."""
    advice = "pass a data set of the Hub or a local folder as `dataset_name`, or a folder of images as"
    advice += f" `train_data_dir`, and one of its splits as `split`; or use `dataset_name` {SYNTHETIC}, built in"
    name = train_data_dir or dataset_name
    try:
        if train_data_dir is not None:
            files = files_by_split(train_data_dir)
            return load_dataset("imagefolder", data_files=files, split=split, cache_dir=cache_dir)
        if (Path(dataset_name) / "state.json").is_file() or (Path(dataset_name) / "dataset_dict.json").is_file():
            loaded = load_from_disk(dataset_name)
            splits = loaded if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}
            if split not in splits:
                raise ValueError(f"it has no split {split!r}, but {', '.join(splits)} alone")
            return splits[split]
        loaded = load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir, streaming=streaming)
        if not streaming and loaded.builder_name == "imagefolder" and Path(dataset_name).is_dir():
            warn_if_images_are_not_taken_once(loaded, dataset_name)
        return loaded
    except DatasetNotFoundError as error:
        raise ValueError(f"There is no data set {name!r} that can be read ({error}): {advice}.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ConnectionError(f"The Hub cannot be reached for data set {name!r} ({error}): {advice}.") from error
    except IndexError as error:  # what `datasets` raises for no rows on disk, and for an empty name
        raise ValueError(f"Data set {name!r} is empty: {advice}.") from error
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"Data set {name!r} cannot be read ({error}): {advice}.") from error


def files_by_split(folder: str) -> dict[str, list[str]]:
    """Patterns of a folder's images: all are "train", unless all are in folders named after splits.

    Left to itself, `datasets` would look for such names at any depth, and a class may have one.
    """
    root = Path(folder).expanduser().resolve()
    paths = sorted(path for path in root.iterdir() if is_seen(path))
    parts = [path for path in paths if is_archive(path) or any(is_image(p) or is_archive(p) for p in path.rglob("*"))]
    patterns, named = {}, []
    for split, words in SPLIT_KEYWORDS.items():
        for path in parts:
            if re.fullmatch(rf"({'|'.join(words)})([-._ \d].*)?", path.stem if is_archive(path) else path.name):
                patterns.setdefault(str(split), []).append(glob.escape(str(path)) + "/**" * path.is_dir())
                named.append(path.name)
    mixed = len(named) < len(parts) or any(map(is_image, paths))
    if mixed and len(named) > 1:
        logger.warning(f"{folder} has other images than in {', '.join(sorted(named))}: all are taken for one split.")
    return patterns if patterns and not mixed else {"train": [f"{glob.escape(str(root))}/**"]}


def is_seen(path: Path) -> bool:
    """Whether `datasets` looks at a path of this name."""
    return not path.name.startswith((".", "__"))


def is_image(path: Path) -> bool:
    return path.suffix.lower() in ImageFolder.EXTENSIONS and is_seen(path)


def is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and is_seen(path)


def warn_if_images_are_not_taken_once(loaded: Dataset, folder: str) -> None:
    """Warn if `datasets`, by names of splits in a folder's paths, leaves images out or takes some twice."""
    if any(map(is_archive, Path(folder).rglob("*"))):
        return  # how many images these hold would take reading them
    paths = (path.relative_to(folder) for path in Path(folder).rglob("*") if is_image(path))
    there = sum(all(map(is_seen, list(path.parents)[:-1])) for path in paths)
    found = sum(split.num_examples for split in loaded.info.splits.values())
    if found != there:
        logger.warning(
            f"{folder} holds {there} images, and `datasets` takes {found}, by names of splits in their paths (or by a"
            " list of theirs): rename these to have each image once."
        )


def decode_images(table: pa.Table, indices: list[int], image_column, resolution, channels, size) -> pa.Table:
    """Decode a table's images to uint8 rows, (C, H, W) each; all must be of `size`, or if None are center-cropped."""
    pixels = np.empty((len(table), channels, resolution, resolution), np.uint8)
    parts = [table.select([image_column]).slice(first, ROWS) for first in range(0, len(table), ROWS)]
    images = (encoded for part in parts for encoded in with_content(part).column(0))
    for row, (index, encoded) in enumerate(zip(indices, images, strict=True)):
        image = decode_image(encoded.as_py(), index)
        side = min(image.size)
        if size is None:
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        elif image.size != (size[0], size[0]):
            raise ValueError(
                f"Image {index} is {image.width}x{image.height}; images must be square and of one size (the first is"
                f" {size[0]}x{size[1]}): pass `center_crop` to use the central square of each."
            )
        try:
            image = image.convert("L" if channels == 1 else "RGB")
        except ValueError as error:
            raise ValueError(f"Image {index} of the data set cannot be used ({error}): convert it.") from error
        if side != resolution:
            image = image.resize((resolution, resolution), PILImage.Resampling.BILINEAR)
        pixels[row] = np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)
    return pixel_table(pixels, table.drop_columns([image_column]))


def with_content(table: pa.Table) -> pa.Table:
    """The one-column table of images, with those in archives, or on the Hub or another server, fetched as bytes."""
    if not any("://" in (path or "") for path in pc.struct_field(table.column(0), "path").to_pylist()):
        return table
    images = table.column(0).combine_chunks()
    fetch = partial(Image().embed_storage, local_files=False)
    with ThreadPoolExecutor(FETCHES) as pool:
        rows = list(pool.map(fetch, (images.slice(i, 1) for i in range(len(images)))))
    return pa.table({table.column_names[0]: pa.chunked_array(rows)})


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
        of_the_machine = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
        raise (ValueError if of_the_machine else DamagedImage)(
            f"Image {index} of the data set cannot be decoded ({error}): repair or remove it, or use the built-in set,"
            f" `dataset_name` {SYNTHETIC}."
        ) from error
    if image.mode in ("I", "F"):  # PIL would clip them
        raise ValueError(
            f"Image {index} has 32-bit pixels (mode {image.mode!r}), whose range is unknown; images must have 8 bits a"
            " channel, or 16 bits of grey: convert them."
        )
    if image.mode.startswith("I;16"):
        return PILImage.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))  # 65535 to 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "black"), image)
    return image


def warn_if_colour_is_lost(first: PILImage.Image, channels: int) -> None:
    """Warn if the first image of a data set, in whatever mode, is in colour and its `channels` are to be 1 (grey)."""
    pixels = np.asarray(first.convert("RGB"))
    if channels == 1 and (pixels != pixels[..., :1]).any():
        logger.warning("The images are in colour and are made grey; for colour, use a network with 3 `in_channels`.")


def pixel_table(pixels: np.ndarray, others: pa.Table) -> pa.Table:
    """Append uint8 pixels to a table as an Arrow column `image`, one row per image, without copying them."""
    rows = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels[0].size)
    return others.append_column("image", rows)


def cache_file(cache_dir: str | None, *content) -> str:
    """Cache file for rows, named after their content and this code, not beside the source, which may be read-only."""
    code = [Path(file).read_bytes() for file in (__file__, synthetic_fashion.__file__)]
    folder = Path(cache_dir or datasets_config.HF_DATASETS_CACHE) / "ddpm-diffusers"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{Hasher.hash([code, content])}.arrow")


def draw_synthetic(count: int, seed: int, resolution: int, channels: int, cache_dir: str | None = None) -> Dataset:
    """The first `count` images of the built-in set, with the columns of `load_images`, drawn into the Arrow cache."""
    pixels = channels * resolution**2
    return (
        Dataset.from_dict({"index": np.arange(count)})
        .with_format("arrow")
        .map(
            draw_rows,
            batched=True,
            batch_size=max(1, CHUNK_BYTES // pixels),
            writer_batch_size=max(1, CHUNK_BYTES // pixels),
            features=Features(
                {
                    "image": List(Value("uint8"), length=pixels),
                    "label": ClassLabel(names=synthetic_fashion.CLASS_NAMES),
                }
            ),
            remove_columns=["index"],
            fn_kwargs={"seed": seed, "resolution": resolution, "channels": channels},
            cache_file_name=cache_file(cache_dir, SYNTHETIC, count, seed, resolution, channels),
            desc=f"Drawing {count} garments at {resolution}x{resolution}",
        )
        .with_format(None)
    )


def draw_rows(table: pa.Table, seed: int, resolution: int, channels: int) -> pa.Table:
    indices = table.column("index").to_numpy()
    images, labels = synthetic_fashion.draw_garments(indices, seed=seed, resolution=resolution, channels=channels)
    return pixel_table(images, pa.table({"label": labels}))
