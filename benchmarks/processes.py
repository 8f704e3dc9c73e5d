"""Run scripts in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def flags(values: dict) -> list[str]:
    return [str(text) for name, value in values.items() for text in (f"--{name}", value)]


def run(command: list, device: torch.device, **environment: str) -> str:
    """The standard output of `python command`; raises RuntimeError with the end of its stderr if it fails."""
    on_cpu = {"ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, **on_cpu, **environment},
    )
    if done.returncode:
        name = next((Path(part).name for part in command if str(part).endswith(".py")), command[0])
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout
