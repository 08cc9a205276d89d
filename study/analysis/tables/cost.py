"""What test-time training costs: seconds and tokens per stage, and the queries after which SFT is cheaper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from study.analysis.tables import paper
from study.analysis.tables.layout import NOT_RUN, in_order, label, rows_of, spread, text
from study.analysis.tables.results import (
    DIFFERENCE,
    answers,
    compare,
    difference_cells,
    power_note,
    select,
    verdict,
)
from study.data import sources

# Row → the records' columns that add up to it.
STAGES = {
    "h": ("seconds_h",),
    "g": ("seconds_g",),
    "t": ("seconds_t",),
    "answer": ("seconds_answer",),
    "uncertain": ("seconds_h", "seconds_g", "seconds_t", "seconds_answer"),
}
STAGE_NAMES = {
    "h": "H, score the tools",
    "g": "G, write an example",
    "t": "T, train an adapter",
    "answer": "answer, adapted",
    "uncertain": "uncertain sample, all four",
    "uncertain_alone": "… with the base answer whose prompt pass it uses",
    "certain": "certain sample, H + answer",
    "base": "base answer",
}
COST_COLUMNS = [
    "benchmark", "mode", "stage", "n", "seconds", "seconds_low", "seconds_high", "tokens", "times_base",
    "paper", "paper_times_base", "model", "note",
]  # fmt: skip


def table_cost(records: pd.DataFrame) -> pd.DataFrame:
    """The paper's runtime table: one row per benchmark × mode × stage, direct answers.

    `seconds`: mean per sample with a 95 % t interval over batches (a sample's seconds are its share of the
    batch it was computed in); none where all fell into one batch. `tokens`: mean per sample. `times_base`:
    of the base answer's seconds.
    The base answer pays the prompt pass that H, G and an activated adapter then find in the cache, unless
    another process (another notebook) ran them: then G pays it again. So `uncertain` can be less than a
    query by itself takes, and `uncertain_alone`, with the base answer, is an upper bound; `make bench`
    measures without the doubt. Several seeds are averaged per sample. Machine
    failures are left out. Stages of `STAGE_NAMES`; one that never ran says so.
    """
    mine = select(records, variant="", inference="direct")
    rows: list[dict[str, Any]] = []
    for benchmark in in_order(mine["benchmark"]) if len(mine) else []:
        ok = mine[(mine["benchmark"] == benchmark) & (mine["status"] == "ok")]
        base = ok[ok["arm"] == "base"]
        base_seconds = _mean(_per_sample(base, ["seconds_answer"]))
        rows.append(_cost_row(benchmark, "none", "base", base_seconds, base, ["tokens_answer"], base_seconds))
        for mode in ok.loc[ok["arm"] == "tt_si", "mode"].unique():
            arm = ok[(ok["arm"] == "tt_si") & (ok["mode"] == mode)]
            uncertain = arm["uncertain"].astype(bool)
            whole = arm[arm["adapted"].astype(bool)]
            for stage, columns in STAGES.items():
                seconds = _mean(_per_sample(whole, columns))
                tokens = [c.replace("seconds", "tokens") for c in columns]
                rows.append(_cost_row(benchmark, mode, stage, seconds, whole, tokens, base_seconds))
            first = base[["sample", "seed", "seconds_answer", "tokens_answer"]]
            alone = whole.merge(first, on=["sample", "seed"], suffixes=("", "_base"))
            columns = (*STAGES["uncertain"], "seconds_answer_base")
            tokens = [c.replace("seconds", "tokens") for c in columns]
            seconds = _mean(_per_sample(alone, columns))
            rows.append(_cost_row(benchmark, mode, "uncertain_alone", seconds, alone, tokens, base_seconds))
            sure = arm[~uncertain]
            seconds = _mean(_per_sample(sure, ["seconds_h", "seconds_answer"]))
            tokens = ["tokens_h", "tokens_answer"]
            rows.append(_cost_row(benchmark, mode, "certain", seconds, sure, tokens, base_seconds))
    table = pd.DataFrame(rows, columns=COST_COLUMNS)
    return table.astype({"n": "Int64"})


def _per_sample(rows: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Seconds of each sample in these columns together, its mean over seeds."""
    return rows[list(columns)].sum(axis=1).groupby(rows["sample"]).mean()


@dataclass(frozen=True)
class Mean:
    value: float
    low: float
    high: float
    n: int


