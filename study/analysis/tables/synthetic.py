"""Figure 5 and what a picture can't prove: distances, copies, validity of the synthetic data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from study.analysis import statistics
from study.analysis.tables.layout import NOT_RUN, bracket, in_order, label, rows_of, spread, text
from study.analysis.tables.results import COPY, percent, select
from ttsi.calls import format_calls
from ttsi.types import Synthesis

Projection = Literal["pca", "tsne"]
POINT_COLUMNS = ["benchmark", "sample", "seed", "kind", "index", "x", "y", "own", "other", "nearest_own"]
QUALITY_COLUMNS = [
    "benchmark", "writer", "asked", "failed", "failed_share", "failed_low", "failed_high", "examples",
    "attempts", "copies", "copies_share", "copies_low", "copies_high", "copy_ratio_q1", "copy_ratio_median",
    "copy_ratio_q3", "valid", "valid_share", "valid_low", "valid_high", "distinct_questions",
    "distinct_tools", "top_tool_share", "note",
]  # fmt: skip
DISTANCE_COLUMNS = [
    "benchmark", "questions", "own_median", "other_median", "nearer", "nearer_low", "nearer_high",
    "nearest_own", "nearest_own_low", "nearest_own_high", "seeds_compared", "note",
]  # fmt: skip


def embedding_points(embeddings: pd.DataFrame, projection: Projection = "pca", seed: int = 0) -> pd.DataFrame:
    """One row per question, seed or synthetic: its place in 2-D (`x`, `y`) and, if synthetic, its distances.

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
        names = [str(c) for c in group if re.fullmatch(r"pc\d+", str(c))]
        points = group[names].to_numpy(float)
        points = points[:, ~np.isnan(points).any(axis=0)]
        points = points - points.mean(axis=0)
        part = group[["benchmark", "sample", "seed", "kind", "index"]].copy()
        part["x"], part["y"] = _plane(points, projection, seed).T
        parts.append(part.join(_distances(part, points, seed)))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=POINT_COLUMNS)


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
    for run in part["seed"].unique():
        of_run = part["seed"] == run
        seeds = part.index[of_run & (part["kind"] == "seed")]
        samples = part.loc[seeds, "sample"].to_numpy()
        for i in part.index[of_run & (part["kind"] != "seed")]:
            far = 1 - unit[seeds] @ unit[i]
            mine = samples == part.at[i, "sample"]
            if not mine.any():
                continue
            out.at[i, "own"] = far[mine][0]
            if (~mine).any():
                out.at[i, "other"] = rng.choice(far[~mine])
                out.at[i, "nearest_own"] = float(far[mine][0] <= far[~mine].min())
    return out


def distances_table(points: pd.DataFrame) -> pd.DataFrame:
    """One row per benchmark: distance of synthetic questions to their own and to other seeds. Shares in %.

    `nearer`: nearer to their own seed than to one drawn at random; `nearest_own`: no other seed is nearer
    (chance: 1 in `seeds_compared`). Wilson intervals take the questions of one run seed as independent.
    """
    rows = []
    for benchmark in in_order(points["benchmark"]):
        mine = points[points["benchmark"] == benchmark]
        made = mine.dropna(subset=["own", "other"])
        row: dict[str, Any] = {
            "benchmark": benchmark,
            "questions": len(made),
            "seeds_compared": int((mine["kind"] == "seed").sum() / max(1, mine["seed"].nunique())),
            "note": "" if len(made) else "too few: no synthetic question beside two seeds",
        }
        if len(made):
            row |= {"own_median": made["own"].median(), "other_median": made["other"].median()}
            for name, hits in (("nearer", made["own"] < made["other"]), ("nearest_own", made["nearest_own"])):
                row |= percent(_share(hits, made), name, f"{name}_low", f"{name}_high")
        rows.append(row)
    return pd.DataFrame(rows, columns=DISTANCE_COLUMNS)


def _share(hits: pd.Series, rows: pd.DataFrame) -> statistics.Estimate:
    """Share of rows that hit, with its Wilson interval over samples: run seeds make no more of them."""
    parts = [c for c in ("sample", "index") if c in rows]
    n = len(rows[parts].drop_duplicates())
    return statistics.wilson(float(hits.sum()) * n / len(rows), n)


def table_synthetic(examples: pd.DataFrame, records: pd.DataFrame) -> pd.DataFrame:
    """One row per benchmark × writer: what G was asked for, failures, copies, validity, tools. Shares in %.

    `examples`: the study's frame, one row per synthetic example. `records`: count the samples `asked`
    for an example (those an arm adapted or tried to) and the syntheses that failed after every retry.
    Intervals are over samples, whatever the number of seeds. `attempts`: replies needed per example, mean.
    Copy: a question that equals its seed up to case and spaces.
    `top_tool_share`: examples about the most frequent tool.
    """
    rows = []
    writers = examples.groupby(["benchmark", "writer"], sort=False) if len(examples) else ()
    for key, made in writers:
        benchmark, writer = map(str, key)
        row: dict[str, Any] = {"benchmark": benchmark, "writer": writer, "examples": len(made), "note": ""}
        row |= _asked(records, benchmark, writer)
        copies, valid = made["copy_ratio"] >= COPY, made["schema_errors"] == 0
        quarters = made["copy_ratio"].quantile([0.25, 0.5, 0.75])
        row |= {
            "attempts": (made["attempt"] + 1).mean(),
            "copies": int(copies.sum()),
            "valid": int(valid.sum()),
            **dict(zip(("copy_ratio_q1", "copy_ratio_median", "copy_ratio_q3"), quarters, strict=True)),
            "distinct_questions": made["question_sha256"].nunique(),
            "distinct_tools": made["tool"].nunique(),
            "top_tool_share": 100 * made["tool"].value_counts(normalize=True).iloc[0],
        }
        for name, hits in (("copies", copies), ("valid", valid)):
            row |= percent(_share(hits, made), f"{name}_share", f"{name}_low", f"{name}_high")
        rows.append(row)
    rows += [{"benchmark": "", "writer": "", "note": NOT_RUN}] if not rows else []
    table = pd.DataFrame(rows, columns=QUALITY_COLUMNS)
    return table.astype(
        dict.fromkeys(
            ["asked", "failed", "examples", "copies", "valid", "distinct_questions", "distinct_tools"],
            "Int64",
        )
    )


