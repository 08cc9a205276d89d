"""Table 2: what the threshold is worth. Any tau, from stored answers and margins: nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import statistics
from study.analysis.statistics import TooFew
from study.analysis.tables import paper
from study.analysis.tables.layout import NOT_RUN, bracket, label, rows_of, spread, text
from study.analysis.tables.results import (
    DIFFERENCE,
    Answers,
    answers,
    difference_cells,
    percent,
    power_note,
    select,
    setting,
    settings_note,
    with_holm,
)

COLUMNS = [
    "benchmark", "mode", "rule", "tau", "n", "correct", "accuracy", "low", "high", "n_uncertain", "uncertain",
    "tpr", "tpr_low", "tpr_high", "fpr", "fpr_low", "fpr_high", *DIFFERENCE,
    "paper", "paper_uncertain", "paper_tpr", "paper_fpr", "model", "tool_order", "seeds", "setting", "note",
]  # fmt: skip


def table2_threshold(
    records: pd.DataFrame,
    taus: Sequence[float] = (0.35, 0.95),
    benchmark: str = "sealtool",
    tau: float = 0.95,
) -> pd.DataFrame:
    """Table 2: accuracy if only samples with margin < tau are adapted; per training mode.

    Rules: `base`; one row per entry of `taus`; `certain only` (adapts margin ≥ `tau` instead); `all`;
    `oracle`. A sample's adapted answer is tt_si_all's, else tt_si's where that adapted it; a rule that needs
    an answer which was never made says how many are missing, and is never guessed. `correct` and
    `n_uncertain`: means over seeds. TPR: share of wrong base answers flagged, FPR: of right ones.
    Differences to base are paired; `p_holm` over the rules of one mode.
    """
    mine = select(records, variant="", benchmark=benchmark, inference="direct")
    found = answers(mine)
    base = next((a for k, a in found.items() if k.arm == "base"), None)
    rows: list[dict[str, Any]] = []
    for key in [k for k in found if k.arm in ("tt_si_all", "tt_si")]:
        if base is None or any(r["mode"] == key.mode for r in rows):
            continue
        every = next((a for k, a in found.items() if k.arm == "tt_si_all" and k.mode == key.mode), None)
        some = next((a for k, a in found.items() if k.arm == "tt_si" and k.mode == key.mode), None)
        truth = next((a for k, a in found.items() if k.arm == "oracle" and k.mode == key.mode), None)
        sweep = Sweep(base, every, some)
        of_mode = [sweep.row("base", -np.inf)]
        of_mode += [sweep.row(f"{t:g}", t) | {"tau": t} for t in sorted(set(taus))]
        of_mode += [sweep.row("certain only", tau, invert=True) | {"tau": tau}, sweep.row("all", np.inf)]
        of_mode.append(sweep.other("oracle", truth))
        cells = {"n": len(sweep.base), "seeds": sweep.base.shape[1]}
        fixed = {"benchmark": benchmark, "mode": key.mode, "model": key.model, "tool_order": key.tool_order}
        whole = fixed | cells | {"setting": setting(key, cells)}
        rows += [whole | r | _paper(benchmark, r) for r in of_mode]
    if not rows:
        rows.append({"benchmark": benchmark, "rule": "base", "note": NOT_RUN})
    table = pd.DataFrame(rows, columns=COLUMNS)
    for _, of_mode in table[table["p"].notna()].groupby("mode"):  # type: ignore[assignment]
        table = with_holm(table, of_mode["p"].to_dict())  # type: ignore[call-overload]
    return table.astype(dict.fromkeys(["n", "pairs", "gained", "lost", "seeds"], "Int64"))


def threshold_curve(records: pd.DataFrame, benchmark: str = "sealtool", steps: int = 101) -> pd.DataFrame:
    """Accuracy and share adapted at `steps` values of tau from 0 to 1, and just above, per mode.

    A tau that needs answers which were never made has no row.
    """
    grid = [*np.round(np.linspace(0, 1, steps), 4), np.nextafter(1.0, 2)]
    table = table2_threshold(records, grid, benchmark)
    if "tau" not in table or table["tau"].isna().all():
        return table.iloc[:0]
    kept = table["tau"].notna() & (table["rule"] != "certain only") & table["accuracy"].notna()
    return table.loc[kept, ["benchmark", "mode", "tau", "n", "accuracy", "low", "high", "uncertain",
                            "difference", "difference_low", "difference_high"]]  # fmt: skip


class Sweep:
    """Base and adapted answers beside the margins, sample × seed; nan = not scored."""

    def __init__(self, base: Answers, every: Answers | None, some: Answers | None) -> None:
        rows = every.rows if every else some.rows[some.rows["uncertain"].astype(bool)] if some else None
        assert rows is not None
        margins = [a.rows.astype({"margin": float}).pivot(index="sample", columns="seed", values="margin")
                   for a in (some, every) if a]  # fmt: skip
        self.margin = margins[0].combine_first(margins[-1])
        # A machine failure was tried and leaves its sample out; what was not tried is unknown.
        tried = rows.assign(tried=True).pivot(index="sample", columns="seed", values="tried")
        self.base, self.margin = base.correct.align(self.margin, join="inner")
        scored = rows[rows["status"] == "ok"]
        values = scored.assign(correct=scored["correct"].astype(float))
        self.adapted = values.pivot(index="sample", columns="seed", values="correct").reindex_like(self.base)
        self.tried = tried.reindex_like(self.base).notna()

    def row(self, rule: str, tau: float, invert: bool = False) -> dict[str, Any]:
        """One rule's cells: adapt margin < tau, or with `invert` margin ≥ tau."""
        flagged = self.margin >= tau if invert else self.margin < tau
        known = self.margin.notna() & self.base.notna()
        if np.isinf(tau):  # no threshold, so no margin is needed
            flagged, known = flagged | (tau > 0), self.base.notna()
        unknown = int((flagged & known & ~self.tried).to_numpy().sum())
        if unknown:
            note = f"{NOT_RUN}: {unknown} of the {int((flagged & known).to_numpy().sum())} answers it needs"
            return {"rule": rule, "note": note}
        chosen = self.adapted.where(flagged, self.base).where(known)
        cells = {"rule": rule, "note": ""} | self._cells(chosen) | self._rates(flagged, known, invert)
        # Base beside itself is no comparison.
        return cells if tau > -np.inf else {k: v for k, v in cells.items() if k not in DIFFERENCE}

    def other(self, rule: str, there: Answers | None) -> dict[str, Any]:
        """The cells of another arm's answers on the same samples."""
        if there is None:
            return {"rule": rule, "note": NOT_RUN}
        return {"rule": rule, "note": ""} | self._cells(there.correct.reindex_like(self.base))

    def _cells(self, chosen: pd.DataFrame) -> dict[str, Any]:
        means = chosen.mean(axis=1).dropna()
        share = statistics.wilson(float(means.sum()), len(means))
        cells: dict[str, Any] = {"n": len(means), "correct": float(means.sum())}
        cells |= percent(share, "accuracy", "low", "high")
        try:
            paired = statistics.paired(self.base.to_numpy(), chosen.to_numpy())
        except TooFew:
            return cells
        return cells | difference_cells(paired)

    def _rates(self, flagged: pd.DataFrame, known: pd.DataFrame, invert: bool) -> dict[str, Any]:
        seeds = self.base.shape[1]
        adapted = (flagged & known).to_numpy().sum() / seeds
        cells = {"n_uncertain": adapted, "uncertain": 100 * adapted / max(1, known.to_numpy().sum() / seeds)}
        wrong, right = ((self.base == value) & known for value in (0, 1))
        if invert or not cells["n_uncertain"] > 0:
            return cells
        for name, group in (("tpr", wrong), ("fpr", right)):
            share = statistics.wilson(
                (flagged & group).to_numpy().sum() / seeds, group.to_numpy().sum() / seeds
            )
            cells |= percent(share, name, f"{name}_low", f"{name}_high")
        return cells


