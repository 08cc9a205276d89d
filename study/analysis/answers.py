"""Answers, their accuracy, and their paired difference to a named reference: what most tables here are.

Frames in, frames out. Accuracies, shares and differences are in per cent (points). Samples are the unit:
seeds are averaged first. What a failure of the machine leaves out is left out, what was never made is said,
and neither is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from math import nan
from typing import Any, NamedTuple, Self

import pandas as pd

from study.analysis import statistics
from study.analysis.look import AVERAGE, NOT_RUN
from study.analysis.statistics import Estimate

COPY = 0.999  # copy_ratio ignores case and spaces; 1 up to rounding is the seed question itself
SCORED = ["n", "correct", "accuracy", "low", "high", "computed", "loaded", "errors", "seeds"]
SHARES = ["uncertain", "synthesis_failed", "copies"]
DIFFERENCE = ["difference", "difference_low", "difference_high", "difference_method", "pairs", "gained",
              "lost", "mcnemar_p", "p", "p_holm", "detectable"]  # fmt: skip
COLUMNS = ["benchmark", "inference", "arm", "mode", "model", "tool_order", "variant", "pool_n",
           "sample", "seed", "status", "correct", "code", "source", "margin", "uncertain", "adapted",
           "attempts", "copy_ratio", "synthesis_failed", "n_replies", "n_tools", "reply", "flags",
           "seconds_fit", "seconds_h", "seconds_g", "seconds_t", "seconds_answer", "tokens_h", "tokens_g",
           "tokens_t", "tokens_answer"]  # fmt: skip
FLAGGED = ["n_uncertain", "uncertain", "tpr", "tpr_low", "tpr_high", "fpr", "fpr_low", "fpr_high"]
COUNTS = ("n", "computed", "loaded", "errors", "seeds", "pairs", "gained", "lost", "pool_n")


class Key(NamedTuple):
    """What makes answers one row of a table. `pool_n`: training samples behind a shared adapter, 0 = none."""

    benchmark: str
    inference: str
    arm: str
    mode: str
    model: str
    tool_order: str
    variant: str = ""
    pool_n: int = 0


class Answers:
    """One set of answers: which were tried, and which of those were right.

    `records`: the study's, one row per sample × seed; `arm`, `mode` and others: the values that rows must
    have. `correct` (sample × seed): in {0, 1}, nan = not scored; `tried`: whether there was an attempt, one
    that ended in a failure of the machine included. `rows`: the records behind them. An answer that is there
    twice raises ValueError.
    """

    def __init__(self, records: pd.DataFrame, arm: str | None = None, mode: str | None = None, **other: Any):
        for column, value in {"arm": arm, "mode": mode, **other}.items():
            if value is not None and len(records):
                records = records[records[column] == value]
        self.rows = records
        self.needed = self.missing = 0
        self.tried = self.correct = pd.DataFrame(dtype=float)
        if len(records):
            # pivot, not pivot_table: an answer that is there twice must be an error, not an average.
            made = records.assign(tried=True, correct=records["correct"].astype(float))
            made["correct"] = made["correct"].where(made["status"] == "ok")
            self.tried = made.pivot(index="sample", columns="seed", values="tried").notna()
            self.correct = made.pivot(index="sample", columns="seed", values="correct").astype(float)

    def _like(self, correct: pd.DataFrame, tried: pd.DataFrame, needed: int = 0, missing: int = 0) -> Self:
        new = type(self)(self.rows.iloc[:0])
        new.correct, new.tried, new.needed, new.missing = correct, tried, needed, missing
        return new

    def __or__(self, other: Answers) -> Self:
        """These answers, and the other ones where these were not tried."""
        mine, theirs = self.tried.align(other.tried, fill_value=False)
        correct, others = self.correct.align(other.correct)
        return self._like(correct.where(mine.astype(bool), others), mine.astype(bool) | theirs.astype(bool))

    def where(self, mask: pd.DataFrame | bool, other: Answers) -> Self:
        """These answers where the mask is true, elsewhere the other ones; on the samples the other scored.

        `mask`: sample × seed, missing = unknown, which leaves the sample out. An answer of these that was
        never tried is counted in `missing`, of the `needed` ones.
        """
        flagged, known = other._mask(mask)
        correct, tried = self.correct.reindex_like(other.correct), self.tried.reindex_like(other.correct)
        missing = flagged & ~tried.fillna(False).astype(bool)
        chosen = correct.where(flagged, other.correct).where(known)
        return self._like(
            chosen, ~missing & known, int(flagged.to_numpy().sum()), int(missing.to_numpy().sum())
        )

    def _mask(self, mask: pd.DataFrame | bool) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Which of these answers a mask flags, and of which both mask and answer are known."""
        wide = pd.DataFrame(mask, index=self.correct.index, columns=self.correct.columns).astype("boolean")
        known = wide.notna() & self.correct.notna()
        return wide.fillna(False).astype(bool) & known, known

    def flagged(self, mask: pd.DataFrame | bool) -> dict[str, float]:
        """How many of these answers a mask flags (`n_uncertain`, mean over seeds; `uncertain`, in %).

        With it `tpr`: the share of wrong answers flagged, `fpr`: of right ones, with Wilson intervals; none
        where nothing is flagged.
        """
        flagged, known = self._mask(mask)
        seeds = max(1, self.correct.shape[1])
        n = flagged.to_numpy().sum() / seeds
        cells = {"n_uncertain": n, "uncertain": 100 * n / max(1, known.to_numpy().sum() / seeds)}
        for name, verdict in {"tpr": 0, "fpr": 1}.items() if n else ():
            group = (self.correct == verdict) & known
            hits = (flagged & group).to_numpy().sum() / seeds
            cells |= percent(statistics.wilson(hits, group.to_numpy().sum() / seeds), name)
        return dict.fromkeys(FLAGGED, nan) | cells

    @property
    def accuracy(self) -> Estimate:
        """Share of right answers with its Wilson interval, over the scored samples."""
        means = self.correct.mean(axis=1).dropna()
        return statistics.wilson(float(means.sum()), len(means))

    def cells(self) -> dict[str, Any]:
        """What they are (`Key`), `SCORED`, `SHARES` of arms that look at H; `note`: why there is none."""
        if self.missing:
            return {"note": f"{NOT_RUN}: {self.missing} of the {self.needed} answers it needs are missing"}
        if self.tried.empty:
            return {"note": NOT_RUN}
        n = int(self.accuracy.n)
        cells: dict[str, Any] = {"seeds": self.tried.shape[1]}
        if len(self.rows):
            cells |= {k: self.rows[k].iloc[0] for k in Key._fields}
            cells["pool_n"] = cells["pool_n"] or None
            source = self.rows["source"].value_counts()
            cells |= {"errors": int((self.rows["status"] == "error").sum())}
            cells |= {k: int(source.get(k, 0)) for k in ("computed", "loaded")}
        if not n:
            return cells | {"n": 0, "note": "no sample was scored: machine failures only"}
        cells |= {
            "n": n,
            "correct": self.accuracy.value * n,
            "note": "",
            **percent(self.accuracy, "accuracy"),
        }
        return cells | (self._shares() if len(self.rows) else {})

    def _shares(self) -> dict[str, float]:
        scored = self.rows[self.rows["status"] == "ok"]
        if scored["margin"].isna().all() or "base" in set(scored["arm"]):
            return {}
        uncertain = scored[scored["uncertain"].astype(bool)]
        shares = {"uncertain": 100 * len(uncertain) / len(scored)}
        # Arms that ask for no example of these samples (oracle, generic, …) have no such share.
        asked = uncertain[uncertain["attempts"] > 0]
        if len(asked):
            shares["synthesis_failed"] = 100 * float(asked["synthesis_failed"].astype(bool).mean())
            shares["copies"] = 100 * float((asked["copy_ratio"].astype(float) >= COPY).mean())
        return shares


