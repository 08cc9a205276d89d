"""What a machine recomputed beside what is committed: how far they agree, and what numerics can't explain."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from math import nan
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.analysis import look, statistics
from study.analysis.answers import percent
from study.analysis.figures.style import NEUTRAL, draw_interval, notice, panels, save_figure, style

SAME = 0.99
"""So large a share of float32 verdicts has to come out again: Wilson's upper end may not be below it."""
NEAR = 0.001
"""Nats, and units of H's margin: rounding moves float32 numbers by less. So a greedy reply can depart only
where two tokens are nearly as likely, and what each machine gave the token it took differs by less, too."""
CELL = ["benchmark", "model", "variant", "arm", "mode", "inference", "pool_n", "seed"]
RESULT = ["stage", "settings", "benchmark", "seed", "sample"]
ENDS = ("", "_low", "_high")
COLUMNS = [*CELL, "stage", "committed", "n", "same_reply", *(f"same_verdict{e}" for e in ENDS), "margin",
           "log_prob", "loss", "accuracy_committed", "accuracy", *(f"difference{e}" for e in ENDS), "machine",
           "dtype", "machine_here", "dtype_here", "note"]  # fmt: skip
JUDGED, CONTRADICTS, SURE = "same reply, judged otherwise", "not what its own stages say", "no near-tie"
BEYOND = {
    JUDGED: "the same reply gets another verdict",
    CONTRADICTS: "the committed record is not what the committed stage result behind it says",
    SURE: f"without training, a greedy reply departs where no two tokens are within {NEAR} nats",
}


class Frames(NamedTuple):
    """A run, committed or recomputed. stages: one row per stored result, `model` being the model's name.

    about: how it was made (`context`: machine and dtype; `models`: names of today's weights, by hash), and of
    a recomputed one `why` something was left out, by benchmark, model, arm or "benchmark arm".
    """

    records: pd.DataFrame
    scores: pd.DataFrame
    stages: pd.DataFrame
    about: dict[str, Any]


class Pairs(NamedTuple):
    """What both have, a row each; what was recomputed ends in `_here`.

    answers: `same_reply`, `same_verdict`, `margin_off` and `why` they differ. margins: H's, `margin_off`.
    stages: `same_reply`, `log_prob` and `loss` (how far apart at most, for the same tokens), and `gap`, where
    replies depart: what each gave its own token.
    """

    answers: pd.DataFrame
    margins: pd.DataFrame
    stages: pd.DataFrame


def pair(committed: Frames, here: Frames) -> Pairs:
    """Committed and recomputed rows of the same arm and sample, or stored under the same settings."""
    stages = _merged(_named(committed.stages), _named(here.stages)[[*RESULT, "value"]], RESULT)
    compared = [_compared(*values) for values in zip(stages["value"], stages["value_here"], strict=True)]
    stages[["same_reply", "log_prob", "loss", "gap"]] = pd.DataFrame(compared, stages.index, range(4))
    ok, ok_here = (_cells(f.records[f.records["status"] == "ok"]) for f in (committed, here))
    answers = _merged(ok, ok_here, [*CELL, "sample"])
    alike = [_alike(*texts) for texts in zip(answers["reply"], answers["reply_here"], strict=True)]
    answers["same_reply"] = np.array(alike, dtype=bool)
    answers["same_verdict"] = answers["correct"].astype(float) == answers["correct_here"].astype(float)
    behind = {tuple(row[k] for k in RESULT): row for row in look.rows_of(stages)}
    answers["why"] = [_why(row, behind) for row in look.rows_of(answers)]
    margins = _merged(committed.scores, here.scores, ["variant", "benchmark", "seed", "sample"])
    own = committed.records[committed.records["arm"] != "teacher"].groupby("variant")["model"].first()
    margins["model"] = margins["variant"].map(own)
    for t in (answers, margins):
        t["margin_off"] = (t["margin"].astype(float) - t["margin_here"].astype(float)).abs()
    return Pairs(answers, margins, stages)


