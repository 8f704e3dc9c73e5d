"""Small images at random, the ways to store them as a data set, and what PIL alone makes of them."""

import io

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage


def pixels_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def random_images(count, mode="L", size=(8, 8), seed=0):
    shape = (count, size[1], size[0], len(mode))
    return [PILImage.fromarray(p.squeeze(-1) if mode == "L" else p) for p in pixels_of(shape, seed)]


def encode(image, format="png", **options):
    """A row of a column of images."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def as_dataset(images):
    features = Features({"image": Image(), "label": Value("int64"), "name": Value("string")})
    count = range(len(images))
    columns = {"image": images, "label": [i % 3 for i in count], "name": [str(i) for i in count]}
    return Dataset.from_dict(columns, features=features)


def save(images, folder, paths):
    """Write the images to files of these paths in the folder."""
    for image, path in zip(images, paths, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / path)


def store(images, folder, kind="parquet"):
    """Write a data set to a folder; returns the arguments of `load_images` that name it."""
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        as_dataset(images).to_parquet(folder / "train.parquet")
    elif kind == "disk":
        as_dataset(images).save_to_disk(folder)
    elif kind == "disk with splits":
        DatasetDict({"train": as_dataset(images), "test": as_dataset(images[:1])}).save_to_disk(folder)
    else:
        save(images, folder, [f"{i:04}.png" for i in range(len(images))])
    return {"train_data_dir" if kind == "train_data_dir" else "dataset_name": str(folder)}


def read(dataset, resolution, channels=1):
    """Row by row, as `datasets` reads: (N, C, H, W)."""
    rows = [row["image"] for row in dataset]
    return np.array(rows, np.uint8).reshape(-1, channels, resolution, resolution)


def reference(images, resolution, channels=1):
    """Each image by PIL alone, (N, C, H, W)."""
    size = (resolution, resolution)
    images = [image.convert("RGB" if channels == 3 else "L") for image in images]
    images = [np.asarray(image.resize(size, PILImage.Resampling.BILINEAR)) for image in images]
    return np.stack([image.reshape(*size, channels).transpose(2, 0, 1) for image in images])
