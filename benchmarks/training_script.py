"""2. The whole training script, beside its bare step, and beside diffusers' recipe with a stock network as wide.

Scripts and recipe read the same images from disk: PNGs in a `datasets` data set.
"""

import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, Features, Image
from networks import CONFIGS, make_network, make_training_step
from processes import LOGGING_STEPS, flags, run, speed_of_training
from report import precision_name, table, thousands, with_quartiles
from windows import quartiles, ratio, seconds_of, turns

from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.sampling import to_pil

NETWORKS = ("default", "stock")
NUM_IMAGES = 10_000  # or one batch, as the recipe leaves an incomplete one out
RECIPE = "diffusers' recipe, stock"
AS_IT_COMES = f"{RECIPE}, float32 as by default"
BARE = {"script, default": "bare step, default", "script, stock": "bare step, stock"}


def measure(args, device: torch.device) -> dict:
    settings = {
        "resolution": args.resolutions[0],
        "batch_size": args.batch_sizes[0],
        "precision": args.precisions[-1],
    }
    cuda_graph, warm_up = device.type == "cuda", LOGGING_STEPS[device.type]  # as in the script
    steps = {
        name: make_training_step(
            make_network(name, settings["resolution"]), device=device, cuda_graph=cuda_graph, **settings
        )
        for name in NETWORKS
    }

    def bare_step(name: str) -> float:
        seconds_of(steps[name], 5)  # warm-up: another process had the caches; and on a GPU the graph is captured
        return settings["batch_size"] / seconds_of(steps[name], args.script_steps - warm_up)

    with tempfile.TemporaryDirectory() as folder:
        cache, data = Path(folder, "cache"), Path(folder, "images")
        save_images(data, cache, max(NUM_IMAGES, settings["batch_size"]))
        asked = {
            "resolution": settings["resolution"],
            "train_batch_size": settings["batch_size"],
            "mixed_precision": settings["precision"],
        }

        def script(name: str, **others) -> float:
            unet = {"unet_config": CONFIGS / "stock.json"} if name == "stock" else {}
            values = {"dataset_name": data, "cache_dir": cache, "max_train_steps": args.script_steps, **asked, **unet}
            values |= others
            return speed_of_training(values, Path(tempfile.mkdtemp(dir=folder)), device)

        arms = {
            "bare step, default": lambda: bare_step("default"),
            "script, default": lambda: script("default"),
            "bare step, stock": lambda: bare_step("stock"),
            "script, stock": lambda: script("stock"),
            RECIPE: lambda: run_recipe(data, asked, args.script_steps, device),
        }
        if args.compile:
            arms |= {f"script, {name}, compiled": lambda name=name: script(name, compile=True) for name in NETWORKS}
        if settings["precision"] != "no":
            in_float32 = asked | {"mixed_precision": "no"}
            arms[AS_IT_COMES] = lambda: run_recipe(data, in_float32, args.script_steps, device)
        speeds = {name: [] for name in arms}  # images per second, by window
        for name in turns(list(arms), args.windows):
            speeds[name].append(arms[name]())
    rows = [
        {
            "arm": name,
            "images_seen": settings["batch_size"] * (args.script_steps - warm_up) * args.windows,
            "images_per_second": quartiles(values) | {"windows": values},
            "of_bare_step": ratio(values, speeds[BARE[name]]) if name in BARE else None,
            "times_recipe": ratio(values, speeds[RECIPE]),
            "times_recipe_as_it_comes": ratio(values, speeds[AS_IT_COMES]) if AS_IT_COMES in speeds else None,
        }
        for name, values in speeds.items()
    ]
    return {**settings, "steps": args.script_steps, "warm_up": warm_up, "rows": rows}


def save_images(folder: Path, cache: Path, count: int) -> None:
    """Save the built-in garments at 28x28 as PNGs, as in a data set on the Hub."""
    garments = load_images("synthetic-fashion", resolution=28, max_samples=count, cache_dir=str(cache))
    images = to_pil(ImageArrays(garments, (1, 28, 28)).__getitems__(range(count)))
    Dataset.from_dict({"image": images}, features=Features({"image": Image()})).save_to_disk(folder)


def run_recipe(data: Path, asked: dict, steps: int, device: torch.device) -> float:
    values = {"data": data, **asked, "steps": steps, "warm_up": LOGGING_STEPS[device.type]}
    output = run([Path(__file__).with_name("diffusers_recipe.py"), *flags(values)], device)
    return json.loads(output.splitlines()[-1])["images_per_second"]


def report(result: dict) -> str:
    lines = [
        (
            row["arm"],
            thousands(row["images_per_second"]["median"]),
            with_quartiles(row["of_bare_step"]),
            with_quartiles(row["times_recipe"]),
            with_quartiles(row["times_recipe_as_it_comes"]),
        )
        for row in result["rows"]
    ]
    head = ("", "images/s", "of the bare step", "x the recipe", "x the recipe in float32")
    caption = (
        f"{result['steps']} steps of {result['batch_size']} images at {result['resolution']}x{result['resolution']},"
        f" the first {result['warm_up']} not timed, precision {precision_name(result['precision'])} but for what says"
        " otherwise. Bare step and script keep freed memory; the recipe leaves the allocator alone, as diffusers'"
        " script does."
    )
    return f"{caption}\n\n{table(head, lines)}"
