"""One table from the sections' records: the default network beside what people would use instead.

    python benchmarks/summary.py runs/benchmarks

rewrites the summary.md in that folder, as `run.py` does at its end.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from networks import PEER
from report import precision_name, table, thousands, with_quartiles
from startup import DIFFUSERS
from time_to_quality import by_budget, reached, times_stock
from training_script import AS_IT_COMES, RECIPE
from windows import paired, quartiles

from files import write_text  # isort: skip

STOCK = "stock `UNet2DModel`"


def write_summary(folder: Path) -> None:
    write_text(folder / "summary.md", summary(folder) + "\n")


def summary(folder: Path) -> str:
    """The table of the sections whose records are in the folder, with what each was measured on."""
    lines, machines, rounds = [], {}, {}
    for name, compare in COMPARISONS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            lines += compare(record)
            once_a_seed = name == "time_to_quality"
            rounds[name] = len(by_budget(record["rows"])[0]) if once_a_seed else record["arguments"]["windows"]
            machine = record["machine"]
            text = f"{machine['device']}, threads: {machine['threads']}, torch {machine['versions']['torch']}"
            machines.setdefault(text, []).append(name)
    where = "; ".join(f"{', '.join(names)}: {machine}" for machine, names in machines.items())
    return (
        f"{table(('the default', '', 'beside', '', 'ratio', ''), lines)}\n\nMedians, and the quartiles of the ratio of"
        f" windows of one round. Alike: within 0.02 in the median. Unclear: not the same in every round. Rounds:"
        f" {', '.join(f'{name} {number}' for name, number in rounds.items())}. {where}."
    )


def compared(
    what: str, ours: float, peer: str, theirs: float, times: Sequence[float], more_is_better: bool = True
) -> tuple:
    """One line; `times` has the ratio of each round, or a single one if it was measured once."""
    median = quartiles(times)["median"] if len(times) > 1 else times[0]
    if abs(median - 1) <= 0.02:
        outcome = "alike"
    elif min(times) <= 1 <= max(times):
        outcome = "unclear"
    else:
        outcome = "better" if (median > 1) == more_is_better else "**worse**"
    ratio = with_quartiles(quartiles(times)) if len(times) > 1 else f"{median:.2f}"
    return what, thousands(ours), peer, thousands(theirs), ratio, outcome


def training_steps(record: dict) -> Iterator[tuple]:
    rows = {(row["network"], row["resolution"], row["batch_size"]): row for row in of_last_precision(record)}
    for (arm, *settings), ours in rows.items():
        network, comma, mode = arm.partition(", ")  # kernel by kernel, as a CUDA graph, compiled: each beside its like
        for peer, label in (("stock", STOCK), (PEER, PEER)):
            theirs = rows.get((peer + comma + mode, *settings))
            if network == "default" and theirs is not None:
                times = paired(theirs["seconds_per_step"]["windows"], ours["seconds_per_step"]["windows"])
                what = f"training step{comma}{mode}, {described(ours)}, images/s"
                yield compared(what, ours["images_per_second"], label, theirs["images_per_second"], times)


def training_scripts(record: dict) -> Iterator[tuple]:
    speeds = {row["arm"]: row["images_per_second"] for row in record["rows"]}
    ours = speeds["script, default"]
    peers = {"its own bare step (goal: 0.95)": "bare step, default", "the script with stock": "script, stock"}
    for label, arm in (peers | {RECIPE: RECIPE, AS_IT_COMES: AS_IT_COMES}).items():
        if arm in speeds:
            times = paired(ours["windows"], speeds[arm]["windows"])
            what = f"training script, {described(record)}, images/s"
            yield compared(what, ours["median"], label, speeds[arm]["median"], times)


def times_to_quality(record: dict) -> Iterator[tuple]:
    """The smallest budget that, like all larger ones, reaches stock's distance with each seed."""
    stock, *others = by_budget(record["rows"])
    smallest = None
    for rows in sorted(others, key=lambda rows: rows[0]["epochs"], reverse=True):
        if reached(rows, stock) < len(rows):
            break
        smallest = rows
    how, stocks = (
        f"{row.get('optimizer', 'adamw')}, batch {row['train_batch_size']}, rate {row['learning_rate']:g}"
        for row in (others[0][0], stock[0])
    )
    how += f"; stock: {stocks}" if how != stocks else ""
    what = f"training at 16x16 ({how}) until stock's distance after {stock[0]['epochs']:g} epochs, seconds"
    of_stock = statistics.median(row["seconds"] for row in stock)
    if smallest is None:
        yield what, "not reached", STOCK, thousands(of_stock), "", "**worse**"
    else:
        seconds = statistics.median(row["seconds"] for row in smallest)
        yield compared(what, seconds, STOCK, of_stock, times_stock(smallest, stock), more_is_better=False)


def samplings(record: dict) -> Iterator[tuple]:
    rows = {(row["arm"], row["resolution"], row["batch_size"]): row for row in of_last_precision(record)}
    for (arm, *settings), ours in rows.items():
        name, _, kind = arm.partition(", ")
        if name == "default" and "network" not in kind:
            theirs = rows[(f"stock, {kind}", *settings)]
            times = paired(theirs["measured"]["windows"], ours["measured"]["windows"])
            what = f"sampling by {ours['evaluations']:,} evaluations, {described(ours)}, images/s"
            yield compared(what, ours["images_per_second"], STOCK, theirs["images_per_second"], times)


def memories(record: dict) -> Iterator[tuple]:
    rows = {(row["network"], row["kind"], row["resolution"]): row["bytes"] for row in record["rows"]}
    for (network, kind, resolution), ours in rows.items():
        theirs = rows["stock", kind, resolution]
        if network == "default" and all(theirs["windows"]):  # 0 where too little was used to be seen
            what = f"memory of {kind}, {described(record | {'resolution': resolution})}, MiB"
            times = paired(ours["windows"], theirs["windows"])
            sizes = (ours["median"] / 2**20, STOCK, theirs["median"] / 2**20)
            yield compared(what, *sizes, times, more_is_better=False)


def startups(record: dict) -> Iterator[tuple]:
    seconds = {row["arm"]: row["seconds"] for row in record["rows"]}
    ours, theirs = seconds["import ddpm_diffusers"], seconds[DIFFUSERS]
    times = paired(ours["windows"], theirs["windows"])
    yield compared("import, seconds", ours["median"], DIFFUSERS, theirs["median"], times, more_is_better=False)


def of_last_precision(record: dict) -> Iterator[dict]:
    """The rows of the last precision: by default bf16 if the hardware supports it."""
    return (row for row in record["rows"] if row["precision"] == record["arguments"]["precisions"][-1])


def described(settings: dict) -> str:
    size = settings["resolution"]
    return f"{size}x{size}, batch {settings['batch_size']}, {precision_name(settings['precision'])}"


COMPARISONS = {
    "training_step": training_steps,
    "training_script": training_scripts,
    "time_to_quality": times_to_quality,
    "sampling": samplings,
    "memory": memories,
    "startup": startups,
}

if __name__ == "__main__":
    write_summary(Path(sys.argv[1]))
