"""One arm's answers with their accuracy, and two arms' paired difference, as cells of a table.

Accuracies, shares and differences are in per cent (points). Samples are the unit: seeds are averaged first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from study.analysis import statistics
from study.analysis.statistics import Estimate, Paired
from study.analysis.tables import paper
from study.analysis.tables.layout import label, model_label

COPY = 0.999  # copy_ratio ignores case and spaces; 1 up to rounding is the seed question itself
SCORED = ["n", "correct", "accuracy", "low", "high", "computed", "loaded", "errors", "seeds"]
SHARES = ["uncertain", "synthesis_failed", "copies"]
DIFFERENCE = ["difference", "difference_low", "difference_high", "difference_method", "pairs", "gained",
              "lost", "mcnemar_p", "p", "p_holm", "detectable"]  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What makes answers one row of a table. `pool_n`: training samples behind a shared adapter, 0 = none."""

    benchmark: str
    inference: str
    arm: str
    mode: str
    model: str
    tool_order: str
    variant: str = ""
    pool_n: int = 0

    def cells(self) -> dict[str, Any]:
        cells = asdict(self)
        return cells | {"pool_n": self.pool_n or None}


class Answers:
    """The answers of one arm on one benchmark, with their accuracy (Wilson) over the scored samples.

    `rows`: the study's records, one per sample × seed. Machine failures (status `error`) are counted and
    never scored. `correct`: sample × seed, in {0, 1}. An answer that is there twice raises ValueError.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        scored = rows[rows["status"] == "ok"]
        self.rows, self.scored = rows, scored
        # pivot, not pivot_table: an answer that is there twice must be an error, not an average.
        self.correct = scored.assign(correct=scored["correct"].astype(float)).pivot(
            index="sample", columns="seed", values="correct"
        )
        means = self.correct.mean(axis=1)
        self.accuracy = statistics.wilson(float(means.sum()), len(means))

    def cells(self) -> dict[str, Any]:
        """The cells `SCORED` and, for an arm that looks at H, `SHARES`."""
        n, answers = len(self.correct), self.rows["source"].value_counts()
        cells: dict[str, Any] = {
            "n": n,
            "seeds": self.rows["seed"].nunique(),
            "errors": int((self.rows["status"] == "error").sum()),
            "computed": int(answers.get("computed", 0)),
            "loaded": int(answers.get("loaded", 0)),
            "note": "" if n else "no sample was scored: machine failures only",
        }
        if n:
            cells |= {"correct": self.accuracy.value * n, **percent(self.accuracy, "accuracy", "low", "high")}
            if "base" not in set(self.rows["arm"]) and self.scored["margin"].notna().any():
                cells |= self._shares()
        return cells

    def _shares(self) -> dict[str, float]:
        uncertain = self.scored[self.scored["uncertain"].astype(bool)]
        shares = {"uncertain": 100 * len(uncertain) / len(self.scored)}
        # Arms that ask for no example of these samples (oracle, generic, …) have no such share.
        asked = uncertain[uncertain["attempts"] > 0]
        if len(asked):
            shares["synthesis_failed"] = 100 * float(asked["synthesis_failed"].astype(bool).mean())
            shares["copies"] = 100 * float((asked["copy_ratio"].astype(float) >= COPY).mean())
        return shares


def answers(records: pd.DataFrame) -> dict[Key, Answers]:
    """The records grouped into rows of a table, in the order met."""
    if records.empty:
        return {}
    filled = records.assign(
        variant=records["variant"].fillna("") if "variant" in records else "",
        pool_n=records["pool_n"].fillna(0).astype(int) if "pool_n" in records else 0,
    )
    groups = filled.groupby(list(Key.__dataclass_fields__), dropna=False, sort=False)
    found: dict[Key, Answers] = {}
    for names, rows in groups:
        *texts, pool_n = names if isinstance(names, tuple) else (names,)
        found[Key(*map(str, texts), pool_n=int(str(pool_n)))] = Answers(rows)  # type: ignore[misc, arg-type]
    return found


def compare(first: Answers | None, second: Answers | None) -> Paired | None:
    """Second minus first on the samples and seeds that both answered; None without a single one.

    Two arms that share no seed are paired sample by sample, each sample's first seed with its first.
    """
    if first is None or second is None:
        return None
    a, b = first.correct, second.correct
    if not set(a.columns) & set(b.columns) and a.shape[1] == b.shape[1]:
        a, b = (x.set_axis(range(x.shape[1]), axis=1) for x in (a, b))
    a, b = a.align(b, join="inner")
    if not (a.notna() & b.notna()).any(axis=None):
        return None
    return statistics.paired(a.to_numpy(), b.to_numpy())


def difference_cells(paired: Paired | None, prefix: str = "") -> dict[str, Any]:
    """The cells `DIFFERENCE` of a comparison (but Holm's), each name after the prefix; none without one."""
    if paired is None:
        return {}
    d = paired.difference
    cells = percent(d, "difference", "difference_low", "difference_high") | {
        "difference_method": d.method,
        "pairs": int(d.n),
        "gained": paired.gained,
        "lost": paired.lost,
        "mcnemar_p": "; ".join(f"{x:.4g}" for x in paired.p_by_seed),
        "p": paired.p,
        "detectable": 100 * paired.detectable,
    }
    return {prefix + k: v for k, v in cells.items()}


def percent(estimate: Estimate, value: str, low: str, high: str) -> dict[str, float]:
    """Three cells in per cent under the given names."""
    return {value: 100 * estimate.value, low: 100 * estimate.low, high: 100 * estimate.high}


def select(records: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The records whose columns have the wanted values; a column that is not there counts as empty."""
    for column, value in wanted.items():
        if column in records:
            records = records[records[column].astype(object).fillna("") == value]
        elif value != "" and len(records):
            records = records.iloc[:0]
    return records


SELECTING = frozenset({"arms", "benchmarks", "n", "mode", "modes", "inference"})


def selecting(variants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The variants that only choose other arms, modes or samples: parts of the same run."""
    return [name for name, settings in variants.items() if set(settings) <= SELECTING]


def joined(parts: Iterable[pd.DataFrame], variants: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The records of a run and its variants as one frame, the `selecting` variants as parts of the run.

    An answer that two parts share is kept once.
    """
    filled = [part for part in parts if len(part)]
    if not filled:
        return pd.DataFrame(columns=["variant"])
    records = pd.concat(filled, ignore_index=True)
    same = records["variant"].isin(selecting(variants))
    records["variant"] = records["variant"].where(~same, "")
    key = [*Key.__dataclass_fields__, "sample", "seed"]
    return records.drop_duplicates([c for c in key if c in records], ignore_index=True)


def with_holm(table: pd.DataFrame, family: Mapping[Any, float], column: str = "p_holm") -> pd.DataFrame:
    """The table with Holm's p of the family (row index → p) in a column; nothing for the other rows."""
    adjusted = statistics.holm({str(i): float(p) for i, p in family.items()})
    if column not in table:
        table[column] = float("nan")
    table.loc[list(family), column] = list(adjusted.values())
    return table


def setting(key: Key, cells: Mapping[str, Any]) -> str:
    """How a row's run differs from the paper's, in words separated by '; '."""
    differs = [model_label(key.model)] if key.model != paper.MODEL else []
    differs += [f"{key.mode} adapters"] if key.mode == "activated" else []
    differs += [f"tools {key.tool_order}"]
    differs += [f"{cells['seeds']} of {paper.SEEDS} seeds"] if cells["seeds"] != paper.SEEDS else []
    n, paper_n = cells["n"], paper.N.get(key.benchmark)
    if paper_n not in (None, n):
        differs += [f"{n} of the paper's {paper_n} {label(key.benchmark)} samples"]
    differs += ["API-Bank's public copy"] if key.benchmark == "apibank" else []
    return "; ".join(differs)


def settings_note(table: pd.DataFrame) -> str:
    """One sentence that names each difference to the paper's run once; empty if no row has any."""
    stated = table["setting"].dropna() if "setting" in table else ()
    # Each difference once: most rows share theirs.
    parts = list(dict.fromkeys(part for row in stated for part in str(row).split("; ") if part))
    return f"Among what differs from the paper's run: {'; '.join(parts)}." if parts else ""


def power_note(rows: Iterable[Mapping[str, Any]], name: Any, prefix: str = "") -> str:
    """One sentence with n, discordant counts and the smallest difference detectable at 80 % power.

    `name`: row → what the comparison is called. Empty without a comparison.
    """
    parts = []
    for r in rows:
        if pd.isna(r.get(f"{prefix}pairs")):
            continue
        least = r[f"{prefix}detectable"]
        parts.append(
            f"{name(r)}: n = {r[f'{prefix}pairs']}, {r[f'{prefix}gained'] + r[f'{prefix}lost']} discordant, "
            f"{'none' if pd.isna(least) else format(least, '.1f') + ' points'}"
        )
    return f"Smallest difference detectable at 80 % power: {'; '.join(parts)}." if parts else ""


def verdict(low: float, high: float, detectable: float, p: float) -> str:
    """What a paired interval in points shows, in words: a gain, a loss, or neither and how blind it is.

    `p`: Holm's where the comparison is one of a family; an interval off 0 with p ≥ 0.05 shows nothing.
    """
    if p < 0.05 and low > 0:
        return "a gain"
    if p < 0.05 and high < 0:
        return "a loss"
    limit = "no difference" if pd.isna(detectable) else f"only {detectable:.0f} points or more"
    return f"no difference shown, in either direction ({limit} would be found 8 times in 10)"