def _asked(records: pd.DataFrame, benchmark: str, writer: str) -> dict[str, Any]:
    mine = select(records, variant="", benchmark=benchmark)
    for arm in ("tt_si_all", "tt_si") if writer == "self" else ("tt_d",):
        rows = mine[(mine["arm"] == arm) & (mine["status"] == "ok")] if len(mine) else mine
        rows = rows if arm == "tt_si_all" or rows.empty else rows[rows["uncertain"].astype(bool)]
        if len(rows):
            # The same synthesis serves every mode and inference.
            once = rows.drop_duplicates(["sample", "seed"])
            failed = once["synthesis_failed"].astype(bool)
            cells = percent(_share(failed, once), "failed_share", "failed_low", "failed_high")
            return {"asked": len(once), "failed": int(failed.sum()), **cells}
    return {}


def synthetic_view(quality: pd.DataFrame) -> pd.DataFrame:
    """The synthetic data for reading."""
    rows = []
    for r in rows_of(quality):
        rows.append({
            "benchmark": label(r["benchmark"]),
            "writer": r["writer"],
            "asked": text(r["asked"]),
            "failed %": bracket(r["failed_share"], r["failed_low"], r["failed_high"]),
            "examples": text(r["examples"]) or text(r["note"]),
            "replies per example": "" if pd.isna(r["attempts"]) else f"{r['attempts']:.2f}",
            "copies %": bracket(r["copies_share"], r["copies_low"], r["copies_high"]),
            "likeness, median [quartiles]": bracket(
                r["copy_ratio_median"], r["copy_ratio_q1"], r["copy_ratio_q3"], digits=2
            ),
            "schema-valid %": bracket(r["valid_share"], r["valid_low"], r["valid_high"]),
            "different questions": text(r["distinct_questions"]),
            "different tools": text(r["distinct_tools"]),
            "most frequent tool %": text(r["top_tool_share"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def distances_view(distances: pd.DataFrame) -> pd.DataFrame:
    """The distances for reading."""
    rows = []
    for r in rows_of(distances):
        rows.append({
            "benchmark": label(r["benchmark"]),
            "synthetic questions": text(r["questions"]),
            "to own seed, median": "" if pd.isna(r["own_median"]) else f"{r['own_median']:.2f}",
            "to another seed, median": "" if pd.isna(r["other_median"]) else f"{r['other_median']:.2f}",
            "nearer to own %": spread(r, "nearer"),
            "own seed the nearest %": spread(r, "nearest_own"),
            "chance %": text(100 / r["seeds_compared"]) if r["seeds_compared"] else "",
            "note": text(r["note"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def synthetic_reading(quality: pd.DataFrame, distances: pd.DataFrame) -> str:
    """One Markdown line per benchmark: is a question beside its seed, and more than its seed again?"""
    lines = []
    for r in rows_of(distances[distances["questions"] > 0]):
        near = spread(r, "nearest_own")
        lines.append(
            f"- **{label(r['benchmark'])}**: of {r['questions']} synthetic questions {near} % lie nearest "
            "to their "
            f"own seed among {r['seeds_compared']}; median distance {r['own_median']:.2f}, to another's seed "
            f"{r['other_median']:.2f}."
        )
    for r in rows_of(quality[quality["examples"].notna()]):
        copies = bracket(r["copies_share"], r["copies_low"], r["copies_high"])
        valid = bracket(r["valid_share"], r["valid_low"], r["valid_high"])
        lines.append(
            f"- **{label(r['benchmark'])}**, written by {r['writer']}: {copies} % of {r['examples']} "
            "questions are "
            f"copies of their seed; {valid} % of the calls fit their tools' schemas."
        )
    return "\n".join(lines) or "No synthetic example is stored in this run."


def good_and_bad(
    written: Mapping[str, Synthesis], questions: Mapping[str, str], count: int = 5
) -> tuple[list[str], list[str]]:
    """Texts of the first `count` good and the first `count` bad examples, in the order of the samples.

    Good: no copy of its seed question, and its calls fit the tools' schemas. Bad: a copy, calls that don't
    fit, or a synthesis that failed after every retry. First, not best: nothing is picked by hand.
    `questions`: sample id → seed question. What comes back is model text: escape it (`quote`).
    """
    good: list[str] = []
    bad: list[str] = []
    for sample, synthesis in written.items():
        asked = f"asked:   {questions.get(sample, '(not part of an exported run)')}"
        if synthesis.failed:
            bad.append(f"{asked}\nfailed:  {', '.join(synthesis.failures)}")
        for example in synthesis.examples:
            calls = format_calls(example.calls)
            faults = ["a copy"] if example.copy_ratio >= COPY else []
            faults += [f"schema: {e}" for e in example.schema_errors]
            shown = (
                f"{asked}\nwritten: {example.question}\ncall:    {calls}\nlikeness {example.copy_ratio:.2f}"
            )
            (bad if faults else good).append("; ".join([shown, *faults]))
    return good[:count], bad[:count]