def _paper(benchmark: str, row: Mapping[str, Any]) -> dict[str, Any]:
    if benchmark != "sealtool" or row["rule"] not in paper.TABLE2:
        return {}
    accuracy, uncertain = paper.TABLE2[row["rule"]]
    cells: dict[str, Any] = {"paper": accuracy, "paper_uncertain": uncertain}
    for name, tau, tpr, fpr in paper.RATES:
        if name == benchmark and row["rule"] == f"{tau:g}":
            cells |= {"paper_tpr": 100 * tpr, "paper_fpr": 100 * fpr}
    return cells


def threshold_view(table: pd.DataFrame) -> pd.DataFrame:
    """Table 2 for reading; the paper's accuracy, TPR / FPR and number of uncertain samples beside ours."""
    rows = []
    for r in rows_of(table):
        there = pd.notna(r["accuracy"])
        n_uncertain = "" if pd.isna(r["n_uncertain"]) else f"{r['n_uncertain']:g} ({r['uncertain']:.0f} %)"
        theirs = "" if pd.isna(r["paper"]) else f"{r['paper']:.2f}"
        if pd.notna(r["paper_tpr"]):
            theirs += f"; TPR {r['paper_tpr']:.0f}, FPR {r['paper_fpr']:.0f}"
        if pd.notna(r["paper_uncertain"]):
            theirs += f"; {r['paper_uncertain']:.0f} uncertain"
        by_number = r["rule"] not in ("base", "certain only", "all", "oracle")
        rows.append({
            "mode": text(r["mode"]),
            "adapts": f"margin < {r['rule']}" if by_number else r["rule"],
            "n": text(r["n"]),
            "TPR %": spread(r, "tpr"),
            "FPR %": spread(r, "fpr"),
            "adapted": n_uncertain,
            "accuracy %": bracket(r["accuracy"], r["low"], r["high"]) if there else text(r["note"]),
            "− base, points": spread(r, "difference", sign="+"),
            "gained / lost": f"{r['gained']} / {r['lost']}" if pd.notna(r["gained"]) else "",
            "p": "" if pd.isna(r["p"]) else f"{r['p']:.3g}",
            "paper": theirs,
        })  # fmt: skip
    return pd.DataFrame(rows)