def _merged(committed: pd.DataFrame, here: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    return committed.merge(here, on=key, suffixes=("", "_here"))


def _named(stages: pd.DataFrame) -> pd.DataFrame:
    """The stages as people call them: with their training mode and number of replies."""
    names = {}
    for stage, text in set(zip(stages["stage"], stages["settings"], strict=True)):
        of = json.loads(text)
        mode, n = of.get("lora", {}).get("mode", ""), of.get("sampling", {}).get("n", 1)
        names[stage, text] = f"{stage.removeprefix('redacted ')} {mode} {f'×{n}' if n > 1 else ''}".strip()
    keys = zip(stages["stage"], stages["settings"], strict=True)
    return stages.assign(stage=[names[key] for key in keys])


def _cells(records: pd.DataFrame) -> pd.DataFrame:
    return records.assign(pool_n=records["pool_n"].astype(float).fillna(0).astype(int))


def _alike(text: str, here: str) -> bool:
    """Whether two texts are the same; the committed one may be a SHA-256."""
    return text in (here, f"sha256:{hashlib.sha256(here.encode()).hexdigest()}")


def _compared(committed: str, here: str) -> tuple[bool, float, float, float]:
    """Of two results of a stage: whether the texts are the same, and how far apart numbers are."""
    (texts, tokens, probs, losses), (texts_here, tokens_here, probs_here, losses_here) = (
        _read(value) for value in (committed, here)
    )
    same = len(texts) == len(texts_here) and all(map(_alike, texts, texts_here))
    at = next((i for i, (a, b) in enumerate(zip(tokens, tokens_here, strict=False)) if a != b), None)
    gap = nan if at is None else abs(probs[at] - probs_here[at])
    return same, _apart(probs[:at], probs_here[:at]), _apart(losses, losses_here), gap


def _read(value: str) -> tuple[list[str], list[int], list[float], list[float]]:
    """Texts, tokens, log-probabilities and losses in a stage's result."""
    read = json.loads(value)
    of: dict[str, Any] = read if isinstance(read, dict) else {"replies": read}
    made = of.get("replies", of.get("examples", []))
    texts = [m.get("text", m.get("question", "")) for m in made] + of.get("failures", [])
    tokens, probs = ([x for m in made for x in m.get(k, [])] for k in ("tokens", "log_probs"))
    return texts, tokens, probs, (of.get("fit") or {}).get("losses", [])


def _apart(a: list[float], b: list[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=False)), default=nan)


def _why(row: dict[str, Any], behind: Mapping[tuple[Any, ...], dict[str, Any]]) -> str:
    """Why an answer differs; "" if it doesn't. behind: stage results by what they are stored under."""
    if row["same_reply"]:
        return "" if row["same_verdict"] and row["code"] == row["code_here"] else JUDGED
    if not row["settings"]:
        return "after training or drawing"
    stage = behind.get(("answer", *(row[k] for k in RESULT[1:])))
    if stage is None:
        return "its committed tokens are not public"
    if stage["same_reply"]:
        return CONTRADICTS
    return f"near-tie, {stage['gap']:.1g} nats" if stage["gap"] <= NEAR else SURE


def problems(committed: Frames, here: Frames, pairs: Pairs) -> list[str]:
    """What numerics can't explain, each with its bound; empty: the committed run comes out again."""
    if not len(pairs.answers) + len(pairs.margins):
        return ["nothing was compared: there was no time, no data or no model for any of it"]
    found, exact = [], here.about["context"]["dtype"] == "float32"
    strange = set().union(*_made_with(committed.stages, "model").values()) - set(committed.about["models"])
    if strange and not committed.about["elsewhere"]:
        found.append(f"the committed results were made with other weights, their hash being {strange}")
    for key in ("data", "prompts", "samples"):
        old, new = (_made_with(f.stages, key) for f in (committed, here))
        if other := sorted(b for b in old.keys() & new.keys() if not old[b] & new[b]):
            found.append(f"the committed results were made with other {key}: {', '.join(other)}")
    failed = here.records[here.records["status"] == "error"]
    if len(failed):
        found.append(f"{len(failed)} answers can't be computed on this machine: {failed['error'].iloc[0]}")
    for why, said in BEYOND.items():
        ids = pairs.answers.loc[pairs.answers["why"] == why, "sample"].unique()
        if len(ids) and (exact or why != SURE):
            found.append(f"{said}: {', '.join(map(str, ids))}")
    off = max(0.0, pairs.margins["margin_off"].max(), pairs.answers["margin_off"].max())
    if exact and off > NEAR:
        found.append(f"H's margin is off by {off:.2g}, where float32 explains {NEAR}")
    verdict = agreement(pairs.answers)["same_verdict"]
    if exact and verdict.high < SAME:
        said = look.bracket(100 * verdict.value, 100 * verdict.low, 100 * verdict.high)
        found.append(
            f"{said} % of {verdict.n:g} samples have the same verdict: Wilson's upper end is below 99 %"
        )
    return found


