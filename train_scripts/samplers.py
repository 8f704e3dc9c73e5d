"""Give a pipeline the scheduler that `--scheduler` and `--scheduler_config` describe."""

import json

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.schedulers import rehearse


def swap_scheduler(pipe: PixelDiffusionPipeline, name: str | None, scheduler_config: str | None) -> dict:
    """Give `pipe` the scheduler `name`, or its own, with the arguments in the JSON text, and return these."""
    try:
        overrides = json.loads(scheduler_config or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"`--scheduler_config` {scheduler_config!r} is no JSON ({error}).") from error
    if not isinstance(overrides, dict):
        raise ValueError(f"`--scheduler_config` holds {overrides!r}; it must be a JSON object of arguments.")
    if name is None and overrides:
        own = [key for key, class_name in SCHEDULERS.items() if class_name == type(pipe.scheduler).__name__]
        if not own:
            raise ValueError("`--scheduler_config` needs `--scheduler`, the name of the class that takes it.")
        name = own[0]
    if name is not None:
        pipe.scheduler = make_scheduler(name, pipe.scheduler, **overrides)
        rehearse(pipe.scheduler, name)
    return overrides
