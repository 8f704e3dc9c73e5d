"""Other samplers for the same trained network: the noise schedule is carried over, never replaced by a default."""

import copy
import inspect

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import requires_backends

from .pipeline_pixel_diffusion import (
    CARRIED_OVER,
    check_steps,
    init_parameters,
    noise_arguments,
    refusal,
    set_timesteps,
    splits_off_a_variance,
)

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",  # needs scipy
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver++_singlestep": "DPMSolverSinglestepScheduler",
    "dpmsolver_sde": "DPMSolverSDEScheduler",  # needs torchsde
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "sa_solver": "SASolverScheduler",
    "tcd": "TCDScheduler",
}

REFUSED = {
    "lcm": "LCMScheduler jumps to the image at each step, which needs a consistency-distilled network",
    "ipndm": "IPNDMScheduler has a noise schedule of its own and cannot take the network's",
}

REHEARSAL_STEPS = 20  # every scheduler can take this many


def make_scheduler(name: str, scheduler: SchedulerMixin, **overrides) -> SchedulerMixin:
    """A scheduler of another class with the noise schedule and prediction type of `scheduler`.

    Args:
        name: A key of `SCHEDULERS`. "ddim" and "pndm" need a number of steps that divides `num_train_timesteps`: they
            go back by the quotient rounded down, so that, with "trailing" spacing, other numbers may end before all
            noise is removed, such as 91 steps of 1,000 timesteps.
        scheduler: The scheduler to follow, such as `pipe.scheduler`. Along with the noise schedule, its timestep
            spacing and clipping are carried over, defaults included, and a `variance_type` that is learned or of the
            same class; other options of the solver itself are not.
        overrides: Arguments of the new class, such as `use_karras_sigmas=True`.

    Raises:
        ValueError: If the name is unknown, the scheduler cannot follow the network's noise schedule (the message says
            why), or an override is not an argument of the class or would change what the network was trained with.
        ImportError: If the scheduler needs a package that is not installed (`lms`: scipy; `dpmsolver_sde`: torchsde).
    """
    if name in REFUSED:
        raise ValueError(f"Scheduler {name!r} cannot be used: {REFUSED[name]}. Use one of {', '.join(SCHEDULERS)}.")
    if name not in SCHEDULERS:
        raise ValueError(f"Scheduler {name!r} is unknown; it must be one of {', '.join(SCHEDULERS)}.")
    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    if "beta_schedule" not in scheduler.config or "prediction_type" not in scheduler.config:
        raise ValueError(
            f"{type(scheduler).__name__} has no discrete noise schedule to follow (no `beta_schedule` or no"
            " `prediction_type`): give the scheduler that the network was trained with."
        )
    requires_backends(scheduler_class, getattr(scheduler_class, "_backends", []))  # a placeholder without its package
    taken = inspect.signature(scheduler_class).parameters
    config = {key: scheduler.config[key] for key in CARRIED_OVER if key in taken and key in scheduler.config}
    variance_type = scheduler.config.get("variance_type")
    is_learned = "learned" in str(variance_type)  # then it is the network's, else the sampler's own
    if "variance_type" in taken and (is_learned or isinstance(scheduler, scheduler_class)):
        config["variance_type"] = variance_type

    for key, value in overrides.items():
        if key not in taken:
            raise ValueError(f"`{key}` is no argument of {scheduler_class.__name__}; it takes {', '.join(taken)}.")
        trained = scheduler.config.get(key, taken[key].default)
        if key in noise_arguments(scheduler.config) and not np.array_equal(value, trained):
            raise ValueError(
                f"`{key}` is {trained!r} in the scheduler that the network was trained with; it cannot change."
            )
    if name == "tcd":  # by default it takes only the 50 steps of its distillation
        config["original_inference_steps"] = config["num_train_timesteps"]
    try:
        made = scheduler_class(**{**config, **overrides})
    except NotImplementedError as error:  # a beta_schedule that only some classes know, or an unknown algorithm
        raise ValueError(
            f"{scheduler_class.__name__} cannot be made with this noise schedule and these options: {error}."
        ) from error
    if reason := refusal(made, scheduler.config):
        raise ValueError(f"{scheduler_class.__name__} cannot be used: {reason}.")
    # what this class cannot use is kept for a class that may replace it, as `from_config` does
    of_network = (*CARRIED_OVER, "variance_type") if is_learned else CARRIED_OVER
    kept = {key: scheduler.config[key] for key in of_network if key in scheduler.config and key not in taken}
    made.register_to_config(**kept)
    return made


def name_and_options(scheduler: SchedulerMixin, followed: SchedulerMixin) -> tuple[str, dict]:
    """The name and options from which `make_scheduler(name, followed, **options)` rebuilds `scheduler`.

    Raises:
        ValueError: If its class is not in `SCHEDULERS`.
    """
    names = [name for name, class_name in SCHEDULERS.items() if class_name == type(scheduler).__name__]
    if not names:
        raise ValueError(f"{type(scheduler).__name__} cannot be used; use one of {', '.join(SCHEDULERS.values())}.")
    made, config = make_scheduler(names[0], followed).config, scheduler.config
    given = init_parameters(scheduler) & config.keys()  # what it holds for other classes is of no effect
    return names[0], {key: config[key] for key in sorted(given) if not np.array_equal(config[key], made[key])}


def count_evaluations(scheduler: SchedulerMixin, num_inference_steps: int, timesteps: list[int] | None = None) -> int:
    """Number of network evaluations that the pipeline makes: up to two per step, and more for a warm-up.

    Raises:
        ValueError, TypeError: If the scheduler cannot take that number of steps, or these timesteps in its place.
    """
    check_steps(scheduler, num_inference_steps, timesteps)
    scheduler = copy.deepcopy(scheduler)  # the caller's keeps its timesteps
    return len(set_timesteps(scheduler, num_inference_steps, timesteps=timesteps))


def rehearse(scheduler: SchedulerMixin, name: str) -> None:
    """Raise a ValueError if the scheduler cannot sample with a network that outputs 0, e.g. due to a wrong option."""
    scheduler, sample = copy.deepcopy(scheduler), torch.zeros(1, 3, 8, 8)
    output = torch.zeros(1, 6 if splits_off_a_variance(scheduler, 3) else 3, 8, 8)
    try:
        with torch.random.fork_rng(devices=[]):
            for t in set_timesteps(scheduler, min(REHEARSAL_STEPS, scheduler.config.num_train_timesteps)):
                scheduler.scale_model_input(sample, t)
                sample = scheduler.step(output, t, sample).prev_sample
    except Exception as error:  # each class fails in its own way
        reason = error.__cause__ or error  # without "cannot take 20 steps", which nobody asked for
        raise ValueError(f"Scheduler {name!r} cannot sample ({reason}): change its options.") from error
