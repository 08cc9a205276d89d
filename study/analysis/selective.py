"""Selective TT-SI judged: two answers per sample, of the base and of the adapted model, and which stands.

Frames hold one row per sample. q: the likelihood of an answer, in [0, 1], under the model that gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from study.analysis import statistics
from study.analysis.detection import delong, pooled
from study.analysis.statistics import Estimate, Floats, Places, TooFew


class Asked(NamedTuple):
    """A set of docs/hypotheses.md: the model, what it is told, how many samples of which benchmarks."""

    model: str
    samples: Mapping[str, int]
    instructions: str = ""


Attempted = Callable[[pd.DataFrame, pd.DataFrame, Asked], dict[str, int]]
PRIMARY = Asked("qwen2.5-coder-0.5b", {"apibank": 526, "nexusraven": 318, "toolalpaca": 114, "bfcl": 300})
SECONDARY = Asked("qwen2.5-coder-1.5b", {"sealtool": 294})
REPLICATION = Asked(SECONDARY.model, {"apibank": 150, "nexusraven": 150, "toolalpaca": 114, "bfcl": 150})
SETS = {"primary": PRIMARY, "secondary": SECONDARY, "replication": REPLICATION}
FIRST, SECOND = ("primary", "secondary"), ("secondary", "replication")
"""The sets on which H1 to H3 are tested, and those for H4 and H5 (`acceptance`)."""
SEEN = {"apibank": 100, "nexusraven": 60, "toolalpaca": 60, "bfcl": 100}
"""So many of their first samples were looked at before, in another precision."""
ADAPTED = "tt_si_likelihood"
"""The arm with an adapted answer wherever q < ½: all that the hypotheses ask for."""
ALPHA = 0.05
"""Level of a family of tests."""
REGISTERED: dict[str, Any] = {
    "seeds": [0], "answer_opening": True, "layout": "native",
    "tool_order": "shuffled", "k": 1, "filters": [], "epochs": 3, "learning_rate": 1e-4,
    "answer_temperature": 0, "answer_tokens": 256, "synthesis_tokens": 256, "constrained": False,
    "judge": "schema", "accept": "lenient", "strict_types": False, "keep_components": False,
    "candidate": "name", "normalise": False, "validate_examples": "none", "novelty": "any", "retries": 5,
    "rank": 8, "alpha": 16, "engine": "torch",
}  # fmt: skip
"""Settings of a profile, beside its model, that they were written down for."""
NOTHING = {"H3": 1, "H5": 50}
"""What a hypothesis's value is if there is nothing in it, where that isn't 0: odds, an area in hundredths."""
KEYS = ["benchmark", "sample", "seed"]
LIKELIHOODS = {
    "likelihood": "likelihood of the answer",
    "likelihood_name": "likelihood of names",
    "likelihood_keys": "likelihood of arguments",
    "likelihood_values": "likelihood of values",
}
"""Columns of the scores, and what they are called."""


def registered(profile: Mapping[str, Any], records: pd.DataFrame, asked: Asked = PRIMARY) -> bool:
    """Whether a run, by its settings and its records' precision, is what the hypotheses were written for."""
    wanted = {b: n for b, n in profile["benchmarks"].items() if b in asked.samples}
    counts = {b: n or asked.samples[b] * (b != "bfcl") for b, n in wanted.items()}
    own = {"model": asked.model, "instructions": asked.instructions}
    same = all(profile[name] == value for name, value in (REGISTERED | own).items())
    adapted = records[records["benchmark"].isin(asked.samples) & (records["arm"] == ADAPTED)]
    same &= set(adapted["mode"]) <= {"activated"} and set(records["dtype"]) == {"float32"}
    return same and counts == asked.samples


def attempted(records: pd.DataFrame, scores: pd.DataFrame, asked: Asked = PRIMARY) -> dict[str, int]:
    """By benchmark of the set: samples with all that the hypotheses ask, failures among it too.

    That is a base outcome with its q, the margin, and an adapted outcome where q < ½, with its own.
    """
    direct = records[(records["inference"] == "direct") & (records["seed"] == REGISTERED["seeds"][0])]
    failed = _samples(direct[direct["arm"].isin(["base", ADAPTED]) & (direct["status"] == "error")])
    known = scores.reindex(columns=[*KEYS, "likelihood"])  # older exports have none
    both = _samples(known[(known["seed"] == REGISTERED["seeds"][0]) & known["likelihood"].notna()]) | failed
    for arm in ("base", ADAPTED):
        own = direct[direct["arm"] == arm]
        lacking = own["adapted"].astype(bool) & own["likelihood"].isna() & (own["status"] == "ok")
        both &= _samples(own[~lacking])
    return {name: sum(benchmark == name for benchmark, _ in both) for name in asked.samples}


