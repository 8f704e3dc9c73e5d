"""8. Operators: where the time of a training step goes, by torch's profiler."""

import torch
from networks import make_network, make_training_step
from report import grouped, precision_name, table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NETWORKS = ("default", "stock")
STEPS = 5
SHOWN = 12  # per network, those that take most time


def measure(args, device: torch.device) -> dict:
    settings = {
        "resolution": args.resolutions[0],
        "batch_size": args.batch_sizes[0],
        "precision": args.precisions[-1],
    }
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    rows = []
    for name in NETWORKS:
        step = make_training_step(make_network(name, settings["resolution"]), device=device, **settings)
        step()
        with profile(activities=activities) as profiler:
            for _ in range(STEPS):
                step()
        for operator in profiler.key_averages():
            if operator.device_type != DeviceType.CPU or operator.is_user_annotation:
                continue  # GPU kernels, whose time counts for their operators, and named ranges
            microseconds = operator.self_device_time_total if on_gpu else operator.self_cpu_time_total
            rows.append({
                "network": name,
                "operator": operator.key,
                "calls": operator.count / STEPS,
                "seconds": microseconds / STEPS / 1e6,
            })  # fmt: skip
    return {**settings, "steps": STEPS, "images_seen": STEPS * settings["batch_size"], "rows": rows}


def report(result: dict) -> str:
    size = result["resolution"]
    parts = [
        f"Of a training step at {size}x{size}, batches of {result['batch_size']}, precision"
        f" {precision_name(result['precision'])}: the time of each operator without those that it calls."
    ]
    for title, rows in grouped(result["rows"], "network"):
        rows.sort(key=lambda row: row["seconds"], reverse=True)
        total = sum(row["seconds"] for row in rows)
        shown, others = rows[:SHOWN], rows[SHOWN:]
        rest = {key: sum(row[key] for row in others) for key in ("calls", "seconds")}
        lines = [
            (row["operator"], f"{row['calls']:.0f}", f"{1000 * row['seconds']:.1f}", f"{row['seconds'] / total:.1%}")
            for row in (*shown, {"operator": f"{len(others)} others", **rest})
        ]
        parts += [f"**{title}**", table(("", "calls", "ms", "of the step"), lines)]
    return "\n\n".join(parts)