def column(records: pd.DataFrame, name: str) -> pd.DataFrame:
    """A number per sample × seed, e.g. its margin, whichever arm's records hold it; missing where unknown.

    Comparing it gives a mask for `where`, missing where the number is. Two numbers for one sample raise
    ValueError.
    """
    known = records[["sample", "seed", name]].dropna().drop_duplicates()
    return known.astype({name: "Float64"}).pivot(index="sample", columns="seed", values=name)


SELECTING = frozenset({"arms", "benchmarks", "n", "mode", "modes", "inference"})


def selecting(variants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The variants that only choose other arms, modes or samples: parts of the same run."""
    return [name for name, settings in variants.items() if set(settings) <= SELECTING]


def joined(parts: Sequence[pd.DataFrame], variants: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The records of a run and its variants as one frame, the `selecting` variants as parts of the run.

    An answer that two parts share is kept once.
    """
    filled = [part for part in parts if len(part)]
    if not filled:
        return pd.DataFrame(columns=COLUMNS)
    records = pd.concat(filled, ignore_index=True)
    same = records["variant"].isin(selecting(variants))
    records["variant"] = records["variant"].where(~same, "")
    return records.drop_duplicates([*Key._fields, "sample", "seed"], ignore_index=True)


def split(records: pd.DataFrame) -> dict[Key, Answers]:
    """The answers that the records hold, one set per `Key`, in the order met."""
    if records.empty:
        return {}
    filled = records.assign(**{k: records[k].fillna(0 if k == "pool_n" else "") for k in Key._fields})
    groups = filled.astype({"pool_n": int}).groupby(list(Key._fields), sort=False)
    return {Key(*names): Answers(rows) for names, rows in groups}  # type: ignore[arg-type]


def compare(
    answers: Mapping[Any, Answers], against: Hashable | Mapping[Any, Answers | None] = None, prefix: str = ""
) -> pd.DataFrame:
    """One row per set of answers: its `name`, its `cells`, and `DIFFERENCE` to the reference.

    `against`: the name of one of them, which isn't compared with itself, or each one's reference by its name.
    `prefix`: of the difference's columns; Holm's p is left open (`holm`).
    """
    references = against if isinstance(against, Mapping) else {
        name: None if name == against else answers.get(against) for name in answers
    }  # fmt: skip
    rows = [
        {"name": name, **a.cells(), **_difference(references.get(name), a, prefix)}
        for name, a in answers.items()
    ]
    columns = [*Key._fields, *SCORED, *SHARES, *(prefix + c for c in DIFFERENCE), "note"]
    return whole(pd.DataFrame(rows, columns=["name", *columns]))


def differences(
    answers: Iterable[Answers], references: Iterable[Answers | None], prefix: str = ""
) -> pd.DataFrame:
    """`DIFFERENCE` of each set of answers to its reference, a row each, the names after the prefix."""
    rows = [_difference(b, a, prefix) for a, b in zip(answers, references, strict=True)]
    return whole(pd.DataFrame(rows, columns=[prefix + c for c in DIFFERENCE]))


def _difference(first: Answers | None, second: Answers, prefix: str) -> dict[str, Any]:
    """Second minus first on the samples and seeds that both answered.

    Two that share no seed are paired sample by sample, each sample's first seed with its first.
    """
    if first is None or second.missing:
        return {}
    a, b = first.correct, second.correct
    if not set(a.columns) & set(b.columns) and a.shape[1] == b.shape[1]:
        a, b = (x.set_axis(range(x.shape[1]), axis=1) for x in (a, b))
    a, b = a.align(b, join="inner")
    if not (a.notna() & b.notna()).any(axis=None):
        return {}
    paired = statistics.paired(a.to_numpy(), b.to_numpy())
    cells = percent(paired.difference, "difference") | {
        "difference_method": paired.difference.method,
        "pairs": int(paired.difference.n),
        "gained": paired.gained,
        "lost": paired.lost,
        "mcnemar_p": "; ".join(f"{x:.4g}" for x in paired.p_by_seed),
        "p": paired.p,
        "detectable": 100 * paired.detectable,
    }
    return {prefix + k: v for k, v in cells.items()}


def by_mode(modes: Iterable[str], make: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    """The tables of all training modes one below the other, with a column `mode`."""
    parts = [make(mode).assign(mode=mode) for mode in modes]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def holm(
    table: pd.DataFrame, family: pd.Series | None = None, prefix: str = "", by: Sequence[str] = ()
) -> pd.DataFrame:
    """The table with Holm's p (`p_holm`) of the rows in the family that have a p; by default all of them.

    `by`: columns whose values make families of their own.
    """
    p = table.loc[slice(None) if family is None else family, f"{prefix}p"].dropna()
    families = [rows for _, rows in p.groupby([table.loc[p.index, c] for c in by])] if by else [p]
    adjusted = {i: x for f in families for i, x in statistics.holm(f.to_dict()).items()}
    return table.assign(**{f"{prefix}p_holm": pd.Series(adjusted, table.index, dtype=float)})


def averages(table: pd.DataFrame, benchmarks: Sequence[str]) -> pd.DataFrame:
    """Rows `avg`: the unweighted means over the benchmarks, of what was scored on each of them.

    Their intervals combine the benchmarks' own (`statistics.average`).
    """
    scored = table[table["benchmark"].isin(benchmarks) & table["accuracy"].notna()]
    rows = []
    for _, parts in scored.groupby(["inference", "arm", "mode", "model", "tool_order"], sort=False):
        if len(parts) < len(benchmarks):
            continue
        row = {**parts.iloc[0][["inference", "arm", "mode", "model", "tool_order"]], "benchmark": AVERAGE}
        row |= {
            **parts[["n", "errors", "computed", "loaded", "correct"]].sum(),
            "seeds": parts["seeds"].min(),
        }
        for name in ("accuracy", "difference") if parts["difference"].notna().all() else ("accuracy",):
            ends = [f"{name}_low", f"{name}_high"] if name == "difference" else ["low", "high"]
            each = parts[[name, *ends]].to_numpy(float) / 100
            mean = statistics.average([Estimate(x, low, high, 0, "") for x, low, high in each])
            row |= percent(mean, name) | ({"difference_method": mean.method} if name == "difference" else {})
        rows.append(row)
    return whole(pd.DataFrame(rows, columns=table.columns)) if rows else table.iloc[:0]


def percent(estimate: Estimate, name: str) -> dict[str, float]:
    """Three cells in per cent: the value and the ends of its interval, the accuracy's being `low`, `high`."""
    ends = ("low", "high") if name == "accuracy" else (f"{name}_low", f"{name}_high")
    values = (estimate.value, estimate.low, estimate.high)
    return {c: 100 * x for c, x in zip((name, *ends), values, strict=True)}


def whole(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its counts as whole numbers, missing ones allowed."""
    names = {c: str(c).removeprefix("base_").removeprefix("tt_si_").removeprefix("own_") for c in table}
    return table.astype({c: "Int64" for c, name in names.items() if name in COUNTS})
