"""The built-in garments: a pure function of (seed, index), learnable, and served as any other data set."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from ddpm_diffusers import data
from ddpm_diffusers.data import ImageArrays, draw_synthetic, load_images
from ddpm_diffusers.synthetic_fashion import CLASS_NAMES, draw_garments


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_depends_on_seed_and_index_alone(channels):
    rng = np.random.default_rng(0)
    indices = np.concatenate([rng.integers(0, 3000, 60), [0, 2**40 + 3, 2**63 - 1]])
    images, labels = draw_garments(indices, seed=5, resolution=16, channels=channels)
    shuffled = rng.permutation(len(indices))
    for chosen in (shuffled, shuffled[:7], np.repeat(shuffled[:3], 2)):
        again, labels_again = draw_garments(indices[chosen], seed=5, resolution=16, channels=channels)
        np.testing.assert_array_equal(again, images[chosen])
        np.testing.assert_array_equal(labels_again, labels[chosen])
    for i in range(0, len(indices), 8):
        np.testing.assert_array_equal(
            draw_garments([int(indices[i])], seed=5, resolution=16, channels=channels)[0][0], images[i]
        )


def test_a_picture_does_not_depend_on_how_many_are_drawn_at_a_time():
    # at 128x128 four pictures fill a chunk of work
    together = draw_garments(range(0, 90, 10), resolution=128)[0]
    alone = np.concatenate([draw_garments([i], resolution=128)[0] for i in range(0, 90, 10)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("other_seed", [1, 2**64 - 1])
def test_another_seed_and_another_index_draw_another_picture(other_seed):
    images = np.concatenate([draw_garments(range(500), seed=seed, resolution=16)[0] for seed in (0, other_seed)])
    assert len(np.unique(images.reshape(1000, -1), axis=0)) == 1000


@pytest.mark.parametrize(("count", "channels", "resolution"), [(0, 1, 28), (1, 3, 28), (23, 1, 8), (23, 3, 33)])
def test_shapes_types_and_labels(count, channels, resolution):
    images, labels = draw_garments(range(100, 100 + count), resolution=resolution, channels=channels)
    assert images.shape == (count, channels, resolution, resolution) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [i % 10 for i in range(count)]


def test_colour_is_the_grey_picture_with_one_tint_each():
    grey = draw_garments(range(200), resolution=16)[0].astype(float)
    colour = draw_garments(range(200), resolution=16, channels=3)[0].astype(float)
    np.testing.assert_array_equal(colour.max(axis=1, keepdims=True), grey)  # the strongest channel is untinted
    tint = colour.sum(axis=(2, 3)) / grey.sum(axis=(2, 3))  # (200, 3)
    assert np.abs(colour - grey * tint[:, :, None, None]).max() < 2  # rounding
    assert len(np.unique(tint.round(3), axis=0)) == 200


def test_garments_stand_out_from_black_and_fill_a_fair_part_of_the_picture():
    images = draw_garments(range(1000), resolution=28)[0]
    filled = (images > 0).mean(axis=(1, 2, 3))
    assert filled.min() > 0.1 and filled.max() < 0.9
    assert (images.max(axis=(1, 2, 3)) > 64).all()


def test_classes_can_be_told_apart():
    images, labels = draw_garments(range(2000), resolution=16)
    rows = images.reshape(2000, -1).astype(float)
    means = np.stack([rows[:1000][labels[:1000] == label].mean(axis=0) for label in range(10)])
    guesses = np.square(rows[1000:, None] - means).sum(axis=2).argmin(axis=1)
    assert (guesses == labels[1000:]).mean() > 0.9  # 0.944 to 0.957 with seeds 0 to 3


def test_edges_are_antialiased():
    # a pixel is the mean of what a finer drawing shows there
    coarse = draw_garments(range(200), resolution=16)[0].astype(float)
    fine = draw_garments(range(200), resolution=64)[0].astype(float)
    averaged = fine.reshape(200, 1, 16, 4, 16, 4).mean(axis=(3, 5))
    sampled = fine[..., 2::4, 2::4]  # what drawing without antialiasing would give
    error, error_of_sampling = np.abs(coarse - averaged).mean(), np.abs(sampled - averaged).mean()
    assert error < 4 and error < error_of_sampling / 2  # 2.6 and 10.6 grey levels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"`seed` is -1; .* in \[0, 2\^64\)"),
        ({"seed": 2**64}, "`seed` is 18446744073709551616"),
        ({"resolution": 7}, "`resolution` is 7; .* at least 8"),
        ({"channels": 2}, "`channels` is 2; it must be 1 .grey. or 3"),
        ({"indices": [3, -1]}, r"`indices` is \[3, -1\]; they must be from 0"),
        ({"indices": [2**63]}, "`indices` is .*; they must be from 0"),
    ],
)
def test_errors_name_the_value_and_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_garments(**{"indices": [0]} | arguments)


@pytest.mark.parametrize(("channels", "split", "seed"), [(1, "train", 0), (3, "test", 1)])
def test_as_a_data_set_it_has_the_columns_and_rows_of_any_other(channels, split, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_BYTES", channels * 100 * 11)  # 11 rows a chunk
    drawn = load_images(
        "synthetic-fashion", resolution=10, channels=channels, max_samples=35, split=split, cache_dir=tmp_path
    )
    images, labels = draw_garments(range(35), seed=seed, resolution=10, channels=channels)
    np.testing.assert_array_equal(ImageArrays(drawn, (channels, 10, 10)).__getitems__(range(35)), images)
    assert drawn["label"][:] == labels.tolist() and tuple(drawn.features["label"].names) == CLASS_NAMES

    rows = {"image": [PILImage.new("RGB", (10, 10))], "label": [0]}
    (tmp_path / "other").mkdir()
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(
        tmp_path / "other" / "train.parquet"
    )
    other = load_images(str(tmp_path / "other"), resolution=10, channels=channels, cache_dir=tmp_path)
    assert set(drawn.column_names) == set(other.column_names)
    assert drawn.features["image"] == other.features["image"]


def test_a_second_call_reads_the_cache(tmp_path):
    def cached():
        return {path: path.stat().st_ino for path in tmp_path.rglob("*.arrow")}

    first = draw_synthetic(50, 0, 12, 1, tmp_path)
    files = cached()
    second = draw_synthetic(50, 0, 12, 1, tmp_path)
    assert len(files) == 1 and cached() == files  # a file drawn anew would be another
    assert first.data.equals(second.data)
    for arguments in ((51, 0, 12, 1), (50, 1, 12, 1), (50, 0, 8, 1), (50, 0, 12, 3)):
        count, seed, resolution, channels = arguments
        images = draw_garments(range(count), seed=seed, resolution=resolution, channels=channels)[0]
        other = ImageArrays(draw_synthetic(*arguments, tmp_path), images.shape[1:])
        np.testing.assert_array_equal(other.__getitems__(range(count)), images)
    assert len(cached()) == 5
