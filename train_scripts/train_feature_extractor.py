"""Train a small image classifier whose features serve to compare generated images with real ones.

    python train_scripts/train_feature_extractor.py --output_dir runs/classifier

It is trained on `--train_split`, at many resolutions, so that its features suit generators of any of them;
`--test_split` is used only for the accuracies on its model card. The same command gives bit-identical weights with the
same versions, kind of processor and number of threads.
"""

import math
import os
import shlex
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from command_line import arg, check, run_script
from datasets import ClassLabel
from diffusers.optimization import get_scheduler
from files import lock
from huggingface_hub import ModelCard, ModelCardData
from launch import PRECISION_HELP, PRECISIONS, make_accelerator
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from ddpm_diffusers.checkpointing import checksum, flush, versions
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.evaluation.features import to_input
from ddpm_diffusers.hub import is_hub_id, table
from ddpm_diffusers.shuffling import ShuffledBatches
from ddpm_diffusers.synthetic_fashion import SYNTHETIC

CARD = """
# {name}

A small ResNet of transformers that classifies images of {data}. It is there for its features: the {num_features}
numbers of `pooler_output`, in which ddpm-diffusers compares generated images with real ones (Frechet distance, kernel
distance, precision and recall). Figures in these features are no Inception FIDs, and cannot be compared with figures
in other features: give the digest below with each.

```python
from ddpm_diffusers.evaluation.features import extract_features, load_feature_extractor

extractor = load_feature_extractor("path/to/{name}")
features = extract_features(extractor, images)  # uint8 (N, {channels}, H, W) to (N, {num_features})
```

Images of any resolution are resized to {image_size}x{image_size} (bilinear, antialiased) and scaled to [-1, 1].

{table}

Made by

```bash
{command}
```

from the split {train_split} alone. Two of three batches were first reduced to a random resolution from
{lowest_resolution} to {resolution} pixels; images were not mirrored, shifted or otherwise changed. The split
{test_split} gave the accuracies alone.
"""


@dataclass
class FeatureExtractorArguments:
    dataset_name: str = arg(
        "zalando-datasets/fashion_mnist", "Hub id or local folder, with a column `label` of classes"
    )
    dataset_config_name: str | None = arg(None, "configuration of the data set, if it has several")
    train_split: str = arg("train", "split to train on")
    test_split: str = arg("test", "split that gives the accuracies alone")
    image_column: str = arg("image", "column that holds the images")
    center_crop: bool = arg(False, "crop each image to its central square first")
    channels: int = arg(1, "1 for grey images, 3 for RGB")
    resolution: int = arg(28, "height and width that images are resized to, and the highest resolution to train on")
    lowest_resolution: int = arg(12, "lowest resolution to train on")
    image_size: int = arg(48, "height and width of the network's input, whatever the resolution")
    cache_dir: str | None = arg(None, "cache folder for data sets and decoded images")
    output_dir: str = arg("feature-extractor", "folder for the model and its card")
    hub_license: str | None = arg(None, "license of the model, such as mit, for its card")
    seed: int = arg(0, "seed for weights, data order and resolutions")
    train_batch_size: int = arg(128, "batch size")
    num_epochs: int = arg(12, "passes over the data")
    learning_rate: float = arg(2e-3, "peak learning rate of AdamW; cosine schedule, a tenth of the steps as warm-up")
    adam_weight_decay: float = arg(0.5, "weight decay of AdamW")
    mixed_precision: str | None = arg(None, PRECISION_HELP)

    def __post_init__(self):
        for name in ("resolution", "lowest_resolution", "train_batch_size", "num_epochs"):
            check(self, getattr(self, name) >= 1, name, "be at least 1")
        check(self, self.lowest_resolution <= self.resolution, "lowest_resolution", f"not exceed {self.resolution}")
        check(self, self.image_size >= 16, "image_size", "be at least 16")
        check(self, self.channels in (1, 3), "channels", "be 1 or 3")
        check(self, 0 <= self.seed < 2**32, "seed", "be in [0, 2^32)")
        check(self, 0 < self.learning_rate < math.inf, "learning_rate", "be a positive number")
        check(self, 0 <= self.adam_weight_decay < math.inf, "adam_weight_decay", "be a number of at least 0")
        check(self, self.mixed_precision in PRECISIONS, "mixed_precision", "be auto, no, fp16 or bf16")


