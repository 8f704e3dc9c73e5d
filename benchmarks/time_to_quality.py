"""3. Time to quality: training time to get as close to real images as stock in 5 epochs, by DDIM in 50 steps.

Each budget of the default network is a training of its own, since the learning rate falls to zero over a whole run.
It takes hours on a CPU, so it runs only if `--sections` names it. What `--work_dir` already has is not run again.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import mean

import torch
from files import write_text
from machine import describe
from networks import CONFIGS, PEER, ROOT, make_network
from processes import flags, run
from report import table
from windows import paired

from ddpm_diffusers.checkpointing import config_of
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.evaluation import load_feature_extractor
from ddpm_diffusers.evaluation.protocol import mean_and_sd

from tables import show  # isort: skip

NETWORKS = ("default", "stock")
RESOLUTION = 16
STOCK_EPOCHS, STOCK_BATCH_SIZE, STOCK_LEARNING_RATE = 5.0, 64, 2e-3
SCHEDULER, NUM_INFERENCE_STEPS = "ddim", 50


def measure(args, device: torch.device) -> dict:
    # decoded, and known to be there, before the first training
    load_images(args.dataset_name, resolution=RESOLUTION, split="test")
    images = ImageArrays(load_images(args.dataset_name, resolution=RESOLUTION), (1, RESOLUTION, RESOLUTION))
    of_default = args.quality_batch_size, args.quality_learning_rate, args.quality_optimizer
    data, runs = images.fingerprint(), []
    trainings = (
        ("stock", STOCK_EPOCHS, STOCK_BATCH_SIZE, STOCK_LEARNING_RATE, "adamw"),
        *(("default", epochs, *of_default) for epochs in args.epochs),
    )
    for seed, (name, epochs, batch_size, rate, optimizer) in product(args.quality_seeds, trainings):
        steps = max(1, round(epochs * len(images) / batch_size))
        budget = {"max_train_steps": steps, "train_batch_size": batch_size, "learning_rate": rate}
        budget |= {"optimizer": optimizer, "seed": seed}
        folder = f"{name}-{steps}x{batch_size}-{rate:g}-{optimizer}-seed-{seed}"
        settings = settings_of(name, budget, data, args, device)
        runs.append((name, epochs, budget, Path(args.work_dir, folder), settings))
    for *_, folder, settings in runs:  # all of them before the first training
        trained_before(folder, settings)
    rows = []
    for name, epochs, budget, folder, settings in runs:
        row = train_and_judge(name, budget, folder, settings, args, device)
        rows.append(row | {"epochs": epochs, "images_seen": budget["max_train_steps"] * budget["train_batch_size"]})
        print(
            f"{name}, {epochs:g} epochs, seed {row['seed']}: {row['seconds']:,.0f} s, distance {row['distance']:.3f}",
            flush=True,
        )
    extractor = load_feature_extractor()
    return {
        "dataset": args.dataset_id or Path(args.dataset_name).name,
        "num_images": args.num_images,
        "feature_extractor": {"name": extractor.name, "digest": extractor.digest},
        "rows": rows,
    }


def settings_of(name: str, budget: dict, data: str, args, device: torch.device) -> dict:
    """What the seconds and weights of a training depend on, and a little more: any change of package or scripts."""
    machine = describe(device)
    del machine["versions"][PEER]
    return {
        "network": config_of(make_network(name, RESOLUTION)),
        "budget": budget,
        "data": data,
        "mixed_precision": args.precisions[-1],
        "code": digest_of(ROOT / "ddpm_diffusers", ROOT / "train_scripts"),
        **{key: machine[key] for key in ("device", "threads", "versions")},
    }


def digest_of(*folders: Path) -> str:
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def trained_before(folder: Path, settings: dict) -> dict | None:
    """The record of the folder's training, None if it has none; ValueError if it is of other settings."""
    path = folder / "trained.json"
    known = json.loads(path.read_text()) if path.is_file() else None
    if known is not None and known["settings"] != settings:
        raise ValueError(
            f"{folder} is of {known['settings']}, and {settings} is asked for: give another `--work_dir`."
        )
    return known


