"""Table 1: accuracy of the arms on every benchmark, beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from study.analysis import statistics
from study.analysis.tables import paper
from study.analysis.tables.layout import (
    AVERAGE,
    BENCHMARKS,
    NOT_RUN,
    bracket,
    label,
    rows_of,
    signed,
    sort_rows,
    spread,
    text,
)
from study.analysis.tables.results import (
    Answers,
    Key,
    answers,
    compare,
    difference_cells,
    percent,
    power_note,
    select,
    setting,
    settings_note,
    verdict,
    with_holm,
)

PRIMARY = ("sealtool", "direct", "tt_si")

COUNTS = ["seeds", "n", "errors", "computed", "loaded", "pairs", "gained", "lost"]
COLUMNS = [
    "benchmark", "arm", "inference", "mode", "n", "correct", "accuracy", "low", "high", "computed", "loaded",
    "errors", "seeds", "uncertain", "synthesis_failed", "copies",
    "difference", "difference_low", "difference_high", "difference_method", "pairs", "gained", "lost",
    "mcnemar_p", "p", "p_holm", "detectable", "paper", "paper_difference", "model", "tool_order",
    "setting", "note",
]  # fmt: skip


def table1_main(
    records: pd.DataFrame, missing: Mapping[str, str] | None = None, benchmarks: Iterable[str] = BENCHMARKS
) -> pd.DataFrame:
    """Table 1: one row per benchmark × inference × arm × mode, accuracies in % with Wilson intervals.

    `records`: the study's, one row per sample × seed (machine failures have status `error`: counted
    in `errors`, in nothing else); rows of variants are left out. `missing`: benchmark → how to get it.
    `benchmarks`: the rows wanted.

    Columns: `n` samples, `correct` of them (mean over seeds), `accuracy`, `low`, `high`; `computed` and
    `loaded` answers; `uncertain` (% of n), `synthesis_failed` and `copies` (% of the uncertain ones);
    `difference` to base on the same samples in points with `difference_low`, `_high`, `_method`,
    `pairs`, `gained`, `lost`, `mcnemar_p` (exact; several seeds: one per seed), `p` and `p_holm` (Holm
    over the benchmarks other than the primary comparison), `detectable` (points, 80 % power); `paper`,
    `paper_difference`, `setting` (how this differs from the paper's run); `note`.
    The row `avg` stands only where all three of the paper's benchmarks do.
    """
    missing = dict(missing or {})
    found = answers(select(records, variant=""))
    rows, differences = [], {}
    for key, result in found.items():
        paired = None if key.arm == "base" else compare(_base_of(key, found), result)
        if paired:
            differences[key] = paired.difference
        rows.append(_row(key, result.cells() | difference_cells(paired)))
    rows += _averages(found, rows, differences)
    rows += _absent({(k.benchmark, k.inference, k.arm) for k in found}, missing,
                    tuple(dict.fromkeys([*benchmarks, *missing])))  # fmt: skip
    table = sort_rows(pd.DataFrame(rows, columns=COLUMNS))
    return _holm_over_benchmarks(table).astype(dict.fromkeys(COUNTS, "Int64"))


def _row(key: Key, cells: Mapping[str, Any]) -> dict[str, Any]:
    return {**key.cells(), **cells, **_paper_cells(key, cells)}


def _base_of(key: Key, found: Mapping[Key, Answers]) -> Answers | None:
    """The base answers for the same benchmark, inference, model and tool order; whatever their mode."""
    for other, result in found.items():
        same = (other.benchmark, other.inference, other.model, other.tool_order)
        if other.arm == "base" and same == (key.benchmark, key.inference, key.model, key.tool_order):
            return result
    return None


def _averages(
    found: Mapping[Key, Answers],
    rows: Sequence[Mapping[str, Any]],
    differences: Mapping[Key, statistics.Estimate],
) -> list[dict[str, Any]]:
    """The unweighted means of the paper's three benchmarks, with intervals from theirs."""
    by_rest: dict[tuple[Any, ...], dict[str, Key]] = {}
    for key in found:
        rest = (key.inference, key.arm, key.mode, key.model, key.tool_order, key.pool_n)
        by_rest.setdefault(rest, {})[key.benchmark] = key
    cells_of = dict(zip(found, rows, strict=True))
    averages = []
    for keys in by_rest.values():
        parts = [keys[b] for b in paper.BENCHMARKS if b in keys]
        if len(parts) < len(paper.BENCHMARKS) or not all(len(found[k].correct) for k in parts):
            continue
        counted = pd.DataFrame([cells_of[k] for k in parts])
        cells: dict[str, Any] = {c: int(counted[c].sum()) for c in ("n", "errors", "computed", "loaded")}
        cells |= {"seeds": int(counted["seeds"].min()), "correct": counted["correct"].sum(), "note": ""}
        cells |= percent(statistics.average([found[k].accuracy for k in parts]), "accuracy", "low", "high")
        if all(k in differences for k in parts):
            difference = statistics.average([differences[k] for k in parts])
            cells |= percent(difference, "difference", "difference_low", "difference_high")
            cells["difference_method"] = difference.method
        first = parts[0]
        key = Key(AVERAGE, first.inference, first.arm, first.mode, first.model, first.tool_order)
        averages.append(_row(key, cells))
    return averages


def _paper_cells(key: Key, cells: Mapping[str, Any]) -> dict[str, Any]:
    columns = (*paper.BENCHMARKS, AVERAGE)
    numbers, base = paper.TABLE1.get((key.inference, key.arm)), paper.TABLE1.get((key.inference, "base"))
    if numbers is None or base is None or key.benchmark not in columns:
        return {}
    at = columns.index(key.benchmark)
    cells = {"paper": numbers[at], "setting": setting(key, cells)}
    return cells | ({"paper_difference": numbers[at] - base[at]} if key.arm != "base" else {})


def _absent(
    there: set[tuple[str, str, str]], missing: Mapping[str, str], benchmarks: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows for what is not there: a benchmark that cannot be had, an arm that the profile leaves out."""
    rows: list[dict[str, Any]] = []
    for benchmark in benchmarks:
        if benchmark in missing and not any(b == benchmark for b, _, _ in there):
            rows.append({"benchmark": benchmark, "note": f"missing: {missing[benchmark]}"})
            continue
        in_paper = benchmark in paper.BENCHMARKS
        for inference, arm in paper.TABLE1 if in_paper else [("direct", "base"), ("direct", "tt_si")]:
            if (benchmark, inference, arm) in there:
                continue
            row = {"benchmark": benchmark, "inference": inference, "arm": arm, "note": NOT_RUN}
            if in_paper:
                row["paper"] = paper.TABLE1[inference, arm][paper.BENCHMARKS.index(benchmark)]  # type: ignore[assignment]
            rows.append(row)
    return rows


def _holm_over_benchmarks(table: pd.DataFrame) -> pd.DataFrame:
    """Adds Holm's p over tt_si − base, direct, on the benchmarks that are not the primary comparison."""
    benchmark, inference, arm = PRIMARY
    of_family = (table["inference"] == inference) & (table["arm"] == arm) & table["p"].notna()
    family = table[of_family & (table["benchmark"] != benchmark)]
    # One run may hold two modes side by side; each is its own family of benchmarks.
    for _, rows in family.groupby(["mode", "model", "tool_order"]):
        table = with_holm(table, rows["p"].to_dict())
    return table


def table1_view(table: pd.DataFrame) -> pd.DataFrame:
    """Table 1 for reading: intervals in brackets, one decimal, the note where there is no number."""

    def row(r: Mapping[str, Any]) -> dict[str, str]:
        there = pd.notna(r["accuracy"])
        return {
            "benchmark": label(r["benchmark"]),
            "inference": text(r["inference"]),
            "arm": text(r["arm"]),
            "mode": text(r["mode"]),
            "n": text(r["n"]),
            "accuracy %": bracket(r["accuracy"], r["low"], r["high"]) if there else text(r["note"]),
            "− base, points": spread(r, "difference", sign="+"),
            "gained / lost": f"{r['gained']} / {r['lost']}" if pd.notna(r["gained"]) else "",
            "McNemar p": text(r["mcnemar_p"]),
            "uncertain %": text(r["uncertain"]),
            "failed syntheses %": text(r["synthesis_failed"]),
            "copies %": text(r["copies"]),
            "paper %": f"{r['paper']:.2f}" if pd.notna(r["paper"]) else "",
            "errors": text(r["errors"]),
            "computed / loaded": f"{r['computed']} / {r['loaded']}" if pd.notna(r["computed"]) else "",
        }

    return pd.DataFrame([row(r) for r in rows_of(table)])


def table1_caption(table: pd.DataFrame) -> str:
    """What a reader needs beside Table 1: intervals, discordant counts, detectable difference, settings."""
    reading = (
        "Accuracy in % with 95 % Wilson interval; difference to base on the same samples, in points, with "
        "its paired 95 % interval (Bonett–Price; bootstrap from n ≥ 50 with ≥ 10 discordant). Uncertain: "
        "% of n; failed syntheses and copies of the seed question: % of the uncertain ones. Machine failures "
        "(errors) are not scored. avg: unweighted mean of the paper's three benchmarks. Intervals take "
        "samples as independent: conditional on NexusRaven's 65 APIs and API-Bank's conversations."
    )
    power = power_note(rows_of(table), _name)
    return "\n\n".join(filter(None, [reading, power, settings_note(table)]))


def _name(row: Mapping[str, Any]) -> str:
    return f"{label(row['benchmark'])} {row['arm']}, {row['inference']}, {row['mode']}"


def table1_reading(table: pd.DataFrame) -> str:
    """One Markdown line per comparison with base: the numbers, and whether they show a difference."""
    lines = []
    for r in rows_of(table[table["difference"].notna() & (table["benchmark"] != AVERAGE)]):
        shown = spread(r, "difference", sign="+")
        paper_says = (
            "" if pd.isna(r["paper_difference"]) else f" The paper's: {signed(r['paper_difference'])}."
        )
        p, of = (r["p"], "p") if pd.isna(r["p_holm"]) else (r["p_holm"], "Holm's p")
        lines.append(
            f"- **{label(r['benchmark'])}**, {r['arm']}, {r['inference']}, {r['mode']}: {shown} points, "
            f"n = {r['pairs']}, {r['gained']} gained, {r['lost']} lost, {of} = {p:.3g}: "
            f"{verdict(r['difference_low'], r['difference_high'], r['detectable'], p)}.{paper_says}"
        )
    return "\n".join(lines) or "Nothing was compared with base in this run."
