"""Arms side by side: accuracy on the left, paired difference on the right, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.analysis.figures.style import COLOURS, NEUTRAL, draw_interval, notice, panels, style, symmetric
from study.analysis.look import arm_name, in_order, label, model_label, rows_of

READING = (
    "Left: accuracy, 95 % Wilson interval. Right: difference to {against} on the same samples, paired 95 % "
    "interval; beside it samples gained, lost."
)
PAPER = " Diamonds, a little lower: the paper's ({model}, exact)."


@dataclass(frozen=True)
class Line:
    """One row to draw: its name, and the table's cells under `prefix` for the difference."""

    name: str
    row: Mapping[str, Any]
    prefix: str = ""


def main_results_figure(table: pd.DataFrame) -> Figure:
    """Table 1 as a picture: accuracy of each arm (left), difference to base on the same samples (right)."""
    there = table[table["accuracy"].notna()]
    groups = []
    for benchmark in in_order(there["benchmark"]):
        rows = there[there["benchmark"] == benchmark]
        lines = [Line(_arm(row, there), row) for row in rows_of(rows)]
        groups.append((f"{label(benchmark)}, n = {rows['n'].iloc[0]}", lines))
    caption = READING.format(against="base") + PAPER.format(model="Qwen2.5-1.5B-Instruct")
    return results_figure(groups, caption, "No benchmark was scored")


def figure2_methods(table: pd.DataFrame) -> Figure:
    """Figure 2, left: ways of learning on one benchmark, each against base; from `tables.methods_table`."""
    there = table[table["accuracy"].notna()]
    lines = [Line(_arm(row, there), row) for row in rows_of(there)]
    n = "" if there.empty else f", n = {there['n'].max()}"
    caption = READING.format(against="base")
    if there["paper"].notna().any():
        caption += PAPER.format(model="Qwen2.5-1.5B-Instruct")
    caption += _absent(table)
    name = label(table["benchmark"].iloc[0])
    return results_figure([(name + n, lines)] if lines else [], caption, "No arm was scored")


def _absent(table: pd.DataFrame) -> str:
    """A sentence that names the arms without an answer, and why; empty if there are none."""
    why: dict[str, list[str]] = {}
    for r in rows_of(table[table["accuracy"].isna()]):
        why.setdefault(str(r["note"]), []).append(str(r["arm"]))
    return "".join(f" {note[0].upper()}{note[1:]}: {', '.join(arms)}." for note, arms in why.items())


def figure3_model_size(table: pd.DataFrame) -> Figure:
    """Figure 3: base and tt_si per model size, from `tables.sizes_table`; the paper's two models below."""
    groups = []
    for model in dict.fromkeys(table["model"].dropna()):
        rows = table[(table["model"] == model) & (table["accuracy"].notna() | table["paper"].notna())]
        ours = rows[rows["accuracy"].notna()]
        if rows.empty:
            continue
        n = f", n = {ours['n'].max()}" if len(ours) else " (the paper's)"
        groups.append(
            (model_label(model).partition(",")[0] + n, [Line(_arm(r, table), r) for r in rows_of(rows)])
        )
    absent = table.loc[table["accuracy"].isna() & table["paper"].isna(), "model"]
    caption = "All of ours on the same samples. " + READING.format(against="the same model's base")
    caption += " Quantised models: Q4_K_M, dequantised."
    if table["paper"].notna().any():
        caption += " Diamonds: the paper's numbers, original tool order, exact, 5 seeds."
    caption += f" Not run in this profile: {', '.join(map(model_label, absent))}." if len(absent) else ""
    return results_figure(groups, caption, "No model was scored")


def figure_controls(table: pd.DataFrame) -> Figure:
    """What the gain is made of: each control's accuracy and its paired difference to tt_si."""
    there = table[table["accuracy"].notna()]
    groups: list[tuple[str, list[Line]]] = []
    for heading, rows in (
        ("The method", there[there["asks"].astype(object).fillna("") == ""]),
        (
            "Control arms",
            there[
                (there["asks"].astype(object).fillna("") != "")
                & (there["variant"].astype(object).fillna("") == "")
            ],
        ),
        ("Other settings", there[there["variant"].astype(object).fillna("") != ""]),
    ):
        lines = []
        for row in rows_of(rows):
            name = (
                str(row["control"])
                if row["arm"] in str(row["control"])
                else f"{row['control']}, {row['arm']}"
            )
            name += "" if row["mode"] in ("none", None) else f", {row['mode']}"
            name += "" if row["inference"] == "direct" else f", {row['inference']}"
            lines.append(Line(f"{name} ({row['n']})", row, "base_" if row["arm"] == "base" else "tt_si_"))
        if lines:
            groups.append((heading, lines))
    against = "tt_si in the same mode (base under another setting: to base)"
    caption = READING.format(against=against) + " In brackets: n."
    return results_figure(groups, caption, "No control was scored", "Difference to tt_si")


