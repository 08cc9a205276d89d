"""H, self-awareness: how sure the model is of its best tool. Paper: section 3.1."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Literal

from ttsi import prompts
from ttsi.engines.base import Engine, EngineError
from ttsi.types import Query, Scored, Tool, Uncertainty

Candidate = Literal["name", "name+opening"]


def rss(log_probs: Sequence[float]) -> list[float]:
    """Relative softmax scores: the candidates' probabilities relative to each other; they sum to 1.

    `log_probs`: one summed log-probability (nats) per candidate action. Empty or non-finite input
    raises ValueError. Paper: section 3.1, p_n = exp(ℓ_n − max ℓ) / Σ exp(ℓ_k − max ℓ).
    """
    if not log_probs:
        raise ValueError("no candidate was scored")
    if not all(math.isfinite(x) for x in log_probs):
        raise ValueError(f"non-finite score among {list(log_probs)}")
    best = max(log_probs)
    weights = [math.exp(x - best) for x in log_probs]
    total = math.fsum(weights)
    return [w / total for w in weights]


def margin(log_probs: Sequence[float]) -> float:
    """Gap between the two largest RSS scores: 1 = sure, 0 = a tie.

    `log_probs`: one summed log-probability (nats) per candidate action.
    A single candidate has margin 1. Empty or non-finite input raises ValueError, so that an unscored
    sample never passes for a sure one. Paper: section 3.1, u(x) = p(1) − p(2).
    """
    first, second = sorted([*rss(log_probs), 0.0], reverse=True)[:2]
    return first - second


def continuation(name: str) -> str:
    """What follows `prompts.OPENING` when the model calls this tool: `NAME", "arguments": {`."""
    return json.dumps(name, ensure_ascii=False)[1:] + ', "arguments": {'


def candidate_log_prob(scored: Scored, name: str, form: Candidate = "name", normalise: bool = False) -> float:
    """Summed log-probability (nats) of a candidate's tokens, higher = more likely.

    form: "name" sums up to and including the token that holds the name's closing quote,
    "name+opening" the whole continuation. normalise: the mean per token instead of the sum.
    """
    end = len(json.dumps(name, ensure_ascii=False)) - 1  # characters up to and with the closing quote
    count = len(scored.ends)
    if form == "name":
        count = next(i for i, e in enumerate(scored.ends) if e >= end) + 1
    used = scored.log_probs[:count]
    return math.fsum(used) / (len(used) if normalise else 1)


def score(engine: Engine, queries: Sequence[Query]) -> list[list[Scored]]:
    """Token log-probabilities (nats) of every tool of every query, as the opening of the model's own call.

    Reads the question and the tools, never a label. Raises EngineError for a query without tools or a
    score that isn't a finite number: an unscored sample is a failure, not a margin.
    """
    for query in queries:
        if not query.tools:
            raise EngineError(f"{query.id} has no tools to choose from")
    scored = engine.score(
        [prompts.act(q) for q in queries],
        prompts.OPENING,
        [[continuation(t.name) for t in q.tools] for q in queries],
    )
    for query, rows in zip(queries, scored, strict=True):
        if not all(math.isfinite(x) for row in rows for x in row.log_probs):
            raise EngineError(f"{query.id}: a score is not a finite number")
    return scored


def uncertainty(
    scored: Sequence[Scored], tools: Sequence[Tool], form: Candidate = "name", normalise: bool = False
) -> Uncertainty:
    """The margin over a query's tools, in [0, 1] (higher = more certain), with the log-probabilities."""
    log_probs = tuple(
        candidate_log_prob(s, t.name, form, normalise) for s, t in zip(scored, tools, strict=True)
    )
    return Uncertainty(margin(log_probs), log_probs, sum(len(s.log_probs) for s in scored))


def estimate(engine: Engine, query: Query, form: Candidate = "name", normalise: bool = False) -> Uncertainty:
    """How certain the model is of its best tool for one query: `score`, then `uncertainty`."""
    return uncertainty(score(engine, [query])[0], query.tools, form, normalise)