def _mean(values: pd.Series | npt.NDArray[Any]) -> Mean:
    """The mean with its t interval over batches, never below 0; nan for nothing, no interval for one batch.

    Samples of one batch share its seconds equally, so equal values are one measurement: the standard error
    is the cluster-robust one, with a batch as the cluster.
    """
    x = np.asarray(values, dtype=float)
    if not len(x):
        return Mean(np.nan, np.nan, np.nan, 0)
    mean = float(x.mean())
    batches, sizes = np.unique(x.round(9), return_counts=True)
    if len(batches) == 1:
        return Mean(mean, np.nan, np.nan, len(x))
    variance = float(((sizes * (batches - mean)) ** 2).sum()) * len(batches) / (len(batches) - 1)
    half = float(special.stdtrit(len(batches) - 1, 0.975)) * sqrt(variance) / len(x)
    return Mean(mean, max(0.0, mean - half), mean + half, len(x))


def _cost_row(
    benchmark: str,
    mode: str,
    stage: str,
    seconds: Mean,
    rows: pd.DataFrame,
    tokens: Sequence[str],
    base: Mean,
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "mode": mode,
        "stage": stage,
        "n": seconds.n,
        "seconds": seconds.value,
        "seconds_low": seconds.low,
        "seconds_high": seconds.high,
        "tokens": rows[list(tokens)].sum(axis=1).mean() if len(rows) else np.nan,
        "times_base": seconds.value / base.value if base.value else np.nan,
        "paper": paper.SECONDS.get(stage, np.nan),
        "paper_times_base": paper.SECONDS.get(stage, np.nan) / paper.SECONDS["base"],
        "model": rows["model"].iloc[0] if len(rows) else None,
        "note": "" if seconds.n else "no such sample in this run",
    }


