"""Decoded images: gathered into batches as row by row, cached once for what they are made of and by whom."""

import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from image_sets import random_images, read, reference, save, store
from PIL import Image as PILImage
from torch.utils.data import DataLoader, default_convert

from ddpm_diffusers import data, image_decoding
from ddpm_diffusers.data import ImageArrays, load_images

SEVERAL_CHUNKS = 7 * 64  # bytes: 7 images of 8x8 in grey


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def cache_files(folder):
    return {path: path.stat().st_ino for path in Path(folder).rglob("*.arrow")}


# batches


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK_BYTES", SEVERAL_CHUNKS)
        return load_images(**store(random_images(50), folder / "source"), resolution=8, cache_dir=str(folder))


def test_a_batch_is_the_rows_one_by_one(decoded):
    arrays, rows = ImageArrays(decoded, (1, 8, 8)), read(decoded, 8)
    np.testing.assert_array_equal(rows, reference(random_images(50), 8))
    assert len(arrays) == 50 and len(arrays.chunks) == 8
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 50, 20).tolist() for _ in range(20)]
    for indices in ([], [49], range(50), range(6, 8), [3, 3, 48, 3], *drawn):
        batch = arrays.__getitems__(list(indices))
        assert batch.dtype == torch.uint8
        np.testing.assert_array_equal(batch, rows[list(indices)])
    for i in range(50):
        np.testing.assert_array_equal(arrays[i], rows[i])


def test_an_index_out_of_range_is_an_error(decoded):
    for indices in ([50], [0, -1], [10**9]):
        with pytest.raises(IndexError, match="from 0 to 49"):
            ImageArrays(decoded, (1, 8, 8)).__getitems__(indices)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_the_arrays_are_views_of_the_mapped_file(decoded):
    (file,) = (entry["filename"] for entry in decoded.cache_files)
    arrays = ImageArrays(decoded, (1, 8, 8))
    sent = pickle.loads(pickle.dumps(arrays))  # as to a worker process that is not forked
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(file):
            mapped.append([int(address, 16) for address in line.split()[0].split("-")])
    for chunk in arrays.chunks + sent.chunks:
        start = chunk.ctypes.data
        assert any(low <= start and start + chunk.nbytes <= high for low, high in mapped)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gives_the_sampler_s_order_whatever_its_workers(decoded, num_workers):
    arrays, rows = ImageArrays(decoded, (1, 8, 8)), read(decoded, 8)
    order = np.random.default_rng(1).permutation(50)
    loader = DataLoader(arrays, 8, sampler=order.tolist(), num_workers=num_workers, collate_fn=default_convert)
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


def test_of_two_processes_that_need_an_array_one_makes_it(tmp_path, cache, monkeypatch):
    fork, draw_rows = multiprocessing.get_context("fork"), data.draw_rows

    def draw_slowly(*arguments, **settings):
        (tmp_path / f"drawn by {os.getpid()}").touch()
        time.sleep(1)  # so that the other process comes meanwhile
        return draw_rows(*arguments, **settings)

    def load():
        both_are_there.wait(60)
        loaded = load_images("synthetic-fashion", resolution=8, max_samples=50, cache_dir=cache)
        assert len(loaded) == 50

    monkeypatch.setattr(data, "draw_rows", draw_slowly)
    both_are_there = fork.Barrier(2)
    processes = [fork.Process(target=load, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("drawn by *"))) == 1


def test_a_data_set_saved_anew_with_other_pixels_is_decoded_anew(tmp_path, cache):
    for seed in (0, 1):
        images, paths = random_images(3, seed=seed), [f"{i}.png" for i in range(3)]
        save(images, tmp_path, paths)
        # the same paths each time, and so the fingerprint
        rows = {"image": [str(tmp_path / path) for path in paths]}
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        Dataset.from_dict(rows, features=Features({"image": Image()})).save_to_disk(tmp_path / "saved")
        found = read(load_images(str(tmp_path / "saved"), resolution=8, cache_dir=cache), 8)
        np.testing.assert_array_equal(found, reference(images, 8))


def test_no_setting_reads_the_cache_of_another(tmp_path, cache, monkeypatch):
    images = random_images(6, "RGB", (12, 12))
    source = store(images, tmp_path / "source")
    settings = [(8, 1, 6, False), (8, 3, 6, False), (9, 1, 6, False), (8, 1, 5, False), (8, 1, 6, True)]
    for resolution, channels, count, crop in settings:
        arguments = {"resolution": resolution, "channels": channels, "max_samples": count, "center_crop": crop}
        found = read(load_images(**source, **arguments, cache_dir=cache), resolution, channels)
        np.testing.assert_array_equal(found, reference(images[:count], resolution, channels))
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
    content, stamp = damaged.read_bytes(), damaged.stat().st_mtime_ns
    damaged.write_bytes(b"\0" * len(content))
    os.utime(damaged, ns=(stamp, stamp))
    with pytest.raises(ValueError, match="Image 25 .* cannot be decoded"):
        load_images(**source, resolution=8, cache_dir=cache)
    assert not [path for path in (Path(cache) / "ddpm-diffusers").iterdir() if path.suffix != ".lock"]
    damaged.write_bytes(content)
    os.utime(damaged, ns=(stamp, stamp))  # the same fingerprint, so a cache of it would be found
    np.testing.assert_array_equal(read(load_images(**source, resolution=8, cache_dir=cache), 8), reference(images, 8))
