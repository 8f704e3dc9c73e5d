"""6. Import and start: what a user waits for before anything happens, each time in a new process."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from networks import ROOT
from processes import environment_for, flags, run
from report import table, with_quartiles
from windows import quartiles, ratio, time_arms

NETWORKS = ()  # none is measured
DIFFUSERS = "import diffusers with what it needs"  # what our modules import from it, and its own network
LOAD = f"DiffusionPipeline.from_pretrained({str(ROOT / 'pretrained' / 'ddpm-fashion-mnist-28')!r})"
CODE = {
    "import torch": "import torch",
    DIFFUSERS: "import einops.layers.torch; from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel",
    "import ddpm_diffusers": "import ddpm_diffusers",
    "and load the released model": f"import ddpm_diffusers; from diffusers import DiffusionPipeline; {LOAD}",
}
LOAD_ALONE = "import time, ddpm_diffusers; from diffusers import DiffusionPipeline; start = time.perf_counter();"
LOAD_ALONE += f" {LOAD}; print(time.perf_counter() - start)"


def measure(args, device: torch.device) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        # without the interpreter's own end, as the script's first step is timed
        end = "; import os; os._exit(0)"
        arms = {name: lambda code=code: run(["-c", code + end], device) for name, code in CODE.items()}
        arms["first step of the training script, cached data"] = first_step(Path(folder), device)
        times = time_arms(arms, args.windows, window_seconds=0)  # one start per window
        loads = [float(run(["-c", LOAD_ALONE], device).splitlines()[-1]) for _ in range(args.windows)]
    imports = times[DIFFUSERS]["windows"]
    rows = [
        {"arm": name, "seconds": result, "times_import": ratio(result["windows"], imports)}
        for name, result in times.items()
    ]
    alone = {"windows": loads, **quartiles(loads)}  # after the rounds, so not compared with their imports
    rows.append({"arm": "`from_pretrained` of the released model alone", "seconds": alone, "times_import": None})
    return {"rows": rows}


def first_step(folder: Path, device: torch.device) -> Callable[[], None]:
    """A call that runs the script until its first line in speed.jsonl; the first call draws the images."""
    script, errors = ROOT / "train_scripts" / "train_unconditional.py", folder / "errors"
    values = {"dataset_name": "synthetic-fashion", "max_train_samples": 2000, "cache_dir": folder / "cache"}
    values |= {"logging_steps": 1, "logger": "none", "output_dir": folder / "run"}
    command = [sys.executable, str(script), *flags(values)]

    def start() -> None:
        shutil.rmtree(folder / "run", ignore_errors=True)
        log = folder / "run" / "speed.jsonl"
        with open(errors, "w") as output:
            process = subprocess.Popen(command, env=environment_for(device), stdout=output, stderr=output)
        try:
            while not (log.is_file() and log.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"{script.name} ended before its first step: {errors.read_text()[-2000:]}")
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()

    return start


def report(result: dict) -> str:
    lines = [
        (row["arm"], with_quartiles(row["seconds"]), with_quartiles(row["times_import"])) for row in result["rows"]
    ]
    return table(("", "seconds", "x import diffusers"), lines)
