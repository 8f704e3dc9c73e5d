"""Sample images from a saved pipeline, a folder or a Hub id, into PNG files and one grid.

    python train_scripts/generate.py --model runs/first --scheduler dpmsolver++ --num_inference_steps 20

Image i is drawn from generator seed + i, so that it does not depend on the batch size or the device.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from arguments import arg, parse_arguments
from tqdm.auto import tqdm

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.grid import image_grid

GRID_IMAGES = 64


@dataclass
class GenerateArguments:
    model: str = field(metadata={"help": "folder or Hub id of a pipeline with a U-Net and a scheduler"})
    output_dir: str = arg("samples", "folder of the PNG files and of grid.png, which shows the first 64")
    num_images: int = arg(16, "how many images")
    batch_size: int = arg(64, "images sampled at a time")
    scheduler: str | None = arg(None, f"{', '.join(SCHEDULERS)}; the pipeline's own by default")
    num_inference_steps: int = arg(100, "steps of the scheduler")
    seed: int = arg(0, "of the first image")
    dtype: str = arg("float32", "float32, float16 or bfloat16: of the weights")
    variant: str | None = arg(None, "variant of the weights, such as fp16")
    device: str | None = arg(None, "cuda if there is one, else cpu, by default")
    overwrite: bool = arg(False, "write into a folder that is not empty")

    def __post_init__(self):
        for name in ("num_images", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"`--dtype` is {self.dtype!r}; it must be float32, float16 or bfloat16.")


def main(args: GenerateArguments) -> None:
    output_dir = Path(args.output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite:
        raise ValueError(f"`--output_dir` {output_dir} is not empty: choose another, or pass `--overwrite`.")
    pipe = PixelDiffusionPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype), variant=args.variant)
    pipe.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler is not None:
        pipe.scheduler = make_scheduler(args.scheduler, pipe.scheduler)

    shown, start = [], time.perf_counter()
    with tqdm(total=args.num_images, desc="Images") as progress_bar:
        for first in range(0, args.num_images, args.batch_size):
            indices = range(first, min(first + args.batch_size, args.num_images))
            generators = [torch.Generator().manual_seed(args.seed + i) for i in indices]
            images = pipe(len(indices), args.num_inference_steps, generators).images
            output_dir.mkdir(parents=True, exist_ok=True)
            for i, image in zip(indices, images, strict=True):
                image.save(output_dir / f"{args.seed + i:06d}.png")
            shown += images[: GRID_IMAGES - len(shown)]
            progress_bar.update(len(images))
    image_grid(shown).save(output_dir / "grid.png")
    print(
        f"{args.num_images} images by {type(pipe.scheduler).__name__}, {args.num_inference_steps} steps,"
        f" {time.perf_counter() - start:.1f} s"
    )
    print(f"Grid: {output_dir / 'grid.png'}")


if __name__ == "__main__":
    main(parse_arguments(GenerateArguments, sys.argv[1:], __doc__))