def results_figure(
    groups: Sequence[tuple[str, Sequence[Line]]],
    caption: str,
    nothing: str,
    difference: str = "Difference to base",
) -> Figure:
    """Headed groups of lines, one below the other; `nothing` is what an empty figure says.

    The width of the names' column follows from the longest.
    """
    if not groups:
        return notice(nothing, caption)
    count = sum(len(lines) for _, lines in groups)
    left = max(1.25, 0.2 + 0.056 * max(len(line.name) for _, lines in groups for line in lines))
    with style():
        tall = 0.2 * count + 0.26 * len(groups)
        figure, grid = panels(1, [1.35, 1], tall, caption, left=left, right=0.6, between=0.08)
        accuracy, differences = grid[0]
        height, ticks = 0.6, []
        for heading, lines in groups:
            height += 0.4
            accuracy.annotate(heading, (0, height), xycoords=("axes fraction", "data"), xytext=(4, 0),
                              textcoords="offset points", weight="bold", va="center")  # fmt: skip
            for axes in (accuracy, differences):
                axes.axhline(height - 0.55, color="#cccccc", lw=0.7)
            height += 0.85
            for line in lines:
                _draw(accuracy, differences, line, height)
                ticks.append((height, line.name))
                height += 1
        accuracy.set(xlim=(0, 100), xlabel="accuracy, %", title="Accuracy")
        accuracy.set_yticks([t for t, _ in ticks], [name for _, name in ticks])
        for axes in (accuracy, differences):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(height - 0.35, 0.45)
        symmetric(differences)
        differences.axvline(0, color="#444444", lw=0.9)
        differences.set(xlabel=f"{difference[0].lower()}{difference[1:]}, points", title=difference)
        differences.set_title(
            "gained, lost", loc="right", fontsize=7, weight="normal", color="#444444", x=1.22
        )
        differences.set_yticks([])
    return figure


def _arm(row: Mapping[str, Any], table: pd.DataFrame) -> str:
    """The arm, with inference and mode where the table holds more than one of them."""
    parts = [arm_name(row)]
    if "inference" in table and table["inference"].nunique() > 1:
        parts.append(str(row["inference"]))
    adapted = table[~table["mode"].isin(["none", None]) & table["mode"].notna()]
    if row["mode"] != "none" and adapted["mode"].nunique() > 1:
        parts.append(str(row["mode"]))
    return ", ".join(parts)


def _draw(accuracy: Axes, differences: Axes, line: Line, height: float) -> None:
    row, colour = line.row, COLOURS.get(line.row["arm"], NEUTRAL)
    diamond: Mapping[str, Any] = {
        "marker": "D",
        "ms": 4.2,
        "mfc": "white",
        "mec": colour,
        "mew": 1.2,
        "zorder": 3,
    }
    if pd.notna(row["accuracy"]):
        draw_interval(accuracy, row["accuracy"], row["low"], row["high"], height, colour)
    if pd.notna(row.get("paper")):
        accuracy.plot(row["paper"], height + 0.24, **diamond)
    if pd.notna(row.get("paper_difference")):
        differences.plot(row["paper_difference"], height + 0.24, **diamond)
    value, low, high, gained, lost = _cells(
        row, line.prefix, ("difference", "difference_low", "difference_high", "gained", "lost")
    )
    if pd.notna(value):
        draw_interval(differences, value, low, high, height, colour)
    if pd.notna(gained):
        differences.annotate(f"+{gained} −{lost}", (1, height), xytext=(3, 0), fontsize=7,
                             xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                             color=colour, annotation_clip=False)  # fmt: skip


def _cells(row: Mapping[str, Any], prefix: str, names: Iterable[str]) -> list[Any]:
    return [row.get(f"{prefix}{name}") for name in names]
