"""The benchmarks' clockwork, a section of them in a real process, and clear errors."""

import ctypes
import importlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import memory
import pytest
import summary
import time_to_quality
import torch
import training_step
import windows
from conftest import ROOT
from datasets import DatasetDict, load_from_disk
from networks import make_network
from run import SECTIONS, BenchmarkArguments


def test_a_ratio_is_of_paired_windows():
    assert windows.ratio([2.0, 4.0, 30.0], [1.0, 2.0, 10.0]) == {"median": 2.0, "quartiles": [2.0, 2.5]}


def test_each_round_starts_with_another_arm():
    assert windows.turns(["a", "b", "c"], 4) == list("abcbcacababc")


def test_arms_are_timed_in_turn(monkeypatch):
    called, seconds = [], {"a": 2, "b": 8}
    arms = {name: lambda name=name: called.append(name) for name in seconds}
    clock = SimpleNamespace(perf_counter=lambda: sum(seconds[name] for name in called))
    monkeypatch.setattr(windows, "time", clock)
    results = windows.time_arms(arms, windows=3, window_seconds=7)
    assert called == [*"abab", *"aaaab", *"baaaa", *"aaaab"]
    assert results["a"] == {"first_call": 2, "calls": 4, "windows": [2, 2, 2], "median": 2, "quartiles": [2, 2]}
    assert results["b"] == {"first_call": 8, "calls": 1, "windows": [8, 8, 8], "median": 8, "quartiles": [8, 8]}


def test_a_graph_is_captured_before_its_windows(monkeypatch):
    called = []
    monkeypatch.setattr(windows, "time", SimpleNamespace(perf_counter=lambda: len(called)))
    result = windows.time_arms({"a": lambda: called.append("a")}, windows=2, window_seconds=1, calls_before=3)["a"]
    assert len(called) == 1 + 3 + 1 + 2 and (result["calls"], result["windows"]) == (1, [1, 1])


@pytest.mark.parametrize("error, reason", [
    (torch.OutOfMemoryError("CUDA out of memory"), "all networks at once need more than the GPU's memory"),
    (RuntimeError("no such kernel\nat line 1"), "no such kernel"),
])  # fmt: skip
def test_a_setting_that_fails_is_left_out_with_the_reason(monkeypatch, capsys, error, reason):
    def fail_at_16(args, device, settings, peak):
        if settings["resolution"] == 16:
            raise error
        return measure_setting(args, device, settings, peak)

    measure_setting = training_step.measure_setting
    monkeypatch.setattr(training_step, "measure_setting", fail_at_16)
    args = SimpleNamespace(
        networks=["default"], resolutions=[8, 16], batch_sizes=[2], precisions=["no"], windows=2, window_seconds=0,
        compile=False,
    )  # fmt: skip
    result = training_step.measure(args, torch.device("cpu"))
    assert f"Left out: resolution 16, batch size 2, precision no, since {reason}." in training_step.report(result)
    assert "**resolution 8, batch size 2, precision float32**" in capsys.readouterr().out  # at once
    args.resolutions = [16]
    with pytest.raises(RuntimeError, match=f"No setting could be measured: {reason}"):
        training_step.measure(args, torch.device("cpu"))


def test_the_peak_of_memory_is_seen():
    if platform.libc_ver()[0] == "glibc":  # memory that another test had freed and glibc kept would not count
        ctypes.CDLL(None).malloc_trim(0)
    with memory.Peak(torch.device("cpu")) as peak:
        block = torch.ones(2**26)  # 256 MiB
        deadline = time.monotonic() + 10
        while peak.bytes < 2**27 and time.monotonic() < deadline:
            time.sleep(0.01)
        del block
    assert 2**27 < peak.bytes < 2**29


