"""What test-time training costs: mean seconds of a stage, prices of a query, ratios of `make bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from study.analysis import paper
from study.analysis.statistics import Estimate

WHOLE = "whole"
BENCH = ["benchmark", "program", "stage", "n", "seconds", "ratio", "ratio_low", "ratio_high"]


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


def bench_ratios(path: Path) -> pd.DataFrame:
    """Seconds per program and stage of `make bench` (`path`: its CSV), and how many times faster than the
    usual loop, the program with 'usual' in its name; empty if there is no such file.

    Ratios stand for T (training alone) and for the whole sample only: in its other stages the usual loop
    reads the prompt anew, which ttsi does once, in a stage of its own (`prefix`). `whole`: all stages but
    `base`, of the usual loop with merge, save, reload and restore. `ratio`: geometric mean over samples of
    usual / program, its 95 % t interval on the logarithm; from two samples on.
    """
    if not path.exists():
        return pd.DataFrame(columns=BENCH)
    data = pd.read_csv(path).dropna(subset=["seconds"])
    by = ["benchmark", "sample", "program"]
    whole = data[data["stage"] != "base"].groupby(by, sort=False, as_index=False)["seconds"].sum()
    data = pd.concat([data, whole.assign(stage=WHOLE)], ignore_index=True)
    usual = next((p for p in data["program"].unique() if "usual" in str(p)), None)
    groups = data.groupby(["benchmark", "stage", "program"], sort=False)
    times = {key: group.groupby("sample")["seconds"].mean() for key, group in groups}
    rows = []
    for (benchmark, stage, program), mine in times.items():
        row = {"benchmark": benchmark, "program": program, "stage": stage}
        row |= {"n": len(mine), "seconds": mine.mean()}
        theirs = times.get((benchmark, stage, usual))
        if stage in ("T", WHOLE) and program != usual and theirs is not None:
            row |= _ratio(theirs, mine)
        rows.append(row)
    return pd.DataFrame(rows, columns=BENCH)


def _ratio(first: pd.Series, second: pd.Series) -> dict[str, float]:
    first, second = first.align(second, join="inner")
    both = (first > 0) & (second > 0)
    logs = np.log((first[both] / second[both]).to_numpy(float))
    if not len(logs):
        return {}
    centre, half = float(logs.mean()), nan
    if len(logs) > 1:
        half = float(special.stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / sqrt(len(logs)))
    return {"ratio": exp(centre), "ratio_low": exp(centre - half), "ratio_high": exp(centre + half)}
