"""Train and evaluate a list of U-Nets under one budget: what does each switch do?

    OMP_NUM_THREADS=1 python train_scripts/ablate.py --jobs 4 --mixed_precision bf16 --output_dir runs/ladder-16

Each row of `--ladder` is a U-Net, trained by `train_unconditional.py` and evaluated by `evaluate.py`, on the same
images in the same order, with the same noise. Run the same command again to continue: what `--results_dir` has is not
run again, whatever machine and precision it came from, so rows and seeds can be added to the results in a clone; the
table shows each row's precision. Stopped, it stops the trainings, each with a checkpoint. Several `--train_seeds` give
means and standard deviations.
"""

import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from arguments import TrainingArguments
from command_line import arg, check, run_script
from files import check_apart, lock
from ladder_rows import add_to_row, check_same_images, open_row, other_rows, write_report
from launch import choose_precision
from samplers import parse_scheduler
from tqdm.auto import tqdm
from unets import make_noise_schedule, make_unet

from ddpm_diffusers import make_scheduler
from ddpm_diffusers.evaluation import FASHION_MNIST, Reference, load_feature_extractor
from ddpm_diffusers.evaluation.plots import FREQUENCIES
from ddpm_diffusers.evaluation.protocol import check_count
from ddpm_diffusers.schedulers import count_evaluations, rehearse

SCRIPTS = Path(__file__).parent
PICTURES = ("grids", *FREQUENCIES)  # beside the strips of the rows
LADDER = SCRIPTS.resolve() / "configs" / "ladder.yaml"
PICTURED = ("baseline", "residual_blocks", "guide", "coarser_layers", "default", "stock")


