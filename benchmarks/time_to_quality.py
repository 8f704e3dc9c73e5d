"""3. Time to quality: training time to get as close to real images as stock in 5 epochs, by DDIM in 50 steps.

Each budget of the default network is a training of its own, since the learning rate falls to zero over a whole run.
It takes hours on a CPU, so it runs only if `--sections` names it. What `--work_dir` already has is not run again.
"""

import json
import time
from pathlib import Path

import torch
from machine import describe
from networks import CONFIGS, ROOT, make_network
from processes import flags, run
from report import table
from run_folder import write_text

from ddpm_diffusers.checkpointing import config_of
from ddpm_diffusers.data import load_images

RESOLUTION, BATCH_SIZE, SEED, STOCK_EPOCHS = 16, 64, 0, 5.0
SCHEDULER, NUM_INFERENCE_STEPS = "ddim", 50


def measure(args, device: torch.device) -> dict:
    # decoded, and known to be there, before the first training
    load_images(args.dataset_name, resolution=RESOLUTION, split="test")
    num_images = len(load_images(args.dataset_name, resolution=RESOLUTION))
    rows = []
    for name, epochs in (("stock", STOCK_EPOCHS), *(("default", epochs) for epochs in args.epochs)):
        steps = max(1, round(epochs * num_images / BATCH_SIZE))
        row = train_and_judge(name, steps, Path(args.work_dir, f"{name}-{steps}"), args, device)
        rows.append(row | {"epochs": epochs, "images_seen": steps * BATCH_SIZE})
        print(f"{name}, {epochs:g} epochs: {row['seconds']:,.0f} s, distance {row['distance']:.3f}", flush=True)
    return {"dataset": args.dataset_id or Path(args.dataset_name).name, "num_images": args.num_images, "rows": rows}


def train_and_judge(name: str, steps: int, folder: Path, args, device: torch.device) -> dict:
    record, trained = folder / "time_to_quality.json", folder / "trained.json"
    settings = {
        "network": config_of(make_network(name, RESOLUTION)),
        "dataset": args.dataset_id or Path(args.dataset_name).name,
        "mixed_precision": args.precisions[-1],
        "num_images": args.num_images,
        **{name: describe(device)[name] for name in ("device", "threads", "versions")},
    }
    if record.is_file():
        row = json.loads(record.read_text())
        if (kept := row.pop("settings", None)) != settings:
            raise ValueError(f"{record} was measured with {kept}, not {settings}: give another `--work_dir`.")
        return row
    data = {"dataset_name": args.dataset_name, **({"dataset_id": args.dataset_id} if args.dataset_id else {})}
    training = {
        **data,
        "resolution": RESOLUTION,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": steps,
        "mixed_precision": args.precisions[-1],
        "seed": SEED,
        "logger": "none",
        "output_dir": folder,
        **({"unet_config": CONFIGS / "stock.json"} if name == "stock" else {}),
    }
    of_training = {name: value for name, value in settings.items() if name != "num_images"}
    known = json.loads(trained.read_text()) if trained.is_file() else None
    if known is None or known["settings"] != of_training:  # a training whose evaluation was cut off is kept
        trained.unlink(missing_ok=True)
        start = time.perf_counter()
        run([ROOT / "train_scripts" / "train_unconditional.py", *flags(training), "--overwrite_output_dir"], device)
        known = {"seconds": time.perf_counter() - start, "settings": of_training}
        write_text(trained, json.dumps(known))
    judging = {
        **data,
        "model": folder,
        "num_images": args.num_images,
        "scheduler": SCHEDULER,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "mixed_precision": args.precisions[-1],
        "output_dir": folder / "evaluation",
    }
    run([ROOT / "train_scripts" / "evaluate.py", *flags(judging), "--overwrite"], device)
    figures = json.loads((folder / "evaluation" / "evaluation.json").read_text())["figures"]
    distance = figures["train"]["frechet_distance"]["mean"]
    row = {"network": name, "steps": steps, "seconds": known["seconds"], "distance": distance}
    write_text(record, json.dumps(row | {"settings": settings}))
    return row


def report(result: dict) -> str:
    stock, *others = result["rows"]
    lines = [
        (
            row["network"],
            f"{row['epochs']:g}",
            f"{row['seconds']:,.0f}",
            f"{row['seconds'] / stock['seconds']:.2f}",
            f"{row['distance']:.3f}",
            "yes" if row["distance"] <= stock["distance"] else "no",
        )
        for row in (stock, *others)
    ]
    head = ("network", "epochs", "seconds of the training script", "x stock's", "distance", "reached")
    caption = f"{result['num_images']:,} samples by DDIM in 50 steps, one training each (seed {SEED})."
    return f"{caption}\n\n{table(head, lines)}"
