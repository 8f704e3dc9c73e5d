"""The ladder: its rows, and the script that trains and judges them."""

import json
import shutil
import signal
import subprocess
import sys
import time

import ablate as script
import psutil
import pytest
import yaml
from command_line import parse_arguments
from conftest import ROOT
from datasets import DatasetDict
from PIL import Image

from ddpm_diffusers import OptimizedUNet2DModel

SCRIPT = ROOT / "train_scripts" / "ablate.py"
CONFIGS = ROOT / "train_scripts" / "configs"


def config_of(arguments: dict) -> dict:
    config = OptimizedUNet2DModel(**{key: value for key, value in arguments.items() if key[0] != "_"}).config
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key[0] != "_"}


def differences(arguments: dict, others: dict) -> set[str]:
    others = config_of(others)
    return {key for key, value in config_of(arguments).items() if value != others[key]}


def test_the_ladder_leads_from_the_guides_baseline_to_its_network_to_the_default():
    ladder = script.read_ladder(CONFIGS / "ladder.yaml")
    assert config_of(ladder["guide"]) == config_of(json.loads((CONFIGS / "guide.json").read_text()))
    assert config_of(ladder["default"]) == config_of({})
    # each rung and each row with one switch turned back is another network
    networks = [json.dumps(config_of(row)) for name, row in ladder.items() if name != "stock"]
    assert len(set(networks)) == len(networks)
    without = set()
    for name, row in ladder.items():
        if name.startswith("no_"):
            changed = differences(row, {})
            assert changed and len(changed - {"time_embedding_dim"}) == 1, name
            without |= changed
    # the resnet blocks and their numbers of layers came last: without them the default is a rung of its own
    layers = {"down_layers_per_block", "up_layers_per_block", "mid_block_layers"}
    assert differences(ladder["time_every_block"], {}) == {"block_type"} | layers
    assert differences(ladder["resnet_blocks"], {}) == layers
    switches = set(config_of({})) - {"sample_size", "in_channels", "out_channels", "block_out_channels"}
    assert switches - {"norm_num_groups", "num_train_timesteps"} == without | layers


