"""The front page: the study's questions, each answered from figures/ by the run that tells most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from study.analysis import costs, look, selective

Row = dict[str, Any]
_UNTOLD = "No committed run answers this yet."


class Asked(NamedTuple):
    """A question, the table that answers it, the figure beside it, its notebook, and what the rows say.

    table, picture: names in figures/<run>/; `bench` stands in figures/ itself. by: the column whose sum makes
    one run tell more than another; "": the number of rows with an answer.
    """

    asks: str
    table: str
    picture: str
    notebook: str
    says: Callable[[pd.DataFrame, Path], str]
    effects: Callable[[pd.DataFrame], list[Row]] = lambda table: []
    by: str = "n"


@dataclass(frozen=True)
class Told:
    """An answered question: its sentence, its run's folder of figures (None: no run), and its effects.

    sentence: several statements stand one to a line.
    """

    asked: Asked
    sentence: str
    folder: Path | None
    intervals: Sequence[Row]


def tell(folders: Sequence[Path]) -> list[Told]:
    """Every question with its answer. folders: with tables and figures, one for each run."""
    return [_told(asked, folders) for asked in ASKED]


def _told(asked: Asked, folders: Sequence[Path]) -> Told:
    found = []
    for path in filter(Path.exists, (folder / f"{asked.table}.csv" for folder in folders)):
        table = pd.read_csv(path)
        rows = table[table["n"].notna()] if "n" in table else table
        if len(rows):
            found.append((rows[asked.by].sum() if asked.by else len(rows), path.parent, rows))
    if not found:
        return Told(asked, _UNTOLD, None, [])
    _, folder, rows = max(found, key=lambda f: f[0])
    return Told(asked, asked.says(rows, folder) or _UNTOLD, folder, _intervals(asked.effects(rows)))


# --- sentences ------------------------------------------------------------------------------------------


def count(n: float, noun: str) -> str:
    """'no sample', '1 sample', '2 samples'."""
    return f"{n:g} {noun}{'' if n == 1 else 's'}"


def told_from_zero(rows: Sequence[Row], name: str = "difference") -> str:
    """How many differences' 95 % intervals leave out zero, and to which side."""
    ends = [(r[f"{name}_low"], r[f"{name}_high"]) for r in rows if pd.notna(r[name])]
    above, below = sum(low > 0 for low, _ in ends), sum(high < 0 for _, high in ends)
    if not ends:
        return ""
    if above + below == 0:
        return "the difference can't be told from zero" if len(ends) == 1 else \
            f"none of the {len(ends)} differences can be told from zero"  # fmt: skip
    parts = [f"{above} better", f"{below} worse", f"{len(ends) - above - below} not told from zero"]
    return f"of {count(len(ends), 'difference')} {', '.join(p for p in parts if p[0] != '0')}"


def _sentence(*parts: str) -> str:
    return _lines("; ".join(filter(None, parts)))


def _lines(*parts: str) -> str:
    """Each part a sentence of its own, one to a line; an arm's name stays as it is."""
    arms = tuple(arm for arm in look.ARMS if arm != "base")
    return "\n".join(
        f"{part if part.startswith(arms) else part[:1].upper() + part[1:]}." for part in parts if part
    )


def _effects(table: pd.DataFrame, name: str = "difference") -> list[Row]:
    return [r for r in look.rows_of(table) if pd.notna(r[name])]


def _tt_si(table: pd.DataFrame) -> list[Row]:
    ours = table["arm"].isin(["tt_si", "tt_si_selective"])
    return _effects(table[ours & (table["benchmark"] != look.AVERAGE)])


