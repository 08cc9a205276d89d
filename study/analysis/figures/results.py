"""Arms side by side: accuracy on the left, paired difference on the right, one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.analysis.figures.style import COLOURS, NEUTRAL, draw_interval, notice, panels, style, symmetric
from study.analysis.look import arm_name, label, model_label, rows_of, size

READING = (
    "Left: accuracy, 95 % Wilson interval. Right: difference to {} on the same samples, paired 95 % "
    "interval; beside it samples gained, lost."
)
PAPER = " Diamonds, a little lower: the paper's (Qwen2.5-1.5B-Instruct, exact)."
Line = tuple[str, Mapping[str, Any], str]  # its name, the table's row, the prefix of the difference's columns


def main_results_figure(table: pd.DataFrame) -> Figure:
    """Table 1 as a picture: accuracy of each arm (left), difference to base on the same samples (right)."""
    there = table[table["accuracy"].notna()]
    groups = dict(
        _counted(label(str(benchmark)), rows, _lines(rows, there))
        for benchmark, rows in there.groupby("benchmark", sort=False)
    )
    return forest(groups, READING.format("base") + PAPER, "No benchmark was scored")


def figure2_methods(table: pd.DataFrame) -> Figure:
    """Figure 2, left: ways of learning on one benchmark, each against base; notebook 03's `table`."""
    there = table[table["accuracy"].notna()]
    caption = READING.format("base") + (PAPER if there["paper"].notna().any() else "")
    for note, rows in table[table["accuracy"].isna()].groupby("note", sort=False):
        caption += f" {str(note)[0].upper()}{str(note)[1:]}: {', '.join(rows['arm'])}."
    lines = _lines(there, there)
    groups = dict([_counted(label(table["benchmark"].iloc[0]), there, lines)]) if lines else {}
    return forest(groups, caption, "No arm was scored")


def figure3_model_size(table: pd.DataFrame) -> Figure:
    """Figure 3: base and tt_si per model size, the paper's two models below; notebook 06's `table`."""
    groups = {}
    there = table[table["accuracy"].notna() | table["paper"].notna()]
    for model, rows in there.groupby("model", sort=False):
        name, ours = model_label(str(model)).partition(",")[0], rows[rows["accuracy"].notna()]
        heading, lines = _counted(name, ours, _lines(rows, table))
        groups[heading if len(ours) else f"{name} (the paper's)"] = lines
    absent = table.loc[table["accuracy"].isna() & table["paper"].isna(), "model"]
    caption = "All of ours on the same samples. " + READING.format("the same model's base")
    caption += " Quantised models: Q4_K_M, dequantised."
    if table["paper"].notna().any():
        caption += " Diamonds: the paper's numbers, original tool order, exact, 5 seeds."
    caption += f" Not run in this profile: {', '.join(map(model_label, absent))}." if len(absent) else ""
    return forest(groups, caption, "No model was scored")


def figure_controls(table: pd.DataFrame) -> Figure:
    """What the gain is made of: each control's accuracy and its paired difference to tt_si."""
    there = table[table["accuracy"].notna()].fillna({"asks": "", "variant": "", "mode": "none"})
    control, other = there["asks"] != "", there["variant"] != ""
    groups: dict[str, list[Line]] = {}
    for heading, mask in (
        ("The method", ~control & ~other),
        ("Control arms", control & ~other),
        ("Other settings", other),
    ):
        for row in rows_of(there[mask]):
            name = str(row["control"]) + ("" if row["arm"] in str(row["control"]) else f", {row['arm']}")
            name += "".join(f", {row[k]}" for k in ("mode", "inference") if row[k] not in ("none", "direct"))
            prefix = "base_" if row["arm"] == "base" else "tt_si_"
            groups.setdefault(heading, []).append((f"{name} ({row['n']})", row, prefix))
    against = "tt_si in the same mode (base under another setting: to base)"
    caption = READING.format(against) + " In brackets: n."
    return forest(groups, caption, "No control was scored", "Difference to tt_si")


def figure_grammar(table: pd.DataFrame) -> Figure:
    """What is left beside a grammar of the tools, by benchmark and model; notebook 11's `table`."""
    there = table[table["accuracy"].notna()].assign(arm=table["name"])
    groups = {}
    for (model, benchmark), rows in there.groupby(["model", "benchmark"], sort=False):
        name = f"{label(str(benchmark))}, {size(str(model))}"
        heading, lines = _counted(name, rows, [(str(r["arm"]), r, "grammar_") for r in rows_of(rows)])
        groups[heading] = lines
    caption = READING.format("constrained, the base model under the grammar,")
    caption += " In brackets, where it differs: n."
    return forest(groups, caption, "No answer was given under a grammar", "Difference to constrained")


