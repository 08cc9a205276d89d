"""Where synthetic questions lie beside those they were made from, and shares that count samples once."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from study.analysis import statistics
from study.analysis.look import in_order

Projection = Literal["pca", "tsne"]
POINTS = ["benchmark", "sample", "seed", "kind", "index", "x", "y", "own", "other", "nearest_own"]


def laid_out(embeddings: pd.DataFrame, projection: Projection = "pca", seed: int = 0) -> pd.DataFrame:
    """One row per question, `POINTS`: its place in 2-D (`x`, `y`) and, if synthetic, its distances.

    `embeddings`: the study's, principal components of the model's mean-pooled hidden states. Projected
    per benchmark: "pca" on two axes (each axis' largest loading positive), "tsne" with scikit-learn's t-SNE
    (PCA start, perplexity 30 or what few points allow, `seed`). `own`: cosine distance (0 = same direction,
    2 = opposite) to the question it was made from; `other`: to one drawn from the other samples' seeds;
    `nearest_own`: whether no other seed question lies nearer. Distances use all components, centred per
    benchmark, never the two that are drawn.
    """
    parts = []
    for benchmark in in_order(embeddings["benchmark"]) if len(embeddings) else []:
        group = embeddings[embeddings["benchmark"] == benchmark].reset_index(drop=True)
        points = group[[c for c in group if re.fullmatch(r"pc\d+", str(c))]].to_numpy(float)
        points = points[:, ~np.isnan(points).any(axis=0)]
        points = points - points.mean(axis=0)
        part = group[POINTS[:5]].copy()
        part["x"], part["y"] = _plane(points, projection, seed).T
        parts.append(part.join(_distances(part, points, seed)))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=POINTS)


def _plane(points: npt.NDArray[Any], projection: Projection, seed: int) -> npt.NDArray[Any]:
    if len(points) < 3 or points.shape[1] < 2:
        return np.pad(points, ((0, 0), (0, 2)))[:, :2]
    if projection == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(points) - 1) / 3)
        return np.asarray(TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(points))
    if projection != "pca":
        raise ValueError(f"no projection {projection!r}; there are pca, tsne")
    _, _, axes = np.linalg.svd(points, full_matrices=False)
    # A singular vector's sign is arbitrary and may differ between machines.
    signs = np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])
    return points @ (axes[:2] * signs[:, None]).T


def _distances(part: pd.DataFrame, points: npt.NDArray[Any], seed: int) -> pd.DataFrame:
    length = np.linalg.norm(points, axis=1, keepdims=True)
    unit = np.divide(points, length, out=np.zeros_like(points), where=length > 0)
    rng = np.random.default_rng(seed)
    out = pd.DataFrame(index=part.index, columns=["own", "other", "nearest_own"], dtype=float)
    for _, of_run in part.groupby("seed", sort=False):
        seeds = of_run.index[of_run["kind"] == "seed"]
        samples = part.loc[seeds, "sample"].to_numpy()
        for i in of_run.index.difference(seeds):
            far = 1 - unit[seeds] @ unit[i]
            mine = samples == part.at[i, "sample"]
            if not mine.any():
                continue
            out.at[i, "own"] = far[mine][0]
            if (~mine).any():
                out.at[i, "other"] = rng.choice(far[~mine])
                out.at[i, "nearest_own"] = float(far[mine][0] <= far[~mine].min())
    return out


def share(hits: pd.Series, rows: pd.DataFrame) -> statistics.Estimate:
    """Share of rows that hit, with its Wilson interval over samples: run seeds make no more of them."""
    parts = [c for c in ("sample", "index") if c in rows]
    n = len(rows[parts].drop_duplicates())
    return statistics.wilson(float(hits.sum()) * n / len(rows), n)
