"""Train and evaluate a list of U-Nets under one budget: what does each switch do?

    OMP_NUM_THREADS=1 python train_scripts/ablate.py --jobs 4 --mixed_precision bf16 --output_dir runs/ladder-16

Each row of `--ladder` is a U-Net, trained by `train_unconditional.py` and judged by `evaluate.py`, on the same images
in the same order, with the same noise. Run the same command again to go on: what `--results_dir` has is not run again,
on whatever machine it was made, so that a row or a seed can be added to results that came with a clone. Several
`--train_seeds` give means and standard deviations.
"""

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from arguments import arg, parse_arguments
from PIL import Image
from run_folder import write_file, write_text
from tables import figures_table
from tqdm.auto import tqdm
from unets import make_unet

from ddpm_diffusers.evaluation import FASHION_MNIST
from ddpm_diffusers.evaluation.plots import plot_rows, plot_spectra
from ddpm_diffusers.evaluation.protocol import mean_and_sd

SCRIPTS = Path(__file__).parent


@dataclass
class AblateArguments:
    # what is compared
    ladder: str = arg(str(SCRIPTS / "configs" / "ladder.yaml"), "YAML file of the rows, each a U-Net")
    rows: list[str] | None = field(default=None, metadata={"help": "names of rows to run; all by default"})
    train_seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "one training of each row a seed"})
    # the budget
    dataset_name: str = arg("zalando-datasets/fashion_mnist", "Hub name or local folder")
    dataset_id: str | None = arg(None, "what a local data set is called on the Hub, for the records")
    resolution: int = arg(16, "height and width of the images")
    num_epochs: int = arg(5, "passes over the data")
    max_train_steps: int | None = arg(None, "optimizer steps, in place of --num_epochs")
    train_batch_size: int = arg(64, "images a step")
    learning_rate: float = arg(2e-3, "peak learning rate of AdamW")
    mixed_precision: str = arg("no", "no, fp16 or bf16, of training and sampling")
    # the judgement
    num_images: int = arg(5000, "samples of each network")
    scheduler: str = arg("dpmsolver++", "that samples them")
    num_inference_steps: int = arg(20, "its steps")
    feature_extractor: str = arg(FASHION_MNIST, "as in evaluate.py")
    # output
    output_dir: str = arg("ablation", "folder of the trainings")
    results_dir: str | None = arg(
        None, "folder of what is kept: JSON and samples of each row, table and pictures; in --output_dir by default"
    )
    pictured: list[str] = field(
        default_factory=lambda: ["baseline", "guide", "default", "stock"], metadata={"help": "rows in the spectra"}
    )
    jobs: int = arg(1, "trainings at a time")
    accelerate_config: str = arg(str(SCRIPTS / "accelerate" / "cpu.yaml"), "of each training")


def main(args: AblateArguments) -> None:
    unet_configs = read_ladder(Path(args.ladder))
    names = args.rows or list(unet_configs)
    for name in names:
        if name not in unet_configs:
            raise ValueError(f"`--rows` has {name!r}; {args.ladder} has {', '.join(unet_configs)}.")
    unets = {name: make_unet(unet_configs[name], args.resolution, 1000) for name in names}
    rows = {name: open_row(args, name, unet_configs[name], unets[name].num_parameters()) for name in names}
    todo = [(name, seed) for seed in args.train_seeds for name in names if str(seed) not in rows[name]["seeds"]]
    for name, seed in todo:
        check_training(args, name, seed, unets[name].config)

    results_dir = results_folder(args)
    results_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {
            pool.submit(train_and_evaluate, args, name, seed, unet_configs[name]): (name, seed) for name, seed in todo
        }
        try:
            for done in tqdm(as_completed(waiting), total=len(waiting), desc="Trainings"):
                done.result()
                name, seed = waiting[done]
                keep(results_dir, rows[name], seed, run_folder(args, name, seed))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run are let to their end
            raise

    kept = [results_dir / f"{name}.json" for name in unet_configs]
    rows = [json.loads(path.read_text()) for path in kept if path.is_file()]
    write_text(results_dir / "table.md", markdown(rows) + "\n")
    strips = {row["name"]: Image.open(results_dir / f"{row['name']}.png") for row in rows}
    write_file(results_dir / "grids.png", lambda path: plot_rows(strips, path))
    write_spectra(results_dir, [row for row in rows if row["name"] in args.pictured])
    print((results_dir / "table.md").read_text())