def main(args: FeatureExtractorArguments) -> None:
    accelerator = make_accelerator(args.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes were launched; this script runs in one.")
    output_dir = Path(args.output_dir).resolve()
    is_empty_folder = output_dir.is_dir() and not any(output_dir.iterdir())
    if output_dir.exists() and not is_empty_folder:
        raise ValueError(f"`--output_dir` {args.output_dir} exists and is not an empty folder: choose another.")
    if output_dir.is_mount():  # it is renamed to at the end
        raise ValueError(f"`--output_dir` {args.output_dir} is a mounted volume: choose a folder in it.")

    images, labels, names = load_split(args, args.train_split, args.resolution)
    sizes = sorted({args.resolution, min(args.resolution, 16)})
    tests = {size: load_split(args, args.test_split, size) for size in sizes}
    if any(test_names != names for _, _, test_names in tests.values()):
        raise ValueError(
            f"The splits {args.train_split} and {args.test_split} have different classes: their `label` columns must"
            " agree."
        )
    if unseen := {label for test in tests.values() for label in test[1].tolist()} - set(labels.tolist()):
        missing = ", ".join(sorted(names[label] for label in unseen))
        raise ValueError(
            f"The split {args.train_split} has no image of {missing}, and {args.test_split} has: add some, or leave"
            " them out of both. (A slice of data that is sorted by class lacks some: shuffle such data first.)"
        )
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    folder_lock = lock(partial)  # now, so that an unwritable folder, or another run in it, fails before the training
    for leftover in partial.glob("[!.]*"):  # of a run that was killed while it saved
        leftover.unlink()

    set_seed(args.seed)
    config = ResNetConfig(
        num_channels=args.channels,
        embedding_size=32,
        hidden_sizes=[32, 64, 96],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        image_size=args.image_size,
    )
    model = ResNetForImageClassification(config).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.adam_weight_decay)
    classifier, optimizer = accelerator.prepare(model, optimizer)
    steps = math.ceil(args.num_epochs * len(images) / args.train_batch_size)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)

    order = ShuffledBatches(len(images), args.train_batch_size, args.seed, range(steps))
    resolutions = np.random.default_rng(args.seed).integers(args.lowest_resolution, args.resolution + 1, steps)
    progress_bar = tqdm(order, desc="Steps")
    for step, indices in enumerate(progress_bar):
        batch, targets = images[indices].to(accelerator.device), labels[indices].to(accelerator.device)
        if step % 3:  # reduced to a random resolution, and rounded as a stored image of that resolution would be
            size = (int(resolutions[step]),) * 2
            batch = F.interpolate(batch.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
            batch = batch.round().to(torch.uint8)
        logits = classifier(to_input(batch, args.image_size)).logits
        loss = F.cross_entropy(logits.float(), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        if step % 50 == 0:
            progress_bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step % 50 == 0 or step == steps - 1) and not math.isfinite(loss.item()):
            shutil.rmtree(partial)
            raise SystemExit(f"The loss is {loss.item()} at step {step}: lower `--learning_rate`. Nothing was saved.")

    model = accelerator.unwrap_model(classifier, keep_fp32_wrapper=False).eval()
    accuracies = {size: accuracy(model, *test[:2]) for size, test in tests.items()}
    model.save_pretrained(partial)
    digest = checksum(partial / "model.safetensors")
    card = model_card(args, accelerator, model.config, digest, accuracies)
    card.save(partial / "README.md")
    folder_lock.release()
    Path(folder_lock.lock_file).unlink(missing_ok=True)
    for path in partial.iterdir():
        flush(path)
    os.replace(partial, output_dir)  # completely or not at all
    for size, value in accuracies.items():
        print(f"Test accuracy at {size}x{size}: {value:.4f}")
    print(f"Feature extractor: {args.output_dir}, digest {digest[:12]}")


def load_split(
    args: FeatureExtractorArguments, split: str, resolution: int
) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Images, uint8 (N, C, H, W), labels, int64 (N,), and the classes' names."""
    dataset = load_images(
        args.dataset_name,
        resolution=resolution,
        channels=args.channels,
        center_crop=args.center_crop,
        dataset_config_name=args.dataset_config_name,
        split=split,
        image_column=args.image_column,
        cache_dir=args.cache_dir,
    )
    if not isinstance(dataset.features.get("label"), ClassLabel):
        raise ValueError(
            f"Split {split!r} has no column `label` of classes (datasets' ClassLabel): a classifier needs one."
        )
    labels = torch.tensor([-1 if label is None else label for label in dataset["label"]])
    if labels.min() < 0:
        raise ValueError(f"Image {int(labels.argmin())} of split {split!r} has no label: remove it.")
    images = ImageArrays(dataset, (args.channels, resolution, resolution))
    return images.__getitems__(range(len(images))), labels, dataset.features["label"].names


@torch.no_grad()
def accuracy(model, images: torch.Tensor, labels: torch.Tensor) -> float:
    batches = [to_input(batch.to(model.device), model.config.image_size) for batch in images.split(500)]
    predicted = torch.cat([model(batch).logits.argmax(1).cpu() for batch in batches])
    return (predicted == labels).double().mean().item()


def model_card(
    args: FeatureExtractorArguments,
    accelerator: Accelerator,
    config: ResNetConfig,
    digest: str,
    accuracies: dict[int, float],
) -> ModelCard:
    public = is_hub_id(args.dataset_name)
    command = [f"OMP_NUM_THREADS={torch.get_num_threads()}", "python", "train_scripts/train_feature_extractor.py"]
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name == "output_dir":
            command += ["--output_dir", Path(value).resolve().name]
        elif field.name == "cache_dir":
            continue
        elif field.name == "dataset_name":
            command += ["--dataset_name", value if public or value == SYNTHETIC else "path/to/images"]
        elif field.name == "mixed_precision":  # whatever chose it
            command += ["--mixed_precision", accelerator.mixed_precision]
        elif value != field.default:
            command += [f"--{field.name}", str(value)]
    source = f"[{args.dataset_name}](https://huggingface.co/datasets/{args.dataset_name})" if public else "a local set"
    rows = {f"test accuracy at {size}x{size}": f"{value:.4f}" for size, value in accuracies.items()}
    rows |= {"features": config.hidden_sizes[-1], "seed": args.seed, "SHA-256 of model.safetensors": f"`{digest}`"}
    made_with = {**versions(), "device": accelerator.device.type}
    rows |= {"made with": ", ".join(f"{name} {value}" for name, value in made_with.items())}
    data = ModelCardData(
        license=args.hub_license,
        library_name="transformers",
        pipeline_tag="image-classification",
        datasets=[args.dataset_name] if public else None,
    )
    text = CARD.format(
        name=Path(args.output_dir).resolve().name,
        data=f"{SYNTHETIC}, which ddpm-diffusers draws itself" if args.dataset_name == SYNTHETIC else source,
        num_features=config.hidden_sizes[-1],
        image_size=args.image_size,
        channels=args.channels,
        table=table(("", ""), rows.items()),
        command=shlex.join(command),
        lowest_resolution=args.lowest_resolution,
        resolution=args.resolution,
        train_split=args.train_split,
        test_split=args.test_split,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


if __name__ == "__main__":
    run_script(main, FeatureExtractorArguments, __doc__)
