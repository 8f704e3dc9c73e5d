"""5. Memory: the most that training and sampling take beyond the process as it is when the network is made.

    python benchmarks/memory.py default training 16 128 bf16

Each is measured in a process of its own: on a GPU what torch allocates, elsewhere the process's resident memory.
"""

import json
import subprocess
import sys
import threading

import psutil
import torch
from networks import installed, make_network, training_step
from report import grouped, table

KINDS = ("training", "training, checkpointed", "sampling")


def measure(args, device: torch.device) -> dict:
    rows = []
    for resolution in args.resolutions:
        for name in [name for name in installed(args.networks) if name in ("default", "stock", "guide")]:
            for kind in KINDS:
                asked = [name, kind, resolution, args.batch_sizes[0], args.precisions[-1], device.type]
                command = [sys.executable, __file__, *map(str, asked)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                rows.append({
                    "network": name,
                    "kind": kind,
                    "resolution": resolution,
                    **json.loads(output.splitlines()[-1]),
                })  # fmt: skip
    return {"batch_size": args.batch_sizes[0], "precision": args.precisions[-1], "rows": rows}


class Peak:
    """`bytes`: the most that the process took within the `with` beyond what it had at its start."""

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


def main(name: str, kind: str, resolution: int, batch_size: int, precision: str, device: torch.device) -> None:
    network = make_network(name, resolution).to(device)
    with Peak(device) as peak:
        if kind.startswith("training"):
            if kind == "training, checkpointed":
                network.enable_gradient_checkpointing()
            step = training_step(network, batch_size, resolution, precision, device)
            for _ in range(3):
                step()
        else:
            latents = torch.randn(batch_size, 1, resolution, resolution, device=device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                for timestep in (999, 500, 0):
                    network(latents, timestep)
    print(json.dumps({"bytes": peak.bytes}))


def report(result: dict) -> str:
    lines = [
        (title.removeprefix("resolution "), *(f"{row['bytes'] / 2**20:,.0f}" for row in rows))
        for title, rows in grouped(result["rows"], "resolution", "network")
    ]
    lines = [(line[0].replace(", network ", ", "), *line[1:]) for line in lines]
    head = ("", *(f"{kind}, MiB" for kind in KINDS))
    return f"Batches of {result['batch_size']}, precision {result['precision']}.\n\n{table(head, lines)}"


if __name__ == "__main__":
    name, kind, resolution, batch_size, precision, device = sys.argv[1:]
    main(name, kind, int(resolution), int(batch_size), precision, torch.device(device))