def _made_with(stages: pd.DataFrame, key: str) -> dict[str, set[str]]:
    """What stage results were made with, by benchmark: hashes, of every layout, tool order and seed."""
    given = pd.Series([json.loads(text).get(key) for text in stages["settings"]], stages.index, dtype=object)
    return {str(b): set(of.dropna()) for b, of in given.groupby(stages["benchmark"])}


def agreement(answers: pd.DataFrame) -> dict[str, statistics.Estimate]:
    """Shares of same replies and of same verdicts. A sample counts once, however many arms answered it."""
    by = answers.groupby(["benchmark", "model", "seed", "sample"])
    each = {name: by[name].mean() for name in ("same_reply", "same_verdict")}
    return {name: statistics.wilson(float(of.sum()), len(of)) for name, of in each.items()}


def table(committed: Frames, here: Frames, pairs: Pairs) -> pd.DataFrame:
    """A row per arm, then for H ("H"), then per stage: what agrees, and how far numbers are apart at most.

    `committed`, `n`, `same_reply` are counts; `same_verdict` is in % with its Wilson interval, `difference`
    the accuracy recomputed minus committed, paired, in points. `note`: why nothing was recomputed.
    """
    rows, done = [], dict(list(pairs.answers.groupby(CELL)))
    for key, of in _cells(committed.records).groupby(CELL, sort=False):
        row, mine = {**dict(zip(CELL, key, strict=True)), "committed": len(of), "n": 0}, done.get(key)
        if mine is None:
            names = [row[k] for k in ("benchmark", "model", "arm")] + [f"{row['benchmark']} {row['arm']}"]
            row["note"] = next(filter(None, map(here.about["why"].get, names)), "not reached in the minutes")
        else:
            before, after = (mine[c].astype(float) for c in ("correct", "correct_here"))
            row |= {"n": len(mine), "same_reply": mine["same_reply"].sum()}
            row |= {"margin": mine["margin_off"].max()}
            row |= percent(statistics.wilson(mine["same_verdict"].sum(), len(mine)), "same_verdict")
            row |= {"accuracy_committed": 100 * before.mean(), "accuracy": 100 * after.mean()}
            row |= percent(statistics.paired(before, after).difference, "difference")
        rows.append(row)
    h = _counted(pairs.margins, committed.scores, "variant", margin="margin_off").assign(arm="H")
    off = {name: name for name in ("same_reply", "log_prob", "loss")}
    stages = _counted(pairs.stages, _named(committed.stages), "stage", **off)
    # Of H there is no text.
    stages["same_reply"] = stages["same_reply"].where(stages["stage"] != "score")
    made = look.sort_rows(pd.concat([pd.DataFrame(rows), h, stages], ignore_index=True))
    made[["machine", "dtype"]], made[["machine_here", "dtype_here"]] = _made_on(committed), _made_on(here)
    return made.reindex(columns=COLUMNS)


def _made_on(of: Frames) -> tuple[str, str]:
    """The machines that computed a run, and in which precision."""
    made = [of.about["context"], *of.about.get("earlier", [])]
    return "; ".join(dict.fromkeys(m["machine"] for m in made)), made[0]["dtype"]


def _counted(pairs: pd.DataFrame, committed: pd.DataFrame, by: str, **most: str) -> pd.DataFrame:
    """By benchmark, model, seed and `by`: how many are committed and compared, and the largest of others."""
    key = ["benchmark", "seed", by]
    how = {k: (column, "sum" if column == "same_reply" else "max") for k, column in most.items()}
    found = pairs.groupby([*key, "model"], as_index=False).agg(n=("sample", "size"), **how)
    if "model" in committed:
        key.append("model")
    return found.merge(committed.groupby(key).size().rename("committed").reset_index(), how="left", on=key)


def differing(answers: pd.DataFrame) -> pd.DataFrame:
    """The answers that differ, by sample id, with both codes, and why."""
    return answers.loc[answers["why"] != "", [*CELL, "sample", "code", "code_here", "same_verdict", "why"]]


