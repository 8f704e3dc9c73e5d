"""Data sets to uint8 arrays to batches, against PIL, numpy and row-by-row reading; every error of `load_images`."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import assert_says
from datasets import Dataset, DatasetDict, Features, Image, Value
from hub_server import HubServer, Repo
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from ddpm_diffusers import data, image_decoding
from ddpm_diffusers.data import ImageArrays, as_batch, load_images
from ddpm_diffusers.image_decoding import decode_image
from ddpm_diffusers.streaming import StreamedBatches, open_stream

SEVERAL_CHUNKS = 7 * 64  # bytes: 7 images of 8x8 in grey


def random_images(count, mode="L", size=(8, 8), seed=0):
    shape = (count, size[1], size[0], len(mode))
    return [PILImage.fromarray(p.squeeze(-1) if mode == "L" else p) for p in pixels_of(shape, seed)]


def pixels_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def as_dataset(images):
    features = Features({"image": Image(), "label": Value("int64"), "name": Value("string")})
    count = range(len(images))
    columns = {"image": images, "label": [i % 3 for i in count], "name": [str(i) for i in count]}
    return Dataset.from_dict(columns, features=features)


def encode(image, format="png", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


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
        for i, image in enumerate(images):
            image.save(folder / f"{i:04}.png")
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


def cache_files(folder):
    return {path: path.stat().st_ino for path in Path(folder).rglob("*.arrow")}


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


# sources and pixels


def test_a_class_or_file_named_as_a_split_is_an_image_like_others(tmp_path, cache, caplog):
    images, folder = random_images(7, "L", (8, 8)), tmp_path / "source"
    paths = ("car/0.png", "car/toy-train.png", "plane/test_1.png", "train/0.png", "train/1.png", "4.png", "val.png")
    for image, path in zip(images, paths, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / path)
    decoded = read(load_images(train_data_dir=str(folder), resolution=8, cache_dir=cache), 8)
    assert sorted(image.tobytes() for image in decoded) == sorted(np.asarray(image).tobytes() for image in images)
    assert not caplog.messages
    assert len(load_images(str(folder), resolution=8, cache_dir=cache)) < 7  # as `datasets` documents it
    assert "holds 7 images, and `datasets` takes" in caplog.text

    for path in ("car", "plane", "4.png", "val.png"):  # what is left is a split
        (folder / path).rename(tmp_path / path)
    (tmp_path / "car").rename(folder / "test")
    (folder / "README.md").write_text("no image")
    for path in ("__MACOSX/train/._0.png", "annotations/train.json", ".hidden.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    for split in ("train", "test"):
        found = load_images(train_data_dir=str(folder), split=split, resolution=8, cache_dir=cache)
        assert len(found) == 2


def test_a_class_named_as_a_split_stays_within_its_split(tmp_path, cache, caplog):
    folder = tmp_path / "toys [2024]"  # which as a pattern would match another name
    kept = {}
    for split, count in (("train", 3), ("test", 2)):
        kept[split] = random_images(2 * count, "L", (8, 8), seed=count)
        for i, image in enumerate(kept[split]):
            path = folder / split / ("train" if i % 2 else "train_station") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    for split, images in kept.items():
        decoded = load_images(train_data_dir=str(folder), split=split, resolution=8, cache_dir=cache)
        found = sorted(image.tobytes() for image in read(decoded, 8))
        assert found == sorted(np.asarray(image).tobytes() for image in images)
        assert decoded.features["label"].names == ["train", "train_station"]
    folder = folder.rename(tmp_path / "toys")
    assert not caplog.messages and len(load_images(str(folder), resolution=8, cache_dir=cache)) > 6
    assert "toys holds 10 images, and `datasets` takes" in caplog.text


def test_images_that_are_left_out_are_told(tmp_path, cache, caplog):
    folder, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for i, image in enumerate(random_images(4)):
        path = (folder / "cats" if i else elsewhere) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (folder / "dogs").symlink_to(elsewhere, target_is_directory=True)
    assert len(load_images(train_data_dir=str(folder), resolution=8, cache_dir=cache)) == 3
    assert "source holds 4 images, and `datasets` takes 3, by names" in caplog.text
    (folder / "dogs").unlink()
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "more").symlink_to(folder / "cats", target_is_directory=True)
    caplog.clear()
    assert len(load_images(train_data_dir=str(folder), resolution=8, cache_dir=cache)) == 3 and not caplog.messages
    (folder / "metadata.csv").write_text("file_name,text\ncats/1.png,a cat\n")
    assert len(load_images(train_data_dir=str(folder), resolution=8, cache_dir=cache)) == 1
    assert "source holds 3 images, and `datasets` takes 1, by names" in caplog.text


@pytest.mark.parametrize("names", [("train", "test"), ("training", "validation")])
def test_splits_may_be_links(names, tmp_path, cache, caplog):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, count in zip(names, (3, 2), strict=True):
        (tmp_path / f"{name}-images" / "class").mkdir(parents=True)
        for i, image in enumerate(random_images(count)):
            image.save(tmp_path / f"{name}-images" / "class" / f"{i}.png")
        (folder / name).symlink_to(tmp_path / f"{name}-images", target_is_directory=True)
    assert len(load_images(train_data_dir=str(folder), resolution=8, cache_dir=cache)) == 3
    assert not caplog.messages


@pytest.mark.parametrize("where", ["{split}.zip", "{split}/images.zip", "{split}-1.zip"])
@pytest.mark.parametrize("argument", ["dataset_name", "train_data_dir"])
def test_images_in_archives(argument, where, tmp_path, cache, caplog):
    splits = {"train": random_images(70), "test": random_images(2, seed=1)}
    for split, images in splits.items():
        path = tmp_path / "source" / where.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for i, image in enumerate(images):
                archive.writestr(f"{i}.png", encode(image)["bytes"])
    for split, images in splits.items():
        decoded = load_images(**{argument: str(tmp_path / "source")}, split=split, resolution=8, cache_dir=cache)
        found = sorted(image.tobytes() for image in read(decoded, 8))
        assert found == sorted(np.asarray(image).tobytes() for image in images)
    assert not caplog.messages


def damaged_archive(folder: Path) -> None:
    """Three images, the second with a wrong checksum."""
    folder.mkdir()
    contents = [encode(image)["bytes"] for image in random_images(3)]
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, content in enumerate(contents):
            archive.writestr(f"{i}.png", content)
    whole = (folder / "images.zip").read_bytes()
    (folder / "images.zip").write_bytes(whole.replace(contents[1], contents[1][:-1] + b"?"))


def test_a_damaged_image_in_an_archive_is_named(tmp_path, cache, caplog):
    damaged_archive(tmp_path / "source")
    with pytest.raises(ValueError, match=r"Image 1 of the data set \(zip://1.png.*\) cannot be decoded"):
        load_images(train_data_dir=str(tmp_path / "source"), resolution=8, cache_dir=cache)
    stream = open_stream("", train_data_dir=str(tmp_path / "source"), cache_dir=cache)
    run = StreamedBatches(stream, (1, 8, 8), 2, buffer_size=3, seed=0)
    batches = {batch.numpy().tobytes() for batch in islice(run, 20)}
    assert len(batches) == 2 and "zip://1.png" in caplog.text  # of the other two, in both orders


DECODING = """
import sys
from ddpm_diffusers.data import load_images
load_images("synthetic-fashion", resolution=28, cache_dir=sys.argv[1])
"""


def test_of_two_processes_that_need_an_array_one_makes_it(cache):
    command = [sys.executable, "-c", DECODING, cache]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert sorted("Drawing 20000 garments" in text for text in told) == [False, True]


def test_folders_of_one_split_come_in_the_order_of_their_names(tmp_path, cache):
    images = random_images(6)
    for image, name in zip(images, ("train-1", "train-2", "train-3", "train-4", "test", "val"), strict=True):
        (tmp_path / "source" / name).mkdir(parents=True)
        image.save(tmp_path / "source" / name / "0.png")
    decoded = load_images(train_data_dir=str(tmp_path / "source"), resolution=8, cache_dir=cache)
    np.testing.assert_array_equal(read(decoded, 8), reference(images[:4], 8))


@pytest.mark.parametrize("kind", ["parquet", "images", "train_data_dir", "disk", "disk with splits"])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("L", 3), ("RGB", 1), ("RGB", 3)])
@pytest.mark.parametrize("resolution", [12, 7])
def test_pixels_are_what_pil_decodes_and_resizes(kind, mode, channels, resolution, tmp_path, cache):
    images = random_images(5, mode, (12, 12))
    source = store(images, tmp_path / "source", kind)
    decoded = load_images(**source, resolution=resolution, channels=channels, cache_dir=cache)
    np.testing.assert_array_equal(read(decoded, resolution, channels), reference(images, resolution, channels))
    if "disk" in kind or kind == "parquet":
        assert set(decoded.column_names) == {"image", "label"} and decoded["label"][:] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(("max_samples", "expected"), [(1, 1), (3, 3), (99, 5)])
def test_max_samples_takes_the_first(max_samples, expected, tmp_path, cache):
    images = random_images(5)
    decoded = load_images(**store(images, tmp_path / "s"), resolution=8, max_samples=max_samples, cache_dir=cache)
    np.testing.assert_array_equal(read(decoded, 8), reference(images[:expected], 8))


def test_other_names_of_split_and_column(tmp_path, cache):
    images = random_images(3)
    splits = {"train": as_dataset(images[:1]), "extra": as_dataset(images[1:])}
    DatasetDict(splits).rename_column("image", "picture").save_to_disk(tmp_path / "s")
    decoded = load_images(str(tmp_path / "s"), resolution=8, split="extra", image_column="picture", cache_dir=cache)
    np.testing.assert_array_equal(read(decoded, 8), reference(images[1:], 8))


def test_center_crop_takes_the_central_square_of_each(tmp_path, cache):
    sizes = [(12, 8), (8, 15), (9, 9), (20, 21)]
    images = [random_images(1, size=size, seed=i)[0] for i, size in enumerate(sizes)]
    source = store(images, tmp_path / "source")
    decoded = load_images(**source, resolution=8, center_crop=True, cache_dir=cache)
    crops = [(0, 2, 8), (3, 0, 8), (0, 0, 9), (0, 0, 20)]  # top, left, side
    squares = [np.asarray(image)[t : t + s, x : x + s] for image, (t, x, s) in zip(images, crops, strict=True)]
    np.testing.assert_array_equal(read(decoded, 8), reference(map(PILImage.fromarray, squares), 8))


# kinds of image


@pytest.mark.parametrize(("format", "dtype"), [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2")])
def test_sixteen_bit_grey_is_scaled_not_clipped(format, dtype, tmp_path, cache):
    values = np.linspace(0, 65535, 64).round().astype(dtype).reshape(8, 8)
    image = PILImage.frombytes("I;16B" if dtype == ">u2" else "I;16", (8, 8), values.tobytes())
    source = store([encode(image, format)], tmp_path / "source")
    for channels in (1, 3):
        decoded = load_images(**source, resolution=8, channels=channels, cache_dir=cache)
        expected = np.broadcast_to(np.round(values / 65535 * 255), (1, channels, 8, 8))
        np.testing.assert_array_equal(read(decoded, 8, channels), expected)


def test_the_transparent_value_of_sixteen_bit_grey_shows_black(tmp_path, cache):
    values = np.linspace(0, 65535, 64).round().astype("<u2").reshape(8, 8)
    image = PILImage.frombytes("I;16", (8, 8), values.tobytes())
    source = store([encode(image, transparency=int(values[7, 7]))], tmp_path / "source")  # white
    decoded = load_images(**source, resolution=8, cache_dir=cache)
    values[7, 7] = 0
    np.testing.assert_array_equal(read(decoded, 8)[0, 0], np.round(values / 65535 * 255))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_show_black(mode, tmp_path, cache):
    pixels = pixels_of((8, 8, len(mode)))
    pixels[:4, :, -1] = np.where(np.arange(8) < 4, 0, 255)  # wholly clear, and wholly opaque
    image = PILImage.fromarray(pixels)
    decoded = load_images(**store([image], tmp_path / "s"), resolution=8, channels=len(mode) - 1, cache_dir=cache)
    expected = pixels[..., :-1].astype(float) * pixels[..., -1:] / 255
    difference = read(decoded, 8, len(mode) - 1)[0] - expected.transpose(2, 0, 1)
    assert np.abs(difference).max() <= 1 and not difference[:, :4].any()


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_and_bilevel_images_are_looked_up(transparent, tmp_path, cache):
    colours, indices = pixels_of((16, 3)), pixels_of((8, 8)) % 16
    palette = PILImage.fromarray(indices, "L")
    palette.putpalette(colours.tobytes())
    options = {"transparency": 5} if transparent else {}
    decoded = load_images(
        **store([encode(palette, **options)], tmp_path / "p"), resolution=8, channels=3, cache_dir=cache
    )
    if transparent:
        colours[5] = 0
    np.testing.assert_array_equal(read(decoded, 8, 3)[0], colours[indices].transpose(2, 0, 1))

    bits = pixels_of((8, 8)) > 127
    decoded = load_images(**store([PILImage.fromarray(bits)], tmp_path / "b"), resolution=8, cache_dir=cache)
    np.testing.assert_array_equal(read(decoded, 8)[0, 0], bits * 255)


def test_images_are_turned_as_their_exif_says(tmp_path, cache):
    image = random_images(1, size=(8, 8))[0]
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the camera was held on its side: a quarter turn clockwise shows it upright
    source = store([encode(image, exif=exif)], tmp_path / "source")
    decoded = load_images(**source, resolution=8, cache_dir=cache)
    np.testing.assert_array_equal(read(decoded, 8)[0, 0], np.rot90(np.asarray(image), -1))


# batches


@pytest.fixture
def decoded(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_BYTES", SEVERAL_CHUNKS)
    return load_images(**store(random_images(50), tmp_path / "source"), resolution=8, cache_dir=cache)


def test_a_batch_is_the_rows_one_by_one(decoded):
    arrays, rows = ImageArrays(decoded, (1, 8, 8)), read(decoded, 8)
    np.testing.assert_array_equal(rows, reference(random_images(50), 8))
    assert len(arrays) == 50 and len(arrays.chunks) == 8
    rng = np.random.default_rng(0)
    for indices in (
        [],
        [49],
        range(50),
        range(6, 8),
        [3, 3, 48, 3],
        *(rng.integers(0, 50, 20).tolist() for _ in range(20)),
    ):
        batch = arrays.__getitems__(list(indices))
        assert batch.dtype == torch.uint8
        np.testing.assert_array_equal(batch, rows[list(indices)])
    for i in range(50):
        np.testing.assert_array_equal(arrays[i], rows[i])


def test_three_channels_keep_their_order(tmp_path, cache):
    images = random_images(4, "RGB")
    decoded = load_images(**store(images, tmp_path / "s"), resolution=8, channels=3, cache_dir=cache)
    np.testing.assert_array_equal(
        ImageArrays(decoded, (3, 8, 8)).__getitems__([2, 0]), reference(images, 8, 3)[[2, 0]]
    )


@pytest.mark.parametrize("indices", [[50], [0, -1], [10**9]])
def test_an_index_out_of_range_is_an_error(decoded, indices):
    with pytest.raises(IndexError, match="from 0 to 49"):
        ImageArrays(decoded, (1, 8, 8)).__getitems__(indices)


def test_a_wrong_shape_is_an_error(decoded):
    with pytest.raises(ValueError, match="reshape"):
        ImageArrays(decoded, (1, 4, 4))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_the_arrays_are_views_of_the_mapped_file(decoded):
    (file,) = (entry["filename"] for entry in decoded.cache_files)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(file):
            mapped.append([int(address, 16) for address in line.split()[0].split("-")])
    for chunk in ImageArrays(decoded, (1, 8, 8)).chunks:
        start = chunk.ctypes.data
        assert any(low <= start and start + chunk.nbytes <= high for low, high in mapped)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gives_the_sampler_s_order_whatever_its_workers(decoded, num_workers):
    arrays, rows = ImageArrays(decoded, (1, 8, 8)), read(decoded, 8)
    order = np.random.default_rng(1).permutation(50)
    loader = DataLoader(arrays, 8, sampler=order.tolist(), num_workers=num_workers, collate_fn=as_batch)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    np.testing.assert_array_equal(torch.cat(batches), rows[order])


def test_the_fingerprint_is_of_the_content_wherever_it_is(tmp_path, cache):
    images = random_images(5)
    changed = np.asarray(images[2]).copy()
    changed[3, 3] ^= 1
    stored = {
        "parquet": images, "disk": images, "fewer": images[:4], "turned": images[::-1],
        "a pixel": [*images[:2], PILImage.fromarray(changed), *images[3:]],
    }  # fmt: skip
    found = {}
    for name, them in stored.items():
        source = store(them, tmp_path / name, "disk" if name == "disk" else "parquet")
        found[name] = ImageArrays(load_images(**source, resolution=8, cache_dir=cache), (1, 8, 8)).fingerprint()
    assert found.pop("parquet") == found["disk"] and len(set(found.values())) == len(found)


# cache


@pytest.mark.parametrize("kind", ["parquet", "images", "disk"])
def test_a_second_call_decodes_nothing(kind, tmp_path, cache):
    source = store(random_images(6), tmp_path / "source", kind)
    before = sorted(path.name for path in (tmp_path / "source").rglob("*"))
    first = load_images(**source, resolution=8, cache_dir=cache)
    files = cache_files(cache)
    second = load_images(**source, resolution=8, cache_dir=cache)
    assert files and cache_files(cache) == files  # a file decoded anew would be another
    assert first.data.equals(second.data)
    assert sorted(path.name for path in (tmp_path / "source").rglob("*")) == before  # a source may be read-only


def test_a_data_set_saved_anew_with_other_pixels_is_decoded_anew(tmp_path, cache):
    for seed in (0, 1):
        images = random_images(3, seed=seed)
        for i, image in enumerate(images):
            image.save(tmp_path / f"{i}.png")
        paths = [str(tmp_path / f"{i}.png") for i in range(3)]  # the same each time, and so the fingerprint
        saved = Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        saved.save_to_disk(tmp_path / "saved")
        found = read(load_images(str(tmp_path / "saved"), resolution=8, cache_dir=cache), 8)
        np.testing.assert_array_equal(found, reference(images, 8))


def test_no_setting_reads_the_cache_of_another(tmp_path, cache, monkeypatch):
    images = random_images(6, "RGB", (12, 12))
    source = store(images, tmp_path / "source")
    settings = [(8, 1, 6, False), (8, 3, 6, False), (9, 1, 6, False), (8, 1, 5, False), (8, 1, 6, True)]
    for resolution, channels, count, crop in settings:
        arguments = {"resolution": resolution, "channels": channels, "max_samples": count, "center_crop": crop}
        decoded = load_images(**source, **arguments, cache_dir=cache)
        np.testing.assert_array_equal(
            read(decoded, resolution, channels), reference(images[:count], resolution, channels)
        )
    # nor does another data set in the same place, or other decoding code
    other = random_images(6, "RGB", (12, 12), seed=1)
    store(other, tmp_path / "source")
    np.testing.assert_array_equal(read(load_images(**source, resolution=8, cache_dir=cache), 8), reference(other, 8))
    files = cache_files(cache)
    (tmp_path / "changed.py").write_bytes(Path(image_decoding.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(image_decoding, "__file__", str(tmp_path / "changed.py"))
    load_images(**source, resolution=8, cache_dir=cache)
    assert len(cache_files(cache)) == len(files) + 1


def test_interrupted_decoding_leaves_nothing_that_a_second_call_would_use(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_BYTES", SEVERAL_CHUNKS)
    images = random_images(30)
    source = store(images, tmp_path / "source", "images")
    damaged = tmp_path / "source" / "0025.png"  # in the fourth chunk
    content, time = damaged.read_bytes(), damaged.stat().st_mtime_ns
    damaged.write_bytes(b"\0" * len(content))
    os.utime(damaged, ns=(time, time))
    with pytest.raises(ValueError, match="Image 25 .* cannot be decoded"):
        load_images(**source, resolution=8, cache_dir=cache)
    assert not [path for path in (Path(cache) / "ddpm-diffusers").iterdir() if path.suffix != ".lock"]
    damaged.write_bytes(content)
    os.utime(damaged, ns=(time, time))  # the same fingerprint, so a cache of it would be found
    np.testing.assert_array_equal(read(load_images(**source, resolution=8, cache_dir=cache), 8), reference(images, 8))


# errors: each names the value, the rule and the fix


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"resolution": 0}, ["`resolution` is 0", "positive integer"]),
        ({"resolution": 8.0}, ["`resolution` is 8.0", "positive integer"]),
        ({"max_samples": 0}, ["`max_samples` is 0", "positive integer"]),
        ({"max_samples": -2}, ["`max_samples` is -2", "positive integer"]),
        ({"channels": 4}, ["`channels` is 4", "1 (grey) or 3 (RGB)"]),
        ({"image_column": "picture"}, ["'picture'", "image, label, name", "`image_column`"]),
        ({"image_column": "label"}, ["'label'", "int64", "not images", "`image_column`"]),
        ({"split": "test"}, ["test", "['train']", "`split`"]),
        ({"dataset_config_name": "large"}, ["'large'", "['default']"]),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path, cache):
    source = store(random_images(2), tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**{**source, "resolution": 8, "cache_dir": cache, **arguments})
    assert_says(error, words)


@pytest.mark.parametrize("name", ["", "../nope", "./nope", "/nope/nope", "nope/nope/nope", "here"])
def test_a_folder_that_is_not_there_or_empty(name, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for argument in ("dataset_name", "train_data_dir"):
        if name or argument == "dataset_name":
            with pytest.raises(ValueError) as error:
                load_images(**{argument: name}, resolution=8, cache_dir=cache)
            assert_says(error, [repr(name), f"`{argument}`", "synthetic-fashion"])


def test_a_split_that_a_saved_data_set_lacks(tmp_path, cache):
    source = store(random_images(2), tmp_path / "source", "disk with splits")
    with pytest.raises(ValueError) as error:
        load_images(**source, split="validation", resolution=8, cache_dir=cache)
    assert_says(error, ["'validation'", "train, test", "`split`"])


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_an_empty_split(kind, tmp_path, cache):
    source = store([], tmp_path / "source", kind)
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8, cache_dir=cache)
    assert_says(error, [source["dataset_name"], "`split`"])


def test_files_that_are_no_data_set(tmp_path, cache):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError) as error:
        load_images(str(tmp_path), resolution=8, cache_dir=cache)
    assert_says(error, [repr(str(tmp_path)), "cannot be read", "synthetic-fashion"])


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ((8, 10), ["Image 20 of the data set", " is 8x10; ", "the first is 8x8", "`center_crop`"]),
        # square, but of another size
        ((10, 10), ["Image 20 of the data set", " is 10x10; ", "the first is 8x8", "`center_crop`"]),
    ],
)
@pytest.mark.parametrize("chunk", [SEVERAL_CHUNKS, 2**26])  # the odd one with the first in its chunk, and not
def test_mixed_sizes(odd, words, chunk, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_BYTES", chunk)
    images = random_images(22)
    images[20] = random_images(1, size=odd)[0]
    source = store(images, tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8, cache_dir=cache)
    assert_says(error, words)


def test_images_of_one_size_that_are_not_square(tmp_path, cache):
    with pytest.raises(ValueError) as error:
        load_images(**store(random_images(2, size=(9, 8)), tmp_path / "s"), resolution=8, cache_dir=cache)
    assert_says(error, ["Image 0 of the data set", " is 9x8; ", "square", "`center_crop`"])


@pytest.mark.parametrize("first", [True, False])
def test_a_missing_image(first, tmp_path, cache):
    images = random_images(2)
    source = store([None, *images] if first else [*images, None], tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8, cache_dir=cache)
    assert_says(error, [f"Image {0 if first else 2} ", "missing (null)", "remove the row"])


@pytest.mark.parametrize("pixels", [np.zeros((8, 8), np.int32), np.zeros((8, 8), np.float32)])
def test_pixels_of_unknown_range(pixels, tmp_path, cache):
    source = store([*random_images(1), encode(PILImage.fromarray(pixels), "tiff")], tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8, cache_dir=cache)
    assert_says(error, ["Image 1 ", "range is unknown", "8 bits", "convert"])


PNG = encode(random_images(1)[0])["bytes"]


@pytest.mark.parametrize(
    "damaged",
    [b"", b"no image", PNG[:20], PNG[:60], PNG[:-30], PNG[:8] + b"\0\0\0\1" + PNG[12:], b"GIF89a" + b"\xff" * 20],
    ids=["empty", "text", "in the header", "in the pixels", "at the end", "short header", "65535x65535"],
)
def test_a_damaged_image(damaged, tmp_path, cache):
    source = store([*random_images(3), {"bytes": damaged, "path": None}], tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8, cache_dir=cache)
    assert_says(error, ["Image 3 ", "cannot be decoded", "repair or remove it", "synthetic-fashion"])


@pytest.mark.parametrize(
    ("mode", "channels", "warned"),
    [
        ("RGB", 1, True),
        ("RGB", 3, False),
        ("RGBA", 1, True),
        ("P", 1, True),
        ("L", 1, False),
        ("grey as RGB", 1, False),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_colour_that_is_made_grey_is_told(mode, channels, warned, streamed, tmp_path, cache, caplog, monkeypatch):
    monkeypatch.setattr(image_decoding.logger, "handlers", [caplog.handler])
    images = random_images(2, "L" if mode in ("L", "grey as RGB") else "RGB")
    source = store([image.convert(mode.removeprefix("grey as ")) for image in images], tmp_path / "source")
    if streamed:
        StreamedBatches(open_stream(**source), (channels, 8, 8), 1, buffer_size=2, seed=0)
    else:
        load_images(**source, resolution=8, channels=channels, cache_dir=cache)
    assert ("are in colour and are made grey" in caplog.text) == warned


def test_an_image_of_a_colour_space_without_conversion(tmp_path, cache):
    buffer = io.BytesIO()
    PILImage.new("LAB", (8, 8)).save(buffer, "tiff")
    source = store([*random_images(3), {"bytes": buffer.getvalue(), "path": None}], tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8, channels=1, cache_dir=cache)
    assert_says(error, ["Image 3 ", "LAB", "convert it"])


@pytest.mark.parametrize("format", ["png", "jpeg", "gif", "webp"])
def test_random_damage_gives_an_image_or_the_error_that_names_it(format):
    rng = np.random.default_rng(0)
    sound = encode(random_images(1, "RGB", (16, 16))[0], format)["bytes"]
    refused = 0
    for _ in range(200):
        damaged = np.frombuffer(sound, np.uint8).copy()
        damaged[rng.integers(len(damaged), size=8)] = rng.integers(0, 256, 8)
        try:
            decode_image({"bytes": damaged.tobytes()[: rng.integers(40, len(damaged))], "path": None}, 4)
        except ValueError as error:
            assert "Image 4 of the data set cannot be decoded" in str(error)
            refused += 1
    assert refused > 20


def test_a_single_saved_data_set_has_no_other_split(tmp_path):
    source = store(random_images(2), tmp_path / "source", "disk")
    with pytest.raises(ValueError, match="has no split 'test', but train alone"):
        load_images(**source, resolution=8, split="test", cache_dir=str(tmp_path / "cache"))


def test_the_images_may_be_in_a_column_named_label(tmp_path, cache):
    rows = {"image": random_images(3), "label": random_images(3, seed=1)}
    Dataset.from_dict(rows, Features({"image": Image(), "label": Image()})).save_to_disk(tmp_path / "s")
    decoded = load_images(str(tmp_path / "s"), resolution=8, image_column="label", cache_dir=cache)
    np.testing.assert_array_equal(read(decoded, 8), reference(rows["label"], 8))


def test_the_synthetic_set_has_no_other_split():
    with pytest.raises(ValueError, match="`split` is 'validation'; synthetic-fashion has train and test"):
        load_images("synthetic-fashion", resolution=8, split="validation")


# the Hub: in a process of its own, since its address is read once, at import


def run(script, *arguments, env):
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_data_set_of_the_hub_is_read_like_a_folder(tmp_path):
    images = random_images(4)
    store(images, tmp_path / "source")
    script = """if True:
        import sys
        from ddpm_diffusers.data import load_images
        images = load_images("user/grey", resolution=8)
        try:
            load_images("user/nope", resolution=8)
        except ValueError as error:
            sys.stderr.write(str(error))
            assert "no data set 'user/nope'" in str(error) and "synthetic-fashion" in str(error)
            print(images["image"][:])
    """
    with HubServer() as hub:
        hub.repos["datasets/user/grey"] = Repo("user/grey", dataset=True)
        hub.repos["datasets/user/grey"].commit(
            "data", {"data/train-0000.parquet": (tmp_path / "source" / "train.parquet").read_bytes()}
        )
        rows = json.loads(run(script, env=hub.env(tmp_path / "hf")))
    np.testing.assert_array_equal(np.reshape(rows, (4, 1, 8, 8)), reference(images, 8))


@pytest.mark.parametrize("kind", [
    "failing", pytest.param("closed", marks=pytest.mark.slow), pytest.param("behind", marks=pytest.mark.slow)
])  # fmt: skip
def test_a_hub_that_cannot_be_reached(kind, tmp_path):
    script = """if True:
        import time
        import datasets, huggingface_hub
        from ddpm_diffusers.data import load_images
        from ddpm_diffusers.streaming import open_stream
        time.sleep = lambda seconds: None  # the client waits 23 s between its tries
        for offline in (False, True):
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = offline
            for read in (lambda name: load_images(name, resolution=8), *([] if offline else [open_stream])):
                try:
                    read("zalando-datasets/fashion_mnist")
                except ConnectionError as error:
                    print(str(error).replace("\\n", " "))
    """
    with socket.socket() as closed, HubServer() as hub, HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as proxy:
        closed.bind(("127.0.0.1", 0))  # and not listening
        hub.fault = lambda method, path: 503
        Thread(target=proxy.serve_forever, daemon=True).start()  # it refuses whatever it is asked for
        env = {
            "closed": {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "NO_PROXY": "127.0.0.1"},
            "failing": {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1"},
            "behind": {"HF_ENDPOINT": "https://hub.example", "HTTPS_PROXY": f"http://127.0.0.1:{proxy.server_port}"},
        }[kind]
        messages = run(script, env={**env, "HF_HOME": str(tmp_path)}).splitlines()
        proxy.shutdown()
    assert len(messages) == 3 and "offline" in messages[2].lower()
    for message in messages:
        for words in ("cannot be reached", "'zalando-datasets/fashion_mnist'", "`dataset_name` synthetic-fashion"):
            assert words in message
