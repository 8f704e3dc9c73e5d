"""The evaluating script: a pipeline's samples, a folder of images, the data set's own images, damaged or not."""

import json
import shutil
import subprocess
from pathlib import Path

import evaluate as script
import numpy as np
import pytest
import torch
from command_line import parse_arguments
from conftest import ROOT, randomize, reset_accelerate, torchrun
from diffusers import DDPMScheduler
from huggingface_hub import ModelCard
from PIL import Image, ImageOps

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.evaluation import Reference, evaluate_images, evaluate_pipeline, load_feature_extractor
from ddpm_diffusers.evaluation.plots import plot_spectra
from ddpm_diffusers.hub import model_card
from ddpm_diffusers.sampling import to_pil
from ddpm_diffusers.synthetic_fashion import draw_garments

SCRIPT = ROOT / "train_scripts" / "evaluate.py"
NUM_IMAGES = 150  # more than features


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved pipeline with a card; what it samples is noise."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "block_norm_num_groups": 4}
    unet = randomize(OptimizedUNet2DModel(sample_size=16, **widths))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe = PixelDiffusionPipeline(unet, DDPMScheduler(timestep_spacing="trailing"))
    pipe.save_pretrained(folder)
    model_card(pipe, "user/tiny").save(folder / "README.md")
    return folder


@pytest.fixture
def evaluate(garments, tmp_path):
    """Run the script here; returns its record."""

    def run(*flags: str) -> dict:
        reset_accelerate()
        output_dir = tmp_path / "evaluation"
        argv = ["--dataset_name", garments, "--num_images", str(NUM_IMAGES), "--output_dir", str(output_dir), *flags]
        script.main(parse_arguments(script.EvaluateArguments, argv, script.__doc__))
        return json.loads((output_dir / "evaluation.json").read_text())

    return run


def test_lower_precision_is_for_the_network_alone(evaluate, model, garments):
    record = evaluate("--model", str(model), "--num_inference_steps", "3", "--mixed_precision", "bf16")
    pipe = PixelDiffusionPipeline.from_pretrained(model)
    pipe.unet.forward = torch.autocast("cpu", torch.bfloat16)(pipe.unet.forward)
    reference = Reference.of_dataset(garments, load_feature_extractor(), resolution=16)
    expected = evaluate_pipeline(pipe, reference, NUM_IMAGES, 3)
    assert record["figures"] == expected["figures"] and record["mixed_precision"] == "bf16"


