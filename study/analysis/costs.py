"""What test-time training costs: one accounting for the seconds of runs and of `make bench`, and prices.

A query is charged with everything it needs. A stage alone may stand on what another paid for: its seconds are
a share, and no ratio of theirs is a headline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isnan, nan, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from study.analysis import paper
from study.analysis.statistics import Estimate

NEEDS = {
    "base": ("prefix", "base"),
    "certain": ("prefix", "h", "base"),
    "uncertain": ("prefix", "h", "g", "t", "answer"),
    "selective": ("prefix", "base", "g", "t", "answer"),
    "selective run": ("prefix", "base", "selective"),
    "usual": ("h", "g", "t", "merge", "save", "reload", "answer", "restore"),
}
"""The stages of a query by what becomes of it. `prefix`: the pass over its system turn and tools, on which
the others stand. The paper's rule: H over the tools, then the base answer, or G, T and the adapted one.
Selective: the base answer, which is all where it is likely, then the rest. The usual loop reads the prompt in
each stage."""


def needs(way: str, apart: bool = True) -> list[str]:
    """The stages charged to a query.

    apart: whether the pass over the prompt was timed as a stage of its own. In a run's records it is part of
    the base answer, which then is charged whole: at most what the query takes.
    """
    return list(dict.fromkeys(s if apart or s != "prefix" else "base" for s in NEEDS[way]))


def mean(values: pd.Series | npt.NDArray[Any]) -> Estimate:
    """The mean with its 95 % t interval over batches, never below 0; none for one batch.

    Samples of one batch share its seconds equally, so equal values are one measurement: the standard error
    is the cluster-robust one, with a batch as the cluster.
    """
    x = np.asarray(values, dtype=float)
    if not len(x):
        return Estimate(nan, nan, nan, 0, "none")
    value = float(x.mean())
    batches, sizes = np.unique(x.round(9), return_counts=True)
    if len(batches) == 1:
        return Estimate(value, nan, nan, len(x), "none")
    variance = float(((sizes * (batches - value)) ** 2).sum()) * len(batches) / (len(batches) - 1)
    half = float(special.stdtrit(len(batches) - 1, 0.975)) * sqrt(variance) / len(x)
    return Estimate(value, max(0.0, value - half), value + half, len(x), "t over batches")


def of(rows: pd.DataFrame, parts: Sequence[str]) -> dict[str, Any]:
    """Cells of one stage: mean seconds and tokens of the samples' `seconds_…` and `tokens_…` in these parts.

    A sample's seconds are its share of the batch it was computed in; several seeds are averaged per sample.
    """
    seconds = mean(rows[[f"seconds_{p}" for p in parts]].sum(axis=1).groupby(rows["sample"]).mean())
    return {
        "n": int(seconds.n),
        "seconds": seconds.value,
        "seconds_low": seconds.low,
        "seconds_high": seconds.high,
        "tokens": rows[[f"tokens_{p}" for p in parts]].sum(axis=1).mean(),
        "model": rows["model"].iloc[0] if len(rows) else None,
        "note": "" if seconds.n else "no such sample in this run",
    }


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


PAPER = Prices(
    "the paper's, A40",
    paper.SECONDS["base"],
    paper.SECONDS["uncertain"],
    paper.SECONDS["certain"],
    paper.UNCERTAIN_SHARE,
    paper.SFT_SECONDS,
    f"the paper's: {paper.SFT_SAMPLES} samples",
)


# --- what `make bench` measured -------------------------------------------------------------------------

BENCH = ["dtype", "device", "benchmark", "sample", "n", "program", "stage", "seconds", "peak_mb",
         "decoded_tokens", "drafted", "accepted", "prompt_tokens", "flops", "reached"]  # fmt: skip
"""A row of the bench: seconds of a stage for all `n` samples, peak memory (MB), tokens decoded, those guessed
ahead and those that came true, operations needed, and the share of the machine's matrix rate this makes."""

ALONE, TOGETHER, RUN = "alone", "together", "run"
WAYS = {"usual": "usual", "exact": "uncertain", "activated": "uncertain", "selective": "selective"}
"""What becomes of a query in each of the bench's programs."""


class Charged(NamedTuple):
    """Seconds per query of a program, all charged: by itself, in a batch, or in a whole run."""

    program: str
    way: str
    how: str = ALONE


class Headline(NamedTuple):
    """A ratio of seconds that was promised on a benchmark; through: the middle of a chain of two ratios."""

    what: str
    benchmark: str
    first: Charged
    second: Charged
    sense: str
    bar: float
    through: Charged | None = None


_USUAL, _BASE = Charged("usual", "usual"), Charged("activated", "base")
_OURS, _BATCH = Charged("activated", "uncertain"), Charged("activated", "uncertain", TOGETHER)
HEADLINES = (
    Headline("uncertain sample, usual loop / activated, SealTool", "sealtool", _USUAL, _OURS, "≥", 9),
    Headline("… 8 together / usual loop one at a time", "sealtool", _USUAL, _BATCH, "≥", 12, _OURS),
    Headline("… VirusTotal", "nexusraven:virustotal", _USUAL, _OURS, "≥", 15),
    Headline("uncertain sample, activated / base answer, one at a time", "sealtool", _OURS, _BASE, "≤", 1.8),
    Headline("… 8 together", "sealtool", _BATCH, Charged("activated", "base", TOGETHER), "≤", 1.8),
    Headline("SealTool run, selective / base, seconds per question", "sealtool",
             Charged("selective", "selective run", RUN), Charged("selective", "base", RUN), "≤", 1.6),
)  # fmt: skip


def bench_rows(path: Path) -> pd.DataFrame:
    """The rows of `make bench` (`path`: its CSV); empty if there is no such file."""
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame()
    return rows.reindex(columns=BENCH)


