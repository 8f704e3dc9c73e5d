"""Speed, memory and start-up time of our networks and scripts, beside what people would use instead.

    python benchmarks/run.py

prints one table per section and saves it, with the figures behind it, in --output_dir; `--sections` selects some. The
timings alternate, window by window; data sets and the long trainings are measured once. It runs on a GPU if there is
one.
"""

import dataclasses
import importlib
import json
import math
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import describe, set_up  # this import makes train_scripts importable
from networks import CONFIGS, NETWORKS, PEER, installed, sizes
from summary import COMPARISONS, write_summary

from command_line import arg, run_script  # isort: skip
from launch import choose_precision  # isort: skip
from files import write_text  # isort: skip

SECTIONS = (
    "training_step",
    "training_script",
    "time_to_quality",
    "sampling",
    "memory",
    "startup",
    "growth",
    "operators",
)
LONG = ("time_to_quality",)
ALL_NETWORKS = (*NETWORKS, *sorted({path.stem for path in CONFIGS.glob("*.json")} - set(NETWORKS)))


def listed(default: list | None, help: str):
    return field(default_factory=lambda: default, metadata={"help": help})


@dataclass
class BenchmarkArguments:
    sections: list[str] = listed(
        [name for name in SECTIONS if name not in LONG],
        f"some of {', '.join(SECTIONS)}; all but {', '.join(LONG)} by default",
    )
    networks: list[str] = listed(list(NETWORKS), f"training_step: some of {', '.join(ALL_NETWORKS)}")
    resolutions: list[int] = listed(
        [16, 28], "height and width; training_script and operators use only the first, time_to_quality 16"
    )
    batch_sizes: list[int] | None = listed(
        None, "for training; by default 128, on a GPU also 1024 and 4096; only training_step uses more than the first"
    )
    precisions: list[str] | None = listed(
        None, "no, bf16 or both (the default if the hardware supports bf16); some sections use only the last"
    )
    compile: bool = arg(False, "training_step, training_script: also measure with torch.compile")
    windows: int = arg(5, "timed windows per arm (what is compared)")
    window_seconds: float = arg(2.0, "approximate length of a window")
    script_steps: int | None = arg(None, "steps of the training script; 60 by default, 300 on a GPU")
    data_sizes: list[int] = listed([10_000, 100_000, 1_000_000], "growth: numbers of images in the data set")
    processes: list[int] | None = listed(None, "growth: numbers of training processes; by default 1, and 2 if there"
                                         " are 2 GPUs or threads")  # fmt: skip
    epochs: list[float] = listed([2.5, 4.0, 5.0], "time_to_quality: budgets to train the default network with")
    quality_batch_size: int = arg(64, "time_to_quality: batch size of the default network's trainings; stock's is 64")
    quality_learning_rate: float = arg(2e-3, "time_to_quality: their peak learning rate; stock's is 2e-3")
    quality_optimizer: str = arg("adamw", "time_to_quality: their optimizer, adamw or muon; stock's is adamw")
    quality_seeds: list[int] = listed([0], "time_to_quality: seeds of trainings and of their samples")
    dataset_name: str = arg("zalando-datasets/fashion_mnist", "time_to_quality: Hub id or local folder")
    dataset_id: str | None = arg(None, "time_to_quality: Hub id of a local data set")
    num_images: int = arg(5000, "time_to_quality: number of samples to evaluate")
    work_dir: str = arg("runs/time-to-quality", "time_to_quality: folder for the training runs")
    device: str | None = arg(None, "cpu or cuda; by default the GPU if there is one")
    output_dir: str = arg("runs/benchmarks", "folder for the results")
    overwrite: bool = arg(False, "replace results of these sections there")

    def __post_init__(self):
        if self.device not in (None, "cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"`--device` is {self.device!r}; it must be cpu, or cuda where there is a GPU.")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device == "cuda"
        self.batch_sizes = self.batch_sizes or ([128, 1024, 4096] if on_gpu else [128])
        has_bf16 = choose_precision("auto", use_cpu=not on_gpu) == "bf16"
        self.precisions = self.precisions or (["no", "bf16"] if has_bf16 else ["no"])
        self.script_steps = self.script_steps or (300 if on_gpu else 60)
        self.processes = self.processes or [1, 2][: torch.cuda.device_count() if on_gpu else torch.get_num_threads()]
        for name, choices in {"sections": SECTIONS, "networks": ALL_NETWORKS, "precisions": ("no", "bf16")}.items():
            values = getattr(self, name)
            if not values or not set(values) <= set(choices):
                raise ValueError(f"`--{name}` is {values}; it must hold some of {', '.join(choices)}.")
        if not installed(self.networks):
            raise ValueError(f"`--networks` is {self.networks}, and {PEER} is not installed: choose others, too.")
        for name in ("batch_sizes", "data_sizes", "processes", "epochs"):
            values = getattr(self, name)
            if not values or not all(math.isfinite(value) and value > 0 for value in values):
                raise ValueError(f"`--{name}` is {values}; it must hold positive numbers.")
        if on_gpu and max(self.processes) > (gpus := torch.cuda.device_count()):
            raise ValueError(f"`--processes` is {self.processes}; it must not exceed the number of GPUs, {gpus}.")
        if not self.resolutions or not all(value >= 8 and value % 4 == 0 for value in self.resolutions):
            raise ValueError(f"`--resolutions` is {self.resolutions}; it must hold multiples of 4, from 8.")
        for name, least in (("windows", 2), ("script_steps", 30), ("num_images", 97)):
            if getattr(self, name) < least:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be at least {least}.")
        for name in ("quality_batch_size", "quality_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be a positive number.")
        if self.quality_optimizer not in ("adamw", "muon"):
            raise ValueError(f"`--quality_optimizer` is {self.quality_optimizer!r}; it must be adamw or muon.")
        if len(set(self.epochs)) < len(self.epochs):
            raise ValueError(f"`--epochs` is {self.epochs}; it must hold different numbers.")
        seeds = self.quality_seeds
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"`--quality_seeds` is {seeds}; it must hold different whole numbers from 0.")
        if not 0 <= self.window_seconds < math.inf:
            raise ValueError(f"`--window_seconds` is {self.window_seconds}; it must be a number of at least 0.")
        kept = [name for name in self.sections if Path(self.output_dir, f"{name}.json").is_file()]
        if kept and not self.overwrite:
            raise ValueError(
                f"`--output_dir` {self.output_dir} has results of {', '.join(kept)}: choose another, or pass"
                " `--overwrite`."
            )


