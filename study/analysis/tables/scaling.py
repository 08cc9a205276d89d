"""Figure 2, right: accuracy against the number of training samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import statistics
from study.analysis.tables.layout import NOT_RUN, bracket, label, rows_of, spread
from study.analysis.tables.results import (
    Answers,
    Key,
    answers,
    compare,
    difference_cells,
    percent,
    power_note,
    select,
    setting,
    settings_note,
)

CURVES = ("tt_si", "tt_d", "tt_si_and_icl")  # one adapter per uncertain sample
POINTS = ("sft_ood", "sft")  # one adapter for all
COLUMNS = [
    "benchmark", "arm", "mode", "training_samples", "n", "correct", "accuracy", "low", "high", "orders",
    "order_low", "order_high", "difference", "difference_low", "difference_high", "difference_method",
    "pairs", "gained", "lost", "mcnemar_p", "p", "detectable", "model", "tool_order", "setting", "note",
]  # fmt: skip


def scaling_curves(
    records: pd.DataFrame,
    benchmark: str = "sealtool",
    orders: int = 20,
    seed: int = 0,
    lacking: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Figure 2, right: one row per arm × mode × number of training samples; direct answers.

    tt_si (and tt_d, tt_si_and_icl): the first x adapted samples of a seeded order take their adapted
    answer, all others the base answer; mean over `orders` orders, from stored answers. `order_low`,
    `order_high`: 2.5 and 97.5 % of the orders, which is no interval of the accuracy: that is `low`, `high`
    (Wilson, over all n samples). sft_ood, sft: the adapter trained on `training_samples` samples of a
    pool, nested. The differences to base are given where the answers are one fixed set: at each point of an
    sft arm, and at the end of a curve. Seeds are averaged per sample first. base: training_samples 0.
    `lacking`: arm → why it cannot be had.
    """
    mine = select(records, variant="", benchmark=benchmark, inference="direct")
    found = answers(mine)
    base = next(((k, a) for k, a in found.items() if k.arm == "base"), None)
    rows: list[dict[str, Any]] = []
    if base:
        cells = base[1].cells()
        rows.append(base[0].cells() | cells | {"training_samples": 0, "setting": setting(base[0], cells)})
        for key, result in found.items():
            if key.arm in CURVES:
                rows += _curve(key, base[1], result, orders, seed)
            elif key.arm in POINTS:
                cells = result.cells() | difference_cells(compare(base[1], result))
                fixed = {"training_samples": key.pool_n, "setting": setting(key, cells)}
                rows.append(key.cells() | cells | fixed)
    there = {k.arm for k in found} if base else set()
    rows += [
        {"benchmark": benchmark, "arm": arm, "note": (lacking or {}).get(arm, NOT_RUN)}
        for arm in ("base", *CURVES, *POINTS)
        if arm not in there
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table.sort_values(["arm", "mode", "training_samples"], kind="stable", ignore_index=True)
    return table.astype(dict.fromkeys(["n", "pairs", "gained", "lost", "training_samples"], "Int64"))


def _curve(key: Key, base: Answers, adapted: Answers, orders: int, seed: int) -> list[dict[str, Any]]:
    before, after = base.correct.align(adapted.correct, join="inner")
    both = before.notna() & after.notna()
    first, last = (x.where(both).mean(axis=1).dropna() for x in (before, after))
    if first.empty:
        return []
    scored = adapted.scored
    # Without a usable example nothing was trained on, and the answer is base's: no training sample.
    flagged = set(scored.loc[scored["adapted"].astype(bool), "sample"])
    # Seeds may disagree on who is uncertain: a sample counts once any of them adapts it.
    gain = np.array([last[i] - first[i] for i in first.index if i in flagged])
    # A sample's place in each order comes from its position in the benchmark's fixed permutation.
    rng = np.random.default_rng(seed)
    paths = (
        np.stack([np.cumsum(rng.permutation(gain)) for _ in range(orders)]) if len(gain) else np.zeros((1, 0))
    )
    n = len(first)
    rows = []
    for x in range(1, len(gain) + 1):
        correct = float(first.sum()) + paths[:, x - 1]
        mean = min(max(float(correct.mean()), 0.0), float(n))
        low, high = np.quantile(correct, [0.025, 0.975])
        row = key.cells() | {"training_samples": x, "n": n, "correct": mean, "orders": orders, "note": ""}
        row |= percent(statistics.wilson(mean, n), "accuracy", "low", "high")
        rows.append(row | {"order_low": 100 * low / n, "order_high": 100 * high / n})
    if rows:
        rows[-1] |= difference_cells(compare(base, adapted)) | {"setting": setting(key, adapted.cells())}
    return rows


def scaling_caption(table: pd.DataFrame) -> str:
    """n, discordant counts, detectable difference and what differs from the paper's run."""
    reading = (
        f"{label(table['benchmark'].iloc[0])}, direct answers, all n samples at every point. tt_si, tt_d, "
        "tt_si_and_icl: the first x uncertain samples of an order take their adapted answer, others base's; "
        "mean of the orders. sft_ood: trained on samples of another benchmark (BFCL where it is not the one "
        "under test), each set within the next; the paper's pool is xLAM-function-calling-60k."
    )
    rows = rows_of(table)
    power = power_note(rows, lambda r: f"{r['arm']} at {r['training_samples']}, {r['mode']}")
    return "\n\n".join(filter(None, [reading, power, settings_note(table)]))


def scaling_reading(table: pd.DataFrame) -> str:
    """One Markdown line per arm and mode: accuracy at its most training samples, against base."""
    lines = []
    for (arm, mode), rows in table[table["accuracy"].notna()].groupby(["arm", "mode"], sort=False):
        last = rows_of(rows)[-1]
        shown = bracket(last["accuracy"], last["low"], last["high"])
        line = f"- **{arm}**, {mode}: {shown} % at {last['training_samples']} training samples"
        if pd.notna(last["difference"]):
            line += f", {spread(last, 'difference', sign='+')} points to base (p = {last['p']:.3g})"
        lines.append(line + f"; n = {last['n']}.")
    lines += [f"- **{r['arm']}**: {r['note']}." for r in rows_of(table[table["accuracy"].isna()])]
    return "\n".join(lines)
