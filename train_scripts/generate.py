"""Sample images from a saved pipeline (a folder or a Hub id) into PNG files and a grid.

    python train_scripts/generate.py --model runs/first --scheduler dpmsolver++ --num_inference_steps 20

Image i is sampled with a generator of seed + i, so its starting noise does not depend on batch size or device. Under
`accelerate launch` the processes share the batches; the images are bit-identical however many processes there are.
"""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import arg, check, run_script
from files import check_empty, lock, write_file
from launch import make_accelerator
from samplers import SamplingArguments, settle_sampling, swap_scheduler

from ddpm_diffusers import PixelDiffusionPipeline
from ddpm_diffusers.grid import image_grid
from ddpm_diffusers.sampling import sample_images, to_pil
from ddpm_diffusers.schedulers import count_evaluations

GRID_IMAGES = 64


@dataclass
class GenerateArguments(SamplingArguments):
    model: str = field(kw_only=True, metadata={"help": "folder or Hub id of a pipeline with a U-Net and a scheduler"})
    output_dir: str = arg("samples", "folder for the PNG files and grid.png, which shows the first 64")
    num_images: int = arg(16, "number of images to sample")
    batch_size: int = arg(64, "images sampled at a time")
    seed: int = arg(0, "seed of the first image; image i gets seed + i")
    dtype: str = arg("float32", "dtype of the weights: float32, float16 or bfloat16")
    variant: str | None = arg(None, "variant of the weights, such as fp16")
    device: str | None = arg(None, "by default accelerate's choice: one GPU per process if available, else cpu")
    overwrite: bool = arg(False, "write into a folder that is not empty, replacing the samples there")

    def __post_init__(self):
        settle_sampling(self)
        for name in ("num_images", "batch_size"):
            check(self, getattr(self, name) >= 1, name, "be at least 1")
        check(self, 0 <= self.seed < 2**32, "seed", "be in [0, 2^32)")
        check(self, self.dtype in ("float32", "float16", "bfloat16"), "dtype", "be float32, float16 or bfloat16")
        if not self.overwrite:
            check_empty(Path(self.output_dir))


def main(args: GenerateArguments) -> None:
    accelerator, output_dir = make_accelerator("no", cpu=args.device == "cpu"), Path(args.output_dir)
    pipe = PixelDiffusionPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype), variant=args.variant)
    pipe.to(args.device or accelerator.device)
    swap_scheduler(pipe, args.scheduler)
    pipe.check_guidance(args.guidance_scale)
    if (channels := pipe.unet.config.in_channels) > 4:
        raise ValueError(f"{args.model} makes images of {channels} channels; a PNG file holds at most 4.")
    count_evaluations(pipe.scheduler, args.num_inference_steps, args.timesteps)  # raises on what it cannot take
    if accelerator.is_main_process:  # before the sampling, so that it fails early
        folder_lock = lock(output_dir, must_be_empty=not args.overwrite)

    start = time.perf_counter()
    images = sample_images(
        pipe,
        args.num_images,
        args.num_inference_steps,
        batch_size=args.batch_size,
        seed=args.seed,
        guidance_scale=args.guidance_scale,
        timesteps=args.timesteps,
        progress=True,
    )
    if not accelerator.is_main_process:
        return
    if (output_dir / "grid.png").exists():  # with `--overwrite`: the numbered images are earlier samples
        for path in output_dir.iterdir():
            if re.fullmatch(r"\d{6,}\.png", path.name):
                path.unlink()
    images = to_pil(images)
    write_file(output_dir / "grid.png", image_grid(images[:GRID_IMAGES]).save)  # first: it marks the others as samples
    for i, image in enumerate(images):
        write_file(output_dir / f"{args.seed + i:06d}.png", image.save, to_disk=False)  # there may be thousands
    folder_lock.release()
    print(
        f"{args.num_images} images by {type(pipe.scheduler).__name__}, {args.num_inference_steps} steps,"
        f" {time.perf_counter() - start:.1f} s"
    )
    print(f"Grid: {output_dir / 'grid.png'}")


if __name__ == "__main__":
    run_script(main, GenerateArguments, __doc__)