def read_ladder(path: Path) -> dict[str, dict]:
    """The U-Net's arguments of each row, what it takes over from others included."""
    rows = yaml.safe_load(path.read_text())

    def resolve(name: str, followed: tuple[str, ...] = ()) -> dict:
        if name in followed:
            raise ValueError(f"{path}: {' from '.join((*followed, name))} goes round in a circle.")
        if name.endswith(".json"):
            return json.loads((path.parent / name).read_text())
        if name not in rows:
            raise ValueError(f"{path}: row {followed[-1]!r} is from {name!r}, which is no row and no .json file.")
        changes = dict(rows[name])
        source = changes.pop("from", None)
        return {**(resolve(source, (*followed, name)) if source else {}), **changes}

    return {name: resolve(name) for name in rows}


def results_folder(args: AblateArguments) -> Path:
    return Path(args.results_dir or args.output_dir)


def run_folder(args: AblateArguments, name: str, seed: int) -> Path:
    return Path(args.output_dir, name, f"seed-{seed}")


def training_arguments(args: AblateArguments, name: str, seed: int) -> dict:
    length = {"max_train_steps": args.max_train_steps} if args.max_train_steps else {"num_epochs": args.num_epochs}
    return {
        "dataset_name": args.dataset_name,
        "resolution": args.resolution,
        **length,
        "train_batch_size": args.train_batch_size,
        "learning_rate": args.learning_rate,
        "mixed_precision": args.mixed_precision,
        "seed": seed,
    }


def open_row(args: AblateArguments, name: str, unet_config: dict, num_parameters: int) -> dict:
    """What is kept of a row, or a new one; ValueError where what is kept was made otherwise."""
    training = training_arguments(args, name, args.train_seeds[0])
    del training["seed"], training["dataset_name"]
    sampling = {key: getattr(args, key) for key in ("num_images", "scheduler", "num_inference_steps")}
    settings = {"unet_config": unet_config, "training": training, "sampling": sampling}
    path = results_folder(args) / f"{name}.json"
    if not path.is_file():
        return {"name": name, "num_parameters": num_parameters, **settings, "seeds": {}}
    row = json.loads(path.read_text())
    for key, values in json.loads(json.dumps(settings)).items():
        differ = [k for k in values | row[key] if values.get(k) != row[key].get(k)]
        if differ:
            raise ValueError(
                f"{path} was made with {show_some(row[key], differ)}, and {show_some(values, differ)} is asked for:"
                " choose another `--results_dir`."
            )
    return row


def show_some(values: dict, keys: list[str]) -> str:
    return ", ".join(f"`{key}` {values.get(key, 'not given')}" for key in keys)


def check_training(args: AblateArguments, name: str, seed: int, unet: dict) -> None:
    """ValueError where a training that is there, finished or not, is another than was asked for."""
    path = run_folder(args, name, seed) / "run.json"
    if not path.is_file():
        return
    run = json.loads(path.read_text())
    asked = {key: value for key, value in training_arguments(args, name, seed).items() if key != "dataset_name"}
    unet = {key: value for key, value in json.loads(json.dumps(unet)).items() if not key.startswith("_")}
    differences = [key for key, value in asked.items() if run["arguments"][key] != value]
    differences += [key for key, value in unet.items() if run["unet"].get(key) != value]
    if differences:
        raise ValueError(
            f"{path.parent} is of another training: {', '.join(differences)} differ. Choose another `--output_dir`."
        )