def alone(bench: pd.DataFrame) -> pd.DataFrame:
    """The rows of samples by themselves."""
    return bench[~bench["sample"].isin([TOGETHER, RUN])]


def charged(bench: pd.DataFrame, of: Charged, column: str = "seconds") -> pd.Series:
    """Seconds per query by (benchmark, sample), all that it needs added up; none where a stage is lacking."""
    how = bench["sample"].where(bench["sample"].isin([TOGETHER, RUN]), ALONE)
    mine = bench[(bench["program"] == of.program) & (how == of.how)]
    each = mine.assign(each=mine[column] / mine["n"])
    wide = each.pivot_table("each", ["benchmark", "sample"], "stage").reindex(columns=needs(of.way))
    return wide.dropna().sum(axis=1)


def headlines(bench: pd.DataFrame) -> pd.DataFrame:
    """What was promised, one row per precision and headline: measured, its interval, and whether it holds.

    Ratios: geometric means over paired samples, 95 % t intervals on the logarithm; a batch is timed once and
    has none. limit: the same ratio if our passes over prompts and T ran at the machine's full matrix rate and
    the rest took what it took: what is beyond it is arithmetic's, the way up to it is ours.
    """
    out = []
    for dtype, rows in bench.groupby("dtype", sort=False):
        ideal = rows.assign(seconds=_at_full_rate(rows))
        for h in HEADLINES:
            at, best = (r[r["benchmark"] == h.benchmark] for r in (rows, ideal))
            first, second = charged(at, h.first), charged(at, h.second)
            floor = charged(at if h.first == _USUAL else best, h.first), charged(best, h.second)
            found = ratio(first, second)
            limit = ratio(*floor).value if h.first.how == ALONE == h.second.how else nan
            if h.through:  # paired by sample up to the middle, then the same samples alone and together
                middle = charged(at, h.through)
                found = _times(ratio(first, middle), middle.mean() / second.mean())
            out.append((dtype, h.what, found.n, found.value, found.low, found.high, h.sense, h.bar, limit))
        out += [(dtype, *row) for row in (_in_flight(rows), _rate(rows))]
    columns = ["dtype", "what", "n", "measured", "measured_low", "measured_high", "sense", "bar", "limit"]
    table = pd.DataFrame(out, columns=columns)
    holds = np.where(
        table["sense"] == "≥", table["measured"] >= table["bar"], table["measured"] <= table["bar"]
    )
    table["result"] = np.where(table["n"] == 0, "not measured", np.where(holds, "reached", "falls short"))
    return table


def _in_flight(rows: pd.DataFrame) -> tuple[Any, ...]:
    """Tokens per second of a run's base answers, in flight over one by one."""
    at = rows[rows["sample"] == RUN].set_index("stage")
    rate = at["decoded_tokens"] / at["seconds"] if len(at) else pd.Series(dtype=float)
    value = rate.get("base", nan) / rate.get("one by one", nan)
    n = 0 if pd.isna(value) else int(at["n"].iloc[0])
    return "tokens per second, 8 rows in flight / one by one", n, value, nan, nan, "≥", 3, nan


def _rate(rows: pd.DataFrame) -> tuple[Any, ...]:
    """The share of the machine's matrix rate that mode `exact` reaches in T, per cent."""
    t = rows[(rows["program"] == "exact") & (rows["stage"] == "t") & (rows["benchmark"] == "sealtool")]
    shares = 100 * t["reached"].dropna()
    half = (
        float(special.stdtrit(len(shares) - 1, 0.975)) * shares.std() / sqrt(len(shares))
        if len(shares) > 1
        else nan
    )
    value = shares.mean()
    return (
        "exact, share of the machine's matrix rate in T, %",
        len(shares),
        value,
        value - half,
        value + half,
        "≥",
        75,
        100,
    )


def _at_full_rate(rows: pd.DataFrame) -> pd.Series:
    """Seconds, those that are arithmetic as short as the machine's rate allows."""
    return rows["seconds"].where(rows["flops"].isna(), rows["seconds"] * rows["reached"])


def by_stage(bench: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds by precision, benchmark and program: of each stage, and of the query, all charged."""
    rows = []
    for (dtype, benchmark, program), mine in alone(bench).groupby(
        ["dtype", "benchmark", "program"], sort=False
    ):
        whole = charged(mine, Charged(str(program), WAYS[str(program)]))
        row: dict[str, Any] = {"dtype": dtype, "benchmark": benchmark, "program": program, "n": len(whole)}
        rows.append(row | mine.groupby("stage")["seconds"].mean().to_dict() | {"charged": whole.mean()})
    stages = dict.fromkeys(s for way in WAYS.values() for s in needs(way))
    ordered = ["prefix", "base", *(s for s in stages if s not in ("prefix", "base", "answer", "restore"))]
    return pd.DataFrame(
        rows, columns=["dtype", "benchmark", "program", "n", *ordered, "answer", "restore", "charged"]
    )


def ratio(first: pd.Series, second: pd.Series) -> Estimate:
    """Geometric mean of first / second over what both have, with its 95 % t interval on the logarithm."""
    first, second = first.align(second, join="inner")
    both = (first > 0) & (second > 0)
    logs = np.log((first[both] / second[both]).to_numpy(float))
    if not len(logs):
        return Estimate(nan, nan, nan, 0, "none")
    centre, half = float(logs.mean()), nan
    if len(logs) > 1:
        half = float(special.stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / sqrt(len(logs)))
    return Estimate(exp(centre), exp(centre - half), exp(centre + half), len(logs), "t")


def _times(found: Estimate, by: float) -> Estimate:
    known = found.n if not isnan(by) else 0
    return Estimate(found.value * by, found.low * by, found.high * by, known, found.method)
