"""Schedulers as the scripts' flags describe them: `NAME`, or `NAME:OPTION=VALUE,OPTION=VALUE`."""

import math
import warnings
from dataclasses import dataclass

import diffusers
import yaml
from command_line import arg, check

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.schedulers import name_and_options, rehearse

FORM = "or with options, as in dpmsolver++:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true"


@dataclass
class SamplingArguments:
    # how the pipeline samples
    scheduler: str | None = arg(None, f"{', '.join(SCHEDULERS)}, {FORM}; the pipeline's own by default")
    num_inference_steps: int | None = arg(None, "steps of the scheduler; 100 by default")
    timesteps: list[int] | None = arg(None, "timesteps to step through, descending, in place of --num_inference_steps")
    guidance_scale: float = arg(1.0, "above 1: guidance by the pipeline's weaker network, `guiding_unet`")


def parse_scheduler(text: str) -> tuple[str, dict]:
    """The name and the options, whose values are YAML; ValueError if the text is of another form."""
    name, _, listed = text.partition(":")
    options = {}
    form = f"The scheduler is {text!r}; it must be NAME or NAME:OPTION=VALUE,OPTION=VALUE"
    for option in listed.split(",") if listed else []:
        key, equals, value = option.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{form}.")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{form}, with values in YAML that hold no comma.") from error
    return name, options


def hush_schedulers() -> None:
    """For scripts that make many: they comment on their defaults each time, and torchsde on rounding in its times."""
    diffusers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="torchsde")


def settle_sampling(args: SamplingArguments) -> None:
    """Check the flags of a sampling, and set `args.num_inference_steps`: to the number of `timesteps`, 100 without.

    Raises:
        ValueError: If both are given, there are no steps, or `guidance_scale` is no number from 1.
    """
    if args.num_inference_steps is not None and args.timesteps is not None:
        raise ValueError("Give either `--num_inference_steps` or `--timesteps`, not both.")
    if args.timesteps is not None:
        args.num_inference_steps = len(args.timesteps)
    elif args.num_inference_steps is None:
        args.num_inference_steps = 100
    check(args, args.num_inference_steps >= 1, "num_inference_steps", "be at least 1")
    check(args, 1 <= args.guidance_scale < math.inf, "guidance_scale", "be a number from 1 (no guidance)")


def swap_scheduler(pipe: PixelDiffusionPipeline, text: str | None) -> dict:
    """Give `pipe` the scheduler of the text, if any; returns the options of the one that it has then.

    Raises:
        ValueError: If there is no such scheduler, or it cannot sample with these options.
    """
    if text is None:
        is_known = type(pipe.scheduler).__name__ in SCHEDULERS.values()
        return name_and_options(pipe.scheduler, pipe.scheduler)[1] if is_known else {}
    name, options = parse_scheduler(text)
    pipe.scheduler = make_scheduler(name, pipe.scheduler, **options)
    rehearse(pipe.scheduler, name)
    return options