def overall(pairs: Pairs) -> pd.DataFrame:
    """A row per benchmark and model: agreement of all arms in % with Wilson intervals, n in samples."""
    rows = []
    for (benchmark, model), answers in pairs.answers.groupby(["benchmark", "model"]):
        found, stages = agreement(answers), pairs.stages
        mine = stages[(stages["benchmark"] == benchmark) & (stages["model"] == model)]
        row = {"benchmark": benchmark, "model": model, "n": found["same_reply"].n, "answers": len(answers)}
        row |= {k: v for name, share in found.items() for k, v in percent(share, name).items()}
        rows.append(row | {name: mine[name].max() for name in ("log_prob", "loss")})
    return look.sort_rows(pd.DataFrame(rows))


def conclusion(pairs: Pairs) -> str:
    """One sentence on how much was recomputed and how much of it is the same."""
    if not len(pairs.answers):
        return "No answer was recomputed."
    shares = agreement(pairs.answers)
    reply, verdict = (look.bracket(100 * e.value, 100 * e.low, 100 * e.high) for e in shares.values())
    n = shares["same_reply"].n
    return (
        f"{len(pairs.answers)} answers to {n:g} samples (of a benchmark, by a model) were computed anew: the "
        f"same reply in {reply} %, the same verdict in {verdict} %."
    )


def view(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is read."""
    rows = look.rows_of(table)
    arms = [look.arm_name(r) if pd.isna(r["stage"]) else f"stage {r['stage']}" for r in rows]
    return pd.DataFrame({
        "benchmark": table["benchmark"].map(look.label), "model": look.texts(table["model"]),
        "variant": look.texts(table["variant"]), "arm or stage": arms,
        "mode, inference": look.together(", ", *(look.texts(table[c]) for c in ("mode", "inference"))),
        "n": look.texts(table["n"], table["committed"], form="{:.0f} of {:.0f}"),
        "same reply": look.texts(table["same_reply"], form="{:.0f}"),
        "same verdict %": look.spreads(table, "same_verdict"),
        "accuracy %": look.texts(table["accuracy_committed"], table["accuracy"], form="{:.1f} → {:.1f}"),
        "difference": look.spreads(table, "difference", sign="+"),
        "Δ margin": look.texts(table["margin"], form="{:.0e}"),
        "Δ log-prob.": look.texts(table["log_prob"], form="{:.0e}"),
        "Δ loss": look.texts(table["loss"], form="{:.0e}"), "note": look.texts(table["note"]),
    })  # fmt: skip


def caption(committed: Frames, here: Frames) -> str:
    """Which two machines, in which precision."""
    one, other = (", ".join(_made_on(of)) for of in (committed, here))
    return f"Committed: {one}. Recomputed: {other}. Intervals: 95 %, Wilson; of differences, as in Table 1."


def shown(of: pd.DataFrame, caption: str, profile: str) -> str | bytes:
    """What a notebook shows of `overall`: the saved figure; of nothing a notice, which isn't saved."""
    drawn = figure(of, caption)
    if len(of):
        return str(save_figure(drawn, of, "figure_reproduction", profile))
    drawn.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def figure(of: pd.DataFrame, caption: str) -> Figure:
    """Per benchmark and model: the share of same verdicts (dot) and of same replies (tick). of: `overall`."""
    caption = f"Dots: samples with the same verdict; ticks: with the same reply. {caption}"
    if not len(of):
        return notice("Nothing was recomputed here: make reproduce does", caption)
    with style():
        drawn, grid = panels(1, [1], 0.3 * len(of) + 0.2, caption, left=2.6, right=0.4)
        axes = grid[0, 0]
        for height, row in enumerate(look.rows_of(of)):
            value, low, high = (row[f"same_verdict{end}"] for end in ENDS)
            draw_interval(axes, value, low, high, height, "#0072b2")
            axes.plot(row["same_reply"], height, "|", color=NEUTRAL, ms=11, mew=1.4, zorder=5)
        names = [f"{look.label(r['benchmark'])}, {r['model']}, n = {r['n']:g}" for r in look.rows_of(of)]
        axes.set_yticks(range(len(of)), names)
        least = min(90.0, of["same_reply"].min() - 2, of["same_verdict_low"].min() - 2)
        axes.set(
            xlim=(least, 100 + 0.03 * (100 - least)),
            ylim=(len(of) - 0.5, -0.5),
            xlabel="recomputed alike, % of samples",
        )
        axes.axvline(100 * SAME, color="#999999", lw=0.8, ls=":")
        axes.grid(axis="y", visible=False)
    return drawn
