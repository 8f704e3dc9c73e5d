"""The protocol: cached statistics, floors, and the record of a pipeline."""

import errno
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

from ddpm_diffusers import PixelDiffusionPipeline
from ddpm_diffusers.data import ImageArrays, draw_synthetic
from ddpm_diffusers.evaluation import Reference, evaluate_images, evaluate_pipeline, protocol
from ddpm_diffusers.evaluation.features import FeatureExtractor, extract_features
from ddpm_diffusers.evaluation.metrics import frechet_distance, kernel_distance, precision_recall
from ddpm_diffusers.evaluation.protocol import Statistics, mean_and_sd
from ddpm_diffusers.evaluation.spectrum import (
    checkerboard,
    power_spectrum,
    radial_spectrum,
    ring_spectrum,
    sharpness,
)
from ddpm_diffusers.sampling import sample_images


class FourNumbers(torch.nn.Module):
    """Four projections of images resized to 8x8; counts the images that it is given."""

    def __init__(self, seed: int = 0):
        super().__init__()
        weight = torch.randn(3 * 8 * 8, 4, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(weight)
        self.images = 0

    def forward(self, images):
        self.images += len(images)
        small = torch.nn.functional.adaptive_avg_pool2d(images / 255, 8)
        return small.flatten(1) @ self.weight

    def extractor(self, folder: Path) -> FeatureExtractor:
        file = folder / "four-numbers.safetensors"
        save_file(self.state_dict(), file)
        made = FeatureExtractor(self, "four-numbers", file, num_channels=3)
        self.images = 0
        return made


@pytest.fixture
def extractor(tmp_path) -> FeatureExtractor:
    return FourNumbers().extractor(tmp_path)


def garments(count: int, seed: int = 0, resolution: int = 8, channels: int = 1) -> ImageArrays:
    dataset = draw_synthetic(count, seed, resolution, channels)
    return ImageArrays(dataset, (channels, resolution, resolution))


def garment_images(count: int, **kwargs) -> torch.Tensor:
    return garments(count, **kwargs).__getitems__(range(count))


@pytest.fixture
def reference(extractor) -> Reference:
    return Reference(garment_images(150), garment_images(120, seed=1), extractor)


def test_statistics_are_computed_once_for_an_images_content_and_an_extractor(extractor, tmp_path):
    network = extractor.network
    made = Statistics.cached(garments(40), extractor, tmp_path)
    assert network.images == 40
    expected = Statistics.of_images(garment_images(40), extractor)
    assert torch.equal(made.features, expected.features) and torch.equal(made.power, expected.power)

    again = Statistics.cached(garments(40), extractor, tmp_path)
    assert network.images == 80
    assert torch.equal(again.features, made.features) and torch.equal(again.power, made.power)
    Statistics.cached(garments(40, seed=1), extractor, tmp_path)
    assert network.images == 120
    other = FourNumbers(seed=1)
    by_other = Statistics.cached(garments(40), other.extractor(tmp_path), tmp_path)
    assert other.images == 40 and not torch.equal(by_other.features, made.features)
    other.extra_repr = lambda: "image_size=32"  # the same weights, and images that go in otherwise
    Statistics.cached(garments(40), other.extractor(tmp_path), tmp_path)
    assert other.images == 40
    cached = [file.name for file in (tmp_path / "ddpm-diffusers").iterdir()]
    assert len(cached) == 4 and all(name.endswith(".safetensors") for name in cached)


def test_statistics_are_computed_again_by_other_code(extractor, tmp_path, monkeypatch):
    Statistics.cached(garments(40), extractor, tmp_path)
    for name in ("features.py", "spectrum.py"):
        code = Path(protocol.__file__).with_name(name).read_text()
        (tmp_path / name).write_text(code + ("\n" if name == "spectrum.py" else ""))
    monkeypatch.setattr(protocol, "__file__", str(tmp_path / "protocol.py"))
    Statistics.cached(garments(40), extractor, tmp_path)
    assert extractor.network.images == 80


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_damaged_cache_file_is_made_anew(extractor, tmp_path, kept):
    made = Statistics.cached(garments(40), extractor, tmp_path)
    (file,) = (tmp_path / "ddpm-diffusers").iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    for _ in range(2):
        again = Statistics.cached(garments(40), extractor, tmp_path)
        assert torch.equal(again.features, made.features) and torch.equal(again.power, made.power)
    assert extractor.network.images == 80


def test_a_cache_that_cannot_be_written_is_told_and_leaves_no_rest(extractor, tmp_path, monkeypatch, caplog):
    def fails(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(protocol, "save_file", fails)
    made = Statistics.cached(garments(40), extractor, tmp_path)
    assert torch.equal(made.power, Statistics.of_images(garment_images(40), extractor).power)
    assert "are not cached: [Errno 28] No space left" in caplog.text
    assert not list((tmp_path / "ddpm-diffusers").iterdir())


def test_a_subset_takes_evenly_from_first_to_last():
    sorted_set = Statistics(torch.arange(1000.0)[:, None], torch.zeros(8, 8))
    subset = sorted_set.subset(12)
    assert subset[0] == 0 and subset[-1] == 999
    assert all(90 <= step <= 92 for step in subset.diff(dim=0))
    assert torch.equal(sorted_set.subset(1000), sorted_set.features)


def test_the_floor_is_what_the_test_images_themselves_are_given(reference):
    figures = evaluate_images(garment_images(120, seed=1), reference)
    assert figures["train"] == figures["floor"]
    assert figures["to_floor"] == {"frechet_distance": 1, "precision": 1, "recall": 1}
    assert figures["test"]["frechet_distance"] < 1e-6 < figures["train"]["frechet_distance"]
    assert figures["test"]["precision"] == figures["test"]["recall"] == 1
    assert figures["test"]["cb2_db"] == figures["test"]["hf_db"] == pytest.approx(0, abs=1e-6)


def test_the_figures_are_those_of_the_metrics_against_each_split(extractor):
    splits = {"train": garment_images(150, resolution=16), "test": garment_images(120, seed=1, resolution=16)}
    reference = Reference(*splits.values(), extractor)
    samples = garment_images(60, seed=2, resolution=16)
    features, power = extract_features(extractor, samples), power_spectrum(samples)
    found = evaluate_images(samples, reference)
    for split, images in splits.items():
        real, real_power = extract_features(extractor, images), power_spectrum(images)
        as_many = real[np.linspace(0, len(images) - 1, 60).round().astype(int)]
        precision, recall = precision_recall(as_many, features)
        assert found[split] == pytest.approx({
            "frechet_distance": frechet_distance(real, features), "kernel_distance": kernel_distance(real, features),
            "precision": precision, "recall": recall, "cb2_db": checkerboard(power, real_power, 2),
            "cb4_db": checkerboard(power, real_power, 4), "hf_db": sharpness(power, real_power),
        })  # fmt: skip


def test_fewer_images_have_a_floor_of_their_own(reference):
    sixty = reference.test.subset(60)
    floor = reference.floor(60)
    assert (floor["precision"], floor["recall"]) == precision_recall(reference.train.subset(60), sixty)
    assert floor["frechet_distance"] == frechet_distance(reference.train.features, sixty)
    assert floor["kernel_distance"] == kernel_distance(reference.train.features, sixty)
    assert floor != reference.floor(120)
    assert reference.floor(10_000) == reference.floor(120)  # all that there are
    assert evaluate_images(garment_images(60, seed=2), reference)["floor"] == floor


def test_more_samples_than_test_images_are_compared_with_the_floor_by_as_many(extractor):
    reference = Reference(garment_images(400), garment_images(40, seed=1), extractor)
    samples = garment_images(400, seed=2)
    figures = evaluate_images(samples, reference)
    as_many = samples[[round(i * 399 / 39) for i in range(40)]]
    fewer = evaluate_images(as_many, reference)
    assert figures["to_floor"]["frechet_distance"] == pytest.approx(fewer["to_floor"]["frechet_distance"])
    ratio = figures["train"]["frechet_distance"] / figures["floor"]["frechet_distance"]
    assert ratio < figures["to_floor"]["frechet_distance"] / 1.5  # what it would be of unequal numbers


def test_statistics_do_not_depend_on_how_many_images_are_read_at_a_time(extractor, monkeypatch):
    whole = Statistics.of_images(garment_images(40), extractor)
    monkeypatch.setattr(protocol, "IMAGES_AT_A_TIME", 17)
    for images in (garment_images(40), garments(40)):
        found = Statistics.of_images(images, extractor)
        torch.testing.assert_close(found.features, whole.features)
        torch.testing.assert_close(found.power, whole.power)


def test_a_data_set_of_two_splits_is_read_as_training_reads_it(extractor, tmp_path):
    splits = {"train": garment_images(30), "held_out": garment_images(20, seed=1)}
    features = datasets.Features({"picture": datasets.Image()})
    datasets.DatasetDict({
        name: datasets.Dataset.from_dict(
            {"picture": [Image.fromarray(image[0]) for image in images.numpy()]}, features=features
        )
        for name, images in splits.items()
    }).save_to_disk(tmp_path / "set")  # fmt: skip
    reference = Reference.of_dataset(
        str(tmp_path / "set"), extractor, resolution=8, test_split="held_out", image_column="picture",
        max_samples=25, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    for found, images in ((reference.train, splits["train"][:25]), (reference.test, splits["held_out"])):
        expected = Statistics.of_images(images, extractor)
        assert torch.equal(found.features, expected.features) and torch.equal(found.power, expected.power)
    assert len(list((tmp_path / "cache" / "ddpm-diffusers").glob("statistics-*"))) == 2


def test_a_folder_of_images_without_a_test_split_is_judged_by_two_parts(extractor, tmp_path):
    images, folder = garment_images(50), tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(images.numpy()):
        Image.fromarray(image[0]).save(folder / f"{number:02}.png")
    reference = Reference.of_dataset(
        str(folder), extractor, resolution=8, train_split="train[:60%]", test_split="train[60%:]",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    for found, part in ((reference.train, images[:30]), (reference.test, images[30:])):
        assert torch.equal(found.features, extractor(part))


def test_a_record_holds_what_was_sampled_and_its_figures_seed_by_seed(tiny_pipe, reference, extractor):
    record = evaluate_pipeline(tiny_pipe, reference, 70, 3, seeds=(2, 0, 5), batch_size=32)
    images = [sample_images(tiny_pipe, 70, 3, batch_size=32, seed=70 * seed) for seed in (2, 0, 5)]
    assert torch.equal(record.pop("images"), images[0][:64])
    assert len({image.numpy().tobytes() for seed in images for image in seed}) > 200
    assert json.loads(json.dumps(record, allow_nan=False)) == record

    assert record["per_seed"] == [evaluate_images(seed, reference) for seed in images]
    for against, names in record["per_seed"][0].items():
        for name in names:
            values = [figures[against][name] for figures in record["per_seed"]]
            found = record["figures"][against][name]
            if None in values:
                assert found is None
            else:
                assert found == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})
    assert record["figures"]["train"]["frechet_distance"]["sd"] > 0
    assert record["figures"]["train"]["cb4_db"] is None  # images of 8x8 have no place for it
    assert record["figures"]["floor"]["frechet_distance"]["sd"] == 0
    assert record["figures"]["to_floor"]["frechet_distance"]["mean"] > 1

    power = torch.stack([Statistics.of_images(seed, extractor).power for seed in images]).mean(0)
    assert record["spectrum"]["samples"]["rings"] == pytest.approx(ring_spectrum(power).tolist())
    assert record["spectrum"]["real"]["radial"] == radial_spectrum(reference.train.power).tolist()
    told = {name: record[name] for name in ("scheduler", "num_inference_steps", "evaluations", "num_images", "seeds",
                                            "batch_size", "feature_extractor")}  # fmt: skip
    assert told == {
        "scheduler": "DDPMScheduler", "num_inference_steps": 3, "evaluations": 3, "num_images": 70, "seeds": [2, 0, 5],
        "batch_size": 32, "feature_extractor": {"name": "four-numbers", "digest": extractor.digest},
    }  # fmt: skip
    assert DDPMScheduler.from_config(record["scheduler_config"]).config.timestep_spacing == "trailing"
    assert record["seconds_per_image"] > 0


def test_seeds_of_older_records_may_hold_more():
    older, newer = {"to_floor": {"precision": 1, "kernel_distance": None}}, {"to_floor": {"precision": 3}}
    expected = {"to_floor": {"precision": {"mean": 2, "sd": pytest.approx(2**0.5)}}}
    assert mean_and_sd([older, newer]) == mean_and_sd([newer, older]) == expected


def test_a_single_seed_gives_the_same_figures_and_no_spread(tiny_pipe, reference):
    both = evaluate_pipeline(tiny_pipe, reference, 20, 2, seeds=(0, 1))
    one = evaluate_pipeline(tiny_pipe, reference, 20, 2, seeds=(1,))
    assert one["per_seed"] == both["per_seed"][1:]
    assert one["figures"]["train"]["hf_db"] == {"mean": one["per_seed"][0]["train"]["hf_db"]}


def test_a_ratio_to_a_floor_of_nothing_is_none(tiny_pipe, extractor):
    images = garment_images(60)
    dark, light = images // 8, 255 - images // 8
    reference = Reference(dark, light, extractor)
    assert reference.floor(60)["precision"] == reference.floor(60)["recall"] == 0
    figures = evaluate_images(dark, reference)
    assert figures["train"]["precision"] == 1
    assert figures["to_floor"]["precision"] is figures["to_floor"]["recall"] is None
    assert figures["to_floor"]["frechet_distance"] < 1e-6
    record = evaluate_pipeline(tiny_pipe, reference, 10, 2, seeds=(0, 1))
    assert record["figures"]["to_floor"]["precision"] is None


def test_white_images_have_figures_too(tiny_pipe, reference):
    """What a network gives that has diverged."""
    tiny_pipe.unet.register_forward_hook(lambda unet, args, output: type(output)(torch.full_like(output.sample, -1e4)))
    record = evaluate_pipeline(tiny_pipe, reference, 10, 3, seeds=(0, 1))
    assert record.pop("images").unique().tolist() == [255]
    assert record["figures"]["train"]["precision"]["mean"] == 0
    assert record["figures"]["train"]["cb2_db"] is record["figures"]["train"]["hf_db"] is None
    json.dumps(record, allow_nan=False)


@pytest.fixture
def untouched_pipe(tiny_pipe) -> PixelDiffusionPipeline:
    """One that must not be sampled."""
    calls = []
    tiny_pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    yield tiny_pipe
    assert not calls


@pytest.mark.parametrize("seeds", [(0, 1, 0), (), (0, -1), (0.5,), ("0",)])
def test_seeds_that_are_not_different_numbers_are_refused(untouched_pipe, reference, seeds):
    with pytest.raises(ValueError, match="`seeds` is .*; it must hold different whole numbers from 0"):
        evaluate_pipeline(untouched_pipe, reference, 20, 3, seeds=seeds)


def test_too_few_images_are_refused_before_any_is_sampled(untouched_pipe, reference):
    with pytest.raises(ValueError, match="There are 4 images to evaluate; there must be more than the 4"):
        evaluate_pipeline(untouched_pipe, reference, 4, 3)
    for num_images in (0, -1, 10.5):
        with pytest.raises(ValueError, match=f"`num_images` is {num_images}; it must be a positive integer"):
            evaluate_pipeline(untouched_pipe, reference, num_images, 3)
    with pytest.raises(ValueError, match="4 features of four-numbers: use at least 2000 for steady figures"):
        evaluate_images(garment_images(4), reference)


def test_steps_that_the_scheduler_cannot_take_are_refused(untouched_pipe, reference):
    for num_inference_steps in (0, 1001):
        with pytest.raises(ValueError, match=f"`num_inference_steps` is {num_inference_steps}; it must"):
            evaluate_pipeline(untouched_pipe, reference, 20, num_inference_steps)


@pytest.mark.parametrize("shape", [{"resolution": 12}, {"channels": 3}])
def test_a_pipeline_of_other_images_than_the_data_sets_is_refused(untouched_pipe, extractor, shape):
    reference = Reference(garment_images(20, **shape), garment_images(20, seed=1, **shape), extractor)
    with pytest.raises(ValueError, match=r"images to evaluate are \(1, 8, 8\) and those of the data set"):
        evaluate_pipeline(untouched_pipe, reference, 20, 3)
    with pytest.raises(ValueError, match="read the data set at the size of the images"):
        evaluate_images(garment_images(20), reference)


def test_splits_that_cannot_serve_are_refused(extractor):
    with pytest.raises(ValueError, match=r"train images are \(1, 8, 8\) and the test images \(1, 12, 12\)"):
        Reference(garment_images(20), garment_images(20, resolution=12), extractor)
    with pytest.raises(
        ValueError, match="There are 4 images in the test split; there must be more than the 4 features"
    ):
        Reference(garment_images(20), garments(4), extractor)
    with pytest.raises(ValueError, match="H even and at least 6"):
        Reference(garment_images(20, resolution=9), garment_images(20, resolution=9), extractor)
    assert extractor.network.images == 0
