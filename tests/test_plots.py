"""The plots of the evaluation."""

import numpy as np
import pytest
from PIL import Image

from ddpm_diffusers import SCHEDULERS
from ddpm_diffusers.evaluation.plots import plot_distances, plot_rows, plot_spectra


def made_up(name: str, evaluations: int, distance: float) -> dict:
    figures = {"train": {"frechet_distance": {"mean": distance}}}
    return {"name": name, "options": {}, "evaluations": evaluations, "figures": figures}


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
