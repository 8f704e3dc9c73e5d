"""The protocol: generated images against the train and the test split of a data set.

The floor, for comparison, is what the data set's own test images score against the train split.

extractor = load_feature_extractor()
reference = Reference.of_dataset("zalando-datasets/fashion_mnist", extractor, resolution=28)
figures = evaluate_images(images, reference)  # uint8 (N, C, H, W)
record = evaluate_pipeline(pipe, reference, num_images=10_000, num_inference_steps=20, seeds=(0, 1, 2))
"""

import contextlib
import hashlib
import logging
import math
import numbers
import statistics
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data import ImageArrays, cache_folder, load_images
from ..pipeline_pixel_diffusion import check_positive, height_and_width
from ..sampling import count_sampled, sample_images
from ..schedulers import count_evaluations
from .features import FeatureExtractor, extract_features
from .metrics import frechet_distance, kernel_distance, precision_recall
from .spectrum import checkerboard, power_spectrum, radial_spectrum, ring_spectrum, sharpness

logger = logging.getLogger(__name__)

IMAGES_AT_A_TIME = 10_000  # read from a data set
IMAGES_KEPT = 64  # in a record, for a grid
RATIOS = ("frechet_distance", "precision", "recall")  # KID is 0 on average for real images


@dataclass(eq=False)
class Statistics:
    """What is kept of a set of images: features (N, D), and the mean power spectrum (H, H)."""

    features: torch.Tensor
    power: torch.Tensor

    @classmethod
    def of_images(cls, images: ImageArrays | torch.Tensor, extractor: FeatureExtractor) -> "Statistics":
        """Statistics of uint8 images (N, C, H, H), computed a part at a time."""
        features, powers = [], []
        for part in parts(images):
            powers.append(power_spectrum(part) * len(part))
            features.append(extract_features(extractor, part))
        return cls(torch.cat(features), (sum(powers) / len(images)).cpu())

    @classmethod
    def cached(cls, images: ImageArrays, extractor: FeatureExtractor, cache_dir: str | None = None) -> "Statistics":
        """As `of_images`, but computed only once for the same bytes, extractor, code and versions of libraries."""
        code = [Path(__file__).with_name(name).read_bytes() for name in ("features.py", "spectrum.py")]
        made_by = f"torch {torch.__version__} transformers {transformers.__version__}"
        digest = hashlib.sha256(b"".join([*code, f"{extractor.digest} {extractor} {images.shape} {made_by}".encode()]))
        for part in parts(images):
            digest.update(part.numpy())
        folder = cache_folder(cache_dir)
        path = folder / f"statistics-{digest.hexdigest()[:32]}.safetensors"
        with contextlib.suppress(FileNotFoundError, SafetensorError):  # not there yet, or cut off by a full disk
            return cls(**load_file(path))
        made = cls.of_images(images, extractor)
        partial = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"features": made.features, "power": made.power}, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:  # a full disk must not end an evaluation
            logger.warning("The statistics of the real images are not cached: %s", error)
            with contextlib.suppress(OSError):
                partial.unlink()
        return made

    def subset(self, count: int) -> torch.Tensor:
        """The features of `count` evenly spaced images, since a data set may be sorted."""
        return self.features[evenly_spaced(len(self.features), count)]


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """`count` places in a list of this length, which may be sorted by class."""
    return np.linspace(0, length - 1, count).round().astype(int)


