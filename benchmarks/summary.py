"""What the sections' records say of the default network beside what people would use instead, in one table.

    python benchmarks/summary.py runs/benchmarks

writes it anew, as `run.py` does at its end.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from report import table, thousands, with_quartiles
from training_script import AS_IT_COMES, RECIPE
from windows import ratio

STOCK, OTHER = "stock `UNet2DModel`", "denoising-diffusion-pytorch"


def summary(folder: Path) -> str:
    """Of those sections whose records are in the folder."""
    lines = []
    for name, compare in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            lines += compare(json.loads(path.read_text()))
    return table(("the default", "", "beside", "", "ratio", ""), lines)


def compared(
    what: str, ours: float, peer: str, theirs: float, times: dict | float, more_is_better: bool = True
) -> tuple:
    """A line, `times` the ratio. Neither is said to be better within 0.02 of 1, or where the quartiles include it."""
    once = isinstance(times, float)
    median, (first, third) = (times, (times, times)) if once else (times["median"], times["quartiles"])
    if first <= 1 <= third or abs(median - 1) <= 0.02:
        outcome = "alike"
    else:
        outcome = "better" if (median > 1) == more_is_better else "**worse**"
    return what, thousands(ours), peer, thousands(theirs), f"{times:.2f}" if once else with_quartiles(times), outcome


def training_steps(record: dict) -> Iterator[tuple]:
    rows = {(row["network"], row["resolution"], row["batch_size"]): row for row in of_last_precision(record)}
    for (network, *settings), ours in rows.items():
        for peer, label in (("stock", STOCK), (OTHER, OTHER)):
            theirs = rows.get((peer, *settings))
            if network != "default" or theirs is None:
                continue
            times = ratio(theirs["seconds_per_step"]["windows"], ours["seconds_per_step"]["windows"])
            what = f"training step, {described(ours)}, images/s"
            yield compared(what, ours["images_per_second"], label, theirs["images_per_second"], times)


def training_scripts(record: dict) -> Iterator[tuple]:
    rows = {row["arm"]: row for row in record["rows"]}
    ours = rows["script, default"]
    pairs = {
        "its own bare step": ("bare step, default", "of_bare_step"),
        "the script with stock": ("script, stock", None),
        RECIPE: (RECIPE, "times_recipe"),
        AS_IT_COMES: (AS_IT_COMES, "times_recipe_as_it_comes"),
    }
    for label, (arm, key) in pairs.items():
        if arm in rows:
            speeds = [rows[name]["images_per_second"] for name in (ours["arm"], arm)]
            times = ours[key] if key else ratio(*(speed["windows"] for speed in speeds))
            what = f"training script, {described(record)}, images/s"
            yield compared(what, speeds[0]["median"], label, speeds[1]["median"], times)


def times_to_quality(record: dict) -> Iterator[tuple]:
    stock, *others = record["rows"]
    reached = [row for row in others if row["distance"] <= stock["distance"]]
    if reached:
        ours = min(reached, key=lambda row: row["seconds"])
        what = f"training until stock's distance after {stock['epochs']:g} epochs, seconds"
        times = ours["seconds"] / stock["seconds"]
        yield compared(what, ours["seconds"], STOCK, stock["seconds"], times, more_is_better=False)


def samplings(record: dict) -> Iterator[tuple]:
    rows = {(row["arm"], row["resolution"], row["batch_size"]): row for row in of_last_precision(record)}
    for (arm, *settings), ours in rows.items():
        name, _, kind = arm.partition(", ")
        if name != "default" or kind == "network alone":
            continue
        theirs = rows[(f"stock, {kind}", *settings)]
        times = ratio(theirs["measured"]["windows"], ours["measured"]["windows"])
        steps = f"{ours['evaluations']:,} evaluations"
        what = f"sampling, {steps}, {described(ours)}, images/s"
        yield compared(what, ours["images_per_second"], STOCK, theirs["images_per_second"], times)


def memories(record: dict) -> Iterator[tuple]:
    rows = {(row["network"], row["kind"], row["resolution"]): row["bytes"] / 2**20 for row in record["rows"]}
    for (network, kind, resolution), ours in rows.items():
        if network == "default":
            theirs = rows["stock", kind, resolution]
            what = f"memory of {kind}, {described(record | {'resolution': resolution})}, MiB"
            yield compared(what, ours, STOCK, theirs, ours / theirs, more_is_better=False)


def startups(record: dict) -> Iterator[tuple]:
    rows = {row["arm"]: row for row in record["rows"]}
    ours, theirs = rows["import ddpm_diffusers"], rows["import diffusers with what it needs"]
    seconds = (ours["seconds"]["median"], theirs["seconds"]["median"])
    yield compared("import, seconds", seconds[0], theirs["arm"], seconds[1], ours["times_import"], False)


def of_last_precision(record: dict) -> Iterator[dict]:
    """bf16 where the hardware has it."""
    return (row for row in record["rows"] if row["precision"] == record["arguments"]["precisions"][-1])


def described(settings: dict) -> str:
    precision = {"no": "float32"}.get(settings["precision"], settings["precision"])
    return f"{settings['resolution']}x{settings['resolution']}, batch {settings['batch_size']}, {precision}"


SECTIONS = {
    "training_step": training_steps,
    "training_script": training_scripts,
    "time_to_quality": times_to_quality,
    "sampling": samplings,
    "memory": memories,
    "startup": startups,
}

if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
