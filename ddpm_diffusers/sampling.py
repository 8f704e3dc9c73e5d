"""Sample many images from a pipeline, with batches split over processes; the split does not affect the images."""

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import gather
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from .pipeline_pixel_diffusion import PixelDiffusionPipeline, check_positive


class NotFiniteError(ValueError):
    """Samples contain NaN or infinity."""


def sample_images(
    pipe: PixelDiffusionPipeline,
    num_images: int,
    num_inference_steps: int = 50,
    *,
    batch_size: int = 16,
    seed: int = 0,
    guidance_scale: float = 1.0,
    timesteps: list[int] | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Sample images 0 to num_images - 1 of `pipe`, uint8 (num_images, C, H, W) on the CPU.

    Every process must call it, and gets all images. Image i starts from `torch.Generator().manual_seed(seed + i)`.
    Batch k always starts with image k * batch_size and is sampled by a single process, so that not even rounding
    depends on the number of processes.

    Args:
        pipe: A `PixelDiffusionPipeline`.
        num_images: At least 1.
        num_inference_steps: Number of scheduler steps.
        batch_size: Images sampled at a time; their last bits depend on it.
        seed: Seed of the first image.
        guidance_scale, timesteps: Those of the pipeline's call.
        progress: Show a progress bar of the main process's batches.

    Raises:
        TypeError: If the pipeline is of another class, or `timesteps` no list.
        ValueError: If a number is no positive integer, or the scheduler cannot take the steps or timesteps.
        NotFiniteError: In every process, if an image holds NaN or infinity.
    """
    if PixelDiffusionPipeline.__name__ not in [base.__name__ for base in type(pipe).__mro__]:  # or a repository's own
        raise TypeError(
            f"`pipe` is a {type(pipe).__name__}; it must be a PixelDiffusionPipeline: give"
            " `PixelDiffusionPipeline(pipe.unet, pipe.scheduler)`."
        )
    check_positive(num_images=num_images, batch_size=batch_size)
    options = {} if guidance_scale == 1 else {"guidance_scale": guidance_scale}  # a subclass's call may take none
    options |= {} if timesteps is None else {"timesteps": timesteps}
    state = PartialState()
    batch_size = min(batch_size, num_images)
    rounds = count_sampled(num_images, batch_size) // (batch_size * state.num_processes)
    batches = []  # equally many in each process; the last may exceed `num_images`
    for turn in tqdm(range(rounds), desc="Batches", disable=not (progress and state.is_main_process)):
        first = (turn * state.num_processes + state.process_index) * batch_size
        generators = [torch.Generator().manual_seed(seed + i) for i in range(first, first + batch_size)]
        with without_progress_bar(pipe):
            latents = pipe(batch_size, num_inference_steps, generators, output_type="latent", **options).images
        if not gather(latents.isfinite().all()[None]).all():  # clamping would hide infinity
            steps = num_inference_steps if timesteps is None else len(timesteps)
            raise NotFiniteError(
                f"{type(pipe.scheduler).__name__} made images with NaN or infinity in {steps} steps. Try"
                " other steps, DDPM and float32; if they do, too, the training has diverged: lower its learning rate."
            )
        batches.append(((latents / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    images = torch.stack(batches)  # (rounds, B, C, H, W)
    images = gather(images).unflatten(0, (state.num_processes, rounds)).transpose(0, 1)  # (rounds, processes, B, ...)
    # lets gloo's thread release the tensors while this one waits; at process exit the two would block each other
    state.wait_for_everyone()
    return images.reshape(-1, *images.shape[-3:])[:num_images].cpu()


@contextlib.contextmanager
def without_progress_bar(pipe: DiffusionPipeline) -> Iterator[None]:
    """For calls within another progress bar."""
    config = getattr(pipe, "_progress_bar_config", {})  # diffusers has no method that tells it
    pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**config)


def count_sampled(num_images: int, batch_size: int) -> int:
    """How many images `sample_images` makes for `num_images`: whole batches, equally many in each process."""
    of_a_round = min(batch_size, num_images) * PartialState().num_processes
    return math.ceil(num_images / of_a_round) * of_a_round


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Convert uint8 (B, C, H, W) to PIL images, grey ones in mode "L"."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).squeeze(-1).numpy()]  # (H, W) or (H, W, 3)
