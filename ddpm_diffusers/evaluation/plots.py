"""Plots of the figures, as files: distances by number of evaluations, spectra, rows of images with their names."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from ..grid import MIN_SIDE
from .comparison import distance, label_of, title_of

LINES, MARKERS = ("-", "--", ":"), ("o", "s", "^", "D", "v", "P", "X")
FREQUENCIES = {"radial": "radius (cycles an image)", "rings": "larger of |u| and |v| (cycles an image)"}
DPI = 130
MIN_FACTOR = 1.12  # between ticks


def plot_distances(records: Sequence[dict], path: str | Path, yardstick: dict | None = None) -> None:
    """Plot Frechet distance to the train split by network evaluations, a line per scheduler, both axes logarithmic.

    Args:
        records: As returned by `compare_schedulers` with a reference.
        path: Path of the file; its extension sets the format.
        yardstick: Such a record, drawn as a horizontal line.
    """
    lines = {}
    for record in records:
        lines.setdefault(label_of(record), []).append(record)
    figure = Figure(figsize=(9, 5 + 0.1 * len(lines)), layout="constrained")
    axes = figure.subplots()
    if yardstick is not None:
        axes.axhline(distance(yardstick), color="0.4", linewidth=1.2, zorder=1, label=title_of(yardstick))
    for i, (name, line) in enumerate(lines.items()):
        line.sort(key=lambda record: record["evaluations"])
        sd = [record["figures"]["train"]["frechet_distance"].get("sd", 0) for record in line]
        axes.errorbar(
            [record["evaluations"] for record in line],
            [distance(record) for record in line],
            yerr=sd if any(sd) else None,
            label=name,
            color=f"C{i}",  # matplotlib has ten, and begins anew
            linestyle=LINES[i // 10 % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
        )
    axes.set(xscale="log", yscale="log", xlabel="network evaluations an image", ylabel="Frechet distance of features")
    axes.set_xticks(spaced([record["evaluations"] for record in records]))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=3)
    figure.savefig(path, dpi=DPI)


def plot_spectra(curves: Mapping[str, Sequence[float]], real: Sequence[float], path: str | Path, kind: str) -> None:
    """Plot mean power by frequency, in dB relative to that of real images, which is the line at 0.

    Args:
        curves: Curves of the samples of a record's "spectrum", by name. Their first value, at frequency 0, is not
            drawn: it is 0, as each image's mean is subtracted.
        real: The curve of real images, which they are compared with.
        path: Path of the file; its extension sets the format.
        kind: "radial", whose outer half blur lowers, or "rings", whose last value shows a checkerboard of period 2.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=2, label="real")
    for i, (name, values) in enumerate(curves.items()):
        with np.errstate(divide="ignore"):  # points without any energy are not drawn
            decibels = 10 * np.log10(np.asarray(values)[1:] / np.asarray(real)[1:])
        style = {"color": f"C{i}", "linestyle": LINES[i // 10 % len(LINES)]}
        axes.plot(range(1, len(values)), decibels, marker=".", label=name, **style)
    axes.set(xlabel=FREQUENCIES[kind], ylabel="mean power relative to real images (dB)")
    axes.grid(alpha=0.3, linewidth=0.6)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3)
    figure.savefig(path, dpi=DPI)


def plot_rows(rows: Mapping[str, Image.Image], path: str | Path) -> None:
    """Plot strips of images, all of one size, one below the other, each with its name to the left, pixel for pixel."""
    width, height = next(iter(rows.values())).size
    factor = max(1, math.ceil(MIN_SIDE / height))
    width, height, gap = width * factor, height * factor, 4
    margin = 30 + 8 * max(len(name) for name in rows)  # for the names, in pixels
    total = (height + gap) * len(rows)
    figure = Figure(figsize=((margin + width) / 100, total / 100), dpi=100)  # inches, which times dpi are the pixels
    for i, (name, strip) in enumerate(rows.items()):
        bottom = total - (height + gap) * (i + 1)
        pixels = strip.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        figure.figimage(pixels, margin, bottom, origin="upper")
        figure.text((margin - 10) / (margin + width), (bottom + height / 2) / total, name, ha="right", va="center",
                    fontsize=10)  # fmt: skip
    figure.savefig(path, dpi=100)


def spaced(values: Sequence[int]) -> list[int]:
    """Ticks for a logarithmic axis: the largest value, then each at least `MIN_FACTOR` below the one kept before."""
    kept = []
    for value in sorted(set(values), reverse=True):
        if not kept or kept[-1] / value >= MIN_FACTOR:
            kept.append(value)
    return kept[::-1]
