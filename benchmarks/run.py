"""Speed, memory and start of our networks and scripts, side by side with what people would use instead.

    python benchmarks/run.py

prints a table a section and keeps it, with the figures it is made of, in --output_dir; a section at a time by
`--sections training_step`. The arms of a section take turns, window by window. On a GPU if there is one.
"""

import dataclasses
import importlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import describe
from networks import NETWORKS, PEER, ROOT, installed  # it finds train_scripts

from arguments import arg, parse_arguments  # isort: skip
from run_folder import write_text  # isort: skip

SECTIONS = ("training_step", "training_script", "sampling", "memory", "startup", "growth", "time_to_quality")
LONG = ("time_to_quality",)


@dataclass
class BenchmarkArguments:
    sections: list[str] = field(
        default_factory=lambda: [name for name in SECTIONS if name not in LONG],
        metadata={"help": f"of {', '.join(SECTIONS)}; all but {', '.join(LONG)} by default"},
    )
    networks: list[str] = field(default_factory=lambda: list(NETWORKS), metadata={"help": "of " + ", ".join(NETWORKS)})
    resolutions: list[int] = field(
        default_factory=lambda: [16, 28], metadata={"help": "height and width of the images"}
    )
    batch_sizes: list[int] | None = field(
        default=None, metadata={"help": "of training; 128, and on a GPU 1024 and 4096, by default"}
    )
    precisions: list[str] = field(default_factory=lambda: ["no", "bf16"], metadata={"help": "no, bf16; the last serves"
                                  " the sections that measure one"})  # fmt: skip
    compile: bool = arg(False, "measure the networks under torch.compile, too (training_step)")
    windows: int = arg(5, "timed windows an arm")
    window_seconds: float = arg(2.0, "about how long each is")
    script_steps: int = arg(60, "steps of the scripts (training_script, growth)")
    data_sizes: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000], metadata={"help": "images in a data set (growth)"}
    )
    processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "of the training script (growth)"})
    # time_to_quality
    epochs: list[float] = field(default_factory=lambda: [2.5, 4.0, 5.0], metadata={"help": "budgets of the default"})
    dataset_name: str = arg("zalando-datasets/fashion_mnist", "Hub name or local folder")
    dataset_id: str | None = arg(None, "what a local data set is called on the Hub, for the records")
    num_images: int = arg(5000, "samples that are judged")
    # output
    device: str | None = arg(None, "cpu or cuda; the GPU if there is one")
    output_dir: str = arg(str(ROOT / "benchmarks" / "results"), "folder of the results")

    def __post_init__(self):
        if self.batch_sizes is None:
            on_gpu = self.device == "cuda" or (self.device is None and torch.cuda.is_available())
            self.batch_sizes = [128, 1024, 4096] if on_gpu else [128]
        for name, choices in {"sections": SECTIONS, "networks": NETWORKS, "precisions": ("no", "bf16")}.items():
            values = getattr(self, name)
            if not values or not set(values) <= set(choices):
                raise ValueError(f"`--{name}` is {values}; it must hold some of {', '.join(choices)}.")
        for name in ("resolutions", "batch_sizes", "data_sizes", "processes", "epochs"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must hold positive numbers.")
        for name, least in (("windows", 2), ("script_steps", 30), ("num_images", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be at least {least}.")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"`--device` is {self.device!r}; it must be cpu or cuda.")


def main(args: BenchmarkArguments) -> None:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if PEER in args.networks and PEER not in installed(args.networks):
        print(f"Left out: {PEER} is not installed (benchmarks/requirements.txt says how).")
    facts = describe(device)
    for name in args.sections:
        section, start = importlib.import_module(name), time.perf_counter()
        result = section.measure(args, device)
        text = section.report(result)
        record = {
            "machine": facts,
            "arguments": {key: value for key, value in dataclasses.asdict(args).items()
                          if key not in ("output_dir", "dataset_name")},
            "seconds": time.perf_counter() - start,
            **result,
        }  # fmt: skip
        write_text(Path(args.output_dir, f"{name}.json"), json.dumps(record, indent=2) + "\n")
        write_text(Path(args.output_dir, f"{name}.md"), text + "\n")
        print(f"\n{section.__doc__.splitlines()[0]}\n\n{text}", flush=True)


if __name__ == "__main__":
    main(parse_arguments(BenchmarkArguments, sys.argv[1:], __doc__))