class Reference:
    """A data set to compare with: the statistics of its two splits, whose images are of one shape.

    Args:
        train, test (`torch.Tensor` or `ImageArrays`): uint8 images (N, C, H, H), with H even and at least 6, and more
            images in each than features.
        extractor: Extractor of the features.
        cache_dir: Where the statistics of an `ImageArrays` are cached; by default, in the cache of `datasets`.

    Raises:
        ValueError: If the images cannot be used.
    """

    def __init__(self, train, test, extractor: FeatureExtractor, cache_dir: str | None = None):
        shapes = [images.shape[-3:] for images in (train, test)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"The train images are {tuple(shapes[0])} and the test images {tuple(shapes[1])}; both"
                             " must be of one size and number of channels.")  # fmt: skip
        for name, images in (("train", train), ("test", test)):
            check_count(len(images), extractor, f"in the {name} split")
        self.extractor, self.image_shape = extractor, tuple(shapes[0])
        self.train, self.test = (
            Statistics.of_images(images, extractor)
            if torch.is_tensor(images)
            else Statistics.cached(images, extractor, cache_dir)
            for images in (train, test)
        )
        self.floors = {}  # by number of images

    @classmethod
    def of_dataset(
        cls,
        dataset_name: str,
        extractor: FeatureExtractor,
        *,
        resolution: int,
        channels: int = 1,
        train_split: str = "train",
        test_split: str = "test",
        cache_dir: str | None = None,
        **load_images_kwargs,
    ) -> "Reference":
        """Reference from a data set on the Hub or in a local folder.

        Args:
            dataset_name: Hub id or local folder.
            extractor: Extractor of the features.
            resolution: Height and width that the images are resized to, in pixels; even, and at least 6.
            channels: 1 (grey) or 3 (RGB).
            train_split, test_split: Names of its splits.
            cache_dir: Where decoded images and statistics are cached; by default, in the cache of `datasets`.
            load_images_kwargs: Further arguments of `load_images`, such as `image_column`.

        Raises:
            ValueError: If the resolution is not such a number, or the data set cannot be read or used.
            ConnectionError: If the Hub cannot be reached.
        """
        if resolution < 6 or resolution % 2:  # before anything is decoded
            raise ValueError(f"`resolution`, the size of the images, is {resolution}; for the spectra it must be"
                             " even, and at least 6.")  # fmt: skip
        test, train = (  # in this order: a test split that is missing shows before the larger one is decoded
            ImageArrays(
                load_images(dataset_name, resolution=resolution, channels=channels, split=split, cache_dir=cache_dir,
                            **load_images_kwargs),
                (channels, resolution, resolution),
            )
            for split in (test_split, train_split)
        )  # fmt: skip
        return cls(train, test, extractor, cache_dir)

    def floor(self, num_images: int) -> dict[str, float]:
        """What real images score: the figures of `num_images` test images, or all if fewer, against the train split.

        Named after the distance; precision and recall of real images are high. Figures of the spectrum are always of
        all test images.
        """
        count = min(num_images, len(self.test.features))
        if count not in self.floors:
            self.floors[count] = figures_against(self.train, Statistics(self.test.subset(count), self.test.power))
        return self.floors[count]


def evaluate_images(images: torch.Tensor, reference: Reference) -> dict[str, dict[str, float | None]]:
    """All figures of generated images.

    Args:
        images: uint8 (N, C, H, H), of the reference's shape, N larger than the number of features.
        reference: The data set to compare with.

    Returns:
        "train" and "test", the figures against those splits: `frechet_distance` (the FID only if the extractor is
        Inception), `kernel_distance`, `precision` and `recall` in [0, 1], and, in dB, `cb2_db` and `cb4_db`
        (checkerboards of period 2 and 4; the latter None unless H is a multiple of 4 and at least 12) and `hf_db`
        (sharpness): 0 if the images are like real ones, None if they have no energy at those frequencies. "floor", the
        figures of as many test images, or all if there are fewer, against the train split. "to_floor", the ratios of
        the samples' distance, precision and recall to these, for equal numbers of images; None if the floor is 0.

    Raises:
        TypeError, ValueError: If the images cannot be compared, before any work.
    """
    check_images(images, reference)
    return figures_of(Statistics.of_images(images, reference.extractor), reference)


def figures_of(samples: Statistics, reference: Reference) -> dict[str, dict[str, float | None]]:
    """The figures that `evaluate_images` describes, from the statistics of the samples."""
    train, test = (figures_against(split, samples) for split in (reference.train, reference.test))
    floor = reference.floor(len(samples.features))
    compared, most = train, len(reference.test.features)
    if len(samples.features) > most:  # the floor is of `most` images then, and a distance falls as their number grows
        compared = figures_against(reference.train, Statistics(samples.subset(most), samples.power))
    to_floor = {name: compared[name] / floor[name] if floor[name] > 0 else None for name in RATIOS}
    return {"train": train, "test": test, "floor": floor, "to_floor": to_floor}


