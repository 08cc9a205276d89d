"""What notebooks work from: one data frame per question, out of the store, with every reply judged anew."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from study.data import benchmarks, pools, sources
from study.data.judge import judge
from study.run import arms
from study.run.arms import ARMS, Step
from study.run.config import Profile
from study.run.stages import Remembered
from ttsi import estimator
from ttsi.algorithm import Outcome
from ttsi.stages import NOT_RUN, Who
from ttsi.types import Example, Generation, Query, Sample, Synthesis, Verdict

NAN = float("nan")
COMPONENTS = 32

RECORDS = [
    "variant", "profile", "benchmark", "sample", "cluster", "seed", "arm", "mode", "inference", "model",
    "dtype", "tool_order", "n_tools", "flags", "status", "error", "margin", "tau", "uncertain", "adapted",
    "diverged", "source", "correct", "code", "form", "reply", "n_replies", "tokens_answer", "tokens_h",
    "tokens_t", "seconds_h", "seconds_g", "seconds_t", "seconds_answer", "synthesis_failed", "attempts",
    "copy_ratio", "schema_valid", "tokens_g", "pool_n", "seconds_fit", "tokens_fit", "likelihood", "refused",
]  # fmt: skip
"""Columns of `records`. seconds_fit, tokens_fit: of the adapter that all rows of the arm share, not of the
sample; pool_n: the labelled samples it was trained on. likelihood: of the reply, in [0, 1], under the model
that gave it. NaN where there is none. refused: an adapted answer was there, but no likelier than the base."""
SCORES = [
    "variant", "benchmark", "sample", "cluster", "seed", "n_tools", "margin", "log_probs", "base_correct",
    "log_probs_opening", "lengths", "lengths_opening", "log_probs_whole", "lengths_whole",
    "answer_log_probs", "votes", "rss", "random", "trivial", "perplexity", "entropy", "smallest_token",
    "disagreement", "likelihood", "likelihood_name", "likelihood_keys", "likelihood_values",
]  # fmt: skip
"""Columns of `scores`. Log-probabilities in nats, one per tool in the order of the prompt; lengths in tokens.
From `rss` on they are estimators (higher = more certain), NaN where not run."""
EXAMPLES = [
    "variant", "benchmark", "sample", "seed", "writer", "index", "attempt", "copy_ratio", "schema_errors",
    "tool", "n_calls", "question_sha256",
]  # fmt: skip
SAMPLES = [
    "benchmark", "sample", "cluster", "seed", "n_tools", "n_turns", "n_calls", "flags", "gold_at",
    "gold_at_original", "in_pool",
]  # fmt: skip
"""Columns of `samples`. gold_at, gold_at_original: place of the first gold call's tool in the prompt's list
and in upstream's, from 0, NaN if it isn't there. in_pool: whether the training pool calls that tool."""
_ESTIMATORS = SCORES[SCORES.index("rss") :]


@dataclass(frozen=True)
class Run:
    """What every row says of the run that it is from."""

    profile: Profile
    dtype: str
    variant: str = ""


def sha256(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def judged(profile: Profile, reply: str, sample: Sample) -> Verdict:
    """A reply's verdict under the profile's rules."""
    return judge(reply, sample, rule=profile.judge, accept=profile.accept, strict_types=profile.strict_types)


def record(
    run: Run,
    sample: Sample,
    outcome: Outcome,
    step: Step,
    seed: int,
    likely: Callable[[Generation], float] | None = None,
) -> dict[str, Any]:
    """One row of `records`. status "error": the machine failed; there is no verdict.

    likely: how likely a reply is to the run's model, adapted or not.
    """
    p, shared = run.profile, outcome.shared
    row: dict[str, Any] = {
        "variant": run.variant,
        "profile": p.name,
        "benchmark": sample.benchmark,
        "sample": sample.id,
        "cluster": sample.cluster,
        "seed": seed,
        "arm": step.arm,
        "mode": step.mode or "none",
        "inference": step.inference,
        "model": p.teacher_name if ARMS[step.arm].whom is arms.TEACHER else p.model,
        "dtype": run.dtype,
        "tool_order": p.tool_order,
        "n_tools": len(sample.tools),
        "flags": ",".join(sorted(sample.flags)),
        "status": "error" if outcome.error else "ok",
        "error": outcome.error,
        "margin": outcome.margin,
        "tau": ARMS[step.arm].under.get("tau", p.tau),
        "uncertain": outcome.uncertain,
        "adapted": outcome.adapted,
        "diverged": outcome.diverged,
        "source": outcome.source,
        "correct": None,
        "code": "",
        "form": "",
        "reply": "",
        "n_replies": len(outcome.replies),
        "tokens_answer": outcome.tokens_other + sum(len(r.tokens) for r in outcome.replies)
        if not outcome.error
        else 0,
        "tokens_h": outcome.tokens_h,
        "tokens_t": outcome.fit.tokens if outcome.fit else 0,
        **{f"seconds_{k}": outcome.seconds.get(k, 0.0) for k in ("h", "g", "t", "answer")},
        **_example_columns(outcome.synthesis),
        "pool_n": NAN if outcome.pool_n is None else float(outcome.pool_n),
        "seconds_fit": shared.seconds if shared else NAN,
        "tokens_fit": float(shared.fit.tokens) if shared and shared.fit else NAN,
        "likelihood": NAN,
        "refused": outcome.refused,
    }
    if not outcome.error:
        reply, verdict = _chosen(p, outcome, step, sample)
        if likely and row["model"] == p.model:
            row["likelihood"] = likely(reply)
        row |= {"correct": verdict.correct, "code": verdict.code, "form": verdict.form, "reply": reply.text}
    return row


def _chosen(p: Profile, outcome: Outcome, step: Step, sample: Sample) -> tuple[Generation, Verdict]:
    """The reply that counts, with its verdict: the only one, the vote's, or the first right one of five."""
    if step.inference == "pass@5":
        each = [(r, judged(p, r.text, sample)) for r in outcome.replies[:5]]
        return next((pair for pair in each if pair[1].correct), each[0])
    voted = step.inference == "majority" or ARMS[step.arm].whom is arms.VOTES
    reply = arms.majority(outcome.replies) if voted else outcome.replies[0]
    return reply, judged(p, reply.text, sample)


def _example_columns(synthesis: Synthesis | None) -> dict[str, Any]:
    examples: tuple[Example, ...] = synthesis.examples if synthesis else ()
    count = len(examples)
    return {
        "synthesis_failed": synthesis is not None and synthesis.failed,
        "attempts": len(synthesis.failures) + count if synthesis else 0,
        "copy_ratio": sum(e.copy_ratio for e in examples) / count if count else NAN,
        "schema_valid": float(all(not e.schema_errors for e in examples)) if count else NAN,
        "tokens_g": synthesis.tokens if synthesis else 0,
    }


def scores(
    run: Run, samples: Sequence[Sample], stages: Remembered, reads: bool = True
) -> list[dict[str, Any]]:
    """Rows of `scores`: what H and its rivals say of each sample, beside whether the base answer is right.

    reads: whether the answers' tokens can be told apart.
    """
    p, queries, seed = run.profile, [s.query for s in samples], stages.method.seed
    scored, margins, answers = stages.scored(queries), stages.score(queries), stages.answer(queries)
    opened, whole = stages.scored(queries, "name+opening"), stages.whole(queries)
    voted = stages.under(answering=stages.voting).answer(queries)
    rows = []
    for sample in samples:
        i = sample.id
        known, u, answer = scored[i].value, margins[i].value, answers[i].value
        if known is None or u is None or answer is None:
            continue
        names = [t.name for t in sample.tools]
        further = opened[i].value
        opening = further and [math.fsum(s.log_probs) for s in further]
        best = opening and whole[i].value
        replies = voted[i].value
        row: dict[str, Any] = {
            "variant": run.variant,
            "benchmark": sample.benchmark,
            "sample": i,
            "cluster": sample.cluster,
            "seed": seed,
            "n_tools": len(names),
            "margin": u.margin,
            "log_probs": list(u.log_probs),
            "base_correct": judged(p, answer[0].text, sample).correct,
            "log_probs_opening": opening,
            "lengths": [estimator.candidate_length(s, n) for s, n in zip(known, names, strict=True)],
            "lengths_opening": further and [len(s.log_probs) for s in further],
            "log_probs_whole": (opening and best)
            and [x + math.fsum(g.log_probs) for x, g in zip(opening, best, strict=True)],
            "lengths_whole": (further and best)
            and [len(s.log_probs) + len(g.tokens) for s, g in zip(further, best, strict=True)],
            "answer_log_probs": list(answer[0].log_probs),
            "answer_parts": stages.parts(answer[0]) if reads else None,
            "votes": replies and [None if k is None else sha256(k)[:16] for k in arms.vote_keys(replies)],
        }
        rows.append(row | dict.fromkeys(_ESTIMATORS, NAN) | estimator.certainties(row, seed))
    return rows


def examples(run: Run, queries: Sequence[Query], stages: Remembered) -> list[dict[str, Any]]:
    """Rows of `examples`: one per synthetic example, without a word of it."""
    writers: list[Who] = ["self", "teacher"] if run.profile.teacher else ["self"]
    rows = []
    for writer in writers:
        written = stages.under(filters=()).synthesize(queries, writer)
        for i, done in written.items():
            for index, example in enumerate(done.value.examples if done.value else ()):
                rows.append(
                    {
                        "variant": run.variant,
                        "benchmark": stages.benchmark,
                        "sample": i,
                        "seed": stages.method.seed,
                        "writer": "self" if writer == "self" else run.profile.teacher_name,
                        "index": index,
                        "attempt": example.attempt,
                        "copy_ratio": example.copy_ratio,
                        "schema_errors": len(example.schema_errors),
                        "tool": _digest(example.calls[0].name)[:12] if example.calls else "",
                        "n_calls": len(example.calls),
                        "question_sha256": _digest(example.question),
                    }
                )
    return rows


def sample_row(sample: Sample, original: Sample, seed: int) -> dict[str, Any]:
    """One row of `samples`. original: the sample with its tools in upstream's order."""
    gold = sample.gold[0].name if sample.gold else ""

    def place(of: Sample) -> float:
        return float(next((i for i, t in enumerate(of.tools) if t.name == gold), NAN))

    return {
        "benchmark": sample.benchmark,
        "sample": sample.id,
        "cluster": sample.cluster,
        "seed": seed,
        "n_tools": len(sample.tools),
        "n_turns": len(sample.messages),
        "n_calls": len(sample.gold),
        "flags": ",".join(sorted(sample.flags)),
        "gold_at": place(sample),
        "gold_at_original": place(original),
        "in_pool": gold in _pool_tools(sample.benchmark),
    }


@cache
def _pool_tools(benchmark: str) -> frozenset[str]:
    """Names of the tools that a benchmark's training pool calls."""
    if benchmark not in pools.IN_DOMAIN:
        return frozenset()
    try:
        return frozenset(g.name for s in benchmarks.load(pools.IN_DOMAIN[benchmark]) for g in s.gold)
    except sources.Unavailable:
        return frozenset()


def hidden(text: str) -> str:
    """What stands in a text's place in an exported run."""
    return f"sha256:{sha256(text)}"


def redaction(text: str) -> str:
    """The SHA-256 that stands in a text's place in an exported run; "" for any other text."""
    mark = "sha256:"
    return text[len(mark) :] if text.startswith(mark) and len(text) == len(mark) + 64 else ""


def _digest(text: str) -> str:
    """A text's SHA-256, also of one that stands there as such."""
    return redaction(text) or sha256(text)


def outcomes_frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """The rows as a frame with these columns, in this order, whether there are any or none."""
    return pd.DataFrame([dict(r) for r in rows], columns=list(columns))


def embeddings_frame(vectors: Sequence[tuple[dict[str, Any], np.ndarray]]) -> pd.DataFrame:
    """One row per question: its first principal components (float16) among all the questions given.

    The components are those of the centred hidden states, by singular value decomposition; each one's sign
    is set so that its largest weight is positive, so that the same vectors always give the same frame.
    """
    keys = ["variant", "benchmark", "sample", "seed", "kind", "index"]
    if not vectors:
        return pd.DataFrame(columns=[*keys, *(f"pc{i}" for i in range(COMPONENTS))])
    matrix = np.stack([v for _, v in vectors]).astype(np.float64)
    left, scale, right = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    scores = (left * scale * signs)[:, :COMPONENTS].astype(np.float16)
    frame = pd.DataFrame([k for k, _ in vectors], columns=keys)
    return frame.join(pd.DataFrame(scores, columns=[f"pc{i}" for i in range(scores.shape[1])]))


def known(outcome: Outcome) -> bool:
    """Whether anything was computed for it; a failure of the machine is something."""
    return outcome.error != NOT_RUN
