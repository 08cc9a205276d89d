"""Accuracy after so many samples were adapted, one after the other, from stored answers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from study.analysis import statistics
from study.analysis.answers import Answers, percent


def adapted_in_orders(base: Answers, adapted: Answers, orders: int = 20, seed: int = 0) -> pd.DataFrame:
    """A row per number x of training samples: the first x of an order take their adapted answer.

    All others keep base's. `correct`, `accuracy`: the mean over the orders, with its Wilson interval over all
    n samples; `order_low`, `order_high`: 2.5 and 97.5 % of the orders, no interval of the accuracy. Seeds are
    averaged per sample first; a sample is adapted once any seed adapts it: the last row is the arm itself.
    Without a usable example nothing was trained on, and the answer is base's: no training sample. Where no
    sample is adapted there is one row, at 0.
    """
    before, after = base.correct.align(adapted.correct, join="inner")
    both = before.notna() & after.notna()
    first, last = (x.where(both).mean(axis=1).dropna() for x in (before, after))
    scored = adapted.rows[adapted.rows["status"] == "ok"]
    flagged = set(scored.loc[scored["adapted"].astype(bool), "sample"])
    gain = (last - first)[[i in flagged for i in first.index]].to_numpy()
    # A sample's place in each order comes from its position in the benchmark's fixed permutation.
    rng, n = np.random.default_rng(seed), len(first)
    if not n:
        return pd.DataFrame([{"training_samples": 0, "n": 0, "note": "no sample was scored"}])
    some = len(gain) > 0
    steps = [np.cumsum(rng.permutation(gain)) if some else np.zeros(1) for _ in range(orders)]
    rows = []
    for x, correct in enumerate(float(first.sum()) + np.stack(steps).T, 1 if some else 0):
        mean = float(np.clip(correct.mean(), 0, n))
        low, high = 100 * np.quantile(correct, [0.025, 0.975]) / n
        row = {"training_samples": x, "n": n, "correct": mean, "orders": orders, "note": ""}
        row |= {"order_low": low, "order_high": high, **percent(statistics.wilson(mean, n), "accuracy")}
        rows.append(row)
    return pd.DataFrame(rows)
