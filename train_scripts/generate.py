"""Sample images from a saved pipeline, a folder or a Hub id, into PNG files and one grid.

    python train_scripts/generate.py --model runs/first --scheduler dpmsolver++ --num_inference_steps 20

Image i is drawn from generator seed + i, so that it does not depend on the batch size.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import HfArgumentParser

from ddpm_diffusers import SCHEDULERS, make_scheduler
from ddpm_diffusers.grid import image_grid


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    model: str = field(metadata={"help": "folder or Hub id of a pipeline"})
    output_dir: str = arg("samples", "folder of the PNG files and of grid.png")
    num_images: int = arg(16, "how many images")
    batch_size: int = arg(64, "images sampled at a time")
    scheduler: str | None = arg(None, f"{', '.join(SCHEDULERS)}; the pipeline's own by default")
    num_inference_steps: int = arg(50, "steps of the scheduler")
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


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite:
        raise ValueError(f"`--output_dir` {output_dir} is not empty: choose another, or pass `--overwrite`.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype), variant=args.variant)
    pipe.to(device)
    if args.scheduler is not None:
        pipe.scheduler = make_scheduler(args.scheduler, pipe.scheduler)

    images, start = [], time.perf_counter()
    for first in range(0, args.num_images, args.batch_size):
        seeds = range(args.seed + first, args.seed + min(first + args.batch_size, args.num_images))
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        images += pipe(len(seeds), args.num_inference_steps, generators).images
    seconds = time.perf_counter() - start

    output_dir.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(output_dir / f"{args.seed + i:06d}.png")
    image_grid(images).save(output_dir / "grid.png")
    print(
        f"{len(images)} images by {type(pipe.scheduler).__name__}, {args.num_inference_steps} steps, {seconds:.1f} s"
    )
    print(f"Grid: {output_dir / 'grid.png'}")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(sys.argv[1:])[0])
