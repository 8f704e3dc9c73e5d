"""Give a pipeline the scheduler that `--scheduler` and `--scheduler_config` describe."""

import json

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.schedulers import name_and_options, rehearse


def swap_scheduler(pipe: PixelDiffusionPipeline, name: str | None, scheduler_config: str | None) -> dict:
    """Give `pipe` the scheduler `name`, or its own, with the arguments in the JSON text.

    Returns the options with which it samples: these arguments, and those of its own scheduler if that is kept.
    """
    try:
        overrides = json.loads(scheduler_config or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"`--scheduler_config` {scheduler_config!r} is no JSON ({error}).") from error
    if not isinstance(overrides, dict):
        raise ValueError(f"`--scheduler_config` holds {overrides!r}; it must be a JSON object of arguments.")
    options = overrides
    if name is None and type(pipe.scheduler).__name__ in SCHEDULERS.values():
        own_name, own_options = name_and_options(pipe.scheduler, pipe.scheduler)
        if not overrides:
            return own_options
        name, options = own_name, own_options | overrides
    if name is not None:
        pipe.scheduler = make_scheduler(name, pipe.scheduler, **options)
        rehearse(pipe.scheduler, name)
    elif overrides:
        raise ValueError("`--scheduler_config` needs `--scheduler`, the name of the class that takes it.")
    return options
