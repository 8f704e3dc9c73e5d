"""What a run logs: metrics.jsonl in any case, and a tracker that goes on where the run does."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from arguments import TrainingArguments
from command_line import run_script
from conftest import SMALL_RUN, run_training
from small_runs import train_here

TOKEN = "hf_thisIsNotForAnyFile"
LOGGED = ["loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "grad_norm", "lr", "ema_decay"]


def needs(package: str):
    absent = importlib.util.find_spec(package) is None
    return pytest.param(package, marks=pytest.mark.skipif(absent, reason=f"{package} is not installed"))


@pytest.fixture
def train(tmp_path, monkeypatch, capfd, caplog):
    """Train in a folder up to a step, and see that the token is shown nowhere."""

    def run(logger: str, max_train_steps: int) -> None:
        flags = ["--max_train_steps", str(max_train_steps), "--logging_steps", "2", "--validation_steps", "3",
                 "--checkpointing_steps", "3", "--logger", logger, "--hub_token", TOKEN,
                 "--resume_from_checkpoint", "latest"]  # fmt: skip
        if logger == "tensorboard":
            monkeypatch.setattr(sys, "argv", ["train", *SMALL_RUN, "--output_dir", str(tmp_path / "run"), *flags])
            train_here(*sys.argv[1:])
            said = "".join(capfd.readouterr()) + caplog.text + str(sys.argv)
        else:  # processes beside the training's own; they stay on this machine, in this folder
            here = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
            result = run_training(tmp_path / "run", *flags, launcher=[sys.executable], cwd=tmp_path, **here)
            said = result.stdout + result.stderr
            assert result.returncode == 0, said
        assert "Samples: " in said and TOKEN not in said

    return run


def tensorboard_steps(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "logs" / "train_unconditional")).Reload()
    found = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return found | {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]}


def trackio_steps(folder: Path) -> dict[str, list[int]]:
    import sqlite3

    database = sqlite3.connect(folder / "trackio" / "train_unconditional.db")
    found = {}
    for step, metrics in database.execute("select step, metrics from metrics order by step"):
        for name in json.loads(metrics):
            found.setdefault(name, []).append(step)
    return found


@pytest.mark.parametrize("logger", [needs("tensorboard"), needs("trackio"), needs("wandb")])
def test_a_run_in_two_parts_logs_each_step_once_and_the_token_nowhere(logger, train, tmp_path):
    train(logger, 5)  # a checkpoint at 3, the last one at 5
    (tmp_path / "run" / "model_index.json").unlink()
    for path in (tmp_path / "run").glob("checkpoint-5/manifest.json"):
        path.unlink()  # so that steps 4 and 5 come again
    train(logger, 8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(list(row) == ["step", "epoch", *LOGGED] for row in rows)
    assert rows[-1]["epoch"] == 8 * 16 / 64
    speeds = [json.loads(line) for line in (tmp_path / "run" / "speed.jsonl").read_text().splitlines()]
    assert [speed["step"] for speed in speeds] == [2, 4, 5, 4, 6, 8]  # a repeated step's is kept
    assert all(speed["images_per_second"] > 0 for speed in speeds)
    if logger == "tensorboard":
        steps = tensorboard_steps(tmp_path)
        assert steps == dict.fromkeys([*LOGGED, "images_per_second"], [2, 4, 6, 8]) | {"samples": [3, 6, 8]}
    if logger == "trackio":
        steps = trackio_steps(tmp_path)
        assert {2, 4, 6, 8} <= set(steps["loss"]) and {3, 6, 8} <= set(steps["samples"])  # it takes nothing back
        assert {*LOGGED, "images_per_second"} <= set(steps)
    if logger == "wandb":
        assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
        assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) >= 3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_tracker_that_is_not_installed_is_asked_for_in_one_line_before_any_work(monkeypatch):
    absent = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("all trackers are installed")
    monkeypatch.setattr(sys, "argv", ["train_unconditional.py", "--logger", absent[0]])
    with pytest.raises(SystemExit) as stop:
        run_script(lambda args: pytest.fail("the work began"), TrainingArguments, "?")
    needed = f"`--logger {absent[0]}` needs a package: pip install {absent[0]}, or --logger none."
    assert stop.value.code == f"train_unconditional.py: {needed}"