def test_a_pipeline_is_judged_as_in_python_and_its_card_gets_the_figures(evaluate, model, garments, tmp_path, capsys):
    sampler = ("--scheduler", "dpmsolver++:solver_order=1", "--timesteps", "999", "400", "20")
    record = evaluate("--model", str(model), *sampler, "--seeds", "0", "1", "--batch_size", "50",
                      "--dataset_id", "user/garments", "--write_card")  # fmt: skip

    pipe = PixelDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("dpmsolver++", pipe.scheduler, solver_order=1)
    reference = Reference.of_dataset(garments, load_feature_extractor(), resolution=16)
    how = {"seeds": (0, 1), "batch_size": 50, "timesteps": [999, 400, 20]}
    expected = evaluate_pipeline(pipe, reference, NUM_IMAGES, **how)
    assert record["figures"] == expected["figures"] and record["per_seed"] == expected["per_seed"]
    assert record["evaluations"] == 3 and record["scheduler_config"]["solver_order"] == 1
    assert record["feature_extractor"]["digest"] == load_feature_extractor().digest
    assert str(tmp_path) not in json.dumps(record) and str(Path(garments).parent) not in json.dumps(record)

    of_train, to_floor = record["figures"]["train"], record["figures"]["to_floor"]
    row = (tmp_path / "evaluation" / "row.md").read_text()
    headings, cells = ([cell.strip() for cell in row.splitlines()[i].split("|")] for i in (0, 2))
    shown = dict(zip(headings, cells, strict=True))
    for heading, figure, form in (
        ("distance", of_train["frechet_distance"], "{:.3f} ± {:.3f}"),
        ("to floor", to_floor["frechet_distance"], "{:.1f} ± {:.1f}"),
        ("precision", of_train["precision"], "{:.3f} ± {:.3f}"),
        ("recall", of_train["recall"], "{:.3f} ± {:.3f}"),
        ("CB2 dB", of_train["cb2_db"], "{:+.2f} ± {:.2f}"),
        ("CB4 dB", of_train["cb4_db"], "{:+.2f} ± {:.2f}"),
        ("HF dB", of_train["hf_db"], "{:+.2f} ± {:.2f}"),
    ):
        assert shown[heading] == form.format(figure["mean"], figure["sd"])
    kernel = of_train["kernel_distance"]
    assert shown["KID x 1000"] == f"{1000 * kernel['mean']:.2f} ± {1000 * kernel['sd']:.2f}"
    assert row in capsys.readouterr().out
    assert "DPMSolverMultistepScheduler (solver_order 1) in 3 steps at timesteps 999, 400, 20, 3 evaluations" in row
    with Image.open(tmp_path / "evaluation" / "grid.png") as grid:
        assert grid.size == (8 * 64, 8 * 64)
    spectrum = record["spectrum"]
    for file, kind in (("spectrum.png", "radial"), ("rings.png", "rings")):
        plot_spectra({"tiny": spectrum["samples"][kind]}, spectrum["real"][kind], tmp_path / file, kind)
        assert (tmp_path / file).read_bytes() == (tmp_path / "evaluation" / file).read_bytes()

    results = ModelCard.load(model / "README.md").data.eval_results
    values = {result.metric_type: result.metric_value for result in results}
    expected = {
        **{name: of_train[name] for name in ("frechet_distance", "kernel_distance", "precision", "recall")},
        **{name: of_train[name] for name in ("cb2_db", "cb4_db", "hf_db")},
        "frechet_distance_to_floor": to_floor["frechet_distance"],
        "frechet_distance_to_test": record["figures"]["test"]["frechet_distance"],
    }
    splits = {result.metric_type: result.dataset_split for result in results}
    assert splits == dict.fromkeys(splits, "train") | {"frechet_distance_to_test": "test"}
    spreads = {result.metric_type: result.metric_name.rpartition("± ")[2] for result in results}
    assert spreads == {name: f"{figure['sd']:.2g} over the seeds" for name, figure in expected.items()}
    assert values == {name: float(f"{figure['mean']:.4g}") for name, figure in expected.items()}
    assert {result.dataset_type for result in results} == {"user/garments"}
    assert all(result.metric_args["solver_order"] == 1 for result in results)
    assert all(result.metric_args["mixed_precision"] == "no" for result in results)


def test_a_run_is_judged_by_other_images_than_its_own_with_a_warning_alone(
    evaluate, model, garments, tmp_path, caplog
):
    run = shutil.copytree(model, tmp_path / "run")
    for trained_on, is_other in (
        ({"dataset_name": "synthetic-fashion"}, True),
        ({"dataset_name": garments, "train_data_dir": str(tmp_path)}, True),
        ({"dataset_name": f"{garments}/"}, False),  # without the id, which the evaluation has
        ({"train_data_dir": "/moved/since", "dataset_id": "user/garments"}, False),
    ):
        flags = {"dataset_name": "owner/name", "dataset_id": None, "train_data_dir": None, **trained_on}
        (run / "run.json").write_text(json.dumps({"arguments": flags}))
        evaluate("--model", str(run), "--num_inference_steps", "2", "--dataset_id", "user/garments", "--overwrite")
        assert (f"{run} was trained on " in caplog.text) == is_other
        caplog.clear()


def test_test_images_give_the_floor_and_damage_moves_the_right_figure(evaluate):
    def figures(*flags: str) -> dict:
        everything = ("--num_images", "200", "--resolution", "16", "--overwrite")
        found = evaluate("--images", "test", *everything, *flags)["figures"]
        return {group: {name: figure and figure["mean"] for name, figure in found[group].items()} for group in found}

    whole = figures()
    assert whole["train"] == whole["floor"] and whole["to_floor"]["frechet_distance"] == 1
    assert abs(whole["test"]["frechet_distance"]) < 1e-6 and whole["test"]["precision"] == 1
    damaged = figures("--damage", "checker", "--damage_amount", "0.1")
    assert damaged["to_floor"]["frechet_distance"] > 1.5 and damaged["train"]["cb2_db"] > whole["train"]["cb2_db"] + 3