def _lines(rows: pd.DataFrame, table: pd.DataFrame) -> list[Line]:
    """A line per row, named by its arm, and by inference and mode where the table holds more than one."""
    inferences = table["inference"].nunique() if "inference" in table else 1
    modes = table.loc[~table["mode"].isin(["none"]), "mode"].nunique()
    lines: list[Line] = []
    for row in rows_of(rows):
        name = arm_name(row) + (f", {row['inference']}" if inferences > 1 else "")
        lines.append((name + (f", {row['mode']}" if row["mode"] != "none" and modes > 1 else ""), row, ""))
    return lines


def _counted(heading: str, rows: pd.DataFrame, lines: list[Line]) -> tuple[str, list[Line]]:
    """The heading with the rows' n; where it isn't the same for all, each line has its own in brackets."""
    if rows["n"].nunique() == 1:
        return f"{heading}, n = {rows['n'].iloc[0]}", lines
    return heading, [
        (f"{name} ({row['n']})" if pd.notna(row["n"]) else name, row, p) for name, row, p in lines
    ]


def forest(
    groups: Mapping[str, Sequence[Line]], caption: str, nothing: str, difference: str = "Difference to base"
) -> Figure:
    """Headed groups of lines, one below the other; `nothing` is what an empty figure says.

    The width of the names' column follows from the longest.
    """
    if not groups:
        return notice(nothing, caption)
    names = [name for lines in groups.values() for name, _, _ in lines]
    left = max(1.25, 0.2 + 0.056 * max(map(len, names)))
    with style():
        tall = 0.2 * len(names) + 0.26 * len(groups)
        figure, grid = panels(1, [1.35, 1], tall, caption, left=left, right=0.6, between=0.08)
        accuracy, differences = grid[0]
        height, ticks = 0.6, []
        for heading, lines in groups.items():
            height += 0.4
            accuracy.annotate(heading, (0, height), xycoords=("axes fraction", "data"), xytext=(4, 0),
                              textcoords="offset points", weight="bold", va="center")  # fmt: skip
            for axes in (accuracy, differences):
                axes.axhline(height - 0.55, color="#cccccc", lw=0.7)
            height += 0.85
            for _, row, prefix in lines:
                _draw(accuracy, differences, row, prefix, height)
                ticks.append(height)
                height += 1
        accuracy.set(xlim=(0, 100), xlabel="accuracy, %", title="Accuracy", xticks=range(0, 100, 20))
        accuracy.set_yticks(ticks, names)
        for axes in (accuracy, differences):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(height - 0.35, 0.45)
        symmetric(differences)
        differences.axvline(0, color="#444444", lw=0.9)
        differences.set(xlabel=f"{difference[0].lower()}{difference[1:]}, points", title=difference)
        differences.annotate("gained, lost", (1, 1), xytext=(1, 4), xycoords="axes fraction", fontsize=6.5,
                             textcoords="offset points", color="#444444", annotation_clip=False)  # fmt: skip
        differences.set_yticks([])
    return figure


def _draw(accuracy: Axes, differences: Axes, row: Mapping[str, Any], prefix: str, height: float) -> None:
    colour = COLOURS.get(row["arm"], NEUTRAL)
    for axes, column, ends, paper in (
        (accuracy, "accuracy", ("low", "high"), "paper"),
        (differences, f"{prefix}difference", (f"{prefix}difference_low", f"{prefix}difference_high"),
         "paper_difference"),
    ):  # fmt: skip
        if pd.notna(row[column]):
            draw_interval(axes, row[column], row[ends[0]], row[ends[1]], height, colour)
        if pd.notna(row.get(paper)):
            axes.plot(row[paper], height + 0.24, "D", ms=4.2, mfc="white", mec=colour, mew=1.2, zorder=3)
    gained, lost = row[f"{prefix}gained"], row[f"{prefix}lost"]
    if pd.notna(gained):
        differences.annotate(f"+{gained:g} −{lost:g}", (1, height), xytext=(3, 0), fontsize=7,
                             xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                             color=colour, annotation_clip=False)  # fmt: skip