def cost_view(table: pd.DataFrame) -> pd.DataFrame:
    """The runtime table for reading, the paper's seconds (A40) beside ours."""
    rows = []
    for r in rows_of(table):
        rows.append({
            "benchmark": label(r["benchmark"]),
            "mode": r["mode"],
            "stage": STAGE_NAMES[r["stage"]],
            "n": text(r["n"]),
            "seconds": spread(r, "seconds", digits=2) or r["note"],
            "tokens": "" if pd.isna(r["tokens"]) else f"{r['tokens']:.0f}",
            "× base answer": "" if pd.isna(r["times_base"]) else f"{r['times_base']:.2f}",
            "paper, s": "" if pd.isna(r["paper"]) else f"{r['paper']:.2f}",
            "paper, × base": "" if pd.isna(r["paper"]) else f"{r['paper_times_base']:.2f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def cost_reading(table: pd.DataFrame) -> str:
    """One Markdown line per benchmark and mode: what an uncertain sample costs, in base answers."""
    lines = []
    for r in rows_of(table[(table["stage"] == "uncertain") & table["seconds"].notna()]):
        shown = spread(r, "seconds", digits=2)
        lines.append(
            f"- **{label(r['benchmark'])}**, {r['mode']}: an uncertain sample takes {shown} s (n = "
            f"{r['n']}), "
            f"{r['times_base']:.1f} times a base answer; the paper's {r['paper']:.2f} s, "
            f"{r['paper_times_base']:.1f} times."
        )
    return "\n".join(lines) or "No sample was adapted in this run."


@dataclass(frozen=True)
class Prices:
    """Seconds per query, and once for SFT: what a break-even is made of.

    `uncertain`, `certain`, `base`: seconds per query of each kind; `share`: of queries that are uncertain;
    `sft`: seconds to train the shared adapter once; `basis`: where that number comes from.
    """

    name: str
    base: float
    uncertain: float
    certain: float
    share: float
    sft: float
    basis: str

    @property
    def tt_si(self) -> float:
        """Seconds per query of TT-SI, certain and uncertain ones together."""
        return self.share * self.uncertain + (1 - self.share) * self.certain

    @property
    def break_even(self) -> float:
        """Queries from which on SFT is cheaper than TT-SI; inf where TT-SI costs no more per query."""
        more = self.tt_si - self.base
        return self.sft / more if more > 0 else inf


PAPER_PRICES = Prices(
    "the paper's, A40",
    paper.SECONDS["base"],
    paper.SECONDS["uncertain"],
    paper.SECONDS["certain"],
    paper.UNCERTAIN_SHARE,
    paper.SFT_SECONDS,
    f"the paper's: {paper.SFT_SAMPLES} samples",
)


def prices(
    records: pd.DataFrame,
    benchmark: str,
    sft_samples: int = paper.SFT_SAMPLES,
    sft_seconds: float | None = None,
    share: float | None = None,
    passes: float = 1,
) -> list[Prices]:
    """Prices per training mode on one benchmark, and the paper's.

    `sft_seconds`: seconds to train SFT once. None: this run's seconds per training sample × `sft_samples`,
    taken from its arm sft in the same mode, or where that was not run from T times `passes`: SFT's epochs
    over T's, both at batch size 1. `share`: of uncertain queries; None: this run's. An uncertain query is
    priced with its base answer (`uncertain_alone`); one whose synthesis failed with what it took: H, G and
    the answer.
    """
    cost = table_cost(records)
    cost = cost[cost["benchmark"] == benchmark]
    mine = select(records, variant="", inference="direct", benchmark=benchmark, arm="tt_si", status="ok")
    found = []
    for mode, rows in cost[cost["mode"] != "none"].groupby("mode", sort=False):
        at = rows.set_index("stage")["seconds"]
        base = float(cost.loc[cost["stage"] == "base", "seconds"].iloc[0])
        if np.isnan(at["uncertain"]):
            continue
        asked = mine[mine["mode"] == mode]
        flags, adapted = (asked[c].astype(bool) for c in ("uncertain", "adapted"))
        mean_share = float(flags.mean()) if share is None else share
        unmended = asked[flags & ~adapted]
        done = float((flags & adapted).sum() / flags.sum())
        uncertain = done * float(at["uncertain_alone"])
        if len(unmended):
            uncertain += (1 - done) * _mean(_per_sample(unmended, STAGES["uncertain"])).value
        certain = base + float(at["h"]) if np.isnan(at["certain"]) else float(at["certain"])
        each, seen = _seconds_per_sample(records, benchmark, str(mode), passes * float(at["t"]))
        sft, basis = each * sft_samples, f"{each:.2f} s per sample ({seen}) × {sft_samples} samples"
        if sft_seconds is not None:
            sft, basis = sft_seconds, "as given"
        found.append(Prices(str(mode), base, uncertain, certain, mean_share, sft, basis))
    return [*found, PAPER_PRICES]


def _seconds_per_sample(records: pd.DataFrame, benchmark: str, mode: str, t: float) -> tuple[float, str]:
    """Seconds of training per sample of a pool, and where that was seen."""
    mine = select(records, variant="", benchmark=benchmark, arm="sft", mode=mode)
    mine = mine.dropna(subset=["seconds_fit", "pool_n"]) if "seconds_fit" in mine else mine.iloc[:0]
    if mine.empty:
        return t, "as T, by epochs"
    first = mine.iloc[0]
    return float(first["seconds_fit"] / first["pool_n"]), f"arm sft, {first['pool_n']:.0f} samples"


def break_even_curves(every: Sequence[Prices], points: int = 61) -> pd.DataFrame:
    """What the break-even figure draws, long form: `panel` 'queries' and 'share'.

    'queries': total seconds of TT-SI and of SFT (training + base answers) after so many queries.
    'share': queries from which SFT is cheaper, against the share of uncertain queries.
    """
    rows: list[dict[str, Any]] = []
    for p in every:
        same = {"name": p.name, "basis": p.basis, "sft_seconds": p.sft, "base_seconds": p.base}
        for q in np.logspace(0, 6, points):
            totals = {"tt_si": q * p.tt_si, "sft": p.sft + q * p.base}
            rows.append({"panel": "queries", **same, "queries": q, "share": p.share, **totals,
                         "break_even": p.break_even})  # fmt: skip
        for share in np.linspace(0.05, 1, 20):
            other = Prices(p.name, p.base, p.uncertain, p.certain, float(share), p.sft, p.basis)
            rows.append({"panel": "share", **same, "share": share, "break_even": other.break_even})
    columns = ["panel", "name", "basis", "share", "queries", "tt_si", "sft", "break_even", "sft_seconds",
               "base_seconds"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def break_even_reading(every: Sequence[Prices]) -> str:
    """One Markdown line per set of prices: after how many queries SFT is cheaper, and on what assumptions."""
    return "\n".join(
        f"- **{p.name}**: {p.tt_si:.2f} s per query against {p.base:.2f} s for a base (or SFT) answer, "
        f"{100 * p.share:.0f} % uncertain; SFT {p.sft:,.0f} s once ({p.basis}): "
        + (
            "TT-SI costs no more per query, so SFT is never cheaper."
            if p.break_even == inf
            else f"SFT is cheaper after {p.break_even:,.0f} queries."
        )
        for p in every
    )


MODE_COLUMNS = ["benchmark", "n", *DIFFERENCE, "same_reply", "model", "note"]


def mode_comparison(records: pd.DataFrame) -> pd.DataFrame:
    """`activated` minus `exact`, tt_si, per benchmark: paired; identical replies in % of adapted ones."""
    found = answers(select(records, variant="", inference="direct", arm="tt_si"))
    rows: list[dict[str, Any]] = []
    for benchmark in in_order(records["benchmark"]) if len(records) else []:
        modes = {k.mode: a for k, a in found.items() if k.benchmark == benchmark}
        paired = compare(modes.get("exact"), modes.get("activated"))
        row: dict[str, Any] = {"benchmark": benchmark, "note": "" if paired else NOT_RUN}
        if paired:
            both = modes["exact"].scored.merge(modes["activated"].scored, on=["sample", "seed"])
            # Where nothing was adapted both modes have the base answer: equal by construction.
            trained = both[both["adapted_x"].astype(bool) & both["adapted_y"].astype(bool)]
            same = (trained["reply_x"] == trained["reply_y"]).mean()
            row |= {"n": int(paired.difference.n), "same_reply": 100 * float(same)}
            row |= {"model": both["model_x"].iloc[0]} | difference_cells(paired)
        rows.append(row)
    table = pd.DataFrame(rows, columns=MODE_COLUMNS)
    return table.astype(dict.fromkeys(["n", "pairs", "gained", "lost"], "Int64"))


def mode_reading(table: pd.DataFrame) -> str:
    """One Markdown line per benchmark: whether the cheaper training costs accuracy, with n and power."""
    lines = []
    for r in rows_of(table):
        if pd.isna(r["difference"]):
            lines.append(f"- **{label(r['benchmark'])}**: both modes side by side were {NOT_RUN}.")
            continue
        lines.append(
            f"- **{label(r['benchmark'])}**: activated − exact {spread(r, 'difference', sign='+')} points, "
            f"n = {r['pairs']}, {r['gained']} gained, {r['lost']} lost, p = {r['p']:.3g}, "
            f"{text(r['same_reply']) or 'no'} % of adapted replies identical: "
            f"{verdict(r['difference_low'], r['difference_high'], r['detectable'], r['p'])}."
        )
    return "\n".join(lines)


def mode_caption(table: pd.DataFrame) -> str:
    """Discordant counts and detectable difference of `mode_comparison`."""
    power = power_note(rows_of(table), lambda r: label(r["benchmark"]))
    return "\n\n".join(
        filter(None, ["tt_si, the same samples, the same examples; paired 95 % interval.", power])
    )


WHOLE_SAMPLE = "whole"
BENCH_COLUMNS = ["benchmark", "program", "stage", "n", "seconds", "ratio", "ratio_low", "ratio_high"]


def bench_ratios(path: Path | None = None, usual: str | None = None) -> pd.DataFrame:
    """Seconds per program and stage of `make bench`, and how many times faster than the usual loop.

    Ratios stand for T (training alone) and for the whole sample only: in its other stages the usual loop
    reads the prompt anew, which ttsi does once, in a stage of its own (`prefix`). `whole`: all stages but
    `base`, of the usual loop with merge, save, reload and restore.

    `path`: default figures/bench.csv; empty table if there is none. `usual`: the program compared with;
    None: the one with 'usual' in its name. `ratio`: geometric mean over samples of usual / program, its
    95 % t interval on the logarithm; from two samples on.
    """
    path = path or sources.figures_dir() / "bench.csv"
    if not path.exists():
        return pd.DataFrame(columns=BENCH_COLUMNS)
    data = pd.read_csv(path).dropna(subset=["seconds"])
    loop = data[data["stage"] != "base"]
    whole = loop.groupby(["benchmark", "sample", "program"], sort=False, as_index=False)["seconds"].sum()
    data = pd.concat([data, whole.assign(stage=WHOLE_SAMPLE)], ignore_index=True)
    usual = usual or next((p for p in data["program"].unique() if "usual" in str(p)), None)
    rows = []
    for (benchmark, stage, program), group in data.groupby(["benchmark", "stage", "program"], sort=False):
        row: dict[str, Any] = {"benchmark": benchmark, "program": program, "stage": stage}
        times = group.groupby("sample")["seconds"].mean()
        row |= {"n": len(times), "seconds": times.mean()}
        same = (data["benchmark"] == benchmark) & (data["stage"] == stage) & (data["program"] == usual)
        against = data[same].groupby("sample")["seconds"].mean()
        first, second = against.align(times, join="inner")
        both = (first > 0) & (second > 0)
        if stage in ("T", WHOLE_SAMPLE) and program != usual and both.any():
            logs = np.log(first[both] / second[both])
            row["ratio"] = exp(float(logs.mean()))
            if len(logs) > 1:
                half = float(special.stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / sqrt(len(logs)))
                row["ratio_low"] = exp(log(row["ratio"]) - half)
                row["ratio_high"] = exp(log(row["ratio"]) + half)
        rows.append(row)
    return pd.DataFrame(rows, columns=BENCH_COLUMNS)


def bench_view(table: pd.DataFrame) -> pd.DataFrame:
    """The bench for reading; one row that says 'not measured' where there is none."""
    if table.empty:
        return pd.DataFrame([{"program": "not measured: make bench has not been run"}])

    def row(r: Mapping[str, Any]) -> dict[str, str]:
        return {
            "benchmark": label(r["benchmark"]),
            "program": r["program"],
            "stage": r["stage"],
            "n": text(r["n"]),
            "seconds": f"{r['seconds']:.2f}",
            "times faster than the usual loop": spread(r, "ratio"),
        }

    return pd.DataFrame([row(r) for r in rows_of(table)])
