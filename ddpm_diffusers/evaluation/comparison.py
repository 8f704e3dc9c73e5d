"""Compare schedulers on one trained network, at equal numbers of its evaluations and from the same starting noise.

    records = compare_schedulers(pipe, ["ddim", ("dpmsolver++", {"use_karras_sigmas": True})], reference)
    yardstick = compare_schedulers(pipe, ["ddpm"], reference, evaluations=(1000,))[0]
    few_steps = best_settings(records, yardstick)

The number of evaluations is the cost of sampling; a second-order scheduler makes up to two of them per step.
"""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tqdm.auto import tqdm

from ..sampling import NotFiniteError
from ..schedulers import count_evaluations, make_scheduler, name_and_options, rehearse
from .protocol import Reference, check_run, evaluate_pipeline, image_shape

logger = logging.getLogger(__name__)

EVALUATIONS = (5, 10, 15, 20, 50, 100)
WITHIN = 0.1  # of the yardstick's distance
AT_MOST = 15  # evaluations, for "best"


@dataclass(frozen=True)
class Setting:
    """What is measured at a time: a scheduler, its options and its steps, or its timesteps if they are given."""

    name: str
    options: dict
    num_inference_steps: int
    evaluations: int
    timesteps: list[int] | None = None

    @property
    def key(self) -> tuple[str, int]:
        return label(self.name, self.options), self.num_inference_steps


def compare_schedulers(
    pipe,
    schedulers: Iterable[str | tuple[str, dict] | SchedulerMixin],
    reference: Reference | None = None,
    *,
    evaluations: Sequence[int] = EVALUATIONS,
    num_images: int = 2000,
    seeds: Sequence[int] = (0,),
    batch_size: int = 100,
    progress: bool = False,
) -> list[dict]:
    """Evaluate `pipe` with each scheduler at each number of network evaluations; every process must call it.

    Args:
        pipe: A `PixelDiffusionPipeline`; its scheduler is restored at the end.
        schedulers: Keys of `SCHEDULERS`, pairs such as `("ddim", {"clip_sample": False})`, or schedulers. All follow
            the noise schedule, spacing and clipping of the pipeline's, except where their options differ.
        reference: The data set to compare with; without one, only samples and times are recorded.
        evaluations: Numbers of network evaluations; for each, a scheduler takes the most steps that need no more.
        num_images, seeds, batch_size: As in `evaluate_pipeline`.
        progress: Show a progress bar of the evaluations.

    Returns:
        In the main process, the records of `evaluate_pipeline`, each with "name" and "options", by scheduler and
        evaluations; in others, an empty list. What a scheduler cannot do is left out and logged with the reason.

    Raises:
        ValueError: If a name, an option or a number cannot be used, before any sampling.
        ImportError: If a scheduler needs a package that is not installed.
    """
    settings, left_out = plan(pipe.scheduler, schedulers, evaluations)
    check_run(pipe, reference, num_images, seeds, batch_size)
    warm_up(pipe, min(batch_size, num_images))
    records = []
    for setting in with_progress(settings, progress):
        record = measure(pipe, setting, reference, num_images=num_images, seeds=seeds, batch_size=batch_size)
        if record is not None:
            kept = left_out if "left_out" in record else records
            kept.append(record)
    if PartialState().is_main_process:
        for record in left_out:
            logger.warning("Left out: %s: %s", title_of(record), record["left_out"])
    return records


def plan(
    scheduler: SchedulerMixin,
    schedulers: Iterable[str | tuple[str, dict] | SchedulerMixin],
    evaluations: Sequence[int],
    leave_out_unusable: bool = False,
) -> tuple[list[Setting], list[dict]]:
    """The settings to measure, and records of what a scheduler cannot do, with the reason as "left_out".

    Args:
        scheduler: The scheduler to follow, that of the pipeline.
        schedulers, evaluations: As in `compare_schedulers`.
        leave_out_unusable: Leave out a scheduler that cannot be used at all, too, instead of raising its error.

    Raises:
        ValueError, ImportError: As in `compare_schedulers`.
    """
    if not evaluations or min(evaluations) < 1:
        raise ValueError(f"`evaluations` is {list(evaluations)}; it must hold numbers from 1.")
    settings, left_out = {}, []
    for entry in schedulers:
        if isinstance(entry, SchedulerMixin):
            name, options = name_and_options(entry, scheduler)
        else:
            name, options = (entry, {}) if isinstance(entry, str) else entry
        left = {"name": name, "options": options}
        try:
            made = make_scheduler(name, scheduler, **options)
            rehearse(made, label(name, options))
        except (ImportError, ValueError) as error:
            if not leave_out_unusable:
                raise
            left_out.append({**left, "evaluations": "any", "left_out": " ".join(str(error).split())})
            continue
        for budget in evaluations:
            try:
                steps = most_steps(made, budget)
            except ValueError as error:
                left_out.append({**left, "evaluations": budget, "left_out": str(error)})
                continue
            setting = Setting(name, options, steps, count_evaluations(made, steps))
            settings.setdefault(setting.key, setting)
    if not settings:
        reasons = "; ".join(f"{label_of(record)}: {record['left_out']}" for record in left_out)
        raise ValueError(f"There is nothing to compare ({reasons or 'no schedulers'}): allow more, or give others.")
    return list(settings.values()), left_out


