"""Algorithm 1, once, and what its rivals choose otherwise. Paper: section 3.

H   certainty = stages.certainty(queries)
G   lessons = own_examples(stages, uncertain(stages, queries, certainty))
T   by_adapter(stages, taught, lessons); the model as it is answers the rest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ttsi import filters
from ttsi.stages import NOT_RUN, Adapted, Done, Fitted, Lesson, Replies, Stages, Who
from ttsi.stages import source as source_of
from ttsi.types import Fit, Generation, Likelihood, Query, Synthesis, Uncertainty


@dataclass(frozen=True)
class Lessons:
    """By query id what is learnt from, and the syntheses it comes from, those that failed included.

    unknown: not to be had yet, as they depend on other samples that weren't run.
    """

    by_id: Mapping[str, Lesson] = field(default_factory=dict)
    written: Mapping[str, Done[Synthesis]] = field(default_factory=dict)
    unknown: bool = False


@dataclass(frozen=True)
class Taught:
    """What became of lessons: answers of adapted models, or of the model as it is with an example to look at.

    shared: how the adapter was trained that all these answers have in common; pool_n: on how many samples.
    """

    adapted: Mapping[str, Done[Adapted]] = field(default_factory=dict)
    shown: Mapping[str, Done[Replies]] = field(default_factory=dict)
    shared: Fitted | None = None
    pool_n: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What was done for one query and what was replied. `error`: the machine failed; there is no answer.

    shared: how the adapter was trained that this answer shares with others; `pool_n`: on how many samples.
    margin, likelihood: H's, in [0, 1], as far as it was asked. refused: the adapted answer was there, but no
    likelier (`likelihood_adapted`) than the base answer, which stands.
    """

    id: str
    replies: Replies = ()
    error: str = ""
    margin: float | None = None
    likelihood: float | None = None
    likelihood_adapted: float | None = None
    uncertain: bool = False
    adapted: bool = False
    diverged: bool = False
    refused: bool = False
    synthesis: Synthesis | None = None
    fit: Fit | None = None
    shared: Fitted | None = None
    pool_n: int | None = None
    source: str = "computed"
    tokens_h: int = 0
    tokens_other: int = 0  # of the answer that doesn't stand
    seconds: Mapping[str, float] = field(default_factory=dict)


S = TypeVar("S", bound=Stages)
Certainty = Mapping[str, Done[Uncertainty] | Done[Likelihood]]
Whom = Callable[[S, Sequence[Query], Certainty], Sequence[Query]]
Source = Callable[[S, Sequence[Query]], Lessons]
Arrival = Callable[[S, Sequence[Query], Mapping[str, Lesson]], Taught]


def uncertain(stages: Stages, queries: Sequence[Query], certainty: Certainty) -> list[Query]:
    """The queries that the model is less certain of than τ."""
    known = {i: d.value.certainty for i, d in certainty.items() if d.value}
    return [q for q in queries if q.id in known and known[q.id] < stages.method.tau]


def own_examples(stages: Stages, queries: Sequence[Query], who: Who = "self") -> Lessons:
    """Examples that the model (or the teacher) writes of each query and its tools, if they pass filters."""
    if stages.method.filters:
        return Lessons(*filters.passing(stages, queries, who))
    written = stages.synthesize(queries, who)
    usable = {q.id: d.value for q in queries if (d := written[q.id]).value and not d.value.failed}
    return Lessons({q.id: stages.lesson(q, usable[q.id], who) for q in queries if q.id in usable}, written)


def by_adapter(stages: Stages, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> Taught:
    """Each query is answered by an adapter of its own, trained on its lesson."""
    return Taught(stages.adapt(queries, lessons))


def self_improve(
    stages: S,
    queries: Sequence[Query],
    whom: Whom[S] = uncertain,
    source: Source[S] = own_examples,
    arrival: Arrival[S] = by_adapter,
    asks_h: bool = True,
) -> list[Outcome]:
    """Algorithm 1 of the paper, and with other choices its rivals: whom to teach, from what, how it arrives.

    One outcome per query, in their order. What is not taught, has no lesson or whose training diverged is
    answered by the model as it is, and so is what the adapted model is no surer of, where that is asked. A
    failure of the machine at any stage is the outcome's.
    """
    certainty = stages.certainty(queries) if asks_h else {}  # H
    chosen = whom(stages, queries, certainty)
    lessons = source(stages, chosen)  # G
    if lessons.unknown:
        return [Outcome(q.id, error=NOT_RUN) for q in queries]
    taught = arrival(stages, [q for q in chosen if q.id in lessons.by_id], lessons.by_id)  # T
    replaced = {i for i, d in taught.adapted.items() if d.value and d.value.replies} | taught.shown.keys()
    surer = stages.method.answer_with == "surer"
    answers = {**stages.answer([q for q in queries if surer or q.id not in replaced]), **taught.shown}
    return [
        outcome(
            q.id,
            stages.method.tau,
            answers.get(q.id),
            certainty.get(q.id),
            lessons.written.get(q.id),
            taught.adapted.get(q.id),
            taught,
            stages.likelihood if surer else None,
            stages.method.surer_by,
        )
        for q in queries
    ]


def outcome(
    name: str,
    tau: float,
    answer: Done[Replies] | None,
    certainty: Done[Uncertainty] | Done[Likelihood] | None = None,
    written: Done[Synthesis] | None = None,
    trained: Done[Adapted] | None = None,
    taught: Taught | None = None,
    likely: Callable[[Generation], float] | None = None,
    by: float = 1.0,
) -> Outcome:
    """The stages of one query as its outcome; without an `answer` the adapted model's stands.

    likely: how likely a reply is to the model that gave it. The adapted answer then stands if it is more than
    `by` times as likely as the other.
    """
    used: list[Done[Any]] = [d for d in (certainty, written, trained, answer) if d is not None]
    adapted = trained.value if trained else None
    known = certainty.value if certainty else None
    before = answer.value if answer else None
    after = adapted.replies if adapted else ()
    was = (
        known.likelihood
        if isinstance(known, Likelihood)
        else likely(before[0])
        if likely and before
        else None
    )
    now = likely(after[0]) if likely and after else None
    stands = bool(after) and (answer is None or (was is not None and now is not None and now > by * was))
    return Outcome(
        name,
        (after if stands else before) or (),
        error=next((d.error for d in used if d.error), ""),
        margin=known.margin if isinstance(known, Uncertainty) else None,
        likelihood=was,
        likelihood_adapted=now,
        tokens_h=known.tokens if known else 0,
        tokens_other=sum(len(r.tokens) for r in (before or () if stands else after)),
        uncertain=known is not None and known.certainty < tau,
        adapted=stands,
        diverged=adapted is not None and not after,
        refused=bool(after) and not stands,
        synthesis=written.value if written else None,
        fit=adapted.fit if adapted else None,
        shared=taught.shared if taught else None,
        pool_n=taught.pool_n if taught else None,
        source=source_of(used),
        seconds={
            "h": certainty.seconds if certainty else 0.0,
            "g": written.seconds if written else 0.0,
            "t": adapted.seconds_t if adapted else 0.0,
            "answer": (answer.seconds if answer else 0.0) + (adapted.seconds_answer if adapted else 0.0),
        },
    )
