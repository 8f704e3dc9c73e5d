"""From data sets to batches: each image is decoded once, to uint8 in the Arrow cache, and read memory-mapped.

A batch gathers rows of those arrays: no Python code runs per image, nothing is decoded twice, and a data set may be
larger than memory.
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import config as datasets_config
from datasets.fingerprint import Hasher
from filelock import FileLock

from . import image_decoding, synthetic_fashion
from .data_sources import check_image_column, open_dataset
from .image_decoding import decode_images, pixel_table, size_of_all
from .pipeline_pixel_diffusion import check_positive
from .synthetic_fashion import SYNTHETIC

SYNTHETIC_SPLITS = {"train": (20_000, 0), "test": (10_000, 1)}  # their number of images, and the seed
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
        for part in np.array_split(spread, 64):  # large images would take gigabytes
            digest.update(self.__getitems__(part).numpy())
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
            rows, start = which == i, self.ends[i] - len(self.chunks[i])  # the first image of chunk i
            batch[rows] = self.chunks[i][indices[rows] - start]
        return torch.from_numpy(batch)


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
    cache_dir: str | None = None,
) -> Dataset:
    """Load a data set, decoded to one resolution. Transparency becomes black; 16-bit grey is scaled to 8 bits.

    Args:
        dataset_name: A data set on the Hub, a local folder (parquet, images or zip archives of them, or Arrow from
            `save_to_disk`), or `"synthetic-fashion"`, the built-in set of drawn garments (splits "train", "test").
        resolution: Height and width to resize to (bilinear, antialiased).
        channels: 1 for grey, 3 for RGB.
        dataset_config_name: Configuration to use, if the data set has several.
        train_data_dir: Folder of images, used instead of `dataset_name`: all in it and its subfolders are the split
            "train", unless it holds only folders named after splits (`train`, `test`, ...).
        split: Split to read, or a part of it, such as `"train[:90%]"` (with `save_to_disk` data, whole splits only).
        image_column: Column that holds the images.
        center_crop: Crop each image to its central square first. Without it, all must be square and of one size.
        max_samples: Use only this many images, the first ones; of the built-in set, draw this many.
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
        if split not in SYNTHETIC_SPLITS:
            raise ValueError(f"`split` is {split!r}; {SYNTHETIC} has {' and '.join(SYNTHETIC_SPLITS)}.")
        size, seed = SYNTHETIC_SPLITS[split]
        return draw_synthetic(max_samples or size, seed, resolution, channels, cache_dir)

    source = open_dataset(dataset_name, dataset_config_name, train_data_dir, split, cache_dir)
    check_image_column(source.features, image_column)
    if len(source) == 0:
        raise ValueError(f"Split {split!r} of the data set is empty: pass another `split`.")
    if max_samples is not None:
        source = source.select(range(min(max_samples, len(source))))

    has_label = "label" in source.features and image_column != "label"
    label = {"label": source.features["label"]} if has_label else {}
    first = source.with_format("arrow")[:1].select([image_column])
    size = size_of_all(first, channels, center_crop)
    settings = {"image_column": image_column, "resolution": resolution, "channels": channels, "size": size}
    return map_once(
        source.select_columns([image_column, *label]),
        decode_images,
        channels * resolution**2,
        label,
        with_indices=True,
        remove_columns=[image_column],
        fn_kwargs={**settings, "progress": True},
        cache_file_name=cache_file(cache_dir, source._fingerprint, stamps(source), settings),
        desc=f"Decoding to {resolution}x{resolution}",
    )


def map_once(
    dataset: Dataset, function: Callable, pixels: int, others: dict, cache_file_name: str, **options
) -> Dataset:
    """`dataset.map(function, **options)`, cached in that file; of processes that share the cache, one computes it.

    `function` maps Arrow tables to tables with `image`, rows of `pixels` uint8, and columns of the features `others`.
    """
    rows = max(1, CHUNK_BYTES // pixels)
    features = Features({"image": List(Value("uint8"), length=pixels), **others})
    chunks = {"batched": True, "batch_size": rows, "writer_batch_size": rows, "features": features}
    made_by_one = nullcontext() if Path(cache_file_name).exists() else FileLock(f"{cache_file_name}.lock")
    with made_by_one:
        mapped = dataset.with_format("arrow").map(function, cache_file_name=cache_file_name, **chunks, **options)
    return mapped.with_format(None)


def stamps(source: Dataset) -> list[tuple[int, int]]:
    """Sizes and modification times of the source's files: data saved anew may have the fingerprint of the old."""
    files = [Path(file["filename"]).stat() for file in source.cache_files]
    return [(file.st_size, file.st_mtime_ns) for file in files]


def cache_file(cache_dir: str | None, *content) -> str:
    """Path of the cache file for rows that this code makes from `content`. The source's folder may be read-only."""
    code = [Path(file).read_bytes() for file in (__file__, image_decoding.__file__, synthetic_fashion.__file__)]
    folder = cache_folder(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{Hasher.hash([code, PIL.__version__, content])}.arrow")


def cache_folder(cache_dir: str | None) -> Path:
    """Where this package keeps what it computes once: in `cache_dir`, by default the cache of `datasets`."""
    return Path(cache_dir or datasets_config.HF_DATASETS_CACHE).expanduser() / "ddpm-diffusers"


def draw_synthetic(count: int, seed: int, resolution: int, channels: int, cache_dir: str | None = None) -> Dataset:
    """The first `count` images of the built-in set, with the columns of `load_images`, drawn into the Arrow cache."""
    return map_once(
        Dataset.from_dict({"index": np.arange(count)}),
        draw_rows,
        channels * resolution**2,
        {"label": ClassLabel(names=synthetic_fashion.CLASS_NAMES)},
        remove_columns=["index"],
        fn_kwargs={"seed": seed, "resolution": resolution, "channels": channels},
        cache_file_name=cache_file(cache_dir, SYNTHETIC, count, seed, resolution, channels),
        desc=f"Drawing {count} garments at {resolution}x{resolution}",
    )


def draw_rows(table: pa.Table, seed: int, resolution: int, channels: int) -> pa.Table:
    indices = table.column("index").to_numpy()
    images, labels = synthetic_fashion.draw_garments(indices, seed=seed, resolution=resolution, channels=channels)
    return pixel_table(images, pa.table({"label": labels}))
