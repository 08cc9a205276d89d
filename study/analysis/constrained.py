"""What a grammar leaves to test-time training: G1 to G3 and L1 of docs/hypotheses.md; L2, L3: `sentence`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from math import nan
from typing import Any

import pandas as pd

from study.analysis import selective, statistics
from study.analysis.answers import Answers
from study.analysis.selective import Asked

SETS = {"primary": selective.PRIMARY, "secondary": selective.SECONDARY, "elsewhere": selective.REPLICATION}
"""The sets that G1 to G3 are tested on; and the one for L1."""
UNTOLD = "untold "
"""Before an arm's name, where a run with instructions stands beside the same without."""

Rivals = Mapping[str, tuple[str, str]]
GRAMMAR: Rivals = {
    "G1": ("base", "constrained"),
    "G2": ("constrained", "tt_si_selective"),
    "G3": ("constrained", "tt_si_selective_constrained"),
}
"""By hypothesis: the arm that the other is compared with, and the other."""
ELSEWHERE: Rivals = {"L1": GRAMMAR["G3"]}
SAID: Rivals = {"L2": (f"{UNTOLD}constrained", "constrained"), "L3": GRAMMAR["G3"]}


def rivals(asked: Asked) -> Rivals:
    """The hypotheses for a set."""
    return SAID if asked.instructions else ELSEWHERE if asked == selective.REPLICATION else GRAMMAR


def arms(of: Rivals) -> list[str]:
    """The arms that hypotheses compare, each once."""
    return list(dict.fromkeys(chain.from_iterable(of.values())))


def attempted(records: pd.DataFrame, scores: pd.DataFrame, asked: Asked) -> dict[str, int]:
    """By benchmark of the set: samples with an outcome of all its arms, machine failures among them.

    scores: not needed; `selective.attempted` takes them.
    """
    rows = _of(records, asked)
    whole = rows.groupby(["benchmark", "sample"])["arm"].nunique() == len(arms(rivals(asked)))
    found = whole[whole].groupby("benchmark").size()
    return {name: int(found.get(name, 0)) for name in asked.samples}


def verdicts(records: pd.DataFrame, asked: Asked) -> pd.DataFrame:
    """One row per sample of the set that the machine failed at in none of the arms: by arm, right or not."""
    rows, of = _of(records, asked), arms(rivals(asked))
    order = rows.loc[rows["arm"] == of[0], ["benchmark", "sample", "cluster"]]
    right = rows[rows["status"] == "ok"].pivot(index=["benchmark", "sample"], columns="arm", values="correct")
    table = order.merge(right.reindex(columns=of).dropna().astype(bool), on=["benchmark", "sample"])
    return table.reset_index(drop=True)


def failures(records: pd.DataFrame, asked: Asked) -> int:
    """Samples of the set that the machine failed at in one arm or more."""
    rows = _of(records, asked)
    return len(rows.loc[rows["status"] == "error", ["benchmark", "sample"]].drop_duplicates())


def _of(records: pd.DataFrame, asked: Asked) -> pd.DataFrame:
    """Direct answers of the arms that are compared on a set, one per sample and arm."""
    rows = records[records["benchmark"].isin(asked.samples) & records["arm"].isin(arms(rivals(asked)))]
    return rows[(rows["inference"] == "direct") & (rows["seed"] == selective.REGISTERED["seeds"][0])]


def beside(found: Mapping[str, Answers], arm: str) -> dict[str, Any]:
    """What an arm's answers have in common with the grammar's, and what they mend in those.

    found: by arm, base and constrained among them. `gains`: samples gained against base, of those that all
    three answered; `mended`: how many of them the grammar alone gets right too (of both of these: nan).
    `extra`: share of the arm's answers that have an argument too many, %. `mends`: what is wrong, and how
    often, with the grammar's answers (for its own arm: with base's) where this arm's are right instead.
    """
    shared, gains = mended(found, arm)
    reference = "base" if arm == "constrained" else "constrained"
    own, other = (
        found[a].rows.query("status == 'ok'").set_index(["sample", "seed"]) for a in (arm, reference)
    )
    own, other = own[["correct", "code"]], other[["correct", "code"]]
    both = own.merge(other, left_index=True, right_index=True, suffixes=("", "_other"))
    gained = both.loc[both["correct"].astype(bool) & ~both["correct_other"].astype(bool), "code_other"]
    counts = sorted(gained.value_counts().items(), key=lambda x: (-x[1], x[0]))
    return {"mended": shared, "gains": gains, "extra": extra(found[arm]),
            "mends": ", ".join(f"{n} {code}" for code, n in counts)}  # fmt: skip


def extra(answers: Answers) -> float:
    """Share of the answers that have an argument too many, %; failures of the machine are no answers."""
    return 100 * float((answers.rows.query("status == 'ok'")["code"] == "extra_argument").mean())


def mended(found: Mapping[str, Answers], arm: str) -> tuple[float, float]:
    """Of the samples gained against base: how many the grammar gets right too, and how many there are."""
    if arm in ("base", "constrained"):
        return nan, nan
    right = pd.DataFrame({a: found[a].correct.mean(axis=1) for a in (arm, "base", "constrained")}).dropna()
    gained = right[(right[arm] == 1) & (right["base"] == 0)]
    return int((gained["constrained"] == 1).sum()), len(gained)


def hypotheses(table: pd.DataFrame) -> pd.DataFrame:
    """The hypotheses about the arms in rows of `verdicts`: points, above 0 if the second arm is better.

    `p_holm` is over them. How: `selective.compared`.
    """
    rows = table.reset_index(drop=True)
    of = next(of for of in (GRAMMAR, SAID, ELSEWHERE) if {*arms(of)} <= {*rows.columns})
    out = pd.DataFrame(
        {"hypothesis": name, "what": f"{arm} − {reference}"}
        | selective.compared(rows, rows[reference], rows[arm])
        for name, (reference, arm) in of.items()
    )
    out["p_holm"] = out.index.map(statistics.holm(out["p"].to_dict()))
    return out
