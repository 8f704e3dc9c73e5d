"""Schedulers compared at equal numbers of evaluations: the records, the pictures, and the script that is stopped."""

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
from transformers import ResNetConfig, ResNetModel

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline
from ddpm_diffusers.evaluation import Reference, load_feature_extractor
from ddpm_diffusers.evaluation.comparison import best_settings, compare_schedulers, label_of, most_steps, plan
from ddpm_diffusers.evaluation.plots import plot_distances, plot_rows, plot_spectra
from ddpm_diffusers.schedulers import count_evaluations, make_scheduler
from ddpm_diffusers.synthetic_fashion import draw_garments

# with the noise of 1,000, for which some schedulers take long to make
HUNDRED_TIMESTEPS = diffusers.DDPMScheduler(100, beta_end=0.2, timestep_spacing="trailing")


def garments(first: int, count: int) -> np.ndarray:
    return draw_garments(range(first, first + count), resolution=8)[0]  # (N, 1, 8, 8)


@pytest.fixture(scope="module")
def extractor_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extractor")
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], image_size=8)
    ResNetModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(extractor_folder) -> Reference:
    extractor = load_feature_extractor(str(extractor_folder))
    return Reference(torch.from_numpy(garments(0, 60)), torch.from_numpy(garments(60, 40)), extractor)


@pytest.fixture
def calls(tiny_unet) -> list[torch.Tensor]:
    """What the network was given, call by call."""
    inputs = []
    tiny_unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    return inputs


@pytest.mark.filterwarnings("ignore:Should have t")
def test_every_scheduler_starts_from_the_same_noise_and_takes_the_evaluations_of_its_record(tiny_unet, calls, caplog):
    pipe = PixelDiffusionPipeline(tiny_unet, HUNDRED_TIMESTEPS)
    records = compare_schedulers(pipe, list(SCHEDULERS), evaluations=(4, 13), num_images=3)
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    del calls[:1]  # to warm up
    for record in records:
        started = [calls.pop(0) for _ in range(record["evaluations"])][0]
        assert torch.allclose(started, noise, atol=0.01), label_of(record)
        assert record["seconds_per_image"] > 0 and record["images"].shape == (3, 1, 8, 8)
        assert "figures" not in record
    assert not calls
    found = {name: [record["evaluations"] for record in records if record["name"] == name] for name in SCHEDULERS}
    second_order = {"heun", "kdpm2", "kdpm2_ancestral", "dpmsolver_sde"}
    assert found == {name: [3, 13] if name in second_order else [4, 13] for name in found} | {"pndm": [13]}
    [told] = [message for message in caplog.messages if "Left out" in message]
    assert "pndm" in told  # its warm-up takes 13


@pytest.mark.parametrize("name", ["ddim", "heun", "pndm", "kdpm2_ancestral", "dpmsolver++_singlestep"])
def test_one_step_more_would_take_too_many_evaluations(name):
    settings, _ = plan(HUNDRED_TIMESTEPS, [name], range(1, 40))
    scheduler = make_scheduler(name, HUNDRED_TIMESTEPS)
    for setting in settings:
        assert setting.evaluations == count_evaluations(scheduler, setting.num_inference_steps)
    steps = [setting.num_inference_steps for setting in settings]
    assert steps == list(range(steps[0], steps[-1] + 1))  # none is passed over
    assert count_evaluations(scheduler, steps[-1] + 1) > 39


def test_records_are_the_protocols_and_options_reach_the_scheduler(tiny_pipe, reference):
    karras = ("dpmsolver++", {"use_karras_sigmas": True})
    clipped = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample_range=0.5)
    own = tiny_pipe.scheduler
    records = compare_schedulers(
        tiny_pipe, [karras, clipped, "ddim"], reference, evaluations=(3,), num_images=30, seeds=(0, 1)
    )
    labels = ["dpmsolver++:use_karras_sigmas=true", "ddim:clip_sample_range=0.5", "ddim"]
    assert [label_of(record) for record in records] == labels and tiny_pipe.scheduler is own
    assert records[0]["scheduler_config"]["use_karras_sigmas"]
    assert records[1]["images"].float().std() < records[2]["images"].float().std()
    for record in records:
        assert record["figures"]["train"]["frechet_distance"].keys() == {"mean", "sd"}
        assert len(record["per_seed"]) == 2