def test_a_folder_of_images_is_judged_as_the_images_are(evaluate, garments, tmp_path):
    images = torch.from_numpy(draw_garments(range(900, 1060), resolution=16, channels=1)[0])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(to_pil(images)):
        image.save(folder / f"{i:06d}.{'png' if i % 2 else 'tif'}")  # as the training takes them
    Image.new("L", (99, 99)).save(folder / "grid.png")  # as generate.py leaves one
    reference = Reference.of_dataset(garments, load_feature_extractor(), resolution=16)
    record = evaluate("--images", str(folder), "--num_images", "1000")
    assert record["num_images"] == 160
    assert record["per_seed"] == [evaluate_images(images, reference)]
    (tmp_path / "wide").mkdir()
    for path in folder.glob("0*"):
        ImageOps.expand(Image.open(path), (2, 0)).save(tmp_path / "wide" / path.name)
    fewer = evaluate("--images", str(tmp_path / "wide"), "--num_images", "120", "--center_crop", "--overwrite")
    spread = images[np.linspace(0, 159, 120).round().astype(int)]  # over all, as if sorted
    assert fewer["per_seed"] == [evaluate_images(spread, reference)]

    Image.new("RGB", (16, 16), "red").save(folder / "000400.png")  # all are read in colour, and refused for it
    with pytest.raises(ValueError, match="The images have 3 channels, and .* takes 1"):
        evaluate("--images", str(folder), "--num_images", "1000", "--overwrite")
    (folder / "000401.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000401.png of `--images` cannot be read \(.*\): repair or remove it"):
        evaluate("--images", str(folder), "--num_images", "1000", "--overwrite")
    (folder / "000401.png").unlink()
    Image.new("L", (20, 16)).save(folder / "000500.png")
    with pytest.raises(ValueError, match=r"000500.png is 20x16 and .*000000.tif 16x16; all images must be square"):
        evaluate("--images", str(folder), "--num_images", "1000", "--overwrite")


