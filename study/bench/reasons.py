"""Why rows of the bench fall short: what their bars ask of the machine, and where the seconds go instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, log
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import costs
from study.analysis.costs import ALONE, HEADLINES, TOGETHER, WAYS, Charged, Headline, charged, needs


def reasons(found: Mapping[str, Any], table: pd.DataFrame) -> list[str]:
    """A sentence per row that falls short and has a reason in what was measured, by precision."""
    told = costs.headlines(table)
    told = told[told["result"] == "falls short"]
    short = set(zip(told["dtype"], told["what"], strict=True))
    lines = []
    for dtype, rows in table.groupby("dtype", sort=False):
        missed = [h for h in HEADLINES if (dtype, h.what) in short]
        lines += [f"{dtype}: {_rate(rows, h)}" for h in missed if h.first.how == ALONE == h.second.how]
        if any(TOGETHER in (h.first.how, h.second.how) for h in missed):
            lines.append(f"{dtype}: {_company(rows)}")
        run = found["runs"][dtype].get("run")
        if run:
            lines += [f"{dtype}: {_run(rows, run, h.bar)}" for h in missed if h.first.how == costs.RUN]
        if any(dtype == d and what.startswith("tokens per second") for d, what in short):
            lines.append(f"{dtype}: {_guesses(rows)}")
    return [*lines, *spent(found.get("spent"))]


def _apart(rows: pd.DataFrame, of: Charged, stages: Sequence[str]) -> pd.DataFrame:
    """Per sample: seconds of these stages (`busy`), at the machine's full rate (`full`), the rest's."""
    ours = rows["stage"].isin(stages) & rows["flops"].notna()
    parts = {"busy": rows["seconds"], "full": rows["seconds"] * rows["reached"]}
    each = {k: charged(rows.assign(seconds=v.where(ours, 0.0)), of) for k, v in parts.items()}
    return pd.DataFrame(each).assign(rest=charged(rows, of) - each["busy"])


def needed(rows: pd.DataFrame, h: Headline) -> tuple[float, float, int]:
    """The share of the machine's rate at which a ratio of single queries reaches its bar; what is reached.

    Of passes over prompts and T against the usual loop; of T alone against the base answer, which has the
    same prompt. inf: no share is enough, as what isn't arithmetic takes too long. And the number of samples.
    """
    at, usual = rows[rows["benchmark"] == h.benchmark], h.first.program == "usual"
    ours, other = (h.second, h.first) if usual else (h.first, h.second)
    mine = _apart(at, ours, ["prefix", "t"] if usual else ["t"])
    wide = mine.join(charged(at, other).rename("other"), how="inner")

    def reaches(share: float) -> bool:
        times = np.log((wide["rest"] + wide["full"] / share) / wide["other"]).mean()
        return bool(-times >= log(h.bar) if usual else times <= log(h.bar))

    enough = next(filter(reaches, np.geomspace(0.01, 100, 2000)), inf)
    return float(enough), float(wide["full"].sum() / wide["busy"].sum()), len(wide)


def _rate(rows: pd.DataFrame, h: Headline) -> str:
    enough, reached, n = needed(rows, h)
    ours = "passes over prompts and T run" if h.first.program == "usual" else "T runs"
    said = f"{h.what}: {ours} at {100 * reached:.0f} % of the machine's matrix rate (n = {n});"
    if enough == inf:
        return f"{said} {h.bar:g} takes more than any rate: what is decoded is too slow for it."
    return f"{said} {h.bar:g} takes {100 * enough:.0f} %{', which no machine has' * (enough > 1)}."


def _company(rows: pd.DataFrame) -> str:
    """Seconds per sample of each stage, alone and eight together."""
    mine = rows[(rows["program"] == "activated") & (rows["benchmark"] == "sealtool")]
    alone = costs.alone(mine).groupby("stage")["seconds"].mean()
    together = mine[mine["sample"] == TOGETHER].set_index("stage")
    batch = together["seconds"] / together["n"]
    stages = dict.fromkeys([*needs("base"), *needs(WAYS["activated"])])
    said = [f"{s} {alone[s]:.2f} → {batch[s]:.2f}" for s in stages if s in alone and s in batch]
    return (
        f"eight together, seconds per sample: {', '.join(said)}. Prefix and T are arithmetic, which company "
        "doesn't lessen; decoding shares passes over the weights and gives up guesses for it."
    )


def _run(rows: pd.DataFrame, run: Mapping[str, Any], bar: float) -> str:
    seconds = rows[rows["sample"] == costs.RUN].set_index("stage")["seconds"]
    base = (seconds["prefix"] + seconds["base"]) / run["n"]
    each = seconds["selective"] / max(1, run["uncertain"])
    return (
        f"a selective run: {run['uncertain']} of {run['n']} questions are uncertain and take {each:.1f} s "
        f"more each, {each / base:.1f} base answers of {base:.1f} s with their prompts; {bar:g} allows for "
        f"{100 * (bar - 1) * base / each:.0f} % uncertain ones at that price."
    )


def _guesses(rows: pd.DataFrame) -> str:
    at = rows[rows["sample"] == costs.RUN].set_index("stage")
    each = at["decoded_tokens"] / (at["decoded_tokens"] - at["accepted"])
    return (
        f"in flight: one by one, guesses make {each['one by one']:.2f} tokens per pass of a row, in flight "
        f"{each['base']:.2f}, as a pass holds only so many tokens before it is arithmetic, and eight rows "
        "fill it: company takes the place of guesses."
    )


def spent(found: Mapping[str, Any] | None) -> list[str]:
    """What torch's profiler says of T in `exact`, and what the engine counted in flight."""
    if not found:
        return ["Where T of exact spends its seconds: not measured (make bench ARGS=--spent)."]
    kinds = sorted(found["kinds"].items(), key=lambda kind: -kind[1])
    whole = sum(found["kinds"].values())
    shares = ", ".join(f"{name} {100 * seconds / whole:.0f} %" for name, seconds in kinds)
    ways = "; ".join(
        f"{name} {w['passes']} passes of {1000 * w['seconds'] / w['passes']:.0f} ms"
        for name, w in found["flight"].items()
    )
    return [
        f"exact, {found['dtype']}, under torch's profiler (n = {found['n']}, {found['threads']} threads, at "
        f"commit `{found['commit']}`): {shares}.",
        f"Base answers to {found['questions']} questions there, one by one and in flight: {ways}.",
    ]