def test_samples_that_are_not_finite_are_left_out_and_the_others_measured(tiny_pipe, caplog):
    overflows = ("kdpm2_ancestral", {"timestep_spacing": "linspace"})  # in two steps
    records = compare_schedulers(tiny_pipe, [overflows, "ddim"], evaluations=(3,), num_images=2)
    assert [record["name"] for record in records] == ["ddim"]
    left_out = "Left out: kdpm2_ancestral:timestep_spacing=linspace, 3 evaluations: "
    assert f"{left_out}KDPM2AncestralDiscreteScheduler made images with NaN or infinity in 2 steps" in caplog.text


def test_the_pipeline_has_its_scheduler_back_after_an_error(tiny_pipe, calls):
    own, config = tiny_pipe.scheduler, dict(tiny_pipe.scheduler.config)

    def fail(module, args):
        if len(calls) == 5:
            raise RuntimeError("out of memory")

    tiny_pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        compare_schedulers(tiny_pipe, ["ddim", "unipc"], evaluations=(3,), num_images=2)
    assert tiny_pipe.scheduler is own and dict(own.config) == config


@pytest.mark.parametrize("scheduler, message", [
    (("unipc", {"timestep_spacing": "even"}), r"'unipc:timestep_spacing=even' cannot sample \(even"),
    (("ddpm", {"clip_sample_range": "wide"}), "'ddpm:clip_sample_range=wide' cannot sample"),
    (diffusers.DDIMScheduler(beta_end=0.01), "`beta_end` is 0.02 in the scheduler that the network was trained"),
    (diffusers.LCMScheduler(), "LCMScheduler cannot be used; use one of DDPMScheduler"),
])  # fmt: skip
def test_names_and_options_are_refused_before_any_sampling(tiny_pipe, calls, scheduler, message):
    with pytest.raises(ValueError, match=message):
        compare_schedulers(tiny_pipe, ["ddim", scheduler], evaluations=(3,), num_images=2)
    assert not calls