def main(args: BenchmarkArguments) -> None:
    device, output_dir = torch.device(args.device), Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if PEER in args.networks and PEER not in installed(args.networks):
        print(f"Left out: {PEER}, which is not installed (see benchmarks/requirements.txt).")
    set_up()
    arguments = {key: value for key, value in dataclasses.asdict(args).items()
                 if key not in ("output_dir", "overwrite", "work_dir", "dataset_name")}  # fmt: skip
    failures = []
    for name in args.sections:
        section, start = importlib.import_module(name), time.perf_counter()
        try:
            measured = installed(args.networks) if name == "training_step" else section.NETWORKS
            networks = sizes(measured, args.resolutions)
            result = section.measure(args, device)
        except (RuntimeError, ValueError, OSError, ImportError) as error:  # the other sections go on
            traceback.print_exc()
            failures.append(f"{name}: {error}")
            continue
        record = {
            "machine": describe(device),
            "arguments": arguments,
            "networks": networks,
            "seconds": time.perf_counter() - start,
            **result,
        }
        write_text(output_dir / f"{name}.json", json.dumps(record, indent=2) + "\n")
        text = section.report(result)
        write_text(output_dir / f"{name}.md", text + "\n")
        print(f"\n{section.__doc__.splitlines()[0]}\n\n{text}", flush=True)
    if set(args.sections) & set(COMPARISONS):
        write_summary(output_dir)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    run_script(main, BenchmarkArguments, __doc__)
