"""7. Growth: how cost grows with resolution, batch size, widths, images in the data set and processes.

    python benchmarks/growth.py 1000000 /tmp/cache

reads batches from that many built-in garments, in a process of its own, and prints its memory and speed.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from counts import count
from networks import make_training_step
from processes import LOGGING_STEPS, run, speed_of_training
from report import precision_name, table, thousands, with_quartiles
from windows import quartiles, time_arms, turns

from ddpm_diffusers import OptimizedUNet2DModel
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.shuffling import ShuffledBatches

from cuda_graph import GraphedStep  # isort: skip

NETWORKS = ("default",)
START = {"resolution": 16, "batch_size": 16, "widths": (64, 64, 128)}
SIZES = {
    "resolution": (16, 32, 64, 128),
    "batch_size": (1, 4, 16, 64, 256),
    "widths": ((32, 32, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512)),
}
READ_BATCHES, READ_BATCH_SIZE = 2000, 128
BATCH_SIZE = 64  # of the training script


def measure(args, device: torch.device) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return {
            "precision": args.precisions[-1],
            "steps": grow_step(args, device),
            "data": [read_in_process(number, Path(folder, str(number)), device) for number in args.data_sizes],
            "processes": grow_processes(args, Path(folder), device),
        }


def grow_step(args, device: torch.device) -> list[dict]:
    precision, rows, on_gpu = args.precisions[-1], [], device.type == "cuda"
    for size, values in SIZES.items():
        settings = {str(value): START | {size: value} for value in values}
        networks = {
            name: OptimizedUNet2DModel(sample_size=s["resolution"], block_out_channels=s["widths"])
            for name, s in settings.items()
        }
        arms = {
            name: make_training_step(
                networks[name], s["batch_size"], s["resolution"], precision, device, cuda_graph=on_gpu
            )
            for name, s in settings.items()
        }
        captured_after = GraphedStep.CALLS_BEFORE_CAPTURE if on_gpu else 0
        for name, time_of_step in time_arms(arms, args.windows, args.window_seconds, captured_after).items():
            s = settings[name]
            one = count(make_training_step(networks[name], 1, s["resolution"], precision, device))
            rows.append({
                "what": f"{size.replace('_', ' ')} {name}",
                "operations": one["operations"] * s["batch_size"],
                "images_per_second": s["batch_size"] / time_of_step["median"],
                "images_seen": s["batch_size"] * time_of_step["calls"] * args.windows,
                "seconds": time_of_step,
            })  # fmt: skip
    return rows


def read_in_process(num_images: int, cache: Path, device: torch.device) -> dict:
    """The result of `read` in a second process: the first one draws the images."""
    for _ in range(2):
        output = run([__file__, num_images, cache], device)
    return {"images": num_images, **json.loads(output.splitlines()[-1])}


def read(num_images: int, cache: str) -> dict:
    garments = load_images("synthetic-fashion", resolution=16, max_samples=num_images, cache_dir=cache)
    images = ImageArrays(garments, (1, 16, 16))
    (own_before, files_before), start = resident_bytes(), time.perf_counter()
    for indices in ShuffledBatches(num_images, READ_BATCH_SIZE, 0, range(READ_BATCHES)):
        images.__getitems__(indices)
    seconds = time.perf_counter() - start
    of_files, own = resident_bytes()[1] - files_before, 0
    for indices in ShuffledBatches(num_images, READ_BATCH_SIZE, 0, range(READ_BATCHES, 2 * READ_BATCHES)):
        images.__getitems__(indices)
        own = max(own, resident_bytes()[0] - own_before)  # not in the first loop, which is timed
    return {
        "images_seen": READ_BATCHES * READ_BATCH_SIZE,
        "images_per_second": READ_BATCHES * READ_BATCH_SIZE / seconds,
        "bytes": {"own": own, "of files": of_files},
    }


def resident_bytes() -> tuple[int, int]:
    """Resident memory of the process's own, and its pages of files, which the system can drop (0 if not reported)."""
    memory = psutil.Process().memory_info()
    of_files = getattr(memory, "shared", 0)
    return memory.rss - of_files, of_files


def grow_processes(args, folder: Path, device: torch.device) -> list[dict]:
    numbers = {str(number): number for number in args.processes}
    speeds = {name: [] for name in numbers}
    for turn, name in enumerate(turns(list(numbers), args.windows)):
        speeds[name].append(train_with(numbers[name], args, folder / f"run-{turn}", folder / "cache", device))
    timed_steps = (args.script_steps - LOGGING_STEPS[device.type]) * args.windows
    return [
        {
            "processes": numbers[name],
            "images_seen": numbers[name] * BATCH_SIZE * timed_steps,
            "images_per_second": quartiles(values) | {"windows": values},
        }
        for name, values in speeds.items()
    ]


def train_with(num_processes: int, args, output_dir: Path, cache: Path, device: torch.device) -> float:
    """Images per second of the training script on `num_processes`, which share the threads of one."""
    values = {
        "dataset_name": "synthetic-fashion",
        "max_train_samples": 10_000,
        "cache_dir": cache,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": args.script_steps,
        "mixed_precision": args.precisions[-1],
        "logger": "none",
    }
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes)
    if num_processes == 1:
        launcher = ()  # as a user starts it: with a launcher, it would take no CUDA graph
    threads = max(1, torch.get_num_threads() // num_processes)
    return speed_of_training(values, output_dir, device, launcher, OMP_NUM_THREADS=str(threads))


def report(result: dict) -> str:
    steps = [
        (
            row["what"],
            f"{row['operations'] / 1e9:,.1f}",
            thousands(1000 * row["seconds"]["median"]),
            thousands(row["images_per_second"]),
            f"{row['operations'] / row['seconds']['median'] / 1e9:,.0f}",
        )
        for row in result["steps"]
    ]
    data = [
        (
            f"{row['images']:,}",
            thousands(row["images_per_second"]),
            *(f"{row['bytes'][kind] / 2**20:.1f}" for kind in ("own", "of files")),
        )
        for row in result["data"]
    ]
    processes = [(row["processes"], with_quartiles(row["images_per_second"], ",.0f")) for row in result["processes"]]
    return "\n\n".join([
        "A training step of the default network, from 16 images of 16x16 and the widths (64, 64, 128), one size at a"
        f" time, precision {precision_name(result['precision'])}:",
        table(("", "GFLOP", "ms", "images/s", "GFLOP/s"), steps),
        f"{READ_BATCHES:,} shuffled batches of {READ_BATCH_SIZE} from a memory-mapped data set of 16x16, one run each;"
        f" memory while {READ_BATCHES:,} more are read:",
        table(("images in it", "images/s", "resident memory, MiB more", "pages of the file, MiB more"), data),
        f"The training script on several processes, each with batches of {BATCH_SIZE} and its share of the threads:",
        table(("processes", "images/s"), processes),
    ])  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(read(int(sys.argv[1]), sys.argv[2])))
