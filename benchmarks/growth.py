"""7. Growth: what a step costs as one size grows, and what a data set of a million images takes.

    python benchmarks/growth.py 1000000

reads batches of the built-in garments, so many of them, and prints memory and time, in a process of its own.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from counts import count
from networks import ROOT, training_step
from report import table, thousands, with_quartiles
from windows import time_arms

from ddpm_diffusers import OptimizedUNet2DModel
from ddpm_diffusers.data import ImageArrays, ShuffledBatches, load_images

START = {"resolution": 16, "batch_size": 16, "widths": (64, 64, 128)}
SIZES = {
    "resolution": (16, 32, 64, 128),
    "batch_size": (1, 4, 16, 64, 256),
    "widths": ((32, 32, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512)),
}
READ_BATCHES, READ_BATCH_SIZE = 2000, 128


def measure(args, device: torch.device) -> dict:
    precision, steps = args.precisions[-1], []
    for size, values in SIZES.items():
        settings = [START | {size: value} for value in values]
        networks = [
            OptimizedUNet2DModel(sample_size=s["resolution"], block_out_channels=s["widths"]) for s in settings
        ]
        arms = {
            str(s[size]): training_step(network, s["batch_size"], s["resolution"], precision, device)
            for s, network in zip(settings, networks, strict=True)
        }
        times = time_arms(arms, args.windows, args.window_seconds)
        for s, network in zip(settings, networks, strict=True):
            operations = count(training_step(network, 1, s["resolution"], precision, device))["operations"]
            seconds = times[str(s[size])]["median"]
            steps.append({
                "what": f"{size.replace('_', ' ')} {s[size]}",
                "operations": operations * s["batch_size"],
                "images_per_second": s["batch_size"] / seconds,
                "operations_per_second": operations * s["batch_size"] / seconds,
                "seconds": times[str(s[size])],
            })  # fmt: skip
    return {
        "precision": precision,
        "steps": steps,
        "data": [read_in_process(number) for number in args.data_sizes],
        "processes": [train_with(number, args, device) for number in args.processes],
    }


def read_in_process(num_images: int) -> dict:
    output = subprocess.run([sys.executable, __file__, str(num_images)], capture_output=True, text=True, check=True)
    return {"images": num_images, **json.loads(output.stdout.splitlines()[-1])}


def read(num_images: int) -> dict:
    images = ImageArrays(load_images("synthetic-fashion", resolution=16, max_samples=num_images), (1, 16, 16))
    sampler = ShuffledBatches(num_images, READ_BATCH_SIZE, 0, range(READ_BATCHES))
    before, start = resident_bytes(), time.perf_counter()
    for indices in sampler:
        images.__getitems__(indices)
    seconds = time.perf_counter() - start
    after = resident_bytes()
    return {
        "images_per_second": READ_BATCHES * READ_BATCH_SIZE / seconds,
        "resident_bytes": {kind: after[kind] - before[kind] for kind in after},
    }


def resident_bytes() -> dict[str, int]:
    """What is the process's own, and pages of files, which the system takes back when it needs them (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("of files", "RssFile"))}


def train_with(num_processes: int, args, device: torch.device) -> dict:
    """The training script on so many processes, its global batch growing with them, cores shared out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes]
        command += [ROOT / "train_scripts" / "train_unconditional.py", "--dataset_name", "synthetic-fashion"]
        command += ["--max_train_samples", 10_000, "--max_train_steps", args.script_steps, "--logging_steps", 10]
        command += ["--mixed_precision", args.precisions[-1], "--logger", "none", "--output_dir", folder]
        command += ["--eval_batch_size", 1, "--ddpm_num_inference_steps", 1]
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": str(device.type == "cpu").lower(),
            "OMP_NUM_THREADS": str(max(1, math.floor(os.cpu_count() / num_processes))),
        }
        subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
        lines = [json.loads(line) for line in Path(folder, "speed.jsonl").read_text().splitlines()]
    speed = statistics.median(line["images_per_second"] for line in lines[1:])
    return {"processes": num_processes, "images_per_second": speed}


def report(result: dict) -> str:
    steps = [
        (
            row["what"],
            f"{row['operations'] / 1e9:,.1f}",
            with_quartiles(row["seconds"], ".3f"),
            thousands(row["images_per_second"]),
            f"{row['operations_per_second'] / 1e9:,.0f}",
        )
        for row in result["steps"]
    ]
    data = [
        (f"{row['images']:,}", thousands(row["images_per_second"]),
         *(f"{row['resident_bytes'][kind] / 2**20:.1f}" for kind in ("own", "of files")))
        for row in result["data"]
    ]  # fmt: skip
    processes = [(row["processes"], thousands(row["images_per_second"])) for row in result["processes"]]
    return "\n\n".join([
        f"A training step of the default network from {START}, one size at a time, precision {result['precision']}:",
        table(("", "GFLOP", "seconds", "images/s", "GFLOP/s"), steps),
        f"{READ_BATCHES:,} shuffled batches of {READ_BATCH_SIZE} from a memory-mapped data set of 16x16:",
        table(("images in it", "images/s", "memory of its own, MiB more", "pages of the file, MiB more"), data),
        "The training script on several processes, batches of 64 each:",
        table(("processes", "images/s"), processes),
    ])  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(read(int(sys.argv[1]))))
