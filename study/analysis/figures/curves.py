"""Curves: accuracy against threshold and training samples; costs, in base answers, against queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.analysis.figures.style import COLOURS, NEUTRAL, name_ends, notice, panels, style
from study.analysis.look import label, rows_of

DASHES = {"exact": "-", "activated": (0, (4, 1.5))}
SOURCES = {
    "machine": "This machine, measured",
    "paper": "The paper's A40",
    "estimate": "{gpu}, estimated",
    "gpu": "A GPU, measured",
}
# Told apart in greyscale too: each set of prices has its own dash.
PRICE_STYLES = (("#0072b2", "-"), ("#56b4e9", (0, (4, 1.5))), ("#d55e00", (0, (1, 1.2))))


def figure_threshold(curve: pd.DataFrame, tau: float = 0.95) -> Figure:
    """Accuracy and share adapted against tau, one line per mode; notebook 04's `curve`."""
    if curve.empty:
        return notice("No threshold could be tried: base or adapted answers are missing", "")
    n = int(curve["n"].max())
    caption = (
        f"{label(curve['benchmark'].iloc[0])}, direct answers, n = {n}: samples with margin < τ take their "
        "adapted answer, the others base's. Bands: left, 95 % Wilson interval of the accuracy; middle, "
        "paired 95 % "
        f"interval of the difference to base. Dotted line: τ = {tau:g}."
    )
    drawn = {
        "accuracy": "accuracy, %",
        "difference": "difference to base, points",
        "uncertain": "adapted, % of n",
    }
    ends = {"accuracy": ("low", "high"), "difference": ("difference_low", "difference_high")}
    with style():
        figure, grid = panels(1, [1, 1, 1], 1.9, caption, between=0.42, right=0.15)
        for axes, (column, name) in zip(grid[0], drawn.items(), strict=True):
            low, high = ends.get(column, (None, None))
            for mode, rows in curve.groupby("mode", sort=False):
                values = rows[column].fillna(0) if column == "difference" else rows[column]
                axes.plot(rows["tau"], values, drawstyle="steps-post", label=mode, color=COLOURS["tt_si"],
                          ls=DASHES.get(str(mode), ":"), lw=1.4)  # fmt: skip
                if low:
                    axes.fill_between(rows["tau"], rows[low], rows[high], step="post", color=COLOURS["tt_si"],
                                      alpha=0.12, lw=0)  # fmt: skip
            axes.axvline(tau, color="#888888", lw=0.9, ls=":")
            axes.set(xlim=(0, 1), xlabel="threshold τ", title=name)
        grid[0][0].set_ylim(0, 100)
        grid[0][0].legend(loc="upper left", handlelength=2.4)
        grid[0][1].axhline(0, color="#444444", lw=0.8)
        grid[0][2].set_ylim(0, 100)
    return figure


def figure2_scaling(table: pd.DataFrame) -> Figure:
    """Figure 2, right: accuracy against the number of training samples; notebook 05's `table`."""
    there = table[table["accuracy"].notna()]
    base = there[there["arm"] == "base"]
    absent = table.loc[table["accuracy"].isna(), "arm"].tolist()
    caption = (
        "Curves: that many uncertain samples take their adapted answer, the rest base's (mean of the orders; "
        "band: 2.5 to 97.5 % of the orders). Dots: one adapter trained on that many samples of a pool. Bars "
        "(a curve's: beside its end) and the grey band (base's): 95 % Wilson intervals. The accuracy axis "
        "is cut."
    )
    caption += f" Not run in this profile: {', '.join(absent)}." if absent else ""
    if base.empty or len(there) == 1:
        return notice("Too few arms were run to compare", caption)
    fewest, n = int(there["n"].min()), int(base["n"].iloc[0])
    counts = f"n = {n} samples at every point. "
    if fewest < n:
        counts = f"n = {n} samples of base, {fewest} or more at the other points. "
    with style():
        figure, grid = panels(1, [1], 2.7, counts + caption, right=1.75)
        axes = grid[0, 0]
        row = base.iloc[0]
        axes.axhspan(row["low"], row["high"], color=COLOURS["base"], alpha=0.07, lw=0)
        axes.axhline(row["accuracy"], color=COLOURS["base"], lw=1.1, ls=(0, (1, 1.2)))
        most = max(2, int(there["training_samples"].max()))
        ends = [("base", COLOURS["base"], float(most), float(row["accuracy"]))]
        several = (
            there.loc[there["arm"] != "base", ["arm", "mode"]].drop_duplicates()["arm"].duplicated().any()
        )
        for (arm, mode), rows in there[there["arm"] != "base"].groupby(["arm", "mode"], sort=False):
            name = f"{arm}, {mode}" if several else str(arm)
            ends.append((name, *_scaling_line(axes, str(arm), str(mode), rows, 1.06 ** len(ends))))
        axes.set_xscale("log", base=2)
        axes.set_xticks([2**i for i in range(int(np.log2(most)) + 1)])
        axes.xaxis.set_major_formatter("{x:g}")
        bottom, top = max(0, there["low"].min() - 3), min(100, there["high"].max() + 3)
        edge = 1.06 * max(e[2] for e in ends)
        axes.set(ylim=(bottom, top), xlim=(0.9, edge), xlabel="training samples (log scale)")
        axes.set_ylabel("accuracy, % (axis cut)")
        axes.set_title(label(table["benchmark"].iloc[0]))
        name_ends(axes, ends)
    return figure


