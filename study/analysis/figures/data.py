"""Where the gold tool stands in the list."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from study.analysis.figures.style import NEUTRAL, draw_interval, notice, panels, style
from study.analysis.look import in_order, label, rows_of
from study.analysis.statistics import wilson


def gold_first_figure(positions: pd.DataFrame) -> Figure:
    """How often the gold tool is listed first, per benchmark and tool order; tick: chance.

    `positions`: notebook 00's.
    """
    colours = {"original": "#aa4499", "shuffled": "#44aa99"}  # no arm's
    there = positions[positions["n"] > 0]
    order = in_order(there["benchmark"])
    caption = (
        "Samples with two or more tools. Dots: share, with 95 % Wilson interval; ticks: what chance gives."
    )
    if not order:
        return notice("No sample has two or more tools", caption)
    with style():
        figure, grid = panels(1, [1], 0.5 * len(order), caption, left=1.5, right=0.6)
        axes = grid[0, 0]
        for row in rows_of(there):
            share = wilson(row["first"], row["n"])
            height = order.index(row["benchmark"]) + (0.17 if row["tool_order"] == "shuffled" else -0.17)
            colour = colours[row["tool_order"]]
            draw_interval(axes, 100 * share.value, 100 * share.low, 100 * share.high, height, colour)
            axes.plot(100 * row["chance"] / row["n"], height, "|", color=NEUTRAL, ms=9, mew=1.2, zorder=5)
            axes.annotate(row["tool_order"], (100 * share.high, height), xytext=(5, 0), color=colour,
                          textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
        sizes = there.groupby("benchmark")["n"].max()
        axes.set_yticks(range(len(order)), [f"{label(b)}, n = {sizes[b]}" for b in order])
        axes.set(xlim=(0, 100), ylim=(len(order) - 0.5, -0.5), xlabel="gold tool listed first, % of samples")
        axes.grid(axis="y", visible=False)
    return figure