def train_and_evaluate(args: AblateArguments, name: str, seed: int, unet_config: dict) -> None:
    folder = run_folder(args, name, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "model_index.json").is_file():
        flags = training_arguments(args, name, seed)
        flags |= {"unet_config": json.dumps(unet_config), "logger": "none", "output_dir": folder}
        flags |= {"checkpointing_steps": 1000, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
        run("train_unconditional.py", flags, args.accelerate_config, folder.with_suffix(".train.log"))
    flags = {
        "model": folder,
        "name": name,
        "dataset_name": args.dataset_name,
        **({"dataset_id": args.dataset_id} if args.dataset_id else {}),
        "num_images": args.num_images,
        "scheduler": args.scheduler,
        "num_inference_steps": args.num_inference_steps,
        "mixed_precision": args.mixed_precision,
        "feature_extractor": args.feature_extractor,
        "output_dir": folder / "evaluation",
        "overwrite": True,  # what was killed before its end
    }
    run("evaluate.py", flags, args.accelerate_config, folder.with_suffix(".evaluate.log"))


def run(script: str, flags: dict, accelerate_config: str, log: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        accelerate_config,
        SCRIPTS / script,
    ]
    for name, value in flags.items():
        command += [f"--{name}", value]
    with open(log, "ab") as output:
        status = subprocess.run([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        tail = log.read_text(errors="replace").strip().splitlines()[-1]
        raise SystemExit(
            f"{script} ended with status {status}: {tail} (all of it: {log}). Run the command again to go on."
        )


def keep(results_dir: Path, row: dict, seed: int, folder: Path) -> None:
    """Add a training and its evaluation to the row, with the means over its seeds, and write it."""
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
    for key in ("loss", "images_per_second"):
        row[key] = mean_and_sd([entry[key] for entry in seeds.values()])
    if next(iter(seeds)) == str(seed):
        strip = first_row(folder / "evaluation" / "grid.png")
        write_file(results_dir / f"{row['name']}.png", lambda path: strip.save(path, optimize=True))
    write_text(results_dir / f"{row['name']}.json", json.dumps(row, indent=2) + "\n")


def take_means(figures: dict | None):
    if figures is None or "mean" in figures:
        return figures and figures["mean"]
    return {name: take_means(figure) for name, figure in figures.items()}


def markdown(rows: list[dict]) -> str:
    extractors = {json.dumps(seed["feature_extractor"]) for row in rows for seed in row["seeds"].values()}
    if len(extractors) > 1:
        raise ValueError(f"The rows were judged by different extractors, {extractors}: remove the older evaluations.")
    cells = [
        (
            {
                "": row["name"],
                "seeds": len(row["seeds"]),
                "parameters": f"{row['num_parameters'] / 1e6:.2f} M",
                "loss": f"{row['loss']['mean']:.4f}",
            },
            row["figures"],
        )
        for row in rows
    ]
    return figures_table(cells)


def first_row(grid: Path) -> Image.Image:
    """The first 8 of the 64 images."""
    with Image.open(grid) as image:
        return image.crop((0, 0, image.width, image.height // 8))


def write_spectra(results_dir: Path, rows: list[dict]) -> None:
    """The first seed's, against the real images': around circles, and on the square rings whose last is Nyquist's."""
    for kind, xlabel in (("radial", "radius (cycles an image)"), ("rings", "larger of |u| and |v| (cycles an image)")):
        firsts = {row["name"]: next(iter(row["seeds"].values()))["spectrum"] for row in rows}
        curves = {"real": next(iter(firsts.values()))["real"][kind]} if firsts else {}
        curves |= {name: spectrum["samples"][kind] for name, spectrum in firsts.items()}
        write_file(results_dir / f"{kind}.png", lambda path, c=curves, x=xlabel: plot_spectra(c, path, x))


if __name__ == "__main__":
    main(parse_arguments(AblateArguments, sys.argv[1:], __doc__))
