"""5. Memory: the peak of training and sampling, beyond what a process holds with its network after a warm-up.

    python benchmarks/memory.py default training 16 128 bf16 cpu

Each in several processes of its own, in turns: torch's allocations on a GPU, elsewhere the process's resident memory,
which differs by a tenth and more from one process to the next, with what the allocator keeps between the tensors.
"""

import json
import sys
import threading
from itertools import product

import psutil
import torch
from machine import set_up
from networks import make_network, make_training_step
from processes import run
from report import grouped, precision_name, table
from windows import quartiles, turns

from ddpm_diffusers import OptimizedUNet2DModel

KINDS = ("training", "training, checkpointed", "sampling")
NETWORKS = ("default", "guide", "stock")
STEPS = 3
TINY = {"block_out_channels": (8, 8), "block_norm_num_groups": 4}


def measure(args, device: torch.device) -> dict:
    batch_size, precision = args.batch_sizes[0], args.precisions[-1]
    measured = {arm: [] for arm in product(args.resolutions, NETWORKS, KINDS)}
    for resolution, name, kind in turns(list(measured), args.windows):
        output = run([__file__, name, kind, resolution, batch_size, precision, device.type], device)
        measured[resolution, name, kind].append(json.loads(output.splitlines()[-1])["bytes"])
    rows = [
        {
            "network": name,
            "kind": kind,
            "resolution": resolution,
            "images_seen": STEPS * batch_size,
            "bytes": {"windows": peaks, **quartiles(peaks)},
        }
        for (resolution, name, kind), peaks in measured.items()
    ]
    return {"batch_size": batch_size, "precision": precision, "rows": rows}


class Peak:
    """`bytes`: the peak of the process's memory in the `with` block, beyond what it held at the start."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.process, self.bytes = device.type == "cuda", psutil.Process(), 0

    def __enter__(self) -> "Peak":
        self.start, self.over = self.taken(), threading.Event()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self.on_gpu:
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        else:
            self.over.set()
            self.thread.join()

    def taken(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else self.process.memory_info().rss

    def watch(self) -> None:
        while not self.over.wait(0.001):
            self.bytes = max(self.bytes, self.taken() - self.start)


def work(network, kind: str, resolution: int, batch_size: int, precision: str, device: torch.device) -> None:
    """Run a few training steps, or as many network evaluations."""
    if kind == "sampling":
        sample = torch.randn(batch_size, 1, resolution, resolution, device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for timestep in torch.linspace(999, 0, STEPS):
                network(sample, timestep)
        return
    if kind == "training, checkpointed":
        network.enable_gradient_checkpointing()
    step = make_training_step(network, batch_size, resolution, precision, device)
    for _ in range(STEPS):
        step()


def main(name: str, kind: str, resolution: int, batch_size: int, precision: str, device: torch.device) -> None:
    set_up()
    network = make_network(name, resolution).to(device)
    # the first use loads pages of the libraries' code
    work(OptimizedUNet2DModel(sample_size=8, **TINY).to(device), kind, 8, 1, precision, device)
    with Peak(device) as peak:
        work(network, kind, resolution, batch_size, precision, device)
    print(json.dumps({"bytes": peak.bytes}))


def report(result: dict) -> str:
    lines = [
        (f"{rows[0]['network']}, {rows[0]['resolution']}", *(mebibytes(row["bytes"]) for row in rows))
        for _, rows in grouped(result["rows"], "resolution", "network")
    ]
    head = ("network, resolution", *(f"{kind}, MiB" for kind in KINDS))
    number = len(result["rows"][0]["bytes"]["windows"])
    caption = (
        f"Batches of {result['batch_size']}, precision {precision_name(result['precision'])}; sampling is evaluations"
        f" of the network. Median and quartiles; number of processes: {number}."
    )
    return f"{caption}\n\n{table(head, lines)}"


def mebibytes(peaks: dict) -> str:
    median, first, third = (size / 2**20 for size in (peaks["median"], *peaks["quartiles"]))
    return f"{median:,.0f} ({first:,.0f} to {third:,.0f})"


if __name__ == "__main__":
    name, kind, resolution, batch_size, precision, device = sys.argv[1:]
    main(name, kind, int(resolution), int(batch_size), precision, torch.device(device))
