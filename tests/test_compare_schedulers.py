"""The script that compares schedulers: it goes on after a kill, alone or in several processes."""

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import compare_schedulers as compare_schedulers_script
import datasets
import diffusers
import numpy as np
import pytest
import torch
from command_line import parse_arguments
from conftest import ROOT, reset_accelerate, torchrun
from PIL import Image
from tables import distances_table

from ddpm_diffusers import PixelDiffusionPipeline
from ddpm_diffusers.evaluation import Reference, load_feature_extractor
from ddpm_diffusers.evaluation.comparison import compare_schedulers
from ddpm_diffusers.sampling import to_pil
from ddpm_diffusers.synthetic_fashion import draw_garments


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "garments"
    images = to_pil(torch.from_numpy(draw_garments(range(100), resolution=8)[0]))
    splits = {"train": images[:60], "test": images[60:]}
    made = {split: datasets.Dataset.from_dict({"image": part}) for split, part in splits.items()}
    datasets.DatasetDict(made).save_to_disk(folder)
    return folder


@pytest.fixture
def script():
    """The script, to run here; what it changes for its process is undone."""
    reset_accelerate()
    verbosity = diffusers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield compare_schedulers_script
    diffusers.logging.set_verbosity(verbosity)


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_records_and_refuses_other_settings(
    tiny_pipe, extractor_folder, dataset_folder, tmp_path, script, capsys
):
    tiny_pipe.save_pretrained(tmp_path / "model")
    entries = ["ddim", "heun", ("unipc", {"timestep_spacing": "leading"})]
    flags = {
        "model": str(tmp_path / "model"),
        "dataset_name": str(dataset_folder),
        "feature_extractor": str(extractor_folder),
        "schedulers": ["ddim", "heun", "unipc:timestep_spacing=leading"],
        "evaluations": [3, 30],  # so that the kill comes in time
        "ddpm_steps": 200,
        "grid_evaluations": 5,
        "num_images": 30,
        "batch_size": 10,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    command = [sys.executable, str(ROOT / "train_scripts" / "compare_schedulers.py"), str(tmp_path / "flags.json")]
    out = tmp_path / "out"

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("samples/ddim-3.png")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    partial = json.loads((out / "comparison.json").read_text())["records"]
    assert 1 <= len(partial) < 7

    def run(*more: str) -> None:
        argv = [str(tmp_path / "flags.json"), *more]
        script.main(parse_arguments(script.ComparisonArguments, argv, script.__doc__))

    run()
    results = json.loads((out / "comparison.json").read_text())
    assert results["records"][: len(partial)] == partial
    extractor = load_feature_extractor(str(extractor_folder))
    reference = Reference.of_dataset(str(dataset_folder), extractor, resolution=8)
    expected = compare_schedulers(tiny_pipe, ["ddpm"], reference, evaluations=(200,), num_images=30, batch_size=10)
    expected += compare_schedulers(tiny_pipe, entries, reference, evaluations=(3, 30), num_images=30, batch_size=10)
    assert len(results["records"]) == len(expected) == 7
    for found, record in zip(results["records"], expected, strict=True):
        strip = np.concatenate(list(record.pop("images")[:8, 0].numpy()), axis=1)
        assert np.array_equal(np.asarray(Image.open(out / found.pop("samples"))), strip)
        assert found.pop("mixed_precision") == "no"
        for values in (found, record):
            assert values.pop("seconds_per_image") > 0
            values.pop("scheduler_config")
        assert found == json.loads(json.dumps(record))

    head, _, *rows = (out / "distances.md").read_text().splitlines()[:6]
    assert head == "| distance by evaluations | 3 | 30 | 200 |"  # Heun's 29 stand under 30
    places = [[bool(cell.strip()) for cell in row.strip("|").split("|")[1:]] for row in rows]
    assert places == [[False, False, True], *[[True, True, False]] * 3]

    text = (out / "comparison.md").read_text()
    assert "Fewest evaluations within 10 % of ddpm, 200 evaluations" in text
    assert "Best at 15" in capsys.readouterr().out
    assert text.count("\n| ") == 9 and "| unipc | timestep_spacing=leading | 30 | 30 | no |" in text
    assert str(tmp_path) not in text + (out / "comparison.json").read_text()
    assert Image.open(out / "grid.png").height == 60 * 4  # the yardstick and three schedulers
    assert min(Image.open(out / "distances.png").size) > 500
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "comparison.json", "comparison.md", "distances.md", "distances.png", "grid.png", "samples"
    }  # fmt: skip

    with torch.no_grad():
        next(tiny_pipe.unet.parameters()).mul_(2)
    tiny_pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds another comparison \(weights: .*; seeds: \[0\] there, \[1\] here\)"):
        run("--seeds", "1")
    assert json.loads((out / "comparison.json").read_text())["records"][0]["seeds"] == [0]

    (out / "samples" / "mine.png").write_bytes(b"")
    run("--seeds", "1", "--schedulers", "ddim", "--evaluations", "3", "--ddpm_steps", "0", "--overwrite")
    assert [record["seeds"] for record in json.loads((out / "comparison.json").read_text())["records"]] == [[1]]
    assert {path.name for path in (out / "samples").iterdir()} == {"mine.png", "ddim-3.png"}


