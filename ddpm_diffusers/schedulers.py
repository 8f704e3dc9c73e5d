"""Other samplers for the same trained network: the noise schedule is carried over, never replaced by a default."""

import inspect

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
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

# their step raises on prediction_type "sample"
NO_SAMPLE_PREDICTION = ("pndm", "euler_ancestral", "dpmsolver_sde", "kdpm2", "kdpm2_ancestral")

# what a network was trained with, and no sampler may change
TRAINED_WITH = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def make_scheduler(name: str, scheduler: SchedulerMixin, **overrides) -> SchedulerMixin:
    """A scheduler of another class with the noise schedule and prediction type of `scheduler`.

    Args:
        name: A key of `SCHEDULERS`.
        scheduler: The scheduler to follow, such as `pipe.scheduler`. What else the two classes share
            (`timestep_spacing` for one) is carried over too, defaults included.
        overrides: Arguments of the new class, such as `use_karras_sigmas=True`.

    Raises:
        ValueError: On an unknown name, a scheduler that cannot serve the network (with the reason), or an override
            that the class does not take.
        ImportError: Where the scheduler needs a package that is not installed (`dpmsolver_sde`: torchsde).
    """
    if name in REFUSED:
        raise ValueError(f"Scheduler {name!r} cannot be used: {REFUSED[name]}. Use one of {', '.join(SCHEDULERS)}.")
    if name not in SCHEDULERS:
        raise ValueError(f"Scheduler {name!r} is unknown; it must be one of {', '.join(SCHEDULERS)}.")
    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    taken = inspect.signature(scheduler_class.__init__).parameters
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}

    if name == "tcd":  # by default it knows the 50 steps of its distillation alone
        overrides.setdefault("original_inference_steps", config["num_train_timesteps"])
    for key in overrides:
        if key not in taken:
            raise ValueError(f"`{key}` is no argument of {scheduler_class.__name__}; it takes {', '.join(taken)}.")
        if key in TRAINED_WITH and overrides[key] != config[key]:
            raise ValueError(
                f"`{key}` is {config[key]!r} in the scheduler that the network was trained with; it cannot change."
            )
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in taken:
        raise ValueError(f"{scheduler_class.__name__} cannot follow a schedule with `rescale_betas_zero_snr=True`.")
    if name in NO_SAMPLE_PREDICTION and config["prediction_type"] == "sample":
        raise ValueError(f"{scheduler_class.__name__} knows no `prediction_type` 'sample'; use another scheduler.")
    try:
        return scheduler_class.from_config(config, **overrides)
    except NotImplementedError as error:  # a beta_schedule that only some classes know
        raise ValueError(f"{scheduler_class.__name__} cannot follow this noise schedule: {error}.") from error
