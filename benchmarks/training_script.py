"""2. The training script as a whole, beside its bare step, and beside diffusers' recipe with the network of its class.

All read the same images from the disk: PNGs in a data set of `datasets`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, Features, Image
from networks import CONFIGS, ROOT, make_network, training_step
from report import table, thousands, with_quartiles
from windows import seconds_of, summary

from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.sampling import to_pil

NUM_IMAGES = 10_000
LOGGING_STEPS = 10
ARMS = ("bare step, default", "script, default", "bare step, stock", "script, stock", "diffusers' recipe, stock")


def measure(args, device: torch.device) -> dict:
    resolution, batch_size, precision = args.resolutions[0], args.batch_sizes[0], args.precisions[-1]
    windows = {arm: [] for arm in ARMS}  # images a second
    bare = {
        name: training_step(make_network(name, resolution), batch_size, resolution, precision, device)
        for name in ("default", "stock")
    }
    with tempfile.TemporaryDirectory() as folder:
        data = save_images(Path(folder, "images"))
        for turn in range(args.windows):
            shift = turn % len(ARMS)
            for arm in ARMS[shift:] + ARMS[:shift]:
                kind, name = arm.split(", ")
                if kind == "bare step":
                    seconds_of(bare[name], 2)  # another process had the caches
                    speed = batch_size / seconds_of(bare[name], args.script_steps // 2)
                elif kind == "script":
                    speed = run_script(name, data, Path(folder, f"{name}-{turn}"), args, device)
                else:
                    speed = run_recipe(data, args, device)
                windows[arm].append(speed)
    reference = {"script, default": "bare step, default", "script, stock": "bare step, stock"}
    rows = [
        {
            "arm": arm,
            "images_per_second": summary(speeds),
            "of_bare_step": shares(speeds, windows[reference[arm]]) if arm in reference else None,
            "times_recipe": shares(speeds, windows[ARMS[-1]]),
        }
        for arm, speeds in windows.items()
    ]
    settings = {"resolution": resolution, "batch_size": batch_size, "precision": precision}
    return {**settings, "steps": args.script_steps, "windows": windows, "rows": rows}


def shares(speeds: list[float], references: list[float]) -> dict:
    return summary([speed / reference for speed, reference in zip(speeds, references, strict=True)])


def save_images(folder: Path) -> Path:
    """The built-in garments at 28x28 as PNGs, as a data set of the Hub holds them."""
    arrays = ImageArrays(load_images("synthetic-fashion", resolution=28, max_samples=NUM_IMAGES), (1, 28, 28))
    images = to_pil(arrays.__getitems__(range(NUM_IMAGES)))
    Dataset.from_dict({"image": images}, features=Features({"image": Image()})).save_to_disk(folder)
    return folder


def run_script(name: str, data: Path, output_dir: Path, args, device: torch.device) -> float:
    """Images a second of `train_unconditional.py`, the median of its lines after the first."""
    flags = {
        "dataset_name": data,
        "resolution": args.resolutions[0],
        "train_batch_size": args.batch_sizes[0],
        "mixed_precision": args.precisions[-1],
        "max_train_steps": args.script_steps,
        "logging_steps": LOGGING_STEPS,
        "eval_batch_size": 1,
        "ddpm_num_inference_steps": 1,
        "output_dir": output_dir,
        **({"unet_config": CONFIGS / "stock.json"} if name == "stock" else {}),
    }
    run(ROOT / "train_scripts" / "train_unconditional.py", flags, device)
    lines = [json.loads(line) for line in (output_dir / "speed.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[1:])


def run_recipe(data: Path, args, device: torch.device) -> float:
    flags = {
        "data": data,
        "resolution": args.resolutions[0],
        "train_batch_size": args.batch_sizes[0],
        "mixed_precision": args.precisions[-1],
        "steps": args.script_steps,
        "warm_up": LOGGING_STEPS,
    }
    output = run(Path(__file__).with_name("diffusers_recipe.py"), flags, device)
    return json.loads(output.splitlines()[-1])["images_per_second"]


def run(script: Path, flags: dict, device: torch.device) -> str:
    """The script in a process of its own; its standard output."""
    command = [sys.executable, script, *(text for name, value in flags.items() for text in (f"--{name}", value))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{script.name} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def report(result: dict) -> str:
    lines = [
        (
            row["arm"],
            thousands(row["images_per_second"]["median"]),
            with_quartiles(row["of_bare_step"]),
            with_quartiles(row["times_recipe"]),
        )
        for row in result["rows"]
    ]
    return "\n\n".join([
        f"{result['steps']} steps of {result['batch_size']} images at {result['resolution']}x{result['resolution']},"
        f" precision {result['precision']}.",
        table(("", "images/s", "of the bare step", "x diffusers' recipe"), lines),
    ])  # fmt: skip
