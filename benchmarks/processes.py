"""Run scripts in processes of their own."""

import json
import os
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch
from networks import ROOT

LOGGING_STEPS = {"cpu": 10, "cuda": 20}  # of the training script, by default 20; the first so many are not timed


def flags(values: dict) -> list[str]:
    return [str(text) for name, value in values.items() for text in (f"--{name}", value)]


def run(command: list, device: torch.device, **environment: str) -> str:
    """The standard output of `python command`; raises RuntimeError with the end of its stderr if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment_for(device) | environment,
    )
    if done.returncode:
        name = next((Path(part).name for part in command if str(part).endswith(".py")), command[0])
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def environment_for(device: torch.device) -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}


def speed_of_training(
    values: dict, output_dir: Path, device: torch.device, launcher: tuple = (), **environment: str
) -> float:
    """Images per second of `train_unconditional.py`, from its first line of speed.jsonl to the last."""
    values = {
        **values,
        "logging_steps": LOGGING_STEPS[device.type],
        "eval_batch_size": 1,
        "ddpm_num_inference_steps": 1,
        "output_dir": output_dir,
    }
    run([*launcher, ROOT / "train_scripts" / "train_unconditional.py", *flags(values)], device, **environment)
    lines = [json.loads(line) for line in (output_dir / "speed.jsonl").read_text().splitlines()]
    steps = [after["step"] - before["step"] for before, after in pairwise(lines)]
    return statistics.harmonic_mean([line["images_per_second"] for line in lines[1:]], steps)