def _main(table: pd.DataFrame, folder: Path) -> str:
    rows = _tt_si(table)
    best = max(rows, key=lambda r: r["difference"], default=None)
    if best is None:
        return ""
    before = best["accuracy"] - best["difference"]  # base's on the same samples
    largest = (
        f"the largest is {best['arm']}'s on {look.label(best['benchmark'])}, {best['mode']}, from "
        f"{before:.1f} % to {look.spread(best, 'accuracy')} %, n = {best['pairs']:g}, p = {best['p']:.2g}"
    )
    mean = table[(table["benchmark"] == look.AVERAGE) & (table["arm"] == "tt_si")]
    means = [f"the mean of the paper's three makes {look.spread(r, 'difference', sign='+')}"
             for r in _effects(mean)]  # fmt: skip
    return _sentence(f"against the model as it is, {told_from_zero(rows)}", largest, *means)


def _modes(table: pd.DataFrame, folder: Path) -> str:
    return _sentence(*(
        f"activated minus exact adapters, {look.label(r['benchmark'])}: {_changed(r)}"
        for r in _effects(table)
    ))  # fmt: skip


def _changed(r: Row) -> str:
    return (
        f"{look.spread(r, 'difference', sign='+')} points, n = {r['pairs']:g}, {r['gained']:g} gained, "
        f"{r['lost']:g} lost"
    )


def _awareness(table: pd.DataFrame, folder: Path) -> str:
    several = table[(table["samples"] == "two or more tools") & (table["benchmark"] != look.POOLED)]
    areas = several[several["auc"].notna()].assign(n=lambda t: t["n_right"] + t["n_wrong"])
    if areas.empty:
        return ""
    row = look.rows_of(areas.sort_values("n"))[-1]
    rates = several[(several["panel"] == "at_tau") & (several["benchmark"] == row["benchmark"])]
    said = [
        f"on {look.label(row['benchmark'])} a right answer has the larger margin in "
        f"{look.spread(row, 'auc', 0, scale=100)} % of pairs, 50 being a coin "
        f"({count(row['n_right'], 'right answer')}, {count(row['n_wrong'], 'wrong one')})"
    ]
    for r in look.rows_of(rates)[:1]:
        wrong, right = (look.spread(r, rate, 0, scale=100) for rate in ("tpr", "fpr"))
        said.append(f"at τ = {r['tau']:g} it flags {wrong} % of the wrong and {right} % of the right")
    rivals = pd.read_csv(folder / "figure4_rivals.csv") if (folder / "figure4_rivals.csv").exists() else table
    if "estimator" in rivals:
        of = (rivals["benchmark"] == row["benchmark"]) & (rivals["samples"] == row["samples"])
        own = rivals[of & rivals["auc"].notna()]
        if len(own) and (best := look.rows_of(own.sort_values("auc"))[-1])["auc"] > row["auc"]:
            said.append(f"{best['estimator']} does it in {look.spread(best, 'auc', 0, scale=100)} %")
    return _sentence(*said)


def _threshold(table: pd.DataFrame, folder: Path) -> str:
    said = []
    for (benchmark, mode), rows in table.groupby(["benchmark", "mode"], sort=False):
        best = look.rows_of(rows.sort_values("difference", kind="stable"))[-1]
        told = int(((rows["difference_low"] > 0) | (rows["difference_high"] < 0)).sum())
        said.append(
            f"{look.label(str(benchmark))}, {mode}: {told} of the {len(rows)} thresholds whose answers are "
            f"all there can be told from base; the largest gain, too good since τ = {best['tau']:.2g} was "
            f"chosen by it, is {look.spread(best, 'difference', sign='+')} points, n = {best['n']:g}"
        )
    return _sentence(*said)


def _named(model: object, benchmark: object, own: object) -> str:
    """A benchmark, and the model where it isn't the study's own."""
    return look.label(str(benchmark)) + f", {look.size(str(model))}" * (model != own)


def _selective(table: pd.DataFrame, folder: Path) -> str:
    said = []
    own = table["model"].iloc[0]
    for (model, benchmark), rows in table.groupby(["model", "benchmark"], sort=False):
        of = {r["rule"]: r for r in look.rows_of(rows)}
        if (rule := of.get("q < ½, surer")) is None:
            continue
        paper = next((r for name, r in of.items() if name.startswith("margin") and "surer" not in name), None)
        beside = f"; the paper's rule {look.spread(paper, 'difference', sign='+')}" if paper else ""
        changed = f"{rule['gained']:g} gained, {rule['lost']:g} lost, n = {rule['n']:g}"
        gain = look.spread(rule, "difference", sign="+")
        said.append(f"{_named(model, benchmark, own)}: {gain} points against base, {changed}{beside}")
    return _lines(*said)


def _hypotheses(table: pd.DataFrame, folder: Path) -> str:
    tested = table[table["set"].str.startswith("confirmatory") & table["p_holm"].notna()]
    return _lines(*(
        f"{r['set'].removeprefix('confirmatory: ')}, {r['hypothesis']}, {r['what']}: "
        f"{look.spread(r, 'value', sign='+' * (r['hypothesis'] not in selective.NOTHING))}, "
        f"n = {r['n']:g}, p = {r['p_holm']:.2g} after Holm, {selective.outcome(r)}"
        for r in look.rows_of(tested)
    ))  # fmt: skip


def _grammar(table: pd.DataFrame, folder: Path) -> str:
    said, own = [], table["model"].iloc[0]
    for (model, benchmark), rows in table.groupby(["model", "benchmark"], sort=False):
        of = {r["name"]: r for r in look.rows_of(rows)}
        plain = f"{look.spread(of['constrained'], 'difference', sign='+')}, n = {of['constrained']['n']:g}"
        more = [f"{arm} against that {look.spread(r, 'grammar_difference', sign='+')}"
                for arm, r in of.items() if arm != "base" and pd.notna(r["grammar_difference"])]  # fmt: skip
        said.append(f"{_named(model, benchmark, own)}: a grammar alone makes {plain}; {', '.join(more)}")
    tested = folder / "table_hypotheses_grammar.csv"
    first = _hypotheses(pd.read_csv(tested), folder) if tested.exists() else ""
    return "\n".join(filter(None, [first, _lines(*said)]))


def _several(table: pd.DataFrame, folder: Path) -> str:
    n = table["n"]
    many = f"{n.min():g}" if n.min() == n.max() else f"{n.min():g} to {n.max():g}"
    rows = _effects(table)
    each = [f"{look.arm_name(r)}: {_changed(r)}" for r in rows]
    return _lines(f"on {many} samples, against the model as it is, {told_from_zero(rows)}", *each)


def _sizes(table: pd.DataFrame, folder: Path) -> str:
    return _lines(*(
        f"{look.size(r['model'])}, {r['arm']}, {r['mode']}: {_changed(r)}" for r in _effects(table)
    ))  # fmt: skip


def _controls(table: pd.DataFrame, folder: Path) -> str:
    rows = _effects(table[table["arm"] != "base"], "tt_si_difference")  # tt_si of a variant is one too
    n = table["n"]
    return _sentence(
        f"{count(len(rows), 'control')} against TT-SI, n = {n.min():g} to {n.max():g}: "
        f"{told_from_zero(rows, 'tt_si_difference')}"
    ) if rows else ""  # fmt: skip


def _scaling(table: pd.DataFrame, folder: Path) -> str:
    most = table.sort_values("training_samples", kind="stable").drop_duplicates(["arm", "mode"], keep="last")
    rows = look.rows_of(most[most["arm"].isin(["base", "sft", "tt_si"])])
    return _lines(*(
        f"{r['arm']}{'' if r['mode'] == 'none' else ', ' + r['mode']}, "
        f"{count(r['training_samples'], 'training sample')}: {look.spread(r, 'accuracy')} %, n = {r['n']:g}"
        for r in rows
    ))  # fmt: skip