def _scaling_line(
    axes: Axes, arm: str, mode: str, rows: pd.DataFrame, shift: float
) -> tuple[str, float, float]:
    """Draws one arm; colour, x and y of its end. `shift`: where the bar of a curve's end stands, × x."""
    colour, x = COLOURS.get(arm, NEUTRAL), rows["training_samples"].astype(float)
    axes.plot(x, rows["accuracy"], color=colour, ls=DASHES.get(mode, "-"), lw=1.5)
    if rows["order_low"].notna().any():
        axes.fill_between(x, rows["order_low"], rows["order_high"], color=colour, alpha=0.22, lw=0)
        rows, x = rows.iloc[-1:], x.iloc[-1:] * shift
    spread = [rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]
    axes.errorbar(x, rows["accuracy"], yerr=spread, fmt="o", ms=3.5, color=colour, elinewidth=0.9)
    return colour, float(x.iloc[-1]), float(rows["accuracy"].iloc[-1])


def figure_break_even(curves: pd.DataFrame) -> Figure:
    """When SFT is cheaper: cost in base answers by queries (left), break-even by share uncertain (right).

    `curves`: notebook 08's. A base answer is each set of prices' own, so that no seconds are compared.
    """
    caption = (
        "Left: solid and dashed rising lines, TT-SI; lines that begin flat, SFT (training once, then base "
        "answers); dots: where they meet. The unit is one base answer of the same prices: seconds of "
        "different machines compare with nothing. Right: that number of queries against the share of queries "
        "called uncertain; dots: the share seen. No interval: each line is arithmetic on means. Assumed: "
    )
    bases = curves.drop_duplicates("name")
    caption += "; ".join(f"{r['name']}: SFT {r['basis']}" for r in rows_of(bases)) + "."
    with style():
        figure, (row,) = panels(1, [1.2, 1], 2.4, caption, between=0.3, right=0.15)
        left, right = row
        for (name, rows), (colour, dash) in zip(
            curves.groupby("name", sort=False), PRICE_STYLES, strict=False
        ):
            totals, shares = rows[rows["panel"] == "queries"], rows[rows["panel"] == "share"]
            left.plot(totals["queries"], totals["tt_si"], color=colour, ls=dash, lw=1.5, label=name)
            left.plot(totals["queries"], totals["sft"], color=colour, ls=dash, lw=0.9)
            meet = totals["break_even"].iloc[0]
            if np.isfinite(meet):
                left.plot(meet, totals["training"].iloc[0] + meet, "o", color=colour, ms=5, zorder=4)
                right.plot(100 * totals["share"].iloc[0], meet, "o", color=colour, ms=5, zorder=4)
            finite = shares[np.isfinite(shares["break_even"])]
            right.plot(100 * finite["share"], finite["break_even"], color=colour, ls=dash, lw=1.5)
        left.set(xscale="log", yscale="log", xlabel="queries", title="Cost in base answers")
        right.set(yscale="log", xlim=(0, 100), xlabel="queries called uncertain, %")
        right.set(title="Queries until SFT is cheaper")
        left.legend(loc="upper left", handlelength=2.6)
    return figure


