"""The rows of a ladder as `ablate.py` keeps them, one JSON file each, and their table and pictures."""

import json
import logging
import math
import statistics
from functools import partial
from pathlib import Path

from diffusers import ModelMixin
from files import write_file, write_text
from PIL import Image
from tables import caption, figures_table

from ddpm_diffusers.checkpointing import config_of
from ddpm_diffusers.evaluation import Reference
from ddpm_diffusers.evaluation.plots import FREQUENCIES, plot_rows, plot_spectra
from ddpm_diffusers.evaluation.protocol import mean_and_sd

logger = logging.getLogger(__name__)


def open_row(results_dir: Path, name: str, unet: ModelMixin, settings: dict) -> dict:
    """The row as kept in `results_dir`, or a new one; ValueError if the kept one was made with other settings."""
    settings = {"unet": config_of(unet), **settings}
    path = results_dir / f"{name}.json"
    if not path.is_file():
        return {"name": name, "num_parameters": unet.num_parameters(), **settings, "seeds": {}}
    row = json.loads(path.read_text())
    for part, asked in settings.items():
        kept = row.get(part, {})
        if differ := [key for key in asked | kept if asked.get(key) != kept.get(key)]:
            raise ValueError(
                f"{path} was made with {show_some(kept, differ)}, and {show_some(asked, differ)} is asked for:"
                " choose another `--results_dir`."
            )
    return row


def other_rows(results_dir: Path, rows: dict, unets: dict[str, ModelMixin], settings: dict) -> dict[str, dict]:
    """The rows kept in `results_dir` that are not run now: of the same settings and, if in the ladder, network."""
    others = {}
    for path in sorted(results_dir.glob("[!.]*.json")):
        if path.stem not in rows:
            row = json.loads(path.read_text())
            asked = settings | ({"unet": config_of(unets[path.stem])} if path.stem in unets else {})
            if any(row.get(part) != value for part, value in asked.items()):
                logger.warning("%s was made with other settings, or of another network: left out.", path)
            else:
                others[path.stem] = row
    return others


def show_some(values: dict, keys: list[str]) -> str:
    return ", ".join(f"`{key}` {values.get(key, 'not given')}" for key in keys)


def check_same_images(reference: Reference, num_images: int, kept: list[dict]) -> None:
    """Raises ValueError if rows were measured against other images, which have another floor."""
    floor = reference.floor(num_images)["frechet_distance"]
    for row in kept:
        measured = row["figures"]["floor"]["frechet_distance"]["mean"]
        of_such_images = row["unet"]["in_channels"] == reference.image_shape[0]
        # a GPU's rounding moves it by 0.02 %
        if of_such_images and not math.isclose(measured, floor, rel_tol=0.01, abs_tol=1e-6):
            raise ValueError(
                f"Row {row['name']!r} was compared with other images: as many test images had a distance of"
                f" {measured:.4f} there, and have {floor:.4f} here. Choose another `--results_dir`."
            )


def add_to_row(results_dir: Path, row: dict, seed: int, folder: Path) -> None:
    """Add a training and its evaluation to the row, update its means over seeds, and write it."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [json.loads(line)["images_per_second"] for line in (folder / "speed.jsonl").read_text().splitlines()]
    record = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    row["seeds"][str(seed)] = {
        "steps": log[-1]["step"],
        "loss": statistics.fmean(line["loss"] for line in log[-20:]),
        "images_per_second": statistics.median(speeds),
        **{key: value for key, value in record.items() if key not in ("per_seed", "name")},
    }
    row["seeds"] = seeds = dict(sorted(row["seeds"].items(), key=lambda item: int(item[0])))
    row["figures"] = mean_and_sd([take_means(entry["figures"]) for entry in seeds.values()])
    row.pop("images_per_second", None)  # of older records: a mean over machines; each seed has its own
    row["loss"] = mean_and_sd([entry["loss"] for entry in seeds.values()])
    if next(iter(seeds)) == str(seed):
        strip = first_row(folder / "evaluation" / "grid.png")
        write_file(results_dir / f"{row['name']}.png", lambda path: strip.save(path, optimize=True))
    write_text(results_dir / f"{row['name']}.json", json.dumps(row, indent=2) + "\n")


def take_means(figures: dict | None):
    """The figures, with each `{"mean": ..., "sd": ...}` replaced by its mean."""
    if figures is None:
        return None
    if "mean" in figures:
        return figures["mean"]
    return {name: take_means(figure) for name, figure in figures.items()}


def write_report(results_dir: Path, rows: list[dict], pictured: list[str]) -> None:
    """Write table.md, grids.png, radial.png and rings.png for the kept rows."""
    write_text(results_dir / "table.md", markdown(rows) + "\n")
    strips = {row["name"]: Image.open(results_dir / f"{row['name']}.png") for row in rows}
    write_file(results_dir / "grids.png", lambda path: plot_rows(strips, path))
    spectra = {row["name"]: next(iter(row["seeds"].values()))["spectrum"] for row in rows}  # of the first seed
    pictured = [name for name in spectra if name in pictured] or list(spectra)
    for kind in FREQUENCIES:
        real = next(iter(spectra.values()))["real"][kind]
        curves = {name: spectrum["samples"][kind] for name, spectrum in spectra.items() if name in pictured}
        write_file(results_dir / f"{kind}.png", partial(plot_spectra, curves, real, kind=kind))


def markdown(rows: list[dict]) -> str:
    cells = [
        (
            {
                "": row["name"],
                "seeds": len(row["seeds"]),
                "parameters": f"{row['num_parameters'] / 1e6:.2f} M",
                "mixed precision": ", ".join(sorted({seed["mixed_precision"] for seed in row["seeds"].values()})),
                "loss": f"{row['loss']['mean']:.4f}",
            },
            row["figures"],
        )
        for row in rows
    ]
    first = dict(next(iter(rows[0]["seeds"].values())))
    del first["mixed_precision"]  # has a column of its own
    return figures_table(cells) + "\n\n" + caption(first)


def first_row(grid: Path) -> Image.Image:
    """The grid's top row: the first 8 of its 64 images."""
    with Image.open(grid) as image:
        return image.crop((0, 0, image.width, image.height // 8))
