"""Timing side by side: the arms' windows alternate, so that what else the machine does falls on all of them alike."""

import math
import statistics
import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    """Wait for what the GPU, if there is one, still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(arm: Callable[[], None], calls: int = 1) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        arm()
    synchronize()
    return (time.perf_counter() - start) / calls


def time_arms(arms: dict[str, Callable[[], None]], windows: int, window_seconds: float) -> dict[str, dict]:
    """Seconds a call of each arm.

    Args:
        arms: What is called, by name.
        windows: Of each arm; one of every arm, then the next of every arm, each round starting with another one.
        window_seconds: As many calls as take about so long are a window, at least one.

    Returns:
        Of each arm `first_call` (compilation, allocation), `windows` (seconds a call in each of them), and
        `median` and `quartiles` of these.
    """
    names = list(arms)
    results = {name: {"first_call": seconds_of(arms[name]), "windows": []} for name in names}
    calls = {name: max(1, math.ceil(window_seconds / seconds_of(arms[name]))) for name in names}
    for turn in range(windows):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            results[name]["windows"].append(seconds_of(arms[name], calls[name]))
    for result in results.values():
        result |= summary(result["windows"])
    return results


def summary(values: list[float]) -> dict:
    """Median and quartiles."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [first, third]}


def ratio(result: dict, reference: dict) -> dict:
    """How many times as fast as the reference, window by window."""
    pairs = zip(reference["windows"], result["windows"], strict=True)
    return summary([theirs / own for theirs, own in pairs])