@pytest.mark.slow
def test_a_section_writes_its_table_and_what_it_is_made_of(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--sections", "training_step", "memory", "operators",
               "--networks", "default", "stock", "--resolutions", "8", "--batch_sizes", "2", "--precisions", "no",
               "--windows", "2", "--window_seconds", "0", "--device", "cpu",
               "--output_dir", tmp_path / "a" / "b"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "a" / "b" / "training_step.json").read_text())
    assert [row["network"] for row in record["rows"]] == ["default", "stock"]
    default, stock = (row["seconds_per_step"]["windows"] for row in record["rows"])
    assert record["rows"][0]["times_reference"] == windows.ratio(stock, default)
    assert record["machine"]["versions"]["torch"]
    for row in record["rows"]:
        of_network = record["networks"][row["network"]]
        assert of_network == {
            "parameters": row["parameters"],
            "operations_per_image": {"8": row["operations_per_image"]},
        }
    assert (tmp_path / "a" / "b" / "training_step.md").read_text().strip() in done.stdout
    assert "| training step, 8x8, batch 2, float32, images/s |" in (tmp_path / "a" / "b" / "summary.md").read_text()
    memory = json.loads((tmp_path / "a" / "b" / "memory.json").read_text())
    rows = memory["rows"]
    assert {row["network"] for row in rows} == set(memory["networks"]) == {"default", "guide", "stock"}
    for row in rows:
        if row["kind"] == "training":  # gradients, the optimizer's two averages and EMA, 4 bytes each
            assert min(row["bytes"]["windows"]) > 8 * memory["networks"][row["network"]]["parameters"], row
    rows = json.loads((tmp_path / "a" / "b" / "operators.json").read_text())["rows"]
    convolutions = [row["calls"] for row in rows if row["operator"] == "aten::convolution"]
    networks = [make_network(name, 8) for name in ("default", "stock")]
    assert convolutions == [sum(isinstance(layer, torch.nn.Conv2d) for layer in net.modules()) for net in networks]


@pytest.mark.slow
def test_the_script_is_measured_beside_its_step_and_the_recipe(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--sections", "training_script", "--resolutions", "8",
               "--batch_sizes", "2", "--precisions", "no", "--windows", "2", "--script_steps", "30", "--device", "cpu",
               "--output_dir", tmp_path]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "training_script.json").read_text())
    speeds = {row["arm"]: row["images_per_second"]["windows"] for row in record["rows"]}
    recipe = "diffusers' recipe, stock"
    scripts = ["bare step, default", "script, default", "bare step, stock", "script, stock"]
    assert list(speeds) == [*scripts, recipe] and all(min(of_arm) > 0 for of_arm in speeds.values())
    ours = record["rows"][1]
    assert ours["of_bare_step"] == windows.ratio(speeds["script, default"], speeds["bare step, default"])
    assert ours["times_recipe"] == windows.ratio(speeds["script, default"], speeds[recipe])
    assert "the first 10 not timed, precision float32" in (tmp_path / "training_script.md").read_text()


