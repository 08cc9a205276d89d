"""Curves: accuracy against threshold and training samples, and costs against queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.analysis.figures.style import COLOURS, NEUTRAL, apart, notice, panels, style
from study.analysis.look import label, rows_of

DASHES = {"exact": "-", "activated": (0, (4, 1.5))}
# Told apart in greyscale too: each set of prices has its own dash.
PRICE_STYLES = (("#0072b2", "-"), ("#56b4e9", (0, (4, 1.5))), ("#d55e00", (0, (1, 1.2))))


def figure_threshold(curve: pd.DataFrame, tau: float = 0.95) -> Figure:
    """Accuracy and share adapted against tau, one line per mode; from `tables.threshold_curve`."""
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
    with style():
        figure, grid = panels(1, [1, 1, 1], 1.9, caption, between=0.42, right=0.15)
        for axes, (column, name) in zip(grid[0], drawn.items(), strict=True):
            for mode, rows in curve.groupby("mode", sort=False):
                style_of = {"color": COLOURS["tt_si"], "ls": DASHES.get(str(mode), ":"), "lw": 1.4}
                values = rows[column].fillna(0) if column == "difference" else rows[column]
                axes.plot(rows["tau"], values, drawstyle="steps-post", label=mode, **style_of)
                low, high = {
                    "accuracy": ("low", "high"),
                    "difference": ("difference_low", "difference_high"),
                }.get(column, (None, None))
                if low and high:
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
    """Figure 2, right: accuracy against the number of training samples; from `tables.scaling_curves`."""
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
    n = int(base["n"].iloc[0])
    with style():
        figure, grid = panels(1, [1], 2.7, f"n = {n} samples at every point. " + caption, right=1.75)
        axes = grid[0, 0]
        row = base.iloc[0]
        axes.axhspan(row["low"], row["high"], color=COLOURS["base"], alpha=0.07, lw=0)
        axes.axhline(row["accuracy"], color=COLOURS["base"], lw=1.1, ls=(0, (1, 1.2)))
        most = max(2, int(there["training_samples"].max()))
        ends = [("base", float(row["accuracy"]), COLOURS["base"], float(most))]
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
        edge = 1.06 * max(e[3] for e in ends)
        axes.set(ylim=(bottom, top), xlim=(0.9, edge), xlabel="training samples (log scale)")
        axes.set_ylabel("accuracy, % (axis cut)")
        axes.set_title(label(table["benchmark"].iloc[0]))
        heights = apart([e[1] for e in ends], 0.065 * (top - bottom), top)
        for (name, value, colour, x), height in zip(ends, heights, strict=True):
            leader = {"arrowstyle": "-", "lw": 0.5, "color": colour, "relpos": (0, 0.5), "shrinkB": 0}
            axes.annotate(name, (x, value), xytext=(edge * 1.12, height), textcoords="data", color=colour,
                          va="center", weight="bold", fontsize=7.5, annotation_clip=False,
                          arrowprops=leader)  # fmt: skip
    return figure


def _scaling_line(
    axes: Axes, arm: str, mode: str, rows: pd.DataFrame, shift: float
) -> tuple[float, str, float]:
    """Draws one arm; its last value, colour and x. `shift`: where the bar of a curve's end stands, × x."""
    colour, x = COLOURS.get(arm, NEUTRAL), rows["training_samples"].astype(float)
    axes.plot(x, rows["accuracy"], color=colour, ls=DASHES.get(mode, "-"), lw=1.5)
    if rows["order_low"].notna().any():
        axes.fill_between(x, rows["order_low"], rows["order_high"], color=colour, alpha=0.22, lw=0)
        rows, x = rows.iloc[-1:], x.iloc[-1:] * shift
    spread = [rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]
    axes.errorbar(x, rows["accuracy"], yerr=spread, fmt="o", ms=3.5, color=colour, elinewidth=0.9)
    return float(rows["accuracy"].iloc[-1]), colour, float(x.iloc[-1])


def figure_break_even(curves: pd.DataFrame) -> Figure:
    """After how many queries SFT is cheaper: total seconds (left), break-even by share uncertain (right)."""
    caption = (
        "Left: solid and dashed rising lines, TT-SI; lines that begin flat, SFT (training once, then base "
        "answers); "
        "dots: where they meet. Right: that number of queries against the share of queries called "
        "uncertain; dots: "
        "the share seen. No interval: each line is arithmetic on the mean seconds of the table above. "
        "Assumed: "
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
                at = rows["sft_seconds"].iloc[0] + meet * rows["base_seconds"].iloc[0]
                left.plot(meet, at, "o", color=colour, ms=5, zorder=4)
                right.plot(100 * totals["share"].iloc[0], meet, "o", color=colour, ms=5, zorder=4)
            finite = shares[np.isfinite(shares["break_even"])]
            right.plot(100 * finite["share"], finite["break_even"], color=colour, ls=dash, lw=1.5)
        left.set(xscale="log", yscale="log", xlabel="queries", title="Total seconds", ylabel="seconds")
        right.set(yscale="log", xlim=(0, 100), xlabel="queries called uncertain, %")
        right.set(title="Queries until SFT is cheaper", ylabel="queries")
        left.legend(loc="upper left", handlelength=2.6)
    return figure


def figure_costs(table: pd.DataFrame, stages: Sequence[str] = ("h", "g", "t", "answer")) -> Figure:
    """Seconds per stage of an uncertain sample, stacked, per benchmark and mode; the base answer beside."""
    whole = table[(table["stage"] == "uncertain") & table["seconds"].notna()]
    caption = (
        "Mean seconds per sample (its share of its batch), direct answers. Bars: H, G, T and the adapted "
        "answer of uncertain samples; whisker: 95 % t interval of their sum, where two batches or more were "
        "timed. Diamonds: one base answer on the same benchmark. "
        "Hatching tells the stages apart in greyscale."
    )
    if whole.empty:
        return notice("No sample was adapted", caption)
    shades = {"h": "#cfe3f1", "g": "#8fbfdf", "t": "#3c86bd", "answer": "#0b4f80"}
    hatches = {"h": "...", "g": "///", "t": "", "answer": "xx"}
    with style():
        figure, grid = panels(1, [1], 0.3 * len(whole), caption, left=1.75, right=0.9)
        axes = grid[0, 0]
        for height, r in enumerate(rows_of(whole)):
            same = table[(table["benchmark"] == r["benchmark"]) & (table["mode"] == r["mode"])].set_index(
                "stage"
            )
            start = 0.0
            for stage in stages:
                wide = float(same.at[stage, "seconds"])
                name = stage if stage == "answer" else stage.upper()
                axes.barh(
                    height,
                    wide,
                    0.62,
                    left=start,
                    color=shades[stage],
                    hatch=hatches[stage],
                    ec="white",
                    lw=0.4,
                    label=None if height else name,
                )
                start += wide
            axes.plot([r["seconds_low"], r["seconds_high"]], [height] * 2, color=NEUTRAL, lw=1)
            base = table[(table["benchmark"] == r["benchmark"]) & (table["stage"] == "base")]["seconds"]
            axes.plot(base, [height] * len(base), "D", ms=5, mfc="white", mec=COLOURS["base"], mew=1.2)
            axes.annotate(f"n = {r['n']}", (1.01, height), xycoords=("axes fraction", "data"), va="center",
                          fontsize=7.5, annotation_clip=False)  # fmt: skip
        names = [f"{label(r['benchmark'])}, {r['mode']}" for r in rows_of(whole)]
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="seconds per sample")
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure
