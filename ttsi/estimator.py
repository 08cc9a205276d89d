"""H, self-awareness: how sure the model is of its best tool. Paper: section 3.1.

Beside the paper's margin stand the estimators it is compared with. All are pure functions of what is stored,
and all point one way: higher = more certain.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ttsi import prompts
from ttsi.call_forms import ARGUMENT_KEYS, NAME_KEYS, fold, pattern
from ttsi.calls import answer_span, parse_calls
from ttsi.engines.base import Engine, EngineError
from ttsi.seeds import seed_for
from ttsi.types import Generation, Layout, Query, Scored, Tool, Uncertainty

Candidate = Literal["name", "name+opening"]
Part = Literal["name", "keys", "values"]

_NAMED = re.compile(rf'"(?:{pattern(NAME_KEYS)})"\s*:\s*"', re.I)
_ARGUED = re.compile(rf'"(?:{pattern(ARGUMENT_KEYS)})"\s*:', re.I)
_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


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


def certain_of_tool(log_probs: Sequence[float]) -> float:
    """1 minus the entropy of the RSS scores over its maximum: 1 = sure, 0 = all tools alike.

    A single candidate is certain: 1. Raises ValueError like `rss`.
    """
    scores = rss(log_probs)
    if len(scores) == 1:
        return 1.0
    return 1 + math.fsum(p * math.log(p) for p in scores if p > 0) / math.log(len(scores))


def certain_of_answer(log_probs: Sequence[float]) -> float:
    """1 / perplexity of an answer, in (0, 1]: the geometric mean of its tokens' probabilities (nats given).

    Raises ValueError for an answer without tokens.
    """
    if not log_probs:
        raise ValueError("an answer without tokens has no perplexity")
    return math.exp(math.fsum(log_probs) / len(log_probs))


def certain_of_every_token(log_probs: Sequence[float]) -> float:
    """Smallest probability among an answer's tokens, in [0, 1]. Raises ValueError if there is none."""
    if not log_probs:
        raise ValueError("an answer without tokens has no least likely one")
    return math.exp(min(log_probs))


def likelihood(log_probs: Sequence[float]) -> float:
    """Probability of a whole answer, in [0, 1], higher = more certain: its tokens' (nats given), multiplied.

    Nothing to multiply, as where no call can be read, gives 0: what can't be used is no likely answer.
    """
    return math.exp(math.fsum(log_probs)) if log_probs else 0.0


def answer_parts(reply: Generation, ends: Sequence[int]) -> dict[Part, list[float]]:
    """A reply's token log-probabilities (nats) from its first call's name to its end, by what they decide.

    "name": which function. "keys": which arguments, and that no more follow: their names, and all that stands
    between values. "values": what they are. A token belongs to the part in which it ends, so the likelihoods
    of the three multiply to the answer's. All are empty where no call can be read.
    ends: characters of the reply's text covered once each token is read, as `Chat.ends` gives them.
    Reads the reply alone, never a label, in time linear in its length.
    """
    parts: dict[Part, list[float]] = {"name": [], "keys": [], "values": []}
    behind = answer_span(reply.text)[0]
    named = _NAMED.search(reply.text, behind) if parse_calls(reply.text).calls else None
    if named is None:
        return parts
    early = _ARGUED.search(reply.text, behind, named.start())  # arguments may stand before the name
    start = early.start() + 1 if early else named.end()
    labels: list[Part] = ["keys"] * len(reply.text)
    for first, last, part in _spans(reply.text, start - 1, early is not None):
        labels[first:last] = [part] * (last - first)
    before = start
    for end, log_prob in zip(ends, reply.log_probs, strict=True):
        if end > start:
            parts[labels[end - 1] if end > before else "keys"].append(log_prob)  # a control token has no text
            before = end
    return parts


def _spans(text: str, start: int, at_key: bool = False) -> Iterator[tuple[int, int, Part]]:
    """(first, last, part) of all names and argument values from a quote on.

    It opens the first name or, with `at_key`, the key of arguments that stand before it.
    A string's own opening quote counts to what stands before it: it says the type, and for names nothing.
    """
    stack, key, value = ["call"], "name", 0
    for token in _JSON.finditer(text, start):
        word, end = token[0], token.end()
        inside = stack[-1] if stack else "list"
        first = token.start() + (word[0] == '"')
        if word in "{[":
            kind = "value" if inside in ("arguments", "value") else "call" if word == "{" else "list"
            kind = "arguments" if kind == "call" and inside == "call" and key in ARGUMENT_KEYS else kind
            value = first if inside == "arguments" else value
            stack.append(kind)
            at_key = word == "{"
        elif word in "}]":
            if stack and stack.pop() == "value" and stack[-1] == "arguments":
                yield value, end, "values"
        elif word in ",:":
            at_key = word == ","
        elif inside in ("call", "arguments") and at_key:
            key = fold(word.strip('"'))
        elif inside == "call" and key in NAME_KEYS:
            yield first, end, "name"
        elif inside == "arguments" or (inside == "call" and key in ARGUMENT_KEYS):
            yield first, end, "values"