def test_a_ladder_that_cannot_be_climbed_is_refused(tmp_path):
    path = tmp_path / "ladder.yaml"
    path.write_text("a: {from: b}\nb: {from: a}\n")
    with pytest.raises(ValueError, match="a from b from a goes round in a circle"):
        script.read_ladder(path)
    path.write_text("a: {from: c}\n")
    with pytest.raises(ValueError, match="row 'a' is from 'c', which is no row and no .json file"):
        script.read_ladder(path)
    path.write_text("a: 3\n")
    with pytest.raises(ValueError, match="row 'a' holds 3; it must hold arguments of a U-Net by name"):
        script.read_ladder(path)
    for text, message in (
        ("- a", r"holds \['a'\]; it must hold rows by name"),
        ("a: {b", "ladder.yaml cannot be read"),
        ("64: {}", "row 64 must have another name"),
        ("rings: {}", "row 'rings' must have another name: text, and not grids, radial, rings"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            script.read_ladder(path)
    path.write_text("a: {widths: 3}\n")
    for flags, message in (
        ([], "'widths'.*no arguments of OptimizedUNet2DModel"),
        (["--rows", "b"], "no row 'b'; .*has a"),
        (["--max_train_steps", "0"], "`--max_train_steps` is 0; it must be a whole number of at least 1"),
        (["--num_epochs", "9", "--max_train_steps", "9"], "`--num_epochs` is 9 and `--max_train_steps` 9: give one"),
        (["--rows", "a", "a"], r"`--rows` is \['a', 'a'\]; it must hold different ones"),
    ):
        argv = ["--ladder", str(path), "--output_dir", str(tmp_path / "runs"), *flags]
        with pytest.raises(ValueError, match=message):
            script.main(parse_arguments(script.AblateArguments, argv, script.__doc__))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_sigterm_stops_the_trainings_with_a_checkpoint(garments, tmp_path):
    flags = ["--rows", "default", "guide", "--dataset_name", garments, "--output_dir", tmp_path, "--num_images", "150"]
    process = subprocess.Popen([sys.executable, SCRIPT, *flags], stderr=subprocess.DEVNULL)
    folder = tmp_path / "default" / "seed-0"
    speeds = folder / "speed.jsonl"
    while process.poll() is None and not (speeds.exists() and speeds.stat().st_size):  # the first steps
        time.sleep(0.1)
    launched = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM and len(launched) >= 2
    assert not psutil.wait_procs(launched, timeout=10)[1]
    assert len(list(folder.glob("checkpoint-*"))) == 1 and not (tmp_path / "guide").exists()


@pytest.mark.slow
def test_rows_are_trained_and_judged_once_and_other_settings_are_refused(garments, tmp_path, capsys, caplog):
    tiny = {"block_out_channels": [8, 16], "norm_num_groups": 4, "block_norm_num_groups": 4}
    ladder = {"default": tiny, "stock": {"from": "default", "global_skip": False}, "other": {"from": "stock"}}
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(ladder))

    def arguments(*flags: str) -> list[str]:
        return ["--ladder", str(tmp_path / "ladder.yaml"), "--rows", "default", "stock", "--jobs", "2",
                "--dataset_name", garments, "--dataset_id", "user/garments", "--max_train_steps", "3",
                "--num_images", "150", "--num_inference_steps", "2", "--output_dir", str(tmp_path / "runs"),
                "--results_dir", str(tmp_path / "results"), *flags]  # fmt: skip

    def ablate(*flags: str) -> str:
        """In this process; returns what it printed. The trainings and evaluations have processes of their own."""
        capsys.readouterr()
        script.main(parse_arguments(script.AblateArguments, arguments(*flags), script.__doc__))
        return capsys.readouterr().out

    first = subprocess.run([sys.executable, SCRIPT, *arguments()], capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    rows = {name: json.loads((tmp_path / "results" / f"{name}.json").read_text()) for name in ("default", "stock")}
    for name, row in rows.items():
        assert row["figures"]["train"]["frechet_distance"]["mean"] > 0 and row["seeds"]["0"]["steps"] == 3
        assert row["seeds"]["0"]["dataset"] == "user/garments"
        assert garments not in json.dumps(row) and str(tmp_path) not in json.dumps(row)
        assert f"| {name} | 1 |" in first.stdout
    assert rows["default"]["num_parameters"] > rows["stock"]["num_parameters"]
    for picture in ("grids.png", "radial.png", "rings.png"):
        with Image.open(tmp_path / "results" / picture) as image:
            assert min(image.size) > 100

    # what was cut off is judged again, with the same outcome; nothing is trained again, and what is kept is not even
    # judged again, wherever its training is; a seed is added
    (tmp_path / "results" / "stock.json").unlink()
    shutil.rmtree(tmp_path / "runs" / "default")
    ablate("--train_seeds", "0", "1")
    assert all(path.stat().st_mtime_ns == written for path, written in files.items() if "stock" in str(path))
    assert not (tmp_path / "runs" / "default" / "seed-0").exists()
    for name, row in rows.items():
        again = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert again["seeds"]["0"]["figures"] == row["seeds"]["0"]["figures"]
        assert again["figures"]["train"]["hf_db"]["sd"] > 0 and set(again["seeds"]) == {"0", "1"}

    # a row that cannot be trained does not keep the others from their end
    (tmp_path / "runs" / "other" / "seed-0" / "unet").mkdir(parents=True)
    with pytest.raises(SystemExit, match="train_unconditional.py ended with status 1, its log .*is not empty"):
        ablate("--rows", "other", "default", "--train_seeds", "0", "2")
    assert "| default | 3 |" in capsys.readouterr().out

    # another ladder adds to the table; what has the name of one of its rows and another network is left out
    del ladder["default"], ladder["other"]
    ladder["stock"] = {**tiny, "global_skip": False, "act_fn": "relu"}
    ladder["third"] = {**ladder["stock"], "mid_block_layers": 1}
    (tmp_path / "third.yaml").write_text(yaml.safe_dump(ladder))
    to_third = ("--ladder", str(tmp_path / "third.yaml"), "--rows", "third")
    DatasetDict.load_from_disk(garments)["train"].train_test_split(120, seed=0).save_to_disk(tmp_path / "garments")
    with pytest.raises(ValueError, match="'default' was compared with other images"):
        ablate(*to_third, "--dataset_name", str(tmp_path / "garments"))
    third = ablate(*to_third)
    assert "| third | 1 |" in third and "| default | 3 |" in third and "| stock |" not in third
    assert "stock.json was made with other settings, or of another network" in caplog.text

    nowhere = str(tmp_path / "nowhere")
    for flags, message in (
        (("--num_inference_steps", "0"), "num_inference_steps"),
        (("--scheduler", "ddpm:clip_sample_range=wide"), "Scheduler 'ddpm' cannot sample"),
        (("--dataset_name", nowhere, "--train_seeds", "5"), repr(nowhere)),
        (("--num_images", "96"), "more than the 96 features"),
        (("--optimizer", "muon"), "made with `optimizer` not given, and `optimizer` muon is asked for"),
        (("--learning_rate", "1e-3"), "made with `learning_rate` 0.002, and `learning_rate` 0.001 is asked for"),
        (("--num_images", "200"), "made with `num_images` 150, and `num_images` 200 is asked for"),
        (
            ("--learning_rate", "1e-3", "--results_dir", str(tmp_path / "new"), "--train_seeds", "1"),
            "learning_rate differ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(*flags)