def train_and_judge(name: str, budget: dict, folder: Path, settings: dict, args, device: torch.device) -> dict:
    record, known = folder / "time_to_quality.json", trained_before(folder, settings)
    judged = {
        "num_images": args.num_images,
        "extractor": load_feature_extractor().digest,
        "scheduler": SCHEDULER,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "code": digest_of(ROOT / "ddpm_diffusers" / "evaluation"),
    }
    if record.is_file():  # else the evaluation was cut off
        row = json.loads(record.read_text())
        if row.pop("judged", None) == judged:
            return row
    data = {"dataset_name": args.dataset_name, **({"dataset_id": args.dataset_id} if args.dataset_id else {})}
    training = {
        **data,
        "resolution": RESOLUTION,
        **budget,
        "mixed_precision": args.precisions[-1],
        "logger": "none",
        "output_dir": folder,
        **({"unet_config": CONFIGS / "stock.json"} if name == "stock" else {}),
    }
    if known is None:
        start = time.perf_counter()
        run([ROOT / "train_scripts" / "train_unconditional.py", *flags(training), "--overwrite_output_dir"], device)
        seconds = time.perf_counter() - start
        known = {"seconds": seconds, "seconds_of_steps": seconds_of_steps(folder, budget), "settings": settings}
        write_text(folder / "trained.json", json.dumps(known))
    judging = {
        **data,
        "model": folder,
        "num_images": args.num_images,
        "seeds": budget["seed"],
        "scheduler": SCHEDULER,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "mixed_precision": args.precisions[-1],
        "output_dir": folder / "evaluation",
    }
    run([ROOT / "train_scripts" / "evaluate.py", *flags(judging), "--overwrite"], device)
    figures = json.loads((folder / "evaluation" / "evaluation.json").read_text())["figures"]
    distance = figures["train"]["frechet_distance"]["mean"]
    row = {"network": name, **budget, "seconds": known["seconds"], "seconds_of_steps": known["seconds_of_steps"]}
    row |= {"distance": distance}
    write_text(record, json.dumps(row | {"judged": judged}))
    return row


def seconds_of_steps(folder: Path, budget: dict) -> float:
    """Seconds of the script's loop, without its start and end, by its own record."""
    lines = [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]
    steps = [after["step"] - before["step"] for before, after in pairwise([{"step": 0}, *lines])]
    seconds = [count / line["images_per_second"] for count, line in zip(steps, lines, strict=True)]
    return budget["train_batch_size"] * sum(seconds)


def by_budget(rows: Sequence[dict]) -> list[list[dict]]:
    """The trainings of each network and budget, which differ in their seed alone; stock's come first."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        of_training = (row["epochs"], row["train_batch_size"], row["learning_rate"], row.get("optimizer", "adamw"))
        groups.setdefault((row["network"], *of_training), []).append(row)
    return list(groups.values())


def reached(rows: Sequence[dict], stock: Sequence[dict]) -> int:
    """Number of seeds with which the samples are as close as those of stock's network with the same seed."""
    return sum(row["distance"] <= of_stock["distance"] for row, of_stock in zip(rows, stock, strict=True))


def times_stock(rows: Sequence[dict], stock: Sequence[dict]) -> list[float]:
    """Seconds in terms of stock's, by seed."""
    return paired([row["seconds"] for row in rows], [row["seconds"] for row in stock])


def report(result: dict) -> str:
    stock, *_ = groups = by_budget(result["rows"])
    digits = 0 if stock[0]["seconds"] > 100 else 1
    lines = []
    for rows in groups:
        first, distances = rows[0], [row["distance"] for row in rows]
        of_seeds = f"{reached(rows, stock)} of {len(rows)}" if len(rows) > 1 else ("no", "yes")[reached(rows, stock)]
        lines.append((
            first["network"],
            f"{first['epochs']:g}",
            first.get("optimizer", "adamw"),  # older records have none
            first["train_batch_size"],
            f"{first['learning_rate']:g}",
            *(f"{mean(row[name] for row in rows):,.{digits}f}" for name in ("seconds", "seconds_of_steps")),
            show(mean_and_sd(times_stock(rows, stock)), ".2f"),
            show(mean_and_sd(distances), ".3f"),
            of_seeds,
        ))  # fmt: skip
    head = ("network", "epochs", "optimizer", "batch size", "learning rate", "seconds of the script",
            "of them in its loop", "x stock's", "distance", "reached")  # fmt: skip
    seeds = [str(row.get("seed", 0)) for row in stock]  # older records have none
    trainings = (
        f"one training each (seed {seeds[0]})"
        if len(seeds) == 1
        else f"{len(seeds)} trainings each (seeds {', '.join(seeds)}; mean ± standard deviation, reached by seed)"
    )
    caption = f"{result['num_images']:,} samples by DDIM in 50 steps, {trainings}."
    if extractor := result.get("feature_extractor"):  # older records have none
        caption += f" Features of {extractor['name']} {extractor['digest']}."
    return f"{caption}\n\n{table(head, lines)}"
