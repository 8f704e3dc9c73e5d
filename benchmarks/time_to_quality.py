"""3. Time to quality: how long a training takes to get as near as stock does in 5 epochs, by DDIM in 50 steps.

Each budget of the default network is a training of its own, since the learning rate falls to zero over a whole run.
Hours on a CPU: asked for by name.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from networks import CONFIGS, ROOT
from report import table
from training_script import run

BATCH_SIZE, SCHEDULER, NUM_INFERENCE_STEPS = 64, "ddim", 50


def measure(args, device: torch.device) -> dict:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, epochs in (("stock", 5.0), *(("default", epochs) for epochs in args.epochs)):
            row = train_and_judge(name, epochs, Path(folder, f"{name}-{epochs:g}"), args, device)
            rows.append(row | {"of_stock_time": row["seconds"] / (rows or [row])[0]["seconds"]})
            print(report({"num_images": args.num_images, "rows": rows}), flush=True)
    return {"dataset": args.dataset_id or Path(args.dataset_name).name, "num_images": args.num_images, "rows": rows}


def train_and_judge(name: str, epochs: float, folder: Path, args, device: torch.device) -> dict:
    data = {"dataset_name": args.dataset_name, **({"dataset_id": args.dataset_id} if args.dataset_id else {})}
    flags = {
        "resolution": 16,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": round(epochs * 60_000 / BATCH_SIZE),
        "mixed_precision": args.precisions[-1],
        "logger": "none",
        "output_dir": folder,
        **({"unet_config": CONFIGS / "stock.json"} if name == "stock" else {}),
    }
    start = time.perf_counter()
    run(ROOT / "train_scripts" / "train_unconditional.py", data | flags, device)
    seconds = time.perf_counter() - start
    judging = {
        "model": folder,
        "num_images": args.num_images,
        "scheduler": SCHEDULER,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "mixed_precision": args.precisions[-1],
        "output_dir": folder / "evaluation",
    }
    run(ROOT / "train_scripts" / "evaluate.py", data | judging, device)
    figures = json.loads((folder / "evaluation" / "evaluation.json").read_text())["figures"]
    distance = figures["train"]["frechet_distance"]["mean"]
    return {
        "network": name,
        "epochs": epochs,
        "steps": flags["max_train_steps"],
        "seconds": seconds,
        "distance": distance,
    }


def report(result: dict) -> str:
    lines = [
        (row["network"], f"{row['epochs']:g}", f"{row['seconds']:,.0f}", f"{row['of_stock_time']:.2f}",
         f"{row['distance']:.3f}")
        for row in result["rows"]
    ]  # fmt: skip
    head = ("network", "epochs", "seconds of the training script", "of stock's time", "distance")
    return f"{result['num_images']:,} samples by DDIM in 50 steps, seed 0.\n\n{table(head, lines)}"
