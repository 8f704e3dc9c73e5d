"""What differs between accelerate's trackers. None of them is imported unless it is asked for."""

import numpy as np
from PIL import Image

TRACKERS = ("tensorboard", "wandb", "trackio")


def init_kwargs(run_id: str, step: int) -> dict:
    """Tracker arguments with which a run resumed at `step` continues in the tracker, too."""
    return {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": run_id, "name": run_id, "resume": "allow"},
        "trackio": {"name": run_id, "resume": "allow"},
    }


def log_image(trackers: list, name: str, image: Image.Image, step: int) -> None:
    pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
    for tracker in trackers:
        if tracker.name == "trackio":  # accelerate has no `log_images` for it
            import trackio

            tracker.log({name: trackio.Image(pixels)}, step=step)
        else:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=step, **options)