def test_a_folder_is_read_as_the_training_reads_it(evaluate, tmp_path):
    """Names of splits in those of files mean nothing to `--train_data_dir`."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(to_pil(torch.from_numpy(draw_garments(range(300), seed=2, resolution=16)[0]))):
        image.save(folder / f"{'train' if i % 2 else 'test'}_{i:03}.png")
    halves = ("--train_split", "train[:50%]", "--test_split", "train[50%:]", "--images", "train[50%:]")
    record = evaluate("--train_data_dir", str(folder), *halves, "--resolution", "16")
    assert record["num_real_images"] == {"train": 150, "test": 150} and record["dataset"] == "photos"


@pytest.mark.parametrize(("flags", "message"), [
    ([], "Give either `--model`, a pipeline, or `--images`"),
    (["--model", "MODEL", "--images", "test"], "Give either"),
    (["--model", "MODEL", "--damage", "blur"], "`--damage` is 'blur'; it must be one of .* with `--images`"),
    (["--images", "test", "--write_card", "--dataset_id", "a/b"], "needs a local `--model` with a card"),
    (["--model", "MODEL", "--write_card"], "needs the data set's id on the Hub, which .* is not"),
    (["--images", "test", "--damage", "blur", "--damage_amount", "nan"], r"is nan; it must be in \[0, 1\]"),
    (["--images", "test", "--damage_amount", "0.5"], "Give `--damage` and `--damage_amount`, or neither"),
    (["--images", "test", "--seeds", "0", "1"], "`--seeds` is for a `--model`; `--images` are judged as they are"),
    (["--images", "test", "--resolution", "9"], "`--resolution` is 9; it must be even"),
    (["--images", "test", "--scheduler", "ddim"], "`--scheduler` is for a `--model`"),
    (["--images", "test", "--num_inference_steps", "5"], "`--num_inference_steps` is for a `--model`"),
    (["--images", "test", "--guidance_scale", "2"], "`--guidance_scale` is for a `--model`"),
    (["--model", "MODEL", "--guidance_scale", "nan"], "`--guidance_scale` is nan; it must be a number from 1"),
    (["--images", "folder", "--resolution", "16"], "`--resolution` is for `--images` that are a split"),
    (["--model", "folder", "--resolution", "16"], "`--resolution` is for `--images` that are a split"),
    (["--images", "test", "--dataset_name", ".", "--output_dir", "./here"], "here lies in ., where the images are"),
    (["--images", ".", "--output_dir", "./here"], "here lies in ., where the images are"),
    (["--images", "test", "--train_data_dir", ""], "`--train_data_dir` is empty"),
    (["--images", "nowhere"], "nowhere is no folder with images, nor one of the splits train and test"),
    (["--model", "MODEL", "--num_images", "20"], "20 images to evaluate; there must be more than the"),
    (["--model", "MODEL", "--seeds", "1", "1"], r"`--seeds` is \[1, 1\]; it must hold different"),
    (["--model", "MODEL", "--scheduler", "ddpm:speed=1"], "`speed` is no argument of DDPMScheduler"),
    (["--images", "test", "--timesteps", "9", "2"], "`--timesteps` is for a `--model`"),
    (["--model", "MODEL", "--timesteps", "2", "9"], "`timesteps` is .2, 9.; it must hold integers"),
    (["--model", "MODEL", "--num_inference_steps", "5000"], "is 5000; it must not exceed the 1000 timesteps"),
    (["--model", "MODEL", "--test_split", "validation"], "no split 'validation'"),
    (["--model", "MODEL", "--feature_extractor", "resnet"], "There is no feature extractor 'resnet'"),
    (["--model", "MODEL", "--mixed_precision", "int8"], "must be auto, no, fp16 or bf16"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(
    evaluate, model, tmp_path, monkeypatch, flags, message
):
    monkeypatch.setattr(PixelDiffusionPipeline, "__call__", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=message):
        evaluate(*[str(model) if flag == "MODEL" else flag for flag in flags])
    assert not [path for path in tmp_path.glob("evaluation/*") if path.name != ".lock"]


def test_a_network_in_colour_is_refused_by_a_grey_extractor_before_any_data_is_read(evaluate, tmp_path):
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "block_norm_num_groups": 4}
    unet = OptimizedUNet2DModel(in_channels=3, out_channels=3, **widths)
    PixelDiffusionPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "colour")
    with pytest.raises(ValueError, match="The images have 3 channels, and .* takes 1"):
        evaluate("--model", str(tmp_path / "colour"), "--dataset_name", str(tmp_path / "absent"))


def test_nothing_is_overwritten_and_nan_is_not_judged(evaluate, model, tmp_path, monkeypatch):
    pipe = PixelDiffusionPipeline.from_pretrained(model)
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="made images with NaN"):
        evaluate("--model", str(tmp_path / "broken"), "--num_inference_steps", "2")
    (tmp_path / "evaluation" / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty: choose another, or pass `--overwrite`"):
        evaluate("--model", str(model))
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")  # of an earlier one
    with pytest.raises(ValueError, match="made images with NaN"):
        evaluate("--model", str(tmp_path / "broken"), "--num_inference_steps", "2", "--overwrite")
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {".lock", "mine.txt", "evaluation.json"}
    monkeypatch.setattr(script, "plot_spectra", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate("--model", str(model), "--num_inference_steps", "2", "--overwrite")
    assert not (tmp_path / "evaluation" / "evaluation.json").exists()  # it would stand for what is not there


@pytest.mark.slow
def test_two_processes_measure_what_one_does(evaluate, model, garments, tmp_path):
    flags = ["--model", str(model), "--num_inference_steps", "2", "--batch_size", "40"]
    one = evaluate(*flags)
    command = [*torchrun(2), str(SCRIPT), *flags, "--dataset_name", garments, "--num_images", str(NUM_IMAGES),
               "--output_dir", str(tmp_path / "two")]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert one["per_seed"] == two["per_seed"] and (one["num_processes"], two["num_processes"]) == (1, 2)
