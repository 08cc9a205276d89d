"""Figure 5: where the synthetic questions lie beside the questions they were made from."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.analysis.figures.style import COLOURS, NEUTRAL, notice, panels, style
from study.analysis.look import in_order, label
from study.analysis.synthetic import Projection

HOW = {"pca": "the first two principal components", "tsne": "t-SNE from a PCA start"}


def figure5_embeddings(points: pd.DataFrame, projection: Projection = "pca") -> Figure:
    """Per benchmark: the questions in 2-D, a line from each seed to its synthetic questions (left); their
    cosine distances to their own and to another seed, as cumulative shares (right).

    `points`: from `synthetic.laid_out`.
    """
    drawn = [b for b in in_order(points["benchmark"]) if (points["benchmark"] == b).sum() > 2]
    caption = (
        f"Left: mean-pooled hidden states of the model, {HOW[projection]}; a line joins each synthetic "
        "question to its "
        "seed; the axes have no unit. Right: cosine distance over all stored components, cumulative; own: "
        "to the "
        "question it was made from, other: to one of another sample. n: synthetic questions."
    )
    if not drawn:
        return notice("No embedding is stored", caption)
    with style():
        figure, grid = panels(len(drawn), [1.25, 1], 2.3, caption, gap=0.55, right=0.15, between=0.18)
        for (left, right), benchmark in zip(grid, drawn, strict=True):
            mine = points[points["benchmark"] == benchmark]
            seeds, made = mine[mine["kind"] == "seed"], mine[mine["kind"] != "seed"]
            pairs = made.merge(
                seeds[["sample", "seed", "x", "y"]], on=["sample", "seed"], suffixes=("", "_of")
            )
            left.plot(np.stack([pairs["x_of"], pairs["x"]]), np.stack([pairs["y_of"], pairs["y"]]),
                      color="#999999", lw=0.5, zorder=1)  # fmt: skip
            left.plot(seeds["x"], seeds["y"], "o", ms=3.6, mfc="white", mec=NEUTRAL, mew=0.9,
                      label="seed question")  # fmt: skip
            left.plot(made["x"], made["y"], "x", ms=3.8, mew=1, color=COLOURS["tt_si"],
                      label="synthetic question")  # fmt: skip
            left.set(xticks=[], yticks=[], title=label(benchmark))
            left.margins(0.06)
            left.legend(loc="best", handletextpad=0.2)
            n = int(made["own"].notna().sum())
            for column, name, colour, dash in (
                ("own", "own seed", COLOURS["tt_si"], "-"),
                ("other", "another's seed", NEUTRAL, (0, (4, 1.5))),
            ):
                values = made[column].dropna()
                if len(values):
                    right.ecdf(values, color=colour, ls=dash, label=name)
            right.set(ylim=(0, 1), xlabel="cosine distance", ylabel="synthetic questions, %")
            right.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}")
            right.set_title(f"n = {n}", loc="right", fontsize=7.5, weight="normal", color="#444444")
            right.set_xlim(left=0)
            if right.get_lines():
                right.legend(loc="lower right", handlelength=2.4)
    return figure