def figures_against(real: Statistics, samples: Statistics) -> dict[str, float | None]:
    count = min(len(real.features), len(samples.features))  # on which precision and recall depend
    precision, recall = precision_recall(real.subset(count), samples.subset(count))
    side = len(real.power)
    decibels = {
        "cb2_db": checkerboard(samples.power, real.power, 2),
        "cb4_db": checkerboard(samples.power, real.power, 4) if side % 4 == 0 and side >= 12 else math.nan,
        "hf_db": sharpness(samples.power, real.power),
    }
    return {
        "frechet_distance": frechet_distance(real.features, samples.features),
        "kernel_distance": kernel_distance(real.features, samples.features),
        "precision": precision,
        "recall": recall,
        **{name: figure if math.isfinite(figure) else None for name, figure in decibels.items()},
    }


def evaluate_pipeline(
    pipe,
    reference: Reference | None,
    num_images: int,
    num_inference_steps: int = 50,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 100,
    guidance_scale: float = 1.0,
    timesteps: list[int] | None = None,
    progress: bool = False,
) -> dict | None:
    """Sample `pipe` and evaluate the images, once per seed; every process must call it.

    Args:
        pipe: A `PixelDiffusionPipeline` with the scheduler to be measured.
        reference: The data set to compare with, or None to only sample.
        num_images: Images per seed, more than features: 10,000 for a figure to quote, 2,000 while developing.
        num_inference_steps: Number of scheduler steps.
        seeds: Distinct seeds; image i of seed s starts from `torch.Generator().manual_seed(s * num_images + i)`.
        batch_size: Images sampled at a time.
        guidance_scale, timesteps: Those of the pipeline's call.
        progress: Show a progress bar of the batches.

    Returns:
        A record in the main process, None in the others: "figures" as in `evaluate_images`, each
        `{"mean": ..., "sd": ...}` over the seeds (without "sd" for a single one), "per_seed", the same for each seed,
        what was measured ("scheduler", "scheduler_config", "num_inference_steps", "timesteps" if given, "evaluations"
        of the `unet`, "guidance_scale", "num_images", "seeds", "batch_size", "feature_extractor"),
        "seconds_per_image" of sampling, "spectrum" (radial and by rings, of samples and real images), and "images",
        up to 64, uint8 (B, C, H, W), for a grid. Without a reference, there are no "figures", "per_seed",
        "feature_extractor" and "spectrum".

    Raises:
        ValueError, TypeError: If an argument cannot be used, before any sampling, or the samples are not finite.
    """
    check_run(pipe, reference, num_images, seeds, batch_size)
    seeds = [int(seed) for seed in seeds]
    evaluations = count_evaluations(pipe.scheduler, num_inference_steps, timesteps)
    collected, seconds, kept = [], 0.0, None
    for seed in seeds:
        start = time.perf_counter()
        images = sample_images(
            pipe,
            num_images,
            num_inference_steps,
            batch_size=batch_size,
            seed=seed * num_images,
            guidance_scale=guidance_scale,
            timesteps=timesteps,
            progress=progress,
        )
        seconds += time.perf_counter() - start
        kept = images[:IMAGES_KEPT].clone() if kept is None else kept
        if reference is not None and PartialState().is_main_process:
            collected.append(Statistics.of_images(images, reference.extractor))
    if not PartialState().is_main_process:
        return None
    return {
        **(record_of(collected, reference) if reference is not None else {}),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": as_json(pipe.scheduler.config),
        "num_inference_steps": num_inference_steps if timesteps is None else len(timesteps),
        **({} if timesteps is None else {"timesteps": [int(t) for t in timesteps]}),
        "evaluations": evaluations,
        "guidance_scale": guidance_scale,
        "num_images": num_images,
        "seeds": seeds,
        "batch_size": batch_size,
        "seconds_per_image": seconds / (count_sampled(num_images, batch_size) * len(seeds)),
        "images": kept,
    }