def settled(
    sets: Mapping[str, Asked], runs: Iterable[tuple[Any, pd.DataFrame, pd.DataFrame]], attempted: Attempted
) -> tuple[dict[str, tuple[pd.DataFrame, Asked]], list[tuple[Asked, dict[str, int]]]]:
    """The sets that a run was written for and has all of, with its records; and what it has of the others.

    runs: (study, records, scores) each. attempted: how many samples of a set have all that is asked.
    """
    whole, begun = {}, []
    for (name, asked), (run, records, scores) in product(sets.items(), runs):
        if registered(run.profile.model_dump(), records, asked):
            counts = attempted(records, scores, asked)
            if counts == asked.samples:
                whole[name] = records, asked
            else:
                begun.append((asked, counts))
    return whole, begun


def _samples(rows: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(rows["benchmark"], rows["sample"], strict=True))


def failures(records: pd.DataFrame, asked: Asked = PRIMARY) -> int:
    """Samples of the set that the machine failed at."""
    of = records["benchmark"].isin(asked.samples) & records["arm"].isin(["base", ADAPTED])
    return len(_samples(records[of & (records["status"] == "error")]))


def unseen(table: pd.DataFrame, records: pd.DataFrame) -> pd.DataFrame:
    """The rows of samples that the first look hadn't: those behind the first `SEEN` of each benchmark.

    records: in the order of the run's permutation, failures of the machine included.
    """
    order = records.loc[records["arm"] == "base", ["benchmark", "sample"]].drop_duplicates()
    at = order.groupby("benchmark").cumcount()
    left = _samples(order[at >= order["benchmark"].map(SEEN).fillna(0)])
    return table[[key in left for key in zip(table["benchmark"], table["sample"], strict=True)]]