def most_steps(scheduler: SchedulerMixin, evaluations: int) -> int:
    """The largest `num_inference_steps` that needs no more than `evaluations`.

    Raises:
        ValueError: If every number of steps that the scheduler can take needs more.
    """
    steps = min(evaluations, scheduler.config.num_train_timesteps)
    while steps >= 1:
        try:
            excess = count_evaluations(scheduler, steps) - evaluations
        except ValueError:  # too few or too many steps for it
            steps -= 1
            continue
        if excess <= 0:
            return steps
        steps -= math.ceil(excess / 2)  # a step needs at most two evaluations
    raise ValueError(f"{type(scheduler).__name__} needs more than {evaluations} evaluations, however few its steps.")


@torch.no_grad()
def warm_up(pipe, batch_size: int) -> None:
    """Evaluate the network once, so that the time of the first measurement does not include loading kernels."""
    pipe.unet(torch.zeros(batch_size, *image_shape(pipe), dtype=pipe.unet.dtype, device=pipe._execution_device), 0)


def with_progress(settings: Sequence[Setting], progress: bool = True) -> Iterable[Setting]:
    """Yield the settings one by one, with a progress bar of their evaluations in the main process."""
    total = sum(setting.evaluations for setting in settings)
    disable = not (progress and PartialState().is_main_process)
    with tqdm(total=total, unit=" evaluations", disable=disable) as bar:
        for setting in settings:
            bar.set_postfix_str(f"{setting.key[0]}, {setting.evaluations}")
            yield setting
            bar.update(setting.evaluations)


def measure(
    pipe,
    setting: Setting,
    reference: Reference | None,
    *,
    num_images: int,
    seeds: Sequence[int],
    batch_size: int,
) -> dict | None:
    """The record of one setting, in the main process; every process must call it.

    If the samples are not finite, it holds the reason as "left_out" instead of figures.
    """
    own = pipe.scheduler
    record = {"name": setting.name, "options": setting.options}
    try:
        pipe.scheduler = make_scheduler(setting.name, own, **setting.options)
        how = {"seeds": seeds, "batch_size": batch_size, "timesteps": setting.timesteps}
        measured = evaluate_pipeline(pipe, reference, num_images, setting.num_inference_steps, **how)
    except NotFiniteError as error:
        measured = {"num_inference_steps": setting.num_inference_steps, "evaluations": setting.evaluations,
                    "timesteps": setting.timesteps, "left_out": str(error)}  # fmt: skip
    finally:
        pipe.scheduler = own
    return {**record, **measured} if PartialState().is_main_process else None


def best_settings(records: Sequence[dict], yardstick: dict | None = None) -> dict[str, dict | None]:
    """The best settings for fast sampling.

    Args:
        records: As returned by `compare_schedulers` with a reference.
        yardstick: A record with many evaluations, to compare with.

    Returns:
        "fewest", the record with the fewest evaluations whose distance is at most `WITHIN` (a fraction) above the
        yardstick's (with the smallest distance, if several), and "best", the one with the smallest distance at
        `AT_MOST` evaluations or fewer. None if there is none.
    """
    near = [record for record in records if yardstick and distance(record) <= (1 + WITHIN) * distance(yardstick)]
    cheap = [record for record in records if record["evaluations"] <= AT_MOST]
    return {
        "fewest": min(near, key=lambda record: (record["evaluations"], distance(record)), default=None),
        "best": min(cheap, key=distance, default=None),
    }


def distance(record: dict) -> float:
    """Frechet distance to the train split."""
    return record["figures"]["train"]["frechet_distance"]["mean"]


def label(name: str, options: dict) -> str:
    """A label such as `dpmsolver++:use_karras_sigmas=true,timestep_spacing=linspace`."""
    items = sorted(options.items())
    texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in items]
    return f"{name}:{','.join(texts)}" if texts else name


def label_of(record: dict) -> str:
    return label(record["name"], record["options"])


def title_of(record: dict) -> str:
    """The label of a record and its number of evaluations, such as `ddim, 20 evaluations`."""
    return f"{label_of(record)}, {record['evaluations']} evaluations"
