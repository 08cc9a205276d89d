"""What is in the benchmarks: counts, and where the gold tool stands in the list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from study.analysis import statistics
from study.analysis.tables.layout import in_order, label, rows_of

ORDERS = {"gold_at_original": "original", "gold_at": "shuffled"}


def data_counts(samples: pd.DataFrame) -> pd.DataFrame:
    """One row per benchmark: samples, tools per sample, calls, clusters; `flags`: 'name count' each.

    `samples`: the study's frame. Of several seeds the first is counted. `in_pool`: samples whose gold tool
    the benchmark's training pool calls too.
    """
    rows = []
    for benchmark in in_order(samples["benchmark"]):
        group = _first_seed(samples[samples["benchmark"] == benchmark])
        flags = Counter(flag for cell in group["flags"].fillna("") for flag in cell.split(",") if flag)
        rows.append({
            "benchmark": benchmark,
            "samples": len(group),
            "tools_min": int(group["n_tools"].min()),
            "tools_median": float(group["n_tools"].median()),
            "tools_max": int(group["n_tools"].max()),
            "one_tool": int((group["n_tools"] == 1).sum()),
            "several_calls": int((group["n_calls"] > 1).sum()),
            "clusters": group["cluster"].where(group["cluster"] != "", group["sample"]).nunique(),
            "in_pool": int(group["in_pool"].sum()),
            "flags": ", ".join(f"{name} {count}" for name, count in sorted(flags.items())),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _first_seed(group: pd.DataFrame) -> pd.DataFrame:
    return group[group["seed"] == group["seed"].iloc[0]]


def gold_positions(samples: pd.DataFrame) -> pd.DataFrame:
    """One row per benchmark and tool order: in how many samples the first gold call's tool is listed first.

    `samples`: the study's frame, tools shuffled. Only samples with two or more tools count (`n`).
    `chance`: how many it would be if the gold tool stood anywhere with the same probability.
    """
    rows = []
    for column, order in ORDERS.items():
        for benchmark in in_order(samples["benchmark"]):
            group = _first_seed(samples[samples["benchmark"] == benchmark])
            several = group[(group["n_tools"] > 1) & (group["n_calls"] > 0)]
            row = {"benchmark": benchmark, "tool_order": order, "n": len(several)}
            first, chance = int((several[column] == 0).sum()), float((1 / several["n_tools"]).sum())
            rows.append(row | {"first": first, "chance": chance})
    return pd.DataFrame(rows, columns=["benchmark", "tool_order", "n", "first", "chance"])


def gold_positions_reading(positions: pd.DataFrame) -> str:
    """One Markdown line per benchmark and tool order: how often position alone gives the gold tool."""
    return "\n".join(
        f"- **{label(r['benchmark'])}**, tools {r['tool_order']}: the gold tool stands first in "
        f"{r['first']} of {r['n']} samples; chance would put it there in {r['chance']:.0f}."
        for r in rows_of(positions[positions["n"] > 0])
    )


def layouts(records: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of base (%, Wilson) and the forms of its replies, per benchmark and `way` of asking.

    Only samples that were answered in every way count, so that the rows of a benchmark compare.
    """
    answered = records[(records["status"] == "ok") & (records["inference"] == "direct")]
    answered = answered.reset_index(drop=True)
    ways = answered.groupby("benchmark")["way"].transform("nunique")
    shared = answered.groupby(["benchmark", "sample"])["way"].transform("nunique") == ways
    return _shares(answered[shared], ["benchmark", "way"], ["tagged", "fenced", "bare", "none"])


def knowable(records: pd.DataFrame) -> pd.DataFrame:
    """Accuracy (%, Wilson) with and without the samples whose gold nobody can know, per benchmark and arm."""
    answered = records[(records["status"] == "ok") & (records["variant"] == "")]
    hidden = (
        answered.get("flags", pd.Series("", answered.index))
        .str.split(",")
        .map(lambda flags: "unknowable" in flags)
    )
    parts = [answered.assign(samples="all"), answered[~hidden].assign(samples="knowable")]
    keys = ["benchmark", "arm", "mode", "inference", "samples"]
    both = pd.concat(parts, ignore_index=True)
    return _shares(both[both["inference"] == "direct"], keys)


def _shares(records: pd.DataFrame, keys: list[str], forms: Sequence[str] = ()) -> pd.DataFrame:
    rows = []
    for key, group in records.groupby(keys, sort=False):
        seeds = group["seed"].nunique()
        right = statistics.wilson(float(group["correct"].astype(bool).sum()) / seeds, len(group) / seeds)
        row = {**dict(zip(keys, key, strict=True)), "n": round(len(group) / seeds)}
        row |= {"accuracy": 100 * right.value, "low": 100 * right.low, "high": 100 * right.high}
        rows.append(row | {f: 100 * float((group["form"] == f).mean()) for f in forms})
    return pd.DataFrame(rows, columns=[*keys, "n", "accuracy", "low", "high", *forms])
