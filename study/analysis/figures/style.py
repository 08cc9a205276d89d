"""The look of every figure: one style, one colour per arm, panels with their caption, files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from study.analysis.look import ARMS, csv_bytes, figures_dir, write

COLOURS = ARMS  # arm → its colour
WRONG, RIGHT, NEUTRAL = "#aa3377", "#117733", "#222222"
WIDTH = 7.2  # inches: a text column on A4


@contextmanager
def style() -> Iterator[None]:
    """The one look of every figure, for the time of a with block; the caller's settings come back after."""
    with mpl.rc_context({
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same on every machine
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.edgecolor": "#666666",
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "figure.dpi": 150,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,
    }):  # fmt: skip
        yield


def save_figure(figure: Figure, values: pd.DataFrame, name: str, profile: str) -> Path:
    """Path of the PNG, beside a PDF and a CSV of the plotted values, in figures/<profile>/."""
    folder = figures_dir() / profile
    # Dates and versions in the metadata would make every rebuild a change.
    undated: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    with style():
        for kind, metadata in undated.items():
            # A PNG is compressed once, below.
            packing: dict[str, Any] = {"pil_kwargs": {"compress_level": 0}} if kind == "png" else {}
            figure.savefig(buffer := io.BytesIO(), format=kind, metadata=metadata, **packing)
            made = buffer.getvalue()
            write(folder / f"{name}.{kind}", _fewer_colours(made) if kind == "png" else made)
    write(folder / f"{name}.csv", csv_bytes(values))
    return folder / f"{name}.png"


def _fewer_colours(png: bytes) -> bytes:
    """A picture in 256 colours: a third of the bytes, and the notebooks that show it are as much smaller."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(kept := io.BytesIO(), "PNG", optimize=True)
    return kept.getvalue()


def draw_interval(axes: Axes, value: float, low: float, high: float, height: float, colour: str) -> None:
    """Draws an estimate as a dot on the line of its interval."""
    axes.plot([low, high], [height, height], color=colour, lw=1.6, solid_capstyle="butt")
    axes.plot(value, height, "o", color=colour, ms=5, zorder=4)


def apart(heights: list[float], least: float, top: float = 1.0) -> list[float]:
    """The heights, in the order given, moved just enough to stand `least` apart and none above `top`."""
    order = np.argsort(heights, kind="stable")
    moved = np.asarray(heights, dtype=float)[order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + least)
    moved[-1] = min(moved[-1], top)
    for i in range(len(moved) - 2, -1, -1):
        moved[i] = min(moved[i], moved[i + 1] - least)
    return [float(moved[list(order).index(k)]) for k in range(len(heights))]


def name_ends(
    axes: Axes, ends: list[tuple[str, str, float, float]], least: float = 0.065, size: float = 7.5
) -> None:
    """Names lines beside their right ends, `least` of the axes apart: name, colour, x and y of each end.

    The axes' scales and limits have to be set.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = apart([float(to_axes.transform((x, y))[1]) for _, _, x, y in ends], least)
    for (name, colour, x, y), height in zip(ends, heights, strict=True):
        leader = {"arrowstyle": "-", "lw": 0.5, "color": colour, "relpos": (0, 0.5), "shrinkB": 0}
        axes.annotate(name, (x, y), xytext=(1.03, height), textcoords="axes fraction", color=colour,
                      va="center", fontsize=size, weight="bold", annotation_clip=False,
                      arrowprops=leader)  # fmt: skip


def symmetric(axes: Axes) -> None:
    """Zero in the middle, so that a gain and a loss of the same size look the same."""
    drawn = [abs(x) for x in axes.dataLim.intervalx if np.isfinite(x)]  # infinite where nothing is drawn
    reach = 1.08 * max([1.0, *drawn])
    axes.set_xlim(-reach, reach)


def panels(
    rows: int,
    widths: list[float],
    height: float,
    caption: str,
    left: float = 0.55,
    right: float = 0.55,
    gap: float = 0.3,
    between: float = 0.0,
) -> tuple[Figure, Any]:
    """A figure with its caption and a (rows, len(widths)) array of axes, each `height` tall; all in inches,
    but `between`, which is a share of a panel's width.

    Laid out by hand: an automatic layout moves with the length of a label, so no two runs look alike.
    """
    lines = textwrap.wrap(caption, 132)
    bottom, top = 0.5 + 0.135 * len(lines), 0.3
    full = bottom + rows * height + (rows - 1) * gap + top
    figure = Figure(figsize=(WIDTH, full))
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    figure.subplots_adjust(
        left=left / WIDTH, right=1 - right / WIDTH, bottom=bottom / full, top=1 - top / full,
        hspace=gap / height, wspace=between,
    )  # fmt: skip
    figure.text(
        0.1 / WIDTH, 0.06 / full, "\n".join(lines), ha="left", va="bottom", fontsize=6.8, color="#444444"
    )
    return figure, axes


def notice(message: str, caption: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    with style():
        figure, axes = panels(1, [1], 0.8, caption)
        axes[0, 0].set_axis_off()
        axes[0, 0].text(0.5, 0.5, message, ha="center", fontsize=10, weight="bold")
    return figure