def _synthetic(table: pd.DataFrame, folder: Path) -> str:
    own = table[(table["writer"] == "self") & table["asked"].notna()]
    if own.empty:
        return ""
    row = look.rows_of(own[own["benchmark"] == look.main_benchmark(own["benchmark"])])[0]

    def share(name: str) -> str:
        return look.bracket(row[f"{name}_share"], row[f"{name}_low"], row[f"{name}_high"], digits=0)

    return _sentence(
        f"of {count(row['examples'], 'example')} that the model wrote for {look.label(row['benchmark'])}, "
        f"{share('copies')} % copy the question and {share('valid')} % fit their tool's schema",
        f"{count(row['failed'], 'sample')} of {row['asked']:g} got none",
    )


_BENCHED = {
    "uncertain sample, usual loop / activated, SealTool": "with activated adapters an uncertain sample, "
    "everything charged, is answered {} times as fast as by the usual loop, n = {}",
    "uncertain sample, activated / base answer, one at a time": "it takes {} base answers, n = {}",
    "SealTool run, selective / base, seconds per question": "a whole run by the selective rule {} base "
    "answers per question, n = {}",
}


def _cost(table: pd.DataFrame, folder: Path) -> str:
    found, said = costs.headlines(table), []
    for dtype, group in found[found["n"] > 0].groupby("dtype", sort=False):
        rows = {r["what"]: (look.spread(r, "measured", 2), r["n"]) for r in look.rows_of(group)}
        told = [words.format(*rows[what]) for what, words in _BENCHED.items() if what in rows]
        said.append(f"in {dtype}, " + ", ".join(told))
    return _sentence(*said)


ASKED = [
    Asked("Does TT-SI raise accuracy?", "table1_main", "figure_main_results", "02", _main, _tt_si),
    Asked("Does the model know when it is wrong?", "table_estimator", "figure4_rivals", "01", _awareness,
          by="n_right"),
    Asked("Which threshold?", "figure_threshold", "figure_threshold", "04", _threshold),
    Asked("Does an answer that has to earn its place do better?", "table_selective", "figure_selective", "11",
          _selective),
    Asked("Do the hypotheses hold that were written down before the data?", "table_hypotheses", "", "11",
          _hypotheses),
    Asked("How much likelier must an adapted answer be?", "table_hypotheses_factor", "figure_acceptance",
          "11", _hypotheses),
    Asked("What is left beside a grammar of the tools?", "table_constrained", "figure_grammar", "11",
          _grammar),
    Asked("Does the fast way of training cost accuracy?", "table_modes", "", "08", _modes, _effects),
    Asked("What does it cost?", "bench", "bench", "08", _cost, by=""),
    Asked("Against ICL, SFT, a teacher and an oracle?", "table_methods", "figure2_methods", "03", _several,
          by=""),
    Asked("How many training samples is it worth?", "figure2_scaling", "figure2_scaling", "05", _scaling,
          by=""),
    Asked("Does a larger model gain as well?", "table_model_size", "figure3_model_size", "06", _sizes,
          _tt_si, by=""),
    Asked("What does the model write for itself?", "table_synthetic", "figure5_embeddings", "07", _synthetic,
          by="asked"),
    Asked("What is a gain made of?", "table_controls", "figure_controls", "09", _controls, by=""),
]  # fmt: skip


# --- intervals ------------------------------------------------------------------------------------------


def _intervals(rows: Sequence[Row]) -> list[Row]:
    """Each difference in words, and where it lies in per cent of a scale that all of them share."""
    ends = [abs(r[e]) for r in rows for e in ("difference_low", "difference_high")]
    most = max([*ends, 1.0])

    def place(x: float) -> float:
        return round(50 + 50 * x / most, 2)

    out = []
    for r in rows:
        named = [r.get("arm"), look.label(r["benchmark"]), r.get("inference"), r.get("mode")]
        named += [r["model"]] if "variant" in r else []
        name = ", ".join(str(x) for x in named if x and pd.notna(x) and x not in ("direct", "none"))
        low, high = place(r["difference_low"]), place(r["difference_high"])
        out.append({"text": f"{name}: {_changed(r)}", "zero": place(0), "low": low,
                    "width": round(high - low, 2), "value": place(r["difference"])})  # fmt: skip
    return out