def check_run(pipe, reference: Reference | None, num_images: int, seeds: Sequence[int], batch_size: int) -> None:
    """Raise a ValueError for what `evaluate_pipeline` cannot measure with any scheduler."""
    whole = all(isinstance(s, numbers.Integral) and s >= 0 for s in seeds)
    if len(set(seeds)) != len(seeds) or not len(seeds) or not whole:
        raise ValueError(f"`seeds` is {list(seeds)}; it must hold different whole numbers from 0.")
    check_positive(num_images=num_images, batch_size=batch_size)
    shape = image_shape(pipe)
    if reference is not None:
        check_images(torch.empty(num_images, *shape, dtype=torch.uint8, device="meta"), reference)


def image_shape(pipe) -> tuple[int, int, int]:
    """(C, H, W) of the images that the pipeline makes; a network may predict more channels, for the variance."""
    size = pipe.unet.config.sample_size
    if size is None:
        raise ValueError("The U-Net's `sample_size` is None, so what size it makes is unknown: set it in its config.")
    return pipe.unet.config.in_channels, *height_and_width(size)


def as_json(config: dict) -> dict:
    """A scheduler's config for JSON, with infinities as strings, since JSON has none."""
    items = ((key, value) for key, value in config.items() if not key.startswith("_"))
    return {key: str(value) if isinstance(value, float) and math.isinf(value) else value for key, value in items}


def record_of(collected: Sequence[Statistics], reference: Reference) -> dict:
    """Figures of several sets of equally many images, and what they were measured with."""
    per_seed = [figures_of(samples, reference) for samples in collected]
    sampled = sum(samples.power for samples in collected) / len(collected)
    return {
        "figures": mean_and_sd(per_seed),
        "per_seed": per_seed,
        "num_images": len(collected[0].features),
        "num_real_images": {name: len(getattr(reference, name).features) for name in ("train", "test")},
        "feature_extractor": {"name": reference.extractor.name, "digest": reference.extractor.digest},
        "spectrum": {
            name: {"radial": radial_spectrum(power).tolist(), "rings": ring_spectrum(power).tolist()}
            for name, power in (("samples", sampled), ("real", reference.train.power))
        },
    }


def mean_and_sd(per_seed: Sequence[dict]) -> dict:
    """The seeds' figures, each as `{"mean": ..., "sd": ...}` (sample standard deviation); None if any is None."""
    first = per_seed[0]
    if isinstance(first, dict):
        shared = [name for name in first if all(name in figures for figures in per_seed)]  # older records have more
        return {name: mean_and_sd([figures[name] for figures in per_seed]) for name in shared}
    if None in per_seed:
        return None
    sd = {"sd": statistics.stdev(per_seed)} if len(per_seed) > 1 else {}
    return {"mean": statistics.fmean(per_seed), **sd}


def check_images(images: torch.Tensor, reference: Reference) -> None:
    reference.extractor.check_images(images)
    if images.shape[1:] != reference.image_shape:
        raise ValueError(
            f"The images to evaluate are {tuple(images.shape[1:])} and those of the data set {reference.image_shape},"
            " (channels, height, width); they must be the same: read the data set at the size of the images."
        )
    check_count(len(images), reference.extractor)


def check_count(num_images: int, extractor: FeatureExtractor, which: str = "to evaluate") -> None:
    if num_images <= extractor.num_features:
        raise ValueError(
            f"There are {num_images} images {which}; there must be more than the {extractor.num_features} features of"
            f" {extractor.name}: use at least {max(2000, extractor.num_features + 1)} for steady figures."
        )


def parts(images: ImageArrays | torch.Tensor) -> Iterator[torch.Tensor]:
    for first in range(0, len(images), IMAGES_AT_A_TIME):
        if torch.is_tensor(images):
            yield images[first : first + IMAGES_AT_A_TIME]
        else:
            yield images.__getitems__(range(first, min(first + IMAGES_AT_A_TIME, len(images))))
