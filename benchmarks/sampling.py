"""4. Sampling: images per second, the time of one image, and what pipeline and scheduler add to the network."""

from collections.abc import Callable
from itertools import product

import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from networks import make_network
from report import grouped, table, thousands, with_quartiles
from windows import ratio, time_arms

from ddpm_diffusers import PixelDiffusionPipeline, make_scheduler

FEW = "few steps"  # the pipeline's recommendation
BESIDE = "few steps without the network"
FEW_STEPS, FEW_OPTIONS = 15, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
DDPM_STEPS = 50  # of the 1,000, which all take equally long
BATCH_SIZES = (1, 64)
NETWORKS = ("default", "stock")


def measure(args, device: torch.device) -> dict:
    rows = []
    for resolution, precision, batch_size in product(args.resolutions, args.precisions, BATCH_SIZES):
        arms, evaluations = {}, {}
        for name in NETWORKS:
            pipe = make_pipeline(name, resolution, precision, device)
            few = make_scheduler("dpmsolver++", pipe.scheduler, **FEW_OPTIONS)
            arms[f"{name}, {FEW}"] = sample_with(pipe, few, batch_size, FEW_STEPS)
            arms[f"{name}, ddpm"] = sample_with(pipe, pipe.scheduler, batch_size, DDPM_STEPS)
            arms[f"{name}, network alone"] = network_alone(pipe.unet, batch_size, FEW_STEPS, device)
            evaluations |= {f"{name}, {FEW}": FEW_STEPS, f"{name}, ddpm": DDPM_STEPS}
            evaluations |= {f"{name}, network alone": FEW_STEPS}
            if name == "default":  # as a difference, it would be lost in how much the network's time varies
                idle = make_pipeline(name, resolution, precision, device)
                idle.unet.forward = lambda sample, timestep: UNet2DOutput(torch.zeros_like(sample))
                arms[f"{name}, {BESIDE}"] = sample_with(idle, few, batch_size, FEW_STEPS)
                evaluations |= {f"{name}, {BESIDE}": FEW_STEPS}
        times = time_arms(arms, args.windows, args.window_seconds)
        an_evaluation = {
            arm: [seconds / evaluations[arm] for seconds in time["windows"]] for arm, time in times.items()
        }
        for arm, time in times.items():
            name, _, kind = arm.partition(", ")
            seconds = time["median"] * (1000 / DDPM_STEPS if kind == "ddpm" else 1)
            rows.append({
                "arm": arm,
                "resolution": resolution,
                "precision": precision,
                "batch_size": batch_size,
                "images_seen": batch_size * time["calls"] * args.windows,
                "evaluations": 1000 if kind == "ddpm" else FEW_STEPS,
                "seconds_per_batch": seconds,
                "images_per_second": batch_size / seconds if kind in (FEW, "ddpm") else None,
                "of_network_alone": ratio(an_evaluation[arm], an_evaluation[f"{name}, network alone"]),
                "measured": time,
            })  # fmt: skip
    return {"rows": rows}


def make_pipeline(name: str, resolution: int, precision: str, device: torch.device) -> PixelDiffusionPipeline:
    """A pipeline with untrained weights, which take as long as trained ones."""
    network = make_network(name, resolution).to(device).eval()
    network.forward = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")(network.forward)
    pipe = PixelDiffusionPipeline(network, DDPMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_with(pipe: PixelDiffusionPipeline, scheduler, batch_size: int, steps: int) -> Callable[[], object]:
    def sample() -> None:
        pipe.scheduler = scheduler
        pipe(batch_size, steps, torch.Generator().manual_seed(0))

    return sample


def network_alone(network, batch_size: int, evaluations: int, device: torch.device) -> Callable[[], object]:
    size = network.config.sample_size
    latents = torch.randn(batch_size, 1, size, size, device=device)
    timesteps = torch.linspace(999, 0, evaluations, device=device)

    @torch.no_grad()
    def evaluate() -> None:
        for timestep in timesteps:
            network(latents, timestep)

    return evaluate


def report(result: dict) -> str:
    parts = [
        f"Few steps: DPM-Solver++'s SDE variant with Karras' sigmas. DDPM's 1,000 are {1000 // DDPM_STEPS} times"
        f" {DDPM_STEPS} of them. Images are made up to PIL objects."
        " The last column is the time an evaluation against that of the network alone: what it is above 1 is the"
        " pipeline and the scheduler."
    ]
    if any(row["arm"].endswith(BESIDE) for row in result["rows"]):  # older records have none
        parts[0] += (
            " Without the network, pipeline and scheduler run on zeros in place of its output, and the column is what"
            " they take themselves."
        )
    for title, rows in grouped(result["rows"], "resolution", "precision", "batch_size"):
        lines = [
            (
                row["arm"],
                row["evaluations"],
                thousands(row["images_per_second"]) if row["images_per_second"] else "",
                thousands(1000 * row["seconds_per_batch"]),
                with_quartiles(row["of_network_alone"]),
            )
            for row in rows
        ]
        head = ("", "evaluations", "images/s", "ms a batch", "x the network alone")
        parts += [f"**{title}**", table(head, lines)]
    return "\n\n".join(parts)
