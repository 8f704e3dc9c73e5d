"""The sampling script."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def generate(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train_scripts" / "generate.py"), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch_size_and_nothing_is_overwritten(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "generate.yaml").write_text(f"model: {tmp_path / 'model'}\nscheduler: ddim\n")
    common = [str(tmp_path / "generate.yaml"), "--scheduler", "euler", "--num_inference_steps", "4", "--seed", "7"]
    for name, batch_size in (("one", "1"), ("many", "4")):
        result = generate(
            *common, "--num_images", "3", "--batch_size", batch_size, "--output_dir", str(tmp_path / name)
        )
        assert result.returncode == 0, result.stderr
        assert "3 images by EulerDiscreteScheduler, 4 steps" in result.stdout
    for file in ("000007.png", "000008.png", "000009.png"):
        one, many = (np.asarray(Image.open(tmp_path / name / file)).astype(int) for name in ("one", "many"))
        assert np.abs(one - many).max() <= 1
    assert Image.open(tmp_path / "one" / "grid.png").size == (112, 112)
    again = generate(*common, "--output_dir", str(tmp_path / "one"))
    assert again.returncode != 0 and "is not empty: choose another, or pass `--overwrite`" in again.stderr
    (tmp_path / "one" / "mine.png").write_bytes(b"")
    fewer = generate(*common, "--num_images", "1", "--output_dir", str(tmp_path / "one"), "--overwrite")
    left = {path.name for path in (tmp_path / "one").iterdir()}
    assert fewer.returncode == 0 and left == {"000007.png", "grid.png", "mine.png"}
    wrong = generate(*common, "--scheduler_config", '{"beta_end": "wide"}', "--output_dir", str(tmp_path / "x"))
    assert "`beta_end` is 0.02 in the scheduler" in wrong.stderr
    wrong = generate("--model", str(tmp_path / "model"), "--scheduler", "eular", "--output_dir", str(tmp_path / "x"))
    assert "'eular' is unknown; it must be one of ddpm" in wrong.stderr and not (tmp_path / "x").exists()
