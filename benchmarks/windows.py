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


def seconds_of(arm: Callable[[], object], calls: int = 1) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        arm()
    synchronize()
    return (time.perf_counter() - start) / calls


def time_arms(arms: dict[str, Callable[[], object]], windows: int, window_seconds: float) -> dict[str, dict]:
    """Seconds a call of each arm.

    Args:
        arms: What is called, by name.
        windows: Of each arm; one of every arm, then the next of every arm, each round starting with another one.
        window_seconds: As many calls as take about so long are a window, at least one.

    Returns:
        Of each arm `first_call` (compilation, allocation), `calls` (a window), `windows` (seconds a call in each of
        them), and `median` and `quartiles` of these.
    """
    results = {name: {"first_call": seconds_of(arm)} for name, arm in arms.items()}
    for name, arm in arms.items():
        results[name] |= {"calls": max(1, math.ceil(window_seconds / seconds_of(arm))), "windows": []}
    for name in turns(list(arms), windows):
        results[name]["windows"].append(seconds_of(arms[name], results[name]["calls"]))
    for result in results.values():
        result |= quartiles(result["windows"])
    return results


def turns(names: list[str], rounds: int) -> list[str]:
    """All names, round after round, each round starting with another one."""
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
