"""Folders, splits, archives and saved data sets: whose images are read, and the error where none can be."""

import zipfile
from itertools import islice

import numpy as np
import pytest
from conftest import assert_says
from datasets import Dataset, DatasetDict, Features, Image
from image_sets import as_dataset, encode, random_images, read, reference, save, store

from ddpm_diffusers.data import load_images
from ddpm_diffusers.data_sources import files_by_split
from ddpm_diffusers.streaming import StreamedBatches, open_stream


def assert_holds(decoded, images):
    """In any order."""
    found, expected = (sorted(image.tobytes() for image in them) for them in (read(decoded, 8), reference(images, 8)))
    assert found == expected


@pytest.mark.parametrize("kind", ["parquet", "images", "train_data_dir", "disk", "disk with splits"])
def test_each_kind_of_source_gives_its_images_in_order(kind, tmp_path):
    images = random_images(5)
    decoded = load_images(**store(images, tmp_path / "source", kind), resolution=8)
    np.testing.assert_array_equal(read(decoded, 8), reference(images, 8))
    if "disk" in kind or kind == "parquet":
        assert set(decoded.column_names) == {"image", "label"} and decoded["label"][:] == [0, 1, 2, 0, 1]


def test_max_samples_takes_the_first(tmp_path):
    images = random_images(5)
    source = store(images, tmp_path / "source")
    for max_samples, expected in ((1, 1), (3, 3), (99, 5)):
        decoded = load_images(**source, resolution=8, max_samples=max_samples)
        np.testing.assert_array_equal(read(decoded, 8), reference(images[:expected], 8))


def test_other_names_of_split_and_column(tmp_path):
    images = random_images(3)
    splits = {"train": as_dataset(images[:1]), "extra": as_dataset(images[1:])}
    DatasetDict(splits).rename_column("image", "picture").save_to_disk(tmp_path / "s")
    decoded = load_images(str(tmp_path / "s"), resolution=8, split="extra", image_column="picture")
    np.testing.assert_array_equal(read(decoded, 8), reference(images[1:], 8))


def test_the_images_may_be_in_a_column_named_label(tmp_path):
    rows = {"image": random_images(3), "label": random_images(3, seed=1)}
    Dataset.from_dict(rows, Features({"image": Image(), "label": Image()})).save_to_disk(tmp_path / "s")
    decoded = load_images(str(tmp_path / "s"), resolution=8, image_column="label")
    np.testing.assert_array_equal(read(decoded, 8), reference(rows["label"], 8))


# folders