def figure_costs(table: pd.DataFrame, stages: Sequence[str] = ("pass", "h", "g", "t", "answer")) -> Figure:
    """The stages of an uncertain sample, stacked, in base answers of the same run; notebook 08's `cost`."""
    whole = table[(table["stage"] == "uncertain") & table["times_base"].notna()]
    caption = (
        "Mean cost of an uncertain sample, direct answers, in base answers (line at 1) of the same benchmark "
        "and run, at most: a base answer, which holds the pass over the prompt, H, G, T and the adapted "
        "answer. Whisker: 95 % t interval of the sum, where two batches or more were timed; base's mean is "
        "taken as it is. "
        "What another machine or other cores computed (the run's header says so) compares with no other bar."
    )
    caption += " Diamonds: the paper's, in its own base answers." if (whole["mode"] == "exact").any() else ""
    if whole.empty:
        return notice("No sample was adapted", caption)
    shades = {"pass": "#e4e4e4", "h": "#cfe3f1", "g": "#8fbfdf", "t": "#3c86bd", "answer": "#0b4f80"}
    hatches = {"pass": "\\\\\\", "h": "...", "g": "///", "t": "", "answer": "xx"}
    parts = table.pivot(index=["benchmark", "mode"], columns="stage", values="times_base")
    parts = parts.loc[list(zip(whole["benchmark"], whole["mode"], strict=True))]
    with style():
        figure, grid = panels(1, [1], 0.3 * len(whole), caption, left=1.75, right=0.9)
        axes, heights, start = grid[0, 0], np.arange(len(whole)), np.zeros(len(whole))
        for stage in stages:
            name = {"pass": "base answer", "answer": "answer"}.get(stage, stage.upper())
            axes.barh(heights, parts[stage], 0.62, left=start, color=shades[stage], hatch=hatches[stage],
                      ec="white", lw=0.4, label=name)  # fmt: skip
            start = start + parts[stage].to_numpy(float)
        for height, r in enumerate(rows_of(whole)):
            ends = [r["times_base"] * r[f"seconds_{end}"] / r["seconds"] for end in ("low", "high")]
            axes.plot(ends, [height] * 2, color=NEUTRAL, lw=1)
            axes.annotate(f"n = {r['n']}", (1.01, height), xycoords=("axes fraction", "data"), va="center",
                          fontsize=7.5, annotation_clip=False)  # fmt: skip
            if r["mode"] == "exact":
                axes.plot(r["paper_times_base"], height, "D", ms=5, mfc="white", mec=NEUTRAL, mew=1.2)
        axes.axvline(1, color=COLOURS["base"], lw=1.1)
        axes.set_yticks(heights, [f"{label(r['benchmark'])}, {r['mode']}" for r in rows_of(whole)])
        axes.set(ylim=(len(whole) - 0.5, -0.5), xlabel="cost of an uncertain sample, in base answers")
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.legend(ncols=5, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def figure_scale(lines: pd.DataFrame, gpu: str = "GPU") -> Figure:
    """Cost against queries, as a multiple of base answers' cost: a panel per source, a line per method.

    `lines`: notebook 08's; `gpu`: what the estimate is for. Both axes are logarithmic.
    """
    drawn = [s for s in SOURCES if (lines["source"] == s).any()]
    absent = [SOURCES[s].format(gpu=gpu) for s in SOURCES if s not in drawn]
    caption = (
        "What so many queries cost, as a multiple of as many base answers at the same rates: hours of "
        "different machines compare with nothing. Blue: TT-SI. SFT: its training once, then base answers; it "
        "meets base where the training no longer counts. No interval: each line is arithmetic on means; its "
        "assumptions stand under the table."
    )
    caption += f" No line without rates: {', '.join(absent)}." if absent else ""
    if not drawn:
        return notice("Nothing was timed", caption)
    with style():
        figure, (row,) = panels(1, [1] * len(drawn), 2.0, caption, between=0.48, right=0.75)
        for axes, source in zip(row, drawn, strict=True):
            ends = []
            for (arm, mode), line in lines[lines["source"] == source].groupby(["arm", "mode"], sort=False):
                colour, name = COLOURS[str(arm)], {"sft": "SFT", "tt_si": str(mode)}.get(str(arm), str(arm))
                x, y = line["queries"], line["times_base"]
                axes.plot(x, y, color=colour, ls=DASHES.get(str(mode), "-"), lw=1.5)
                ends.append((name, colour, float(x.iloc[-1]), float(y.iloc[-1])))
            top = 1.3 * float(lines["times_base"].max())
            axes.set(xscale="log", yscale="log", ylim=(0.8, top), xlabel="queries")
            axes.set_title(SOURCES[source].format(gpu=gpu))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.tick_params(labelleft=axes is row[0])
            name_ends(axes, ends, 0.075, 7)
        row[0].set_ylabel(f"times base answers, {label(lines['benchmark'].iloc[0])}")
    return figure
