"""The flags that the evaluation scripts share, and what is made from them."""

import hashlib
import importlib.metadata
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from command_line import arg, check
from files import check_apart, check_empty
from launch import PRECISION_HELP, PRECISIONS
from run_folder import RUN_FILE

from ddpm_diffusers import PixelDiffusionPipeline
from ddpm_diffusers.evaluation import FASHION_MNIST, FeatureExtractor, Reference, load_feature_extractor
from ddpm_diffusers.evaluation.protocol import check_count, image_shape

logger = logging.getLogger(__name__)


@dataclass
class MeasuringArguments:
    # the real images
    dataset_name: str = arg("zalando-datasets/fashion_mnist", "Hub id or local folder of the real images")
    train_data_dir: str | None = arg(None, "folder of images, in place of --dataset_name, as in the training")
    dataset_config_name: str | None = arg(None, "configuration of a data set that has several")
    dataset_id: str | None = arg(None, "Hub id of a local data set, for records and model cards")
    image_column: str = arg("image", "column that holds the images")
    center_crop: bool = arg(False, "crop each image to its central square first")
    train_split: str = arg("train", "split that the network was trained on")
    test_split: str = arg("test", "split that the network has not seen")
    cache_dir: str | None = arg(None, "cache folder for data sets, decoded images and their statistics")
    feature_extractor: str = arg(FASHION_MNIST, "name, folder or Hub id of the classifier whose features are compared")
    # the samples
    num_images: int = arg(10_000, "samples per seed: 10,000 for figures to quote, 2,000 during development")
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "one or more seeds of sampling noise"})
    batch_size: int = arg(100, "images sampled at a time; much larger batches are slower on a CPU")
    # output
    output_dir: str = arg("evaluation", "folder for the results")
    overwrite: bool = arg(False, "write into a folder that is not empty")

    def __post_init__(self):
        for name in ("num_images", "batch_size"):
            check(self, getattr(self, name) >= 1, name, "be at least 1")
        check_apart(self.output_dir, self.dataset_name, self.train_data_dir)
        different = len(set(self.seeds)) == len(self.seeds)
        check(self, different and min(self.seeds) >= 0, "seeds", "hold different whole numbers from 0")
        if not (self.overwrite or self.continues()):
            check_empty(Path(self.output_dir))

    def continues(self) -> bool:
        """Whether the output folder holds what this run goes on with."""
        return False


@dataclass
class EvaluationArguments(MeasuringArguments):
    # the network
    mixed_precision: str | None = arg(None, f"of the network: {PRECISION_HELP}")
    variant: str | None = arg(None, "variant of the weights, such as fp16")

    def __post_init__(self):
        super().__post_init__()
        check(self, self.mixed_precision in PRECISIONS, "mixed_precision", "be auto, no, fp16 or bf16")


def open_extractor(args: MeasuringArguments, accelerator: Accelerator, channels: int = 1) -> FeatureExtractor:
    extractor = load_feature_extractor(args.feature_extractor).to(accelerator.device)
    extractor.check_channels(channels)
    check_count(args.num_images, extractor)
    return extractor


def open_reference(
    args: MeasuringArguments, accelerator: Accelerator, extractor: FeatureExtractor, resolution: int, channels: int
) -> Reference:
    with accelerator.main_process_first():  # it fills the caches for the others
        return Reference.of_dataset(
            extractor=extractor,
            resolution=resolution,
            channels=channels,
            train_split=args.train_split,
            test_split=args.test_split,
            **source_of(args),
        )


def source_of(args: MeasuringArguments) -> dict:
    """The arguments of `load_images` that say where the real images are and how they are read."""
    names = ("dataset_name", "train_data_dir", "dataset_config_name", "image_column", "center_crop", "cache_dir")
    return {name: getattr(args, name) for name in names}


def load_pipeline(args: EvaluationArguments, accelerator: Accelerator) -> PixelDiffusionPipeline:
    """The pipeline of `--model`, on the device; warns if it is a run's folder and the run had other images."""
    options = {"variant": args.variant, "dtype": torch.float32}
    pipe = PixelDiffusionPipeline.from_pretrained(args.model, **options).to(accelerator.device)
    # lower precision for the networks alone: autocast around all would reach the scheduler's arithmetic, too
    for name, network in pipe.networks().items():
        setattr(pipe, name, accelerator.prepare_model(network, evaluation_mode=True))
    _, height, width = image_shape(pipe)
    if height != width:
        raise ValueError(f"{args.model} makes images of {height}x{width}; only square images can be evaluated.")
    run = Path(args.model, RUN_FILE)
    if accelerator.is_main_process and run.is_file():
        trained_on = names_of_data(json.loads(run.read_text("utf-8")).get("arguments", {}))
        judged_by = names_of_data(vars(args))
        if trained_on and trained_on.isdisjoint(judged_by):
            logger.warning(
                f"{args.model} was trained on {', '.join(sorted(trained_on))} and is judged by"
                f" {', '.join(sorted(judged_by))}: give `--dataset_name` or `--train_data_dir` of the images that it"
                " was to learn, unless these are the same."
            )
    return pipe


def names_of_data(flags: dict) -> set[str]:
    """The folder or name of the images in a script's flags, and the id of what they are a copy of."""
    source = flags.get("train_data_dir") or flags.get("dataset_name")
    if source and os.path.exists(source):
        source = os.path.abspath(source)
    return {name for name in (source, flags.get("dataset_id")) if name}


def provenance(args: MeasuringArguments, accelerator: Accelerator, pipe: PixelDiffusionPipeline | None) -> dict:
    """What a figure depends on beyond its record: data, weights, precision, versions. No local paths."""
    local = Path(os.path.abspath(args.train_data_dir or args.dataset_name))  # by its own name, also if it is a link
    record = {
        "dataset": args.dataset_id or (local.name if local.exists() else args.dataset_name),
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "torchmetrics")},
    }
    if pipe is not None:
        record["mixed_precision"] = accelerator.mixed_precision
        record["weights"] = digest_of(pipe.unet)
    return record


def digest_of(network: torch.nn.Module) -> str:
    """The start of its weights' SHA-256, by which a record names them."""
    state = network.state_dict().items()  # of a network that accelerate compiled, with a prefix
    weights = {name.removeprefix("_orig_mod."): tensor.cpu().contiguous() for name, tensor in state}
    return hashlib.sha256(safetensors.torch.save(weights)).hexdigest()[:12]