def pairs(
    records: pd.DataFrame,
    adapter: str = "tt_si_all",
    mode: str | None = None,
    scores: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per sample: `q`, `right`, `code` of the base answer, and `adapted_…` of the adapted one.

    adapter: the arm whose adapted answers are meant. A sample without an adapted answer (no example, training
    diverged, or certain by the arm's H) has NaN there: nothing can be accepted. Machine failures are left
    out. scores: where the margin is from, and q where a record has none as its text wasn't exported; by
    default the margin is from the arm, NaN where that asks for none. Seconds: `seconds` of the base answer,
    `seconds_h` of the arm's H, `seconds_more` of G, T and the adapted answer.
    """
    direct = records[(records["inference"] == "direct") & (records["status"] == "ok")]
    base = direct[direct["arm"] == "base"]
    other = direct[direct["arm"] == adapter]
    other = other[other["mode"] == mode] if mode else other
    columns = {"likelihood": "q", "correct": "right", "code": "code"}
    left = base[[*KEYS, "cluster", "n_tools", "seconds_answer", *columns]]
    left = left.rename(columns=columns | {"seconds_answer": "seconds"})
    answer = other["seconds_answer"].where(other["adapted"].astype(bool), 0)
    other = other.assign(seconds_more=other["seconds_g"] + other["seconds_t"] + answer)
    right = other[[*KEYS, "margin", "adapted", "seconds_h", "seconds_more", *columns]].rename(columns=columns)
    table = left.merge(right, on=KEYS, suffixes=("", "_adapted"), validate="one_to_one")
    table = table.rename(columns={f"{c}_adapted": f"adapted_{c}" for c in columns.values()})
    table["right"] = table["right"].astype(bool)
    if scores is not None:
        known = scores.reindex(columns=[*KEYS, "margin", "likelihood"])
        table = table.drop(columns="margin").merge(known, on=KEYS, how="left", validate="one_to_one")
        table["q"] = table["q"].fillna(table.pop("likelihood"))
    made = table["adapted"].astype(bool)
    table["adapted_right"] = table["adapted_right"].astype("boolean").where(made)
    table["adapted_q"] = table["adapted_q"].where(made)
    return table


def chosen(table: pd.DataFrame, adapt: pd.Series | bool, surer: float) -> pd.Series:
    """Whether each sample is answered right if those in `adapt` take their adapted answer.

    surer: only if it is so many times likelier to the adapted model than the base answer was to the base
    model; 0: always.
    """
    takes = pd.Series(adapt, index=table.index) & table["adapted_right"].notna()
    if surer:
        takes &= (table["adapted_q"] > surer * table["q"]).fillna(False)
    return table["right"].where(~takes, table["adapted_right"].fillna(False).astype(bool))


def hypotheses(table: pd.DataFrame) -> pd.DataFrame:
    """H1 to H3 of docs/hypotheses.md over all of the samples, one row each, `p_holm` over the three.

    Samples have to be independent: one seed. Where there are clusters enough, each value has an interval from
    resampling those too (`cluster_low`, `cluster_high`). H1 leaves out benchmarks with fewer than 10 right or
    wrong answers or an area without variance, and names those that are in it; without any its p is 1.
    """
    rows, h2 = table.reset_index(drop=True), {"hypothesis": "H2", "what": "selective − base"}
    out = pd.DataFrame([_h1(rows), h2 | against_base(rows), _h3(rows)])
    out["p_holm"] = out.index.map(statistics.holm(out["p"].to_dict()))
    return out


def _h1(rows: pd.DataFrame) -> dict[str, Any]:
    """AUC(q) − AUC(margin) of samples with several tools, in hundredths."""
    several, areas = rows[(rows["n_tools"] > 1) & rows["margin"].notna()], dict[str, Estimate]()
    for name, group in several.groupby("benchmark", sort=False):
        try:
            area = delong(*(group[c].tolist() for c in ("q", "margin", "right")))
        except TooFew:
            continue
        if area.high > area.low:  # none: it would outweigh all others
            areas[str(name)] = area
    said = {"hypothesis": "H1", "what": "AUC(q) − AUC(margin)", "of": ", ".join(areas)}
    if not areas:
        return said | {"p": 1.0, "n": 0}
    weights = {name: 1 / (a.high - a.low) ** 2 for name, a in areas.items()}
    q, margin, right = (rows[c].to_numpy() for c in ("q", "margin", "right"))
    places = {n: (rows["benchmark"] == n).to_numpy() & rows.index.isin(several.index) for n in areas}

    def value(drawn: Places) -> float:
        total = 0.0
        for name, weight in weights.items():
            own = drawn[places[name][drawn]]
            total += weight * (ranked(q[own], right[own]) - ranked(margin[own], right[own]))
        return 100 * total / sum(weights.values())

    area, p = pooled(list(areas.values()))
    return said | {"p": p} | cells(area, 100) | over_clusters(rows, value)


def ranked(score: Floats, right: npt.NDArray[np.bool_]) -> float:
    """Share of (right, wrong) pairs in which the right one scores higher, ties counting half."""
    n = int(right.sum())
    if n in (0, len(right)):
        return float("nan")
    wrong, others = np.sort(score[~right]), score[right]
    twice = sum(int(np.searchsorted(wrong, others, side=side).sum()) for side in ("left", "right"))
    return twice / 2 / (n * len(wrong))


def against_base(rows: pd.DataFrame, surer: float = 1) -> dict[str, Any]:
    """Selective TT-SI, whose adapted answers have to be `surer` times likelier, against base, in points."""
    return compared(rows, rows["right"], chosen(rows, rows["q"] < 0.5, surer))


def compared(rows: pd.DataFrame, reference: pd.Series, other: pd.Series) -> dict[str, Any]:
    """One way to answer against another, right or not by row: points, above 0 if `other` is right more often.

    Exact McNemar, two-sided; the paired interval, and that over clusters where there are enough.
    """
    paired = statistics.paired(reference, other)
    gain = 100 * (other.astype(float) - reference.astype(float)).to_numpy()
    return (
        {"p": paired.p}
        | cells(paired.difference, 100)
        | {"gained": paired.gained, "lost": paired.lost}
        | over_clusters(rows, lambda drawn: float(gain[drawn].mean()))
    )


def _h3(rows: pd.DataFrame) -> dict[str, Any]:
    """Gains against losses of the adapted answers where q < ½, by whether acceptance keeps them."""
    asked = rows["q"] < 0.5
    always, kept = chosen(rows, asked, False), chosen(rows, asked, True)
    kinds = np.full(len(rows), -1)
    for kind, changed in enumerate((always & ~rows["right"], ~always & rows["right"])):
        kinds[changed] = 2 * kind + (kept != always)[changed]

    def counts(drawn: Places) -> Places:
        return np.bincount(kinds[drawn] + 1, minlength=5)[1:]

    def odds(drawn: Places) -> float:
        a, b, c, d = counts(drawn) + 0.5
        return float(a * d / (b * c))

    found = counts(np.arange(len(rows)))
    fisher = stats.fisher_exact(found.reshape(2, 2))
    names = ("gains_kept", "gains_refused", "losses_kept", "losses_refused")
    return (
        {"hypothesis": "H3", "what": "odds that acceptance keeps gains rather than losses"}
        | {"value": fisher.statistic, "p": float(fisher.pvalue), "n": int(found.sum())}
        | dict(zip(names, map(int, found), strict=True))
        | over_clusters(rows, odds)
    )


def outcome(test: Mapping[str, Any]) -> str:
    """What a row of `hypotheses` says after Holm at .05; "" where there is no p, as nothing was tested."""
    if not test["p_holm"] <= 1:
        return ""
    if test["p_holm"] >= ALPHA:
        return "not shown"
    return "holds" if test["value"] > NOTHING.get(test["hypothesis"], 0) else "the opposite holds"


def over_clusters(rows: pd.DataFrame, value: Callable[[Places], float]) -> dict[str, float]:
    """The interval of a value over draws of whole clusters: conversations, domains."""
    try:
        e = statistics.cluster_bootstrap(value, list(zip(rows["benchmark"], rows["cluster"], strict=True)))
    except TooFew:
        return {}
    return {"cluster_low": e.low, "cluster_high": e.high, "clusters": e.n}


def cells(e: Estimate, scale: float) -> dict[str, float]:
    return {"value": scale * e.value, "value_low": scale * e.low, "value_high": scale * e.high, "n": e.n}


def reliability(q: pd.Series, right: pd.Series, bins: int = 10) -> pd.DataFrame:
    """By tenth of q: its mean, the share of right answers with its Wilson interval, and n; no empty bins."""
    at = np.minimum((q * bins).astype(int), bins - 1)
    rows = []
    for number, group in right.groupby(at):
        share = statistics.wilson(float(group.sum()), len(group))
        rows.append({"bin": number, "q": q[group.index].mean(), "right": share.value, "right_low": share.low,
                     "right_high": share.high, "n": len(group)})  # fmt: skip
    return pd.DataFrame(rows, columns=["bin", "q", "right", "right_low", "right_high", "n"])


def risk_coverage(certainty: pd.Series, right: pd.Series) -> pd.DataFrame:
    """Share of wrong answers (`risk`) among the most certain, by their share (`coverage`), ties together."""
    ordered = pd.DataFrame({"c": certainty, "wrong": ~right.astype(bool)}).dropna()
    groups = ordered.groupby("c")["wrong"].agg(["sum", "size"]).sort_index(ascending=False).cumsum()
    groups = groups.assign(coverage=groups["size"] / len(ordered), risk=groups["sum"] / groups["size"])
    return groups.reset_index(names="certainty")[["certainty", "coverage", "risk"]]


def rules(
    table: pd.DataFrame,
    everyone: pd.DataFrame | None = None,
    by_margin: pd.DataFrame | None = None,
    tau: float = 0.95,
) -> dict[str, pd.DataFrame]:
    """By rule, the rows that it is judged on: its verdict as `correct`, `asked` to adapt or not, `took`.

    took: seconds of all that the rule needs of a sample. That is the most it takes where the adapted answer
    always stands: the whole base answer is charged, of which it needs the pass over the prompt. Rules of q
    are judged on `table`, which has adapted answers where q < ½; `all` on `everyone`, the samples that were
    adapted to whatever H says, by default `table` too; those of the margin on `by_margin`, which has adapted
    answers where the margin is below τ, by default `everyone`.
    """
    everyone = table if everyone is None else everyone
    by_margin = everyone if by_margin is None else by_margin
    asked: Mapping[str, tuple[pd.DataFrame, pd.Series | bool]] = {
        f"margin < {tau:g}": (by_margin, by_margin["margin"] < tau),
        "q < ½": (table, table["q"] < 0.5),
        "all": (everyone, True),
    }
    return {
        f"{name}{', surer' * surer}": rows.assign(
            correct=chosen(rows, mask, surer),
            status="ok",
            asked=mask,
            took=rows["seconds"] + rows["seconds_h"] * ("margin" in name) + rows["seconds_more"] * mask,
        )
        for name, (rows, mask) in asked.items()
        for surer in (False, True)
    }