def threshold_caption(table: pd.DataFrame) -> str:
    """n, discordant counts, detectable difference and what differs from the paper's run."""
    reading = (
        f"{label(table['benchmark'].iloc[0])}, direct answers, by which samples are adapted. TPR: wrong base "
        "answers flagged, FPR: right ones flagged. Accuracy, TPR, FPR: 95 % Wilson intervals; difference to "
        "base on the same samples, paired 95 % interval, samples gained and lost, exact McNemar p (Holm's "
        "over "
        "the rules of one mode in the CSV). All rows select from the same stored answers."
    )
    power = power_note(rows_of(table), lambda r: f"{r['rule']}, {r['mode']}")
    return "\n\n".join(filter(None, [reading, power, settings_note(table)]))


def threshold_reading(table: pd.DataFrame) -> str:
    """One Markdown line per mode: the thresholds' accuracies, and whether adapting everything differs."""
    lines = []
    for mode, rows in table[table["accuracy"].notna()].groupby("mode", sort=False):
        by_rule = {r["rule"]: r for r in rows_of(rows)}
        shown = [
            f"{rule if rule in ('base', 'certain only', 'all', 'oracle') else f'τ = {rule}'} "
            f"{bracket(r['accuracy'], r['low'], r['high'])}"
            for rule, r in by_rule.items()
        ]
        taus = [r for r in by_rule.values() if pd.notna(r["tau"]) and r["rule"] != "certain only"]
        overlap = max((r["low"] for r in taus), default=0) <= min((r["high"] for r in taus), default=0)
        line = f"- **{mode}**, n = {next(iter(by_rule.values()))['n']}: {'; '.join(shown)} %."
        if len(taus) > 1:
            line += " The thresholds' intervals overlap." if overlap else " The thresholds' intervals part."
        lines.append(line)
    absent = rows_of(table.loc[table["accuracy"].isna(), ["mode", "rule", "note"]])
    lines += [f"- {r['rule']}, {text(r['mode'])}: {r['note']}." for r in absent if text(r["mode"])]
    return "\n".join(lines) or f"Table 2 was {NOT_RUN}."
