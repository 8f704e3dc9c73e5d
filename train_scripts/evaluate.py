"""Evaluate a saved pipeline, or any folder of images, against a data set: distances, precision, recall, spectra.

    python train_scripts/evaluate.py --model runs/first --scheduler dpmsolver++ --num_inference_steps 20

`--images` evaluates a folder, or the data set's split `train` or `test`, in place of a pipeline's samples; `--damage`
blurs them or adds a checkerboard or noise first, to see which figures move. Under `accelerate launch` the processes
share the sampling.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from command_line import arg, check, run_script
from evaluation_arguments import (
    EvaluationArguments,
    digest_of,
    load_pipeline,
    open_extractor,
    open_reference,
    provenance,
    source_of,
)
from files import check_apart, lock, write_file, write_text
from launch import make_accelerator
from samplers import SamplingArguments, settle_sampling, swap_scheduler
from tables import caption, figures_table

from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.data_sources import is_image
from ddpm_diffusers.evaluation import evaluate_pipeline
from ddpm_diffusers.evaluation.damage import DAMAGE
from ddpm_diffusers.evaluation.plots import plot_spectra
from ddpm_diffusers.evaluation.protocol import (
    IMAGES_KEPT,
    Statistics,
    check_count,
    evenly_spaced,
    image_shape,
    record_of,
)
from ddpm_diffusers.grid import image_grid
from ddpm_diffusers.hub import add_figures, has_form_of_hub_id, is_hub_id
from ddpm_diffusers.image_decoding import central_square, decode_image, has_colour
from ddpm_diffusers.pipeline_pixel_diffusion import README
from ddpm_diffusers.sampling import to_pil
from ddpm_diffusers.schedulers import count_evaluations

# metric_type on the card: its name there, and where the figure stands in a record's "figures", by group and name
CARD_FIGURES = {
    "frechet_distance": ("Frechet distance of classifier features (0 is best)", "train", "frechet_distance"),
    "frechet_distance_to_floor": ("Frechet distance, times that of real test images", "to_floor", "frechet_distance"),
    "kernel_distance": ("KID of classifier features (0 is best)", "train", "kernel_distance"),
    "precision": ("precision, k=3 (share of samples among real images)", "train", "precision"),
    "recall": ("recall, k=3 (share of real images among samples)", "train", "recall"),
    "cb2_db": ("checkerboard CB2, dB (0: as in real images)", "train", "cb2_db"),
    "cb4_db": ("checkerboard CB4, dB (0: as in real images)", "train", "cb4_db"),
    "hf_db": ("sharpness HF, dB (0: as in real images, below: blurred)", "train", "hf_db"),
    "frechet_distance_to_test": ("Frechet distance to images not trained on", "test", "frechet_distance"),
}


@dataclass
class EvaluateArguments(SamplingArguments, EvaluationArguments):
    # what is evaluated
    model: str | None = arg(None, "folder or Hub id of a pipeline")
    images: str | None = arg(None, "in place of --model: a folder of images, or the data set's split train or test")
    resolution: int | None = arg(None, "with --images train or test: height and width to resize to; 28 by default")
    damage: str | None = arg(None, f"with --images: damage to apply, one of {', '.join(DAMAGE)}")
    damage_amount: float | None = arg(None, "in [0, 1]: share of the full blur, or of the range of pixel values")
    # output
    name: str | None = arg(None, "name of the table row; the last part of --model or --images by default")
    write_card: bool = arg(False, "write the figures into the model card in the --model folder")

    def __post_init__(self):
        super().__post_init__()
        if self.images not in (None, self.train_split, self.test_split):
            check_apart(self.output_dir, self.images)
        if (self.model is None) == (self.images is None):
            raise ValueError("Give either `--model`, a pipeline, or `--images`, images in place of its samples.")
        if self.images is not None:
            sampling = ("scheduler", "num_inference_steps", "timesteps", "variant", "mixed_precision")
            for name, default in {**dict.fromkeys(sampling), "guidance_scale": 1, "seeds": [0]}.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`--{name}` is for a `--model`; `--images` are judged as they are: leave it out."
                    )
        if self.resolution is not None and self.images not in (self.train_split, self.test_split):
            raise ValueError(
                "`--resolution` is for `--images` that are a split of the data set; others, and a `--model`'s samples,"
                " have one: leave it out."
            )
        settle_sampling(self)
        self.resolution = 28 if self.resolution is None else self.resolution
        even = self.resolution >= 6 and self.resolution % 2 == 0
        check(self, even, "resolution", "be even, and at least 6")
        if self.damage is not None and (self.images is None or self.damage not in DAMAGE):
            raise ValueError(f"`--damage` is {self.damage!r}; it must be one of {', '.join(DAMAGE)}, with `--images`.")
        if (self.damage is None) != (self.damage_amount is None):
            raise ValueError("Give `--damage` and `--damage_amount`, or neither.")
        check(self, self.damage is None or 0 <= self.damage_amount <= 1, "damage_amount", "be in [0, 1]")
        if self.dataset_id is not None:
            check(self, has_form_of_hub_id(self.dataset_id), "dataset_id", "be owner/name on the Hub")
        elif self.write_card and (self.train_data_dir is not None or not is_hub_id(self.dataset_name)):
            raise ValueError(
                f"`--write_card` needs the data set's id on the Hub, which {self.train_data_dir or self.dataset_name}"
                " is not: give `--dataset_id owner/name`."
            )
        if self.write_card and (self.model is None or not Path(self.model, README).is_file()):
            raise ValueError(f"`--write_card` needs a local `--model` with a card; {self.model} has no {README}.")


def main(args: EvaluateArguments) -> None:
    accelerator, output_dir, pipe = make_accelerator(args.mixed_precision), Path(args.output_dir), None
    if args.model is not None:
        pipe = load_pipeline(args, accelerator)
        options = swap_scheduler(pipe, args.scheduler)
        pipe.check_guidance(args.guidance_scale)
        channels, side, _ = image_shape(pipe)
        extractor = open_extractor(args, accelerator, channels)
        count_evaluations(pipe.scheduler, args.num_inference_steps, args.timesteps)  # raises on what it cannot take
    else:
        extractor = open_extractor(args, accelerator)
        images = given_images(args, extractor.num_channels)  # (N, C, H, W)
        extractor.check_channels(images.shape[1])
        check_count(len(images), extractor)
        if args.damage is not None:
            images = DAMAGE[args.damage](images, args.damage_amount)
        side, channels = images.shape[-1], images.shape[1]
    if accelerator.is_main_process:
        folder_lock = lock(output_dir, must_be_empty=not args.overwrite)
    reference = open_reference(args, accelerator, extractor, side, channels)

    if pipe is not None:
        record = evaluate_pipeline(
            pipe,
            reference,
            args.num_images,
            args.num_inference_steps,
            seeds=args.seeds,
            batch_size=args.batch_size,
            guidance_scale=args.guidance_scale,
            timesteps=args.timesteps,
            progress=True,
        )
    else:
        record = record_of([Statistics.of_images(images, reference.extractor)], reference)
        record["images"] = images[:IMAGES_KEPT]
    if not accelerator.is_main_process:
        return

    name = args.name or Path(args.model or args.images).resolve().name
    kept = record.pop("images")
    split = {"train_split": args.train_split, "test_split": args.test_split, "center_crop": args.center_crop}
    record = {"name": name, **provenance(args, accelerator, pipe), **split, **record}
    if pipe is not None:
        record["scheduler_options"] = options
        if args.guidance_scale > 1:
            record["guiding_weights"] = digest_of(pipe.guiding_unet)
    (output_dir / "evaluation.json").unlink(missing_ok=True)  # where it is, all files are complete: written last
    row = figures_table([(leading_cells(record), record["figures"])]) + "\n\n" + caption(record)
    write_text(output_dir / "row.md", row + "\n")
    write_file(output_dir / "grid.png", image_grid(to_pil(kept)).save)
    for kind, file in (("radial", "spectrum.png"), ("rings", "rings.png")):
        real, samples = (record["spectrum"][of][kind] for of in ("real", "samples"))
        write_file(output_dir / file, partial(plot_spectra, {name: samples}, real, kind=kind))
    write_text(output_dir / "evaluation.json", json.dumps(record, indent=2) + "\n")  # last
    if args.write_card:
        card = Path(args.model, README)
        write_text(card, add_figures(card.read_text("utf-8"), card_figures(record)))
    folder_lock.release()
    print(row)


def given_images(args: EvaluateArguments, channels: int) -> torch.Tensor:
    """Up to `--num_images` of what `--images` names, a split (with `channels`) or a folder; uint8 (N, C, H, W)."""
    if args.images not in (args.train_split, args.test_split):
        return images_of_folder(args, channels)
    dataset = load_images(resolution=args.resolution, channels=channels, split=args.images, **source_of(args))
    images = ImageArrays(dataset, (channels, args.resolution, args.resolution))
    count = min(args.num_images, len(images))
    return images.__getitems__(evenly_spaced(len(images), count))


def images_of_folder(args: EvaluateArguments, channels: int) -> torch.Tensor:
    """Evenly spaced images of the folder, grey if all are, or if `channels` is 1 and none has colour."""
    files = sorted(path for path in Path(args.images).glob("*") if is_image(path))
    files = [path for path in files if path.name != "grid.png"]  # of generate.py
    files = [files[i] for i in evenly_spaced(len(files), min(args.num_images, len(files)))]
    if not files:
        raise ValueError(
            f"`--images` {args.images} is no folder with images, nor one of the splits {args.train_split} and"
            f" {args.test_split}."
        )
    images = []
    for i, path in enumerate(files):
        try:
            images.append(decode_image({"bytes": None, "path": str(path)}, i))
        except ValueError as error:
            if error.__cause__ is None:  # it was read, but its kind cannot be used: the message says why
                raise
            raise ValueError(
                f"{path} of `--images` cannot be read ({error.__cause__}): repair or remove it."
            ) from error
    if args.center_crop:
        images = [central_square(image) for image in images]
    grey = all(image.mode == "L" for image in images) or (channels == 1 and not any(map(has_colour, images)))
    mode = "L" if grey else "RGB"
    for path, image in zip(files, images, strict=True):
        if image.size != images[0].size or image.width != image.height:
            raise ValueError(
                f"{path} is {image.width}x{image.height} and {files[0]} {images[0].width}x{images[0].height}; all"
                " images must be square and of one size."
            )
    pixels = np.stack([np.asarray(image.convert(mode)) for image in images])
    return torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()


def leading_cells(record: dict) -> dict:
    cells = {"": record["name"], "images": record["num_images"]}
    if "scheduler" in record:
        cells |= {"scheduler": record["scheduler"].removesuffix("Scheduler"), "evaluations": record["evaluations"]}
    return cells


def card_figures(record: dict) -> list[dict]:
    """The figures for the card's `model-index`, and how they were measured."""
    extractor = record["feature_extractor"]
    measured_with = {
        "samples": record["num_images"],
        "seeds": " ".join(map(str, record["seeds"])),
        "scheduler": record["scheduler"],
        **record["scheduler_options"],
        "evaluations": record["evaluations"],
        **({"timesteps": " ".join(map(str, record["timesteps"]))} if "timesteps" in record else {}),
        **({"guidance_scale": record["guidance_scale"]} if record["guidance_scale"] > 1 else {}),
        "mixed_precision": record["mixed_precision"],
        "features": f"{extractor['name']} {extractor['digest']}",
    }
    figures = []
    for metric, (heading, group, name) in CARD_FIGURES.items():
        figure = record["figures"][group][name]
        if figure is not None:
            figures.append({
                "dataset_type": record["dataset"],
                "dataset_name": record["dataset"].rpartition("/")[2],
                "dataset_split": record["test_split" if group == "test" else "train_split"],
                "metric_type": metric,
                "metric_name": heading + (f", ± {figure['sd']:.2g} over the seeds" if "sd" in figure else ""),
                "metric_value": float(f"{figure['mean']:.4g}"),
                "metric_args": measured_with,
            })  # fmt: skip
    return figures


if __name__ == "__main__":
    run_script(main, EvaluateArguments, __doc__)
