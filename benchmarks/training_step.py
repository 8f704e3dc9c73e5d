"""1. The training step: images a second of each network, and the share of the machine's matrix-product peak."""

import torch
from counts import count
from machine import matrix_peak
from networks import installed, make_network, training_step
from report import grouped, table, thousands, with_quartiles
from windows import ratio, time_arms

REFERENCE = "stock"


def measure(args, device: torch.device) -> dict:
    peaks = matrix_peak(device, args.windows, args.window_seconds)
    rows = []
    for resolution in args.resolutions:
        for batch_size in args.batch_sizes:
            for precision in args.precisions:
                networks = {name: make_network(name, resolution) for name in installed(args.networks)}
                steps = {
                    name: training_step(network, batch_size, resolution, precision, device)
                    for name, network in networks.items()
                }
                if args.compile:
                    for name in list(networks):
                        compiled = torch.compile(make_network(name, resolution).to(device))
                        steps[f"{name}, compiled"] = training_step(compiled, batch_size, resolution, precision, device)
                times = time_arms(steps, args.windows, args.window_seconds)
                for name, time in times.items():
                    network = networks[name.partition(",")[0]]
                    counts = count(training_step(network, 1, resolution, precision, device))
                    operations = counts["operations"] * batch_size
                    rows.append({
                        "network": name,
                        "resolution": resolution,
                        "batch_size": batch_size,
                        "precision": precision,
                        "parameters": sum(parameter.numel() for parameter in network.parameters()),
                        "operations_per_image": counts["operations"],
                        "kernels_per_step": counts["kernels"],
                        "seconds_per_step": time,
                        "images_per_second": batch_size / time["median"],
                        "of_peak": operations / time["median"] / peaks[precision]["per_second"],
                        "times_reference": ratio(time, times[REFERENCE]) if REFERENCE in times else None,
                    })  # fmt: skip
    return {"peaks": peaks, "rows": rows}


def report(result: dict) -> str:
    peaks = ", ".join(f"{peak['per_second'] / 1e9:.0f} GFLOP/s {name}" for name, peak in result["peaks"].items())
    parts = [f"Square matrix products of {result['peaks']['no']['size']}: {peaks}."]
    for title, rows in grouped(result["rows"], "resolution", "batch_size", "precision"):
        lines = [
            (
                row["network"],
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['operations_per_image'] / 1e9:.2f}",
                row["kernels_per_step"],
                thousands(row["images_per_second"]),
                with_quartiles(row["times_reference"]),
                f"{row['of_peak']:.0%}",
                f"{row['seconds_per_step']['first_call']:.1f}",
            )
            for row in rows
        ]
        head = (
            "network",
            "parameters",
            "GFLOP an image",
            "kernels",
            "images/s",
            f"x {REFERENCE}",
            "of peak",
            "first s",
        )
        parts += [f"**{title}**", table(head, lines)]
    return "\n\n".join(parts)