@pytest.mark.parametrize("arguments, message", [
    ({"evaluations": (5, 0)}, r"`evaluations` is \[5, 0\]"),
    ({"schedulers": ["pndm"], "evaluations": (5,)}, "PNDMScheduler needs more than 5 evaluations"),
    ({"seeds": (0, 0)}, r"`seeds` is \[0, 0\]"),
    ({"num_images": 4}, "There are 4 images to evaluate"),
    ({"batch_size": 0}, "`batch_size` is 0"),
])  # fmt: skip
def test_numbers_are_refused_before_any_sampling(tiny_pipe, calls, reference, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_schedulers(tiny_pipe, **{"schedulers": ["ddim"], "reference": reference, **arguments})
    assert not calls


def made_up(name: str, evaluations: int, distance: float, **options) -> dict:
    figures = {"train": {"frechet_distance": {"mean": distance}}}
    return {"name": name, "options": options, "evaluations": evaluations, "figures": figures}


def test_the_best_settings_are_the_cheapest_near_the_yardstick_and_the_nearest_of_the_cheap():
    yardstick = made_up("ddpm", 1000, 2.0)
    slow, near, nearer, cheap = (made_up("ddim", 50, 1.9), made_up("unipc", 20, 2.2), made_up("deis", 20, 2.1),
                                 made_up("lms", 15, 2.3))  # fmt: skip
    records = [slow, near, nearer, cheap, made_up("euler", 10, 2.4)]
    assert best_settings(records, yardstick) == {"fewest": nearer, "best": cheap}
    assert best_settings([slow]) == {"fewest": None, "best": None}


def test_each_of_many_schedulers_has_a_line_of_its_own(tmp_path):
    records = [made_up(name, n, 3.0) for name in SCHEDULERS for n in (5, 10)]
    files = []
    for name in ("ddpm", "dpmsolver++", "kdpm2", "sa_solver"):  # of one marker or one colour: one by one they move up
        moved = [made_up(r["name"], r["evaluations"], 9.0) if r["name"] == name else r for r in records]
        plot_distances(moved, tmp_path / f"{name}.png", made_up("ddpm", 1000, 2.0))
        files.append(np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")))
    assert len({file.tobytes() for file in files}) == 4
    assert files[0].shape[0] > 500 and files[0].shape[1] > 900


def test_spectra_are_drawn_without_frequency_0(tmp_path):
    plot_spectra({"ddim": [0.0, 4.0, 2.0]}, [0.0, 5.0, 1.0], tmp_path / "a.png", "radial")
    plot_spectra({"ddim": [7.0, 4.0, 2.0]}, [7.0, 5.0, 1.0], tmp_path / "b.png", "radial")
    plot_spectra({"ddim": [0.0, 4.0, 3.0]}, [0.0, 5.0, 1.0], tmp_path / "c.png", "radial")
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c) and min(a.shape[:2]) > 400


def test_more_energy_than_in_real_images_is_drawn_above_them_and_less_below(tmp_path):
    curves = {"noisy": [0.0, 50.0, 10.0], "blurred": [0.0, 0.5, 0.1]}
    plot_spectra(curves, [0.0, 5.0, 1.0], tmp_path / "a.png", "radial")
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))[:, :500]  # without the legend, at the right
    rows = {}
    for name, color in (("real", (0, 0, 0)), ("noisy", (31, 119, 180)), ("blurred", (255, 127, 14))):
        rows[name] = np.median(np.nonzero((drawn == color).all(-1))[0])
    assert rows["noisy"] < rows["real"] < rows["blurred"]  # counted from the top


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_rows_show_their_strips_pixel_by_pixel(tmp_path, mode):
    strips = {name: Image.fromarray(np.random.default_rng(i).integers(100, 256, (8, 24), np.uint8)).convert(mode)
              for i, name in enumerate(("ddim (5)", "dpmsolver++:use_karras_sigmas=true (5)"))}  # fmt: skip
    plot_rows(strips, tmp_path / "grid.png")
    drawn = np.asarray(Image.open(tmp_path / "grid.png").convert(mode)).astype(int)
    for i, strip in enumerate(strips.values()):
        cells = drawn[60 * i + 4 : 60 * i + 60, -168:][3::7, 3::7]  # 7x7 a pixel, and a gap of 4 before each row
        assert np.array_equal(cells, np.asarray(strip))
    names = drawn[:, :-168]
    assert (names[:60] < 100).sum() > 50 and (names[60:] < 100).sum() > (names[:60] < 100).sum()


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "garments"
    parts = {"train": garments(0, 60), "test": garments(60, 40)}
    splits = {split: {"image": [Image.fromarray(image[0]) for image in images]} for split, images in parts.items()}
    made = {split: datasets.Dataset.from_dict(images) for split, images in splits.items()}
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
    tiny_pipe, reference, extractor_folder, dataset_folder, tmp_path, script, capsys
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

    text = (out / "comparison.md").read_text()
    assert "Fewest evaluations within 10 % of ddpm, 200 evaluations" in text
    assert "Best at 15" in capsys.readouterr().out
    assert text.count("\n| ") == 9 and "| unipc | timestep_spacing=leading | 30 | 30 | no |" in text
    assert str(tmp_path) not in text + (out / "comparison.json").read_text()
    assert Image.open(out / "grid.png").height == 60 * 4  # the yardstick and three schedulers
    assert min(Image.open(out / "distances.png").size) > 500
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "comparison.json", "comparison.md", "distances.png", "grid.png", "samples"
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


def test_steps_are_as_many_as_fit_for_a_scheduler_that_cannot_take_all():
    offset = diffusers.DDPMScheduler(20, steps_offset=1, timestep_spacing="leading")  # it has no timestep 20
    assert most_steps(offset, 20) == most_steps(offset, 19) == 19


def test_of_all_schedulers_those_that_cannot_follow_the_network_are_left_out_with_the_reason():
    predicts_samples = diffusers.DDPMScheduler(100, prediction_type="sample")
    settings, left_out = plan(predicts_samples, list(SCHEDULERS), [20], leave_out_unusable=True)
    kept = {setting.name for setting in settings}
    assert "ddim" in kept and len(kept) + len(left_out) == len(SCHEDULERS)
    reasons = {record["name"]: record["left_out"] for record in left_out}
    assert "prediction_type given as sample must be one of" in reasons["pndm"]


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
