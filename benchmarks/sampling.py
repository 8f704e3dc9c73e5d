"""4. Sampling: images a second, the time of one image, and what pipeline and scheduler take beside the network."""

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from networks import installed, make_network
from report import grouped, table, thousands, with_quartiles
from windows import ratio, time_arms

from ddpm_diffusers import PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.schedulers import count_evaluations

FEW_STEPS = ("dpmsolver++", 20)
DDPM_STEPS = 50  # of the 1,000: each takes as long
BATCH_SIZES = (1, 64)


def measure(args, device: torch.device) -> dict:
    names = [name for name in installed(args.networks) if name in ("default", "stock")]
    rows = []
    for resolution in args.resolutions:
        for precision in args.precisions:
            for batch_size in BATCH_SIZES:
                arms, evaluations, images = {}, {}, {}
                for name in names:
                    pipe = make_pipeline(name, resolution, precision, device)
                    few = make_scheduler(FEW_STEPS[0], pipe.scheduler)
                    for scheduler, steps in ((few, FEW_STEPS[1]), (pipe.scheduler, DDPM_STEPS)):
                        label = f"{name}, {type(scheduler).__name__.removesuffix('Scheduler')}"
                        evaluations[label] = count_evaluations(scheduler, steps)
                        arms[label] = sample_with(pipe, scheduler, batch_size, steps)
                        images[label] = 1000 / steps if scheduler is pipe.scheduler else 1
                    arms[f"{name}, network alone"] = network_alone(pipe.unet, batch_size, FEW_STEPS[1], device)
                    evaluations[f"{name}, network alone"] = FEW_STEPS[1]
                times = time_arms(arms, args.windows, args.window_seconds)
                for label, time in times.items():
                    alone = times[f"{label.partition(',')[0]}, network alone"]
                    share = time | {"windows": [seconds / evaluations[label] for seconds in time["windows"]]}
                    alone = alone | {"windows": [seconds / FEW_STEPS[1] for seconds in alone["windows"]]}
                    seconds = time["median"] * images.get(label, 1)
                    rows.append({
                        "arm": label,
                        "resolution": resolution,
                        "precision": precision,
                        "batch_size": batch_size,
                        "evaluations": round(evaluations[label] * images.get(label, 1)),
                        "seconds_per_batch": seconds,
                        "images_per_second": batch_size / seconds,
                        "of_network_alone": ratio(alone, share),
                        "windows": time,
                    })  # fmt: skip
    return {"few_steps": FEW_STEPS, "ddpm_steps": DDPM_STEPS, "rows": rows}


def make_pipeline(name: str, resolution: int, precision: str, device: torch.device) -> PixelDiffusionPipeline:
    """With untrained weights, which take as long as trained ones."""
    network = make_network(name, resolution).to(device).eval()
    network.forward = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")(network.forward)
    pipe = PixelDiffusionPipeline(network, DDPMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_with(pipe: PixelDiffusionPipeline, scheduler, batch_size: int, steps: int) -> Callable[[], None]:
    def sample() -> None:
        pipe.scheduler = scheduler
        pipe(batch_size, steps, torch.Generator().manual_seed(0))

    return sample


def network_alone(network, batch_size: int, evaluations: int, device: torch.device) -> Callable[[], None]:
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
        f"DDPM's 1,000 steps are {1000 // result['ddpm_steps']} times {result['ddpm_steps']} of them. Images are made"
        " up to PIL objects. The last column is the time an evaluation against that of the network alone: what it is"
        " above 1 is the pipeline and the scheduler."
    ]
    for title, rows in grouped(result["rows"], "resolution", "precision", "batch_size"):
        lines = [
            (
                row["arm"],
                row["evaluations"],
                thousands(row["images_per_second"]),
                thousands(1000 * row["seconds_per_batch"]),
                with_quartiles(row["of_network_alone"]),
            )
            for row in rows
        ]
        head = ("", "evaluations", "images/s", "ms a batch", "x the network alone")
        parts += [f"**{title}**", table(head, lines)]
    return "\n\n".join(parts)
