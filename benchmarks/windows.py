"""Side-by-side timing: the arms' windows alternate, so that other load on the machine affects all of them alike."""

import math
import statistics
import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(arm: Callable[[], object], calls: int = 1) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        arm()
    synchronize()
    return (time.perf_counter() - start) / calls


def time_arms(
    arms: dict[str, Callable[[], object]], windows: int, window_seconds: float, calls_before: int = 0
) -> dict[str, dict]:
    """Seconds per call of each arm.

    Args:
        arms: The calls to time, by name.
        windows: Number per arm; each round times one window of every arm, and starts with another arm.
        window_seconds: A window is as many calls as take about this long, at least one.
        calls_before: Calls of each arm after its first, which are not timed.

    Returns:
        For each arm `first_call` (with compilation and allocation), `calls` (per window), `windows` (seconds per call
        in each of them), and their `median` and `quartiles`.
    """
    results = {name: {"first_call": seconds_of(arm)} for name, arm in arms.items()}
    for arm in arms.values():
        for _ in range(calls_before):
            arm()
    for name, arm in arms.items():
        results[name] |= {"calls": max(1, math.ceil(window_seconds / seconds_of(arm))), "windows": []}
    for name in turns(list(arms), windows):
        results[name]["windows"].append(seconds_of(arms[name], results[name]["calls"]))
    for result in results.values():
        result |= quartiles(result["windows"])
    return results


def turns(names: list[str], rounds: int) -> list[str]:
    """All names, round after round, each round starting with the next name."""
    return [name for turn in range(rounds) for name in names[turn % len(names) :] + names[: turn % len(names)]]


def quartiles(values: list[float]) -> dict:
    """Median and quartiles."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [first, third]}


def ratio(values: list[float], references: list[float]) -> dict:
    """Median and quartiles of values / references, window by window."""
    return quartiles(paired(values, references))


def paired(values: list[float], references: list[float]) -> list[float]:
    return [value / reference for value, reference in zip(values, references, strict=True)]
