"""What the sliders move: every committed run's verdicts and scores, without a word of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from study.analysis import look, statistics
from study.analysis.answers import Answers, joined, selecting, split
from study.run.results import Results

NAMES = {"margin": "margin of the tool names", "random": "a random number",
         "perplexity": "perplexity of base's answer", "entropy": "entropy over the tools",
         "smallest_token": "smallest token of base's answer", "disagreement": "disagreement of five answers",
         "likelihood": "likelihood of base's answer", "likelihood_name": "likelihood of its tools' names",
         "likelihood_keys": "likelihood of its arguments' names",
         "likelihood_values": "likelihood of its arguments' values"}  # fmt: skip
"""Uncertainties by column, higher = more certain. A column that isn't listed goes by its own name."""


def data(results: Path) -> dict[str, Any]:
    """`z`, the normal quantile of every interval, and `entries`, see `entry`; those first of whose samples
    most have an adapted answer, then the largest.

    results: folder with an exported run in each folder below.
    """
    folders = sorted(path.parent for path in results.rglob("header.json"))
    found = [e for folder in folders for e in entries(folder, str(folder.relative_to(results)))]
    z = float(special.ndtri((1 + statistics.LEVEL) / 2))
    return {"z": z, "entries": sorted(found, key=lambda e: (_share_made(e) < 0.85, -len(e["base"])))}


def _share_made(entry: dict[str, Any]) -> float:
    made: str = entry["adapted"]
    return 1 - made.count("-") / len(made)


def entries(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """One `entry` for every base arm of a run and training mode in which samples were adapted."""
    run = Results(folder)
    variants = run.profile.variants
    parts = [run, *map(run.variant, variants)]
    records = joined([part.records() for part in parts], variants)
    scores = pd.concat([part.scores() for part in parts], ignore_index=True)
    scores["variant"] = scores["variant"].where(~scores["variant"].isin(selecting(variants)), "")
    sets = split(records)
    for key, base in sets.items():
        if key.arm != "base":
            continue
        modes = [k.mode for k in sets if k == key._replace(arm=k.arm, mode=k.mode) and k.arm in _ADAPTED]
        own = scores[(scores["benchmark"] == key.benchmark) & (scores["variant"] == key.variant)]
        for mode in sorted(set(modes)):
            made = [sets[k] for arm in _ADAPTED if (k := key._replace(arm=arm, mode=mode)) in sets]
            yield {
                "run": name, "variant": key.variant, "benchmark": look.label(key.benchmark),
                "inference": key.inference, "mode": mode, "model": look.model_label(key.model),
                "order": key.tool_order, "tau": run.variant(key.variant).profile.tau
                if key.variant in variants else run.profile.tau,
            } | entry(base, made, own)  # fmt: skip


_ADAPTED = ("tt_si_all", "tt_si", "tt_si_likelihood")


def entry(base: Answers, made: Sequence[Answers], scores: pd.DataFrame) -> dict[str, Any]:
    """Two answers to every sample and what there is to choose between them by, in one order of sample × seed.

    `base`, `adapted`: verdicts, a character each: 1 right, 0 wrong, x a failure of the machine, - never made.
    `h`: by column, a number each or null. `accept`: how likely the base answer and the adapted one are to the
    models that gave them, null if the records don't say. `tokens`: written (`base`: by the base answer,
    `written`: by G and the adapted answer) and trained on (`trained`). `seeds`: so many neighbours are one
    sample.

    made: the answers of arms that adapt; of one that looks at H, only those where it was unsure are adapted.
    """
    like, seen = base.tried, pd.concat([base.rows, *(a.rows for a in made)])
    adapted = (seen["arm"] == "tt_si_all") | seen["uncertain"].astype(bool) & (seen["arm"] != "base")
    rows = seen[adapted].drop_duplicates(["sample", "seed"])

    def numbers(frame: pd.DataFrame, name: str) -> list[float | None]:
        known = frame.loc[frame[name].notna(), ["sample", "seed", name]].drop_duplicates(["sample", "seed"])
        wide = known.astype({name: float}).pivot(index="sample", columns="seed", values=name)
        return [None if np.isnan(x) else x for x in wide.reindex_like(like).to_numpy(float).ravel().tolist()]

    h = {"margin": numbers(seen, "margin")}  # where no scores were made: what the arms saw
    h |= {c: v for c in scores.select_dtypes(float).columns if any(v := numbers(scores, c))}
    # What tells no samples apart, or says the same under another name, is no choice.
    by_values = {str(v): c for c, v in reversed(h.items()) if len(set(v) - {None}) > 1}
    likely = [numbers(frame, "likelihood") for frame in (base.rows, rows) if "likelihood" in frame]
    return {
        "seeds": like.shape[1],
        "base": _verdicts(base, like),
        "adapted": _verdicts(Answers(rows), like),
        "h": {c: {"name": NAMES.get(c, c), "values": v} for c, v in h.items() if by_values.get(str(v)) == c},
        "accept": likely if likely and all(set(v) - {None} for v in likely) else None,
        "tokens": {
            "base": numbers(base.rows, "tokens_answer"),
            "written": numbers(rows.assign(all=rows["tokens_g"] + rows["tokens_answer"]), "all"),
            "trained": numbers(rows, "tokens_t"),
        },
    }


def _verdicts(answers: Answers, like: pd.DataFrame) -> str:
    tried = answers.tried.reindex_like(like).astype("boolean").fillna(False).astype(bool)
    correct = answers.correct.reindex_like(like)
    marks = np.select([~tried, correct.isna(), correct == 1], ["-", "x", "1"], "0")
    return "".join(marks.ravel())