@pytest.mark.parametrize("arguments, message", [
    ({"sections": ["speed"]}, "`--sections` is .* training_step, training_script"),
    ({"networks": ["default", "u-net"]}, "`--networks` is .*default, guide"),
    ({"precisions": ["fp8"]}, "`--precisions` is .* no, bf16"),
    ({"resolutions": [15]}, "`--resolutions` is .*multiples of 4, from 8"),
    ({"resolutions": [4]}, "`--resolutions` is .*multiples of 4, from 8"),
    ({"batch_sizes": [0]}, "`--batch_sizes` is .*positive"),
    ({"epochs": [float("nan")]}, "`--epochs` is .*positive"),
    ({"windows": 1}, "`--windows` is 1; it must be at least 2"),
    ({"window_seconds": float("nan")}, "`--window_seconds` is nan"),
    ({"quality_batch_size": 0}, "`--quality_batch_size` is 0; it must be a positive number"),
    ({"quality_learning_rate": float("nan")}, "`--quality_learning_rate` is nan"),
    ({"quality_seeds": [1, 1]}, "`--quality_seeds` is .* different whole numbers"),
    ({"quality_seeds": [-1]}, "`--quality_seeds` is .* different whole numbers from 0"),
    ({"epochs": [3.0, 3.0]}, "`--epochs` is .* different numbers"),
    ({"num_images": 10}, "`--num_images` is 10; it must be at least 97"),
    ({"device": "tpu"}, "`--device` is 'tpu'; it must be cpu, or cuda"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkArguments(**arguments)


def test_results_are_not_replaced_unasked(tmp_path):
    (tmp_path / "memory.json").write_text("{}")
    for refused in (["memory"], ["startup", "memory"]):
        with pytest.raises(ValueError, match="has results of memory: choose another, or pass `--overwrite`"):
            BenchmarkArguments(sections=refused, output_dir=str(tmp_path))
    BenchmarkArguments(sections=["startup"], output_dir=str(tmp_path))
    BenchmarkArguments(sections=["memory"], output_dir=str(tmp_path), overwrite=True)


def test_the_summary_is_of_the_records_that_are_kept():
    results = ROOT / "benchmarks" / "results"
    assert summary.summary(results) + "\n" == (results / "summary.md").read_text("utf-8")
    for record in results.rglob("*.json"):
        if record.stem in SECTIONS:
            report = importlib.import_module(record.stem).report(json.loads(record.read_text("utf-8")))
            assert report + "\n" == record.with_suffix(".md").read_text("utf-8"), record


@pytest.mark.parametrize("distances, line", [
    (([0.9], [1.1], [0.8]), ("30", "0.30", "better")),  # 10 seconds an epoch; 1 was luck
    (([0.9], [0.8], [0.7]), ("10", "0.10", "better")),
    (([1.3], [1.2], [1.1]), ("not reached", "", "**worse**")),
    # with the second seed stock's distance is 2, and all trainings take twice as long
    (([0.9, 1.9], [0.9, 2.1], [0.8, 1.8]), ("45", "0.30 (0.30 to 0.30)", "better")),
    (([0.9, 1.9], [0.8, 1.8], [0.7, 2.1]), ("not reached", "", "**worse**")),
])  # fmt: skip
def test_quality_is_reached_where_more_training_and_each_seed_reach_it_too(distances, line):
    def row(network, epochs, seconds, seed, distance):
        times = {"seconds": seconds * (1 + seed), "seconds_of_steps": 1}
        budget = {"network": network, "epochs": epochs, "train_batch_size": 64, "learning_rate": 2e-3}
        return budget | times | {"seed": seed, "distance": distance}

    rows = []
    for seed, of_budgets in enumerate(zip(*distances, strict=True)):
        rows.append(row("stock", 5, 100, seed, 1.0 + seed))
        rows += [row("default", n, 10 * n, seed, distance) for n, distance in enumerate(of_budgets, 1)]
    [(_, ours, _, _, ratio, outcome)] = summary.times_to_quality({"rows": rows})
    assert (ours, ratio, outcome) == line
    closer = [sum(d <= 1 + seed for seed, d in enumerate(of_seeds)) for of_seeds in distances]
    reported = time_to_quality.report({"rows": rows, "num_images": 100}).splitlines()[-3:]
    words = ["no", "yes"] if len(distances[0]) == 1 else ["0 of 2", "1 of 2", "2 of 2"]
    assert [text.split(" | ")[-1] for text in reported] == [f"{words[n]} |" for n in closer]
    spread = "" if len(distances[0]) == 1 else " ± 0.00"
    assert [text.split(" | ")[-3] for text in reported] == [f"0.{n}0{spread}" for n in (1, 2, 3)]


@pytest.mark.parametrize("times, more_is_better, outcome", [
    ([1.5], True, "better"), ([1.5], False, "**worse**"), ([0.9], False, "better"), ([0.9], True, "**worse**"),
    ([1.01], True, "alike"), ([0.9, 1.3, 1.5], True, "unclear"), ([0.7, 0.8, 0.9], True, "**worse**"),
    ([1.01, 1.015, 1.2], True, "alike"),
])  # fmt: skip
def test_losses_are_marked(times, more_is_better, outcome):
    assert summary.compared("speed", 3, "peer", 2, times, more_is_better)[-1] == outcome


@pytest.mark.slow
def test_time_to_quality_trains_each_once_and_takes_none_of_other_settings(garments, tmp_path):
    def measure(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "benchmarks" / "run.py", "--sections", "time_to_quality", "--overwrite",
                   "--dataset_name", garments, "--dataset_id", "user/garments", "--precisions", "no", "--epochs", "1",
                   "--num_images", "100", "--quality_seeds", "0", "1", "--work_dir", tmp_path / "work",
                   "--output_dir", tmp_path / "out", "--device", "cpu", *flags]  # fmt: skip
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    def weights() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/unet/*.safetensors")}

    first = measure()
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "out" / "time_to_quality.json").read_text())["rows"]
    assert [(row["network"], row["max_train_steps"]) for row in rows] == [("stock", 23), ("default", 5)] * 2
    assert [row["seed"] for row in rows] == [0, 0, 1, 1] and len({row["distance"] for row in rows}) == 4
    assert all(row["seconds"] > row["seconds_of_steps"] > 0 and row["distance"] > 0 for row in rows)
    trained = weights()
    of_last = tmp_path / "work" / "default-5x64-0.002-adamw-seed-1"
    (of_last / "time_to_quality.json").unlink()  # as if cut off: judged again
    again = measure()
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "out" / "time_to_quality.json").read_text())["rows"] == rows
    sets = load_from_disk(garments)  # as many images, in another order
    DatasetDict(train=sets["train"].select(range(299, -1, -1)), test=sets["test"]).save_to_disk(tmp_path / "others")
    other = measure("--dataset_name", tmp_path / "others")
    assert other.returncode != 0 and "give another `--work_dir`" in other.stderr
    assert weights() == trained and len(trained) == 4