def test_what_was_not_finite_in_another_precision_is_measured_and_then_no_longer_left_out(
    script, tiny_pipe, extractor_folder, dataset_folder, tmp_path
):
    tiny_pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "out" / "comparison.json"
    flags = ["--model", tmp_path / "model", "--dataset_name", dataset_folder, "--output_dir", out.parent,
             "--feature_extractor", extractor_folder, "--evaluations", "2", "--ddpm_steps", "3",
             "--num_images", "30", "--schedulers"]  # fmt: skip

    def compare(*schedulers: str) -> dict:
        argv = [str(flag) for flag in (*flags, *schedulers)]
        script.main(parse_arguments(script.ComparisonArguments, argv, script.__doc__))
        return json.loads(out.read_text())

    result = compare("ddim", "pndm")
    [yardstick, record], [too_few] = result["records"], result["left_out"]
    assert too_few["name"] == "pndm"
    for precision in ("no", "fp16"):  # this one, and another
        failed = {**record, "left_out": "images with NaN", "mixed_precision": precision}
        out.write_text(json.dumps({**result, "records": [yardstick], "left_out": [too_few, failed]}))
        again = compare("ddim")
        if precision == "no":
            assert again["records"] == [yardstick] and again["left_out"] == [too_few, failed]
        else:
            assert again["left_out"] == [too_few] and again["records"][1]["figures"] == record["figures"]


def test_of_the_default_list_what_cannot_be_used_is_left_out_and_what_is_named_is_an_error(
    tiny_unet, extractor_folder, dataset_folder, tmp_path, script
):
    predicts_samples = diffusers.DDPMScheduler(100, prediction_type="sample", timestep_spacing="trailing")
    PixelDiffusionPipeline(tiny_unet, predicts_samples).save_pretrained(tmp_path / "model")

    def run(*more: str) -> None:
        flags = ["--model", str(tmp_path / "model"), "--dataset_name", str(dataset_folder), "--num_images", "20",
                 "--feature_extractor", str(extractor_folder), "--ddpm_steps", "0", "--evaluations", "2",
                 "--grid_evaluations", "2", "--output_dir", str(tmp_path / "out"), *more]  # fmt: skip
        reset_accelerate()
        script.main(parse_arguments(script.ComparisonArguments, flags, script.__doc__))

    with pytest.raises(ValueError, match="'pndm' cannot sample"):
        run("--schedulers", "pndm")
    run()
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "pndm" in [record["name"] for record in result["left_out"]]
    assert "ddim" in [record["name"] for record in result["records"]]


def test_numbers_of_evaluations_share_a_column_unless_one_scheduler_has_both():
    def table(**evaluations: tuple[int, ...]) -> list[list[str]]:
        figures = {"train": {"frechet_distance": {"mean": 0.5}}}
        records = [{"name": name, "options": {}, "evaluations": n, "figures": figures}
                   for name, numbers in evaluations.items() for n in numbers]  # fmt: skip
        lines = distances_table(records).splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]

    first = "distance by evaluations"
    assert table(ddim=(10,), heun=(9,)) == [[first, "10"], ["ddim", "0.500"], ["heun", "0.500"]]
    assert table(ddim=(9, 10), heun=(9,)) == [[first, "9", "10"], ["ddim", "0.500", "0.500"], ["heun", "0.500", ""]]
    assert table(ddim=(8, 10), heun=(9,))[0] == [first, "8", "10"]


@pytest.mark.slow
def test_two_processes_compare_as_one_does(tiny_pipe, extractor_folder, dataset_folder, tmp_path, script):
    tiny_pipe.save_pretrained(tmp_path / "model")
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ["--model", tmp_path / "model", "--dataset_name", dataset_folder, "--output_dir", out,
                 "--feature_extractor", extractor_folder, "--schedulers", "ddim", "heun", "--evaluations", "3",
                 "--ddpm_steps", "10", "--num_images", "30", "--batch_size", "10"]  # fmt: skip
        flags = [str(flag) for flag in flags]
        if processes == 1:
            script.main(parse_arguments(script.ComparisonArguments, flags, script.__doc__))
        else:
            command = [*torchrun(processes), str(ROOT / "train_scripts" / "compare_schedulers.py"), *flags]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr
        result = json.loads((out / "comparison.json").read_text())
        assert result["settings"].pop("num_processes") == processes
        assert all(record.pop("seconds_per_image") > 0 for record in result["records"])
        strips = [(out / record["samples"]).read_bytes() for record in result["records"]]
        results.append((result, strips))
    assert results[0] == results[1] and len(results[0][1]) == 3