def test_a_class_or_file_named_as_a_split_is_an_image_like_others(tmp_path, caplog):
    images, folder = random_images(7), tmp_path / "source"
    paths = ("car/0.png", "car/toy-train.png", "plane/test_1.png", "train/0.png", "train/1.png", "4.png", "val.png")
    save(images, folder, paths)
    assert_holds(load_images(train_data_dir=str(folder), resolution=8), images)
    assert not caplog.messages
    assert len(load_images(str(folder), resolution=8)) < 7  # as `datasets` documents it
    assert "holds 7 images, and `datasets` takes" in caplog.text

    for path in ("car", "plane", "4.png", "val.png"):  # what is left is a split
        (folder / path).rename(tmp_path / path)
    (tmp_path / "car").rename(folder / "test")
    (folder / "README.md").write_text("no image")
    for path in ("__MACOSX/train/._0.png", "annotations/train.json", ".hidden.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    for split in ("train", "test"):
        assert len(load_images(train_data_dir=str(folder), split=split, resolution=8)) == 2


def test_a_class_named_as_a_split_stays_within_its_split(tmp_path, caplog):
    folder = tmp_path / "toys [2024]"  # which as a pattern would match another name
    kept = {"train": random_images(6, seed=3), "test": random_images(4, seed=2)}
    for split, images in kept.items():
        classes = ["train_station", "train"] * (len(images) // 2)
        save(images, folder / split, [f"{name}/{i}.png" for i, name in enumerate(classes)])
    for split, images in kept.items():
        decoded = load_images(train_data_dir=str(folder), split=split, resolution=8)
        assert_holds(decoded, images)
        assert decoded.features["label"].names == ["train", "train_station"]
    folder = folder.rename(tmp_path / "toys")
    assert not caplog.messages and len(load_images(str(folder), resolution=8)) > 6
    assert "toys holds 10 images, and `datasets` takes" in caplog.text


def test_a_split_beside_other_images_is_told(tmp_path, caplog):
    everything = [f"{tmp_path}/**"]
    save(random_images(2), tmp_path, ("train/0.png", "cats/0.png"))
    assert files_by_split(str(tmp_path)) == {"train": everything} and not caplog.messages  # two classes, it may be
    save(random_images(1), tmp_path, ["test/0.png"])
    assert files_by_split(str(tmp_path)) == {"train": everything}
    assert "has other images than in test, train: all are taken for one split" in caplog.text
    (tmp_path / "train").rename(tmp_path / "dogs")
    files_by_split(str(tmp_path))  # a class of the name "test" is unlikely, images kept back are not
    assert "has other images than in test: all are taken for one split" in caplog.text


def test_a_configuration_of_a_folder_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`dataset_config_name` is 'small', but the folder .* has no configurations"):
        load_images(train_data_dir=str(tmp_path), dataset_config_name="small", resolution=8)


def test_images_that_are_left_out_are_told(tmp_path, caplog):
    folder, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    save(random_images(3), folder, [f"cats/{i}.png" for i in range(3)])
    save(random_images(1, seed=1), elsewhere, ["dog.png"])
    (folder / "dogs").symlink_to(elsewhere, target_is_directory=True)
    assert len(load_images(train_data_dir=str(folder), resolution=8)) == 3
    assert "source holds 4 images, and `datasets` takes 3: it goes by split names" in caplog.text
    (folder / "dogs").unlink()
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "more").symlink_to(folder / "cats", target_is_directory=True)
    caplog.clear()
    assert len(load_images(train_data_dir=str(folder), resolution=8)) == 3 and not caplog.messages
    (folder / "metadata.csv").write_text("file_name,text\ncats/1.png,a cat\n")
    assert len(load_images(train_data_dir=str(folder), resolution=8)) == 1
    assert "source holds 3 images, and `datasets` takes 1: it goes by split names" in caplog.text


@pytest.mark.parametrize("names", [("train", "test"), ("training", "validation"), ("Train", "TEST")])
def test_splits_may_be_links(names, tmp_path, caplog):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, count in zip(names, (3, 2), strict=True):
        save(random_images(count), tmp_path / f"{name}-images", [f"class/{i}.png" for i in range(count)])
        (folder / name).symlink_to(tmp_path / f"{name}-images", target_is_directory=True)
    assert len(load_images(train_data_dir=str(folder), resolution=8)) == 3
    assert not caplog.messages


def test_folders_of_one_split_come_in_the_order_of_their_names(tmp_path):
    images = random_images(6)
    names = ("train-1", "train-2", "train-3", "train-4", "test", "val")
    save(images, tmp_path / "source", [f"{name}/0.png" for name in names])
    decoded = load_images(train_data_dir=str(tmp_path / "source"), resolution=8)
    np.testing.assert_array_equal(read(decoded, 8), reference(images[:4], 8))


# archives


def archive(images, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for i, image in enumerate(images):
            file.writestr(f"{i}.png", encode(image)["bytes"])


@pytest.mark.parametrize("where", ["{split}.zip", "{split}/images.zip", "{split}-1.zip"])
@pytest.mark.parametrize("argument", ["dataset_name", "train_data_dir"])
def test_images_in_archives(argument, where, tmp_path, caplog):
    splits = {"train": random_images(70), "test": random_images(2, seed=1)}
    for split, images in splits.items():
        archive(images, tmp_path / where.format(split=split))
    for split, images in splits.items():
        assert_holds(load_images(**{argument: str(tmp_path)}, split=split, resolution=8), images)
    assert not caplog.messages


def test_a_damaged_image_in_an_archive_is_named(tmp_path, caplog):
    images = random_images(3)
    file, source = tmp_path / "images.zip", {"train_data_dir": str(tmp_path)}
    archive(images, file)
    second = encode(images[1])["bytes"]
    file.write_bytes(file.read_bytes().replace(second, second[:-1] + b"?"))  # its checksum is wrong now
    with pytest.raises(ValueError, match=r"Image 1 of the data set \(zip://1.png.*\) cannot be decoded"):
        load_images(**source, resolution=8)
    run = StreamedBatches(open_stream("", **source), (1, 8, 8), 2, buffer_size=3, seed=0)
    batches = {batch.numpy().tobytes() for batch in islice(run, 20)}
    assert len(batches) == 2 and "zip://1.png" in caplog.text  # of the other two, in both orders


# errors: each names the value, the rule and the fix


def refused(words, **arguments):
    with pytest.raises(ValueError) as error:
        load_images(**{"resolution": 8, **arguments})
    assert_says(error, words)


@pytest.fixture(scope="module")
def two_images(tmp_path_factory):
    return store(random_images(2), tmp_path_factory.mktemp("two") / "source")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"resolution": 0}, ["`resolution` is 0", "positive integer"]),
        ({"max_samples": 0}, ["`max_samples` is 0", "positive integer"]),
        ({"channels": 4}, ["`channels` is 4", "1 (grey) or 3 (RGB)"]),
        ({"image_column": "picture"}, ["'picture'", "image, label, name", "`image_column`"]),
        ({"image_column": "label"}, ["'label'", "int64", "not images", "`image_column`"]),
        ({"split": "test"}, ["test", "['train']", "`split`"]),
        ({"dataset_config_name": "large"}, ["'large'", "['default']"]),
        (
            {"dataset_name": "synthetic-fashion", "split": "validation"},
            ["`split` is 'validation'", "synthetic-fashion has train and test"],
        ),
    ],
)
def test_wrong_arguments(arguments, words, two_images):
    refused(words, **{**two_images, **arguments})


@pytest.mark.parametrize("name", ["", "../nope", "./nope", "/nope/nope", "nope/nope/nope", "here"])
def test_a_folder_that_is_not_there_or_empty(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for argument in ("dataset_name", "train_data_dir"):
        if name or argument == "dataset_name":
            refused([repr(name), f"`{argument}`", "synthetic-fashion"], **{argument: name})
        else:
            refused(["`train_data_dir` is empty", "leave it out"], train_data_dir="")  # not the current directory


def test_a_split_that_a_saved_data_set_lacks(tmp_path):
    several = store(random_images(2), tmp_path / "several", "disk with splits")
    refused(["'validation'", "train, test", "`split`"], **several, split="validation")
    single = store(random_images(2), tmp_path / "single", "disk")
    refused(["has no split 'test', but train alone"], **single, split="test")


def test_an_empty_split(tmp_path):
    for kind in ("parquet", "disk"):
        source = store([], tmp_path / kind, kind)
        refused([source["dataset_name"], "`split`"], **source)


def test_files_that_are_no_data_set(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    refused([repr(str(tmp_path)), "cannot be read", "synthetic-fashion"], dataset_name=str(tmp_path))