@dataclass
class AblateArguments:
    # what is compared
    ladder: str = arg(str(LADDER), "YAML file of the rows to compare, each a U-Net")
    rows: list[str] | None = field(default=None, metadata={"help": "names of rows to run; all by default"})
    train_seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds to train each row with"})
    # the budget
    dataset_name: str = arg("zalando-datasets/fashion_mnist", "Hub id or local folder")
    dataset_id: str | None = arg(None, "Hub id of a local data set, for the records")
    resolution: int = arg(16, "height and width of the images")
    num_epochs: int | None = arg(None, "passes over the data; 5 unless --max_train_steps is given")
    max_train_steps: int | None = arg(None, "optimizer steps, in place of --num_epochs")
    train_batch_size: int = arg(64, "batch size per process")
    optimizer: str = arg("adamw", "adamw or muon, as in train_unconditional.py")
    learning_rate: float = arg(2e-3, "peak learning rate")
    mixed_precision: str = arg("no", "auto, no, fp16 or bf16, for training and sampling")
    # the evaluation
    num_images: int = arg(5000, "number of samples per trained network")
    scheduler: str = arg("dpmsolver++", "scheduler to sample with, with options as in generate.py")
    num_inference_steps: int = arg(20, "steps of the scheduler")
    feature_extractor: str = arg(FASHION_MNIST, "name, folder or Hub id of the classifier whose features are compared")
    # output
    output_dir: str = arg("ablation", "folder for the training runs")
    results_dir: str | None = arg(
        None, "folder for the results: JSON and samples of each row, table and pictures; --output_dir by default"
    )
    pictured: list[str] | None = field(
        default=None,
        metadata={"help": f"rows to show in the spectra; by default {', '.join(PICTURED)}, of another ladder all"},
    )
    jobs: int = arg(1, "number of trainings to run at a time")
    compile: bool = arg(False, "torch.compile each network for its training; for GPUs")
    accelerate_config: str = arg(
        str(SCRIPTS / "accelerate" / "cpu.yaml"), "accelerate config file for each training and evaluation"
    )

    def __post_init__(self):
        for name in ("rows", "train_seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"`--{name}` is {values}; it must hold different ones.")
        check(self, self.jobs >= 1, "jobs", "be at least 1")
        if self.num_epochs is None and self.max_train_steps is None:
            self.num_epochs = 5
        use_cpu = yaml.safe_load(Path(self.accelerate_config).read_text("utf-8")).get("use_cpu", False)
        self.mixed_precision = choose_precision(self.mixed_precision, use_cpu)
        check(self, not (use_cpu and self.mixed_precision == "fp16"), "mixed_precision",
              "be no, bf16 or auto on a CPU, where accelerate has no fp16")  # fmt: skip
        for seed in self.train_seeds:  # made only to be checked: raises now what the trainings would
            TrainingArguments(
                **training_arguments(self, seed),
                dataset_id=self.dataset_id,
                logger="none",
                output_dir=str(folder_of(self, "row", seed)),
            )


def main(args: AblateArguments) -> None:
    unet_configs = read_ladder(Path(args.ladder))
    names = args.rows or list(unet_configs)
    pictured = args.pictured or list(unet_configs)
    if args.pictured is None and Path(args.ladder).resolve() == LADDER:
        pictured = [name for name in PICTURED if name in unet_configs]
    for name in (*names, *pictured):
        if name not in unet_configs:
            raise ValueError(f"There is no row {name!r}; {args.ladder} has {', '.join(unet_configs)}.")
    check_apart(args.results_dir or args.output_dir, args.dataset_name)
    training = TrainingArguments(**training_arguments(args, args.train_seeds[0]), logger="none")
    unets = {
        name: make_unet(config, args.resolution, training.ddpm_num_steps) for name, config in unet_configs.items()
    }
    extractor = load_feature_extractor(args.feature_extractor)
    check_count(args.num_images, extractor)
    # raise now what the evaluations would after the trainings
    name, options = parse_scheduler(args.scheduler)
    scheduler = make_scheduler(name, make_noise_schedule(training), **options)
    rehearse(scheduler, name)
    count_evaluations(scheduler, args.num_inference_steps)
    settings = {**shared_settings(args), "feature_extractor": {"name": extractor.name, "digest": extractor.digest}}
    results_dir = Path(args.results_dir or args.output_dir)
    folder_lock = lock(results_dir)
    rows = {name: open_row(results_dir, name, unets[name], settings) for name in names}
    others = other_rows(results_dir, rows, unets, settings)
    todo = [(name, seed) for seed in args.train_seeds for name in names if str(seed) not in rows[name]["seeds"]]
    for name, seed in todo:
        check_training(args, name, seed, rows[name])
    for channels in {unets[name].config.in_channels for name, _ in todo}:
        extractor.check_channels(channels)
        # fills the caches for the evaluations, and raises what they would after the trainings
        reference = Reference.of_dataset(args.dataset_name, extractor, resolution=args.resolution, channels=channels)
        check_same_images(
            reference, args.num_images, [row for row in (*rows.values(), *others.values()) if row["seeds"]]
        )

    failures, running = [], set()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            pool.submit(train_and_evaluate, args, name, seed, unet_configs[name], running): (name, seed)
            for name, seed in todo
        }
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="Trainings"):
                name, seed = futures[future]
                try:
                    future.result()
                    add_to_row(results_dir, rows[name], seed, folder_of(args, name, seed))
                except RuntimeError as error:  # the other rows go on
                    failures.append(str(error))
                    tqdm.write(failures[-1])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stopped = set()
            while not all(future.done() for future in futures):  # one may have begun another script meanwhile
                for process in running - stopped:
                    stop(process)
                    stopped.add(process)
                time.sleep(0.1)
            raise

    rows |= others
    order = dict.fromkeys((*unet_configs, *rows))  # as in the ladder, then those of other ladders
    if kept := [rows[name] for name in order if name in rows and rows[name]["seeds"]]:
        write_report(results_dir, kept, pictured)
        print((results_dir / "table.md").read_text())
    folder_lock.release()
    if failures:
        raise SystemExit("\n".join([*failures, "Run the command again to go on."]))


def read_ladder(path: Path) -> dict[str, dict]:
    """The U-Net arguments of each row, including those it inherits by `from`."""
    try:
        rows = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`--ladder` {path} cannot be read ({error}): give rows by name.") from error
    if not isinstance(rows, dict):
        raise ValueError(f"`--ladder` {path} holds {rows!r}; it must hold rows by name.")
    for name in rows:
        if not isinstance(name, str) or name in PICTURES:
            raise ValueError(f"{path}: row {name!r} must have another name: text, and not {', '.join(PICTURES)}.")

    def resolve(name: str, followed: tuple[str, ...] = ()) -> dict:
        if name in followed:
            raise ValueError(f"{path}: {' from '.join((*followed, name))} goes round in a circle.")
        if name.endswith(".json"):
            return json.loads((path.parent / name).read_text("utf-8"))
        if name not in rows:
            raise ValueError(f"{path}: row {followed[-1]!r} is from {name!r}, which is no row and no .json file.")
        if not isinstance(rows[name], dict):
            raise ValueError(f"{path}: row {name!r} holds {rows[name]!r}; it must hold arguments of a U-Net by name.")
        changes = dict(rows[name])
        source = changes.pop("from", None)
        return {**(resolve(source, (*followed, name)) if source else {}), **changes}

    return {name: resolve(name) for name in rows}


