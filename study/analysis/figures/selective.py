"""How nearly q is a probability of being right, and how certain answers must be to be few and right."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.analysis.figures.style import NEUTRAL, panels, style
from study.analysis.look import ARMS, label

LINES = {"q": (ARMS["tt_si"], "-", "q"), "margin": (NEUTRAL, "--", "margin")}


def figure_selective(
    bins: Mapping[str, pd.DataFrame], curves: Mapping[tuple[str, str], pd.DataFrame]
) -> Figure:
    """Per benchmark, above: share of right base answers by tenth of q; below: risk by coverage of each H.

    bins: by benchmark, of `selective.reliability`. curves: by benchmark and H, of `selective.risk_coverage`.
    """
    caption = (
        "Base answers. Above: share of right answers (95 % Wilson intervals) by tenth of q, the answer's "
        "likelihood; n beside each point; on the diagonal q is the probability of being right. Below: the "
        "share of wrong answers among those kept, by the share kept when the least certain are dropped first."
    )
    with style():
        figure, (above, below) = panels(2, [1] * len(bins), 1.7, caption, gap=0.55, between=0.25)
        for axes, (benchmark, points) in zip(above, bins.items(), strict=True):
            axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8)
            error = np.abs(points[["right_low", "right_high"]].to_numpy().T - points["right"].to_numpy())
            axes.errorbar(points["q"], points["right"], error, fmt="o", ms=3, lw=0.8, color=ARMS["tt_si"])
            for x, y, n in zip(points["q"], points["right_high"], points["n"], strict=True):
                axes.annotate(
                    str(n), (x, y), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=5.5
                )
            axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.15), xlabel="q")
            axes.set_title(label(benchmark))
        for axes, benchmark in zip(below, bins, strict=True):
            for name, (colour, dash, said) in LINES.items():
                curve = curves[benchmark, name]
                axes.step(
                    curve["coverage"], curve["risk"], where="post", color=colour, ls=dash, lw=1.2, label=said
                )
            axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="share kept")
        for axes in (*above[1:], *below[1:]):
            axes.tick_params(labelleft=False)
        above[0].set_ylabel("right")
        below[0].set_ylabel("wrong among kept")
        below[-1].legend(loc="upper right")
    return figure


def figure_acceptance(changed: Mapping[str, pd.DataFrame], factor: float) -> Figure:
    """By set, how much likelier the adapted answers are that gain and that lose: of `acceptance.changed`."""
    caption = (
        "Adapted answers where q < ½ that change the verdict. q′ / q: how many times likelier the adapted "
        "answer is to its model than the base answer to its own; beyond the frame at its edge. Selective "
        f"TT-SI refuses what is left of 1; the dashed line is at {factor:g}."
    )
    least, most = 1 / 8, 64
    with style():
        figure, [[axes]] = panels(1, [1], 0.35 + 0.42 * len(changed), caption, left=1.3)
        for row, rows in enumerate(changed.values()):
            for gained, colour, side in ((True, ARMS["tt_si"], -1), (False, ARMS["tt_d"], 1)):
                own = np.sort(rows.loc[rows["gained"] == gained, "raised"].clip(least, most))
                spread = 0.06 + 0.05 * (np.arange(len(own)) % 6)
                axes.plot(
                    own, row + side * spread, "o", ms=2.5, color=colour, mew=0, alpha=0.8,
                    label=("gained" if gained else "lost") if not row else None,
                )  # fmt: skip
        for at, dash in ((1, "-"), (factor, "--")):
            axes.axvline(at, color=NEUTRAL, lw=0.8, ls=dash, zorder=0)
        axes.set_xscale("log", base=2)
        ticks = [least, 0.25, 0.5, 1, 2, 4, 8, 16, 32, most]
        axes.set(xlim=(least * 0.85, most * 1.2), ylim=(len(changed) - 0.5, -0.5), xlabel="q′ / q")
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_yticks(range(len(changed)), list(changed))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
    return figure
