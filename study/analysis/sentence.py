"""What a sentence in the prompt does beside training: L2 and L3 of docs/hypotheses.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from study.analysis import constrained, selective, statistics
from study.analysis.answers import SELECTING, Answers, compare
from study.analysis.constrained import UNTOLD, extra
from study.analysis.selective import Asked

SENTENCE = (
    "Give an argument only if the question gives its value; leave out every other one that is not required."
)
SETS = {
    model: Asked(model, selective.SECONDARY.samples, SENTENCE)
    for model in (selective.PRIMARY.model, selective.SECONDARY.model)
}
"""By model, the parts of the set: it is whole when both are."""


def untold(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By variant with instructions: the variant that is the same without them; "" for the run itself."""

    def rest(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {k: x for k, x in settings.items() if k not in {*SELECTING, "instructions"}}

    plain: dict[str, Mapping[str, Any]] = {"": {}}
    plain |= {name: of for name, of in variants.items() if "instructions" not in of}
    found = {}
    for name, of in variants.items():
        same = [other for other, settings in plain.items() if rest(settings) == rest(of)]
        if "instructions" in of and same:
            found[name] = same[0]
    return found


def beside(told: pd.DataFrame, without: pd.DataFrame) -> pd.DataFrame:
    """The records of a run with instructions, and those of the same run without, whose arms say so."""
    return pd.concat([told, without.assign(arm=UNTOLD + without["arm"])], ignore_index=True)


def hypotheses(finished: Mapping[str, tuple[pd.DataFrame, Asked]]) -> pd.DataFrame:
    """L2 and L3 with each model, `p_holm` over all four; no row until both models' parts are whole.

    finished: by model, records of `beside` and the part that they are. How: `selective.compared`.
    """
    if finished.keys() != SETS.keys():
        return pd.DataFrame()
    each = [constrained.hypotheses(constrained.verdicts(*of)).assign(model=m) for m, of in finished.items()]
    table = pd.concat(each, ignore_index=True)
    return table.assign(p_holm=table.index.map(statistics.holm(table["p"].to_dict())))


def table(records: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """A row per arm: with instructions against the same without, on the samples that both answered.

    records: of `beside`. `untold_…`: without. `extra`: share of answers with an argument too many, %.
    """
    both = {a: (Answers(records, a), Answers(records, UNTOLD + a)) for a in arms}
    both = {a: pair for a, pair in both.items() if all(len(of.rows) for of in pair)}
    told, plain = ({a: pair[i] for a, pair in both.items()} for i in (0, 1))
    before = compare(plain)[["n", "accuracy", "low", "high"]].add_prefix("untold_")
    ends = {f"untold_{end}": f"untold_accuracy_{end}" for end in ("low", "high")}
    found = compare(told, against=plain).join(before.rename(columns=ends))
    shares = {"extra": told, "untold_extra": plain}
    return found.assign(**{name: list(map(extra, of.values())) for name, of in shares.items()})
