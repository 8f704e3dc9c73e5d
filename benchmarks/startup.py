"""6. Import and start: what a user waits for before anything happens, each time in a new process."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from networks import ROOT
from report import table, with_quartiles
from windows import ratio, time_arms

# what the package's modules take from others, and a network that is diffusers' own
NEEDED = "import einops.layers.torch; from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel"
MODEL = ROOT / "pretrained" / "ddpm-fashion-mnist-16"
CODE = {
    "import torch": "import torch",
    "import diffusers with what it needs": NEEDED,
    "import ddpm_diffusers": "import ddpm_diffusers",
    "and load the released model": f"import ddpm_diffusers; from diffusers import DiffusionPipeline;"
    f" DiffusionPipeline.from_pretrained({str(MODEL)!r})",
}
FIRST_STEP = "first step of the training script, cached data"


def measure(args, device: torch.device) -> dict:
    environment = {**os.environ, "ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: python(code) for name, code in CODE.items()}
        arms[FIRST_STEP] = first_step(Path(folder, "run"), environment)
        times = time_arms(arms, args.windows, 0.1)
    reference = times["import diffusers with what it needs"]
    rows = [{"arm": name, "seconds": time, "times_import": ratio(reference, time)} for name, time in times.items()]
    return {"rows": rows}


def python(code: str) -> Callable[[], None]:
    def start() -> None:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    return start


def first_step(output_dir: Path, environment: dict) -> Callable[[], None]:
    script = ROOT / "train_scripts" / "train_unconditional.py"
    flags = ["--dataset_name", "synthetic-fashion", "--max_train_samples", "2000", "--logging_steps", "1"]
    flags += ["--logger", "none", "--output_dir", str(output_dir)]
    log = output_dir / "speed.jsonl"

    def start() -> None:
        shutil.rmtree(output_dir, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, script, *flags], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not (log.is_file() and log.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"{script.name} ended with status {process.returncode} before its first step.")
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()

    return start


def report(result: dict) -> str:
    lines = [
        (row["arm"], with_quartiles(row["seconds"]), f"{row['times_import']['median']:.2f}") for row in result["rows"]
    ]
    return table(("", "seconds", "x import diffusers"), lines)