def agreement(votes: Sequence[str | None]) -> float:
    """Share of the sampled replies that the most frequent calls have, in [0, 1].

    `votes`: canonical calls, or a hash of them; None = a reply that can't be parsed, which agrees with none.
    """
    if not votes:
        raise ValueError("no reply was sampled")
    return max(Counter(v for v in votes if v is not None).values(), default=0) / len(votes)


def certainties(row: Mapping[str, Any], run_seed: int = 0) -> dict[str, float]:
    """Every estimator's value for one row of the frame `scores`; what wasn't run for it is left out.

    rss: the paper's margin. random: one uniform number per sample. trivial: never certain.
    """
    given = {"rss": float(row["margin"]), "trivial": 0.0, "entropy": certain_of_tool(list(row["log_probs"]))}
    draw = seed_for(run_seed, str(row["benchmark"]), str(row["sample"]), "random estimator")
    given["random"] = draw / 2**63
    if (answer := row.get("answer_log_probs")) is not None and len(answer):
        given["perplexity"] = certain_of_answer(list(answer))
        given["smallest_token"] = certain_of_every_token(list(answer))
    if (parts := row.get("answer_parts")) is not None:
        read = any(parts.values())  # in a call without arguments nothing is left to choose of them
        given["likelihood"] = likelihood([x for part in parts.values() for x in part])
        given |= {f"likelihood_{p}": math.exp(math.fsum(x)) if read else 0.0 for p, x in parts.items()}
    if (votes := row.get("votes")) is not None and len(votes):
        given["disagreement"] = agreement(list(votes))
    return given


def candidate_margin(log_probs: Sequence[float], lengths: Sequence[int] | None = None) -> float:
    """The margin over candidates of any form; with `lengths` (tokens) over their mean log-probabilities."""
    if lengths is None:
        return margin(log_probs)
    return margin([x / n for x, n in zip(log_probs, lengths, strict=True)])


def continuation(name: str) -> str:
    """What follows `prompts.OPENING` when the model calls this tool: `NAME", "arguments": {`."""
    return json.dumps(name, ensure_ascii=False)[1:] + ', "arguments": {'


def candidate_log_prob(scored: Scored, name: str, form: Candidate = "name", normalise: bool = False) -> float:
    """Summed log-probability (nats) of a candidate's tokens, higher = more likely.

    form: "name" sums up to and including the token that holds the name's closing quote,
    "name+opening" the whole continuation. normalise: the mean per token instead of the sum.
    """
    used = scored.log_probs[: candidate_length(scored, name, form)]
    return math.fsum(used) / (len(used) if normalise else 1)


def candidate_length(scored: Scored, name: str, form: Candidate = "name") -> int:
    """Number of tokens that a candidate's log-probability sums."""
    if form == "name":
        return next(i for i, e in enumerate(scored.ends) if e >= _closing(name)) + 1
    if not scored.ends or scored.ends[-1] < len(scored.continuation):
        raise ValueError("scored up to the name only")
    return len(scored.ends)


def _closing(name: str) -> int:
    """Characters of a continuation up to the name's closing quote, which counts."""
    return len(json.dumps(name, ensure_ascii=False)) - 1


def score(
    engine: Engine,
    queries: Sequence[Query],
    form: Candidate = "name",
    layout: Layout = "native",
    instructions: str = "",
) -> list[list[Scored]]:
    """Token log-probabilities (nats) of every tool of every query, as the opening of the model's own call.

    form: "name" scores no more than `candidate_log_prob` will sum, the tokens up to the closing quote.
    Reads the question and the tools, never a label. Raises EngineError for a query without tools or a
    score that isn't a finite number: an unscored sample is a failure, not a margin.
    """
    for query in queries:
        if not query.tools:
            raise EngineError(f"{query.id} has no tools to choose from")
    scored = engine.score(
        [prompts.act(q, layout, instructions) for q in queries],
        prompts.opening(layout),
        [[continuation(t.name) for t in q.tools] for q in queries],
        [[_closing(t.name) for t in q.tools] for q in queries] if form == "name" else None,
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


def estimate(
    engine: Engine,
    query: Query,
    form: Candidate = "name",
    normalise: bool = False,
    layout: Layout = "native",
    instructions: str = "",
) -> Uncertainty:
    """How certain the model is of its best tool for one query: `score`, then `uncertainty`."""
    scored = score(engine, [query], form, layout, instructions)
    return uncertainty(scored[0], query.tools, form, normalise)
