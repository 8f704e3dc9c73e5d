"""Kills a training with SIGKILL at random moments, resumes it by the same command, and compares with one left alone.

    python tests/kill_and_resume.py --kills 10

Every other kill waits until a checkpoint is being written. Ends with status 1 if a bit differs in the weights, their
average, the optimizer state, the metrics, the samples or the saved pipeline, or if a checkpoint was found damaged.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
LONG = 300  # seconds, for a training that takes half a minute
UNET = {"block_out_channels": [8, 16], "norm_num_groups": 4, "block_norm_num_groups": 4}
FLAGS = ["--dataset_name", "synthetic-fashion", "--max_train_samples", "330", "--resolution", "8",
         "--unet_config", json.dumps(UNET), "--train_batch_size", "16", "--gradient_accumulation_steps", "2",
         "--dataloader_num_workers", "1", "--learning_rate", "3e-3",
         "--logging_steps", "4", "--validation_steps", "10", "--checkpointing_steps", "3",
         "--checkpoints_total_limit", "2", "--eval_batch_size", "4", "--ddpm_num_inference_steps", "2",
         "--logger", "none", "--resume_from_checkpoint", "latest"]  # fmt: skip


def start(output_dir: Path, processes: int, steps: int = 300) -> subprocess.Popen:
    """The training, in a process group of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = str(ROOT / "train_scripts" / "train_unconditional.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, script, *FLAGS, "--max_train_steps", str(steps), "--output_dir", str(output_dir)]
    with open(said(output_dir), "a") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def said(output_dir: Path) -> Path:
    """What the training and those before it in this folder printed."""
    return output_dir.with_suffix(".log")


def kill_at_random(output_dir: Path, processes: int, in_a_checkpoint: bool, rng: random.Random) -> list[str] | None:
    """Start the training and kill it; returns the half-written folders, or None if it came to its end before."""
    training = start(output_dir, processes)
    # most moments fall into the steps, after a few checkpoints of this start, and some into the start itself
    begun = set(output_dir.glob("checkpoint-*"))
    checkpoints = rng.randrange(5)
    window = 0.3 if checkpoints else 5  # seconds
    while training.poll() is None and checkpoints:
        found = set(output_dir.glob("checkpoint-*"))
        checkpoints -= bool(found - begun)
        begun |= found
        time.sleep(0.0005)
    moment = time.monotonic() + rng.uniform(0, window)
    while training.poll() is None and time.monotonic() < moment:
        time.sleep(0.0005)
    while training.poll() is None and in_a_checkpoint and not list(output_dir.glob(".checkpoint-*")):
        time.sleep(0.0002)
    if training.poll() is not None:
        return None
    everyone = [training, *psutil.Process(training.pid).children(recursive=True)]  # a launcher's are in other groups
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in everyone:
        process.wait()
    return [path.name for path in output_dir.glob(".checkpoint-*")]


def results(output_dir: Path) -> dict[str, bytes]:
    """All that a run leaves, but what depends on the clock, the folder's name or the number of starts."""
    files = [path for path in output_dir.rglob("*") if path.is_file() and path.name not in ("speed.jsonl", "run.json")]
    found = {str(path.relative_to(output_dir)): path.read_bytes() for path in files}
    for name in found:
        if name.endswith("training_state.json"):
            state = json.loads(found[name])
            del state["arguments"]["output_dir"]
            found[name] = json.dumps(state).encode()
    return {name: data for name, data in found.items() if not name.endswith("manifest.json") and name != "README.md"}


def kill_and_compare(folder: Path, kills: int, processes: int, seed: int) -> list[str]:
    """What went wrong, or nothing."""
    rng = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    if start(alone, processes).wait(LONG):
        return [f"the run left alone failed: {said(alone).read_text()}"]
    kill, in_checkpoints = 0, 0
    while kill < kills or not in_checkpoints:  # one may come a moment late
        kill += 1
        writing = kill_at_random(killed, processes, kill % 2 == 1, rng)
        if writing is None:
            return [f"the training was over after {kill - 1} of {kills} kills: {said(killed).read_text()}"]
        in_checkpoints += bool(writing)
        there = sorted(int(path.name.removeprefix("checkpoint-")) for path in killed.glob("checkpoint-*"))
        print(f"kill {kill}: checkpoints {there}, in the middle of {writing or 'no checkpoint'}", flush=True)
    if start(killed, processes).wait(LONG):
        return [f"the last start failed: {said(killed).read_text()}"]
    print(f"{kill} kills, {in_checkpoints} of them while a checkpoint was written or deleted")
    wrong = [line for line in said(killed).read_text().splitlines() if "damaged" in line]
    first, second = results(alone), results(killed)
    wrong += [f"only in one of the runs: {name}" for name in sorted(first.keys() ^ second.keys())]
    wrong += [f"differs: {name}" for name in sorted(first.keys() & second.keys()) if first[name] != second[name]]
    print(f"{len(first)} files compared, {sum(map(len, first.values())):,} bytes")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        problems = kill_and_compare(Path(temporary), arguments.kills, arguments.processes, arguments.seed)
    print("\n".join(problems) or "No bit differs.")
    sys.exit(bool(problems))