def folder_of(args: AblateArguments, name: str, seed: int) -> Path:
    return Path(args.output_dir, name, f"seed-{seed}")


def training_arguments(args: AblateArguments, seed: int) -> dict:
    length = {"num_epochs": args.num_epochs, "max_train_steps": args.max_train_steps}
    return {
        "dataset_name": args.dataset_name,
        "resolution": args.resolution,
        **{name: value for name, value in length.items() if value is not None},
        "train_batch_size": args.train_batch_size,
        **({} if args.optimizer == "adamw" else {"optimizer": args.optimizer}),  # older records have none
        "learning_rate": args.learning_rate,
        "mixed_precision": args.mixed_precision,
        "seed": seed,
    }


def shared_settings(args: AblateArguments) -> dict:
    """What all rows have in common."""
    training = training_arguments(args, seed=0)
    del training["seed"], training["mixed_precision"]  # each seed's record has its own
    training["dataset_name"] = args.dataset_id or args.dataset_name
    training["num_processes"] = num_processes(args)
    judging = {key: getattr(args, key) for key in ("num_images", "scheduler", "num_inference_steps")}
    return {"training": training, "judging": judging}


def num_processes(args: AblateArguments) -> int:
    return yaml.safe_load(Path(args.accelerate_config).read_text("utf-8")).get("num_processes", 1)


def check_training(args: AblateArguments, name: str, seed: int, row: dict) -> None:
    """Raises ValueError if the run folder holds a training, finished or not, with other settings than asked for."""
    path = folder_of(args, name, seed) / "run.json"
    if not path.is_file():
        return
    run = json.loads(path.read_text())
    asked = training_arguments(args, seed)
    asked |= {"global_batch_size": args.train_batch_size * num_processes(args), "optimizer": args.optimizer}
    if epochs := asked.pop("num_epochs", None):
        images = int(run["arguments"]["data"].partition(" ")[0])
        asked["max_train_steps"] = math.ceil(epochs * images / asked["global_batch_size"])
    differences = [key for key, value in asked.items() if run["arguments"].get(key) != value]
    differences += [key for key, value in row["unet"].items() if run["unet"].get(key) != value]
    if differences:
        raise ValueError(
            f"{path.parent} is of another training: {', '.join(differences)} differ. Choose another `--output_dir`."
        )


def train_and_evaluate(args: AblateArguments, name: str, seed: int, unet_config: dict, running: set) -> None:
    """Run the two scripts one after the other; RuntimeError if one fails. `running` holds the process that runs."""
    folder = folder_of(args, name, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    dataset_id = {"dataset_id": args.dataset_id} if args.dataset_id else {}
    if not (folder / "model_index.json").is_file():
        flags = training_arguments(args, seed) | dataset_id
        flags |= {"unet_config": json.dumps(unet_config), "compile": args.compile}
        flags |= {"logger": "none", "output_dir": folder}
        flags |= {"checkpointing_steps": 1000, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
        launch_script(
            "train_unconditional.py", flags, args.accelerate_config, folder.with_suffix(".train.log"), running
        )
    flags = {
        "model": folder,
        "name": name,
        "dataset_name": args.dataset_name,
        **dataset_id,
        "num_images": args.num_images,
        "scheduler": args.scheduler,
        "num_inference_steps": args.num_inference_steps,
        "mixed_precision": args.mixed_precision,
        "seeds": seed,  # vary the sampling noise with the training: both are chance
        "feature_extractor": args.feature_extractor,
        "output_dir": folder / "evaluation",
        "overwrite": True,  # what a killed evaluation left
    }
    launch_script("evaluate.py", flags, args.accelerate_config, folder.with_suffix(".evaluate.log"), running)


def launch_script(script: str, flags: dict, accelerate_config: str, log: Path, running: set) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",  # so that the script's own error is the log's last line
        "--config_file",
        accelerate_config,
        "--main_process_port",
        "0",  # any that is free: of `--jobs` beside each other, each has its own
        SCRIPTS / script,
    ]
    for name, value in flags.items():
        command += [f"--{name}", value]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # else Ctrl-C would end a launcher before what it has launched
        )
    running.add(process)
    status = process.wait()
    running.remove(process)
    if status:
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{script} ended with status {status}, its log {log} with: {' '.join(tail)}")


def stop(launcher: subprocess.Popen) -> None:
    """End what it has launched, and so itself: a training stops after its step, with a checkpoint."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher.pid).children() or [launcher]:
            process.terminate()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, to stop the trainings
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    run_script(main, AblateArguments, __doc__)
