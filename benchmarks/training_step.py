"""1. The training step: images per second of each network, and its share of the machine's matrix-product peak."""

import gc
import traceback
from itertools import product

import torch
from counts import count
from machine import matrix_peak
from networks import installed, make_network, make_training_step
from report import grouped, precision_name, table, thousands, with_quartiles
from windows import ratio, time_arms

from cuda_graph import GraphedStep  # isort: skip

REFERENCE = "stock"


def measure(args, device: torch.device) -> dict:
    peaks = matrix_peak(device, args.precisions, args.windows, args.window_seconds)
    rows, left_out = [], []
    for resolution, batch_size, precision in product(args.resolutions, args.batch_sizes, args.precisions):
        settings = {"resolution": resolution, "batch_size": batch_size, "precision": precision}
        try:
            measured = measure_setting(args, device, settings, peaks[precision]["per_second"])
        except torch.OutOfMemoryError:  # the arms take turns, so all are in memory at once
            left_out.append(settings | {"reason": "all networks at once need more than the GPU's memory"})
        except RuntimeError as error:  # one that a kernel or its compilation raises
            traceback.print_exc()
            left_out.append(settings | {"reason": str(error).partition("\n")[0]})
        else:
            rows += measured
            print(report({"peaks": peaks, "rows": measured}), flush=True)  # the rest may be killed
        gc.collect()  # graphs and their memory are in cycles
    if not rows:
        raise RuntimeError(f"No setting could be measured: {left_out[-1]['reason']}. Try fewer `--networks` at once.")
    return {"peaks": peaks, "rows": rows, "left_out": left_out}


def measure_setting(args, device: torch.device, settings: dict, peak: float) -> list[dict]:
    """A row for each network, and on a GPU for each as a CUDA graph, at one resolution, batch size and precision."""
    resolution, batch_size = settings["resolution"], settings["batch_size"]
    networks = {name: make_network(name, resolution) for name in installed(args.networks)}
    arms = {name: make_training_step(network, device=device, **settings) for name, network in networks.items()}
    on_gpu = device.type == "cuda"
    if on_gpu:
        for name in networks:
            graphed = make_training_step(make_network(name, resolution), device=device, cuda_graph=True, **settings)
            arms[f"{name}, CUDA graph"] = graphed
    if args.compile:
        torch._dynamo.reset()  # else it would compile for dynamic shapes after the first
        for name in networks:
            compiled = torch.compile(make_network(name, resolution))
            step = make_training_step(compiled, device=device, cuda_graph=on_gpu, **settings)
            arms[f"{name}, compiled{', CUDA graph' if on_gpu else ''}"] = step
    captured_after = GraphedStep.CALLS_BEFORE_CAPTURE if on_gpu else 0
    times = time_arms(arms, args.windows, args.window_seconds, captured_after)
    counts = {
        name: count(make_training_step(network, device=device, **settings | {"batch_size": 1}))
        for name, network in networks.items()
    }
    rows = []
    for name, time in times.items():
        of_network = name.partition(",")[0]
        operations = counts[of_network]["operations"]
        rows.append({
            "network": name,
            **settings,
            "parameters": sum(parameter.numel() for parameter in networks[of_network].parameters()),
            "operations_per_image": operations,
            "aten_calls_per_step": counts[name]["kernels"] if name in networks else None,
            "seconds_per_step": time,
            "images_seen": batch_size * time["calls"] * args.windows,
            "images_per_second": batch_size / time["median"],
            "of_peak": operations * batch_size / time["median"] / peak,
            "times_reference": ratio(times[REFERENCE]["windows"], time["windows"]) if REFERENCE in times else None,
        })  # fmt: skip
    return rows


def report(result: dict) -> str:
    peaks = ", ".join(
        f"{peak['per_second'] / 1e9:,.0f} GFLOP/s in {precision_name(name)}" for name, peak in result["peaks"].items()
    )
    parts = [
        f"The peak, of square matrix products: {peaks}. GFLOP of convolutions and products, forward and backward."
    ]
    for title, rows in grouped(result["rows"], "resolution", "batch_size", "precision"):
        lines = [
            (
                row["network"],
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['operations_per_image'] / 1e9:.2f}",
                row["aten_calls_per_step"] or "",
                thousands(row["images_per_second"]),
                with_quartiles(row["times_reference"]),
                f"{row['of_peak']:.1%}",
                f"{row['seconds_per_step']['first_call']:.1f}",
            )
            for row in rows
        ]
        head = ("network", "parameters", "GFLOP an image", "aten calls", "images/s")
        parts += [f"**{title}**", table((*head, f"x {REFERENCE}", "of peak", "first call, s"), lines)]
    for settings in result.get("left_out", ()):
        named = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name != "reason")
        parts.append(f"Left out: {named}, since {settings['reason']}.")
    return "\n\n".join(parts)
