"""Algorithm 1 and its rivals. Each arm is a few lines over the same stages, so that arms stay paired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from ttsi.calls import canonical, parse_calls
from ttsi.types import Fit, Generation, Query, Synthesis, Uncertainty

T = TypeVar("T")
Mode = Literal["exact", "activated"]


@dataclass(frozen=True)
class Done(Generic[T]):
    """A stage's result for one sample, or the machine's failure to give one (`value` None, `error` says why).

    seconds: this sample's share of the batch it was computed in. source: "computed" or "loaded".
    """

    value: T | None
    error: str = ""
    seconds: float = 0.0
    source: str = "computed"


@dataclass(frozen=True)
class Adapted:
    """T and the answer that follows it. No replies: training diverged, and the base model answers."""

    fit: Fit | None
    replies: tuple[Generation, ...]
    seconds_t: float
    seconds_answer: float


class Stages(Protocol):
    """What an arm is made of; results by query id. The study's stages remember, so nothing runs twice."""

    def answer(self, queries: Sequence[Query]) -> Mapping[str, Done[tuple[Generation, ...]]]: ...

    def score(self, queries: Sequence[Query]) -> Mapping[str, Done[Uncertainty]]: ...

    def synthesize(self, queries: Sequence[Query]) -> Mapping[str, Done[Synthesis]]: ...

    def adapt(
        self, queries: Sequence[Query], examples: Mapping[str, Synthesis], mode: Mode
    ) -> Mapping[str, Done[Adapted]]: ...


@dataclass(frozen=True)
class Outcome:
    """What an arm did for one query and what it replied. `error`: the machine failed; there is no answer."""

    id: str
    replies: tuple[Generation, ...] = ()
    error: str = ""
    margin: float | None = None
    uncertain: bool = False
    adapted: bool = False
    diverged: bool = False
    synthesis: Synthesis | None = None
    fit: Fit | None = None
    source: str = "computed"
    tokens_h: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What an arm may vary: the threshold on the margin and the training mode."""

    tau: float = 0.95
    mode: Mode = "exact"


def base(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """The model as it is."""
    answers = stages.answer(queries)
    return [_answered(q, answers[q.id]) for q in queries]


def tt_si(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """Algorithm 1: adapt to the questions the model is unsure about, answer the rest as it is."""
    answers = stages.answer(queries)
    certainty = stages.score(queries)  # H
    uncertain = [q for q in queries if (u := certainty[q.id].value) and u.margin < setting.tau]
    written = stages.synthesize(uncertain)  # G
    examples = {i: d.value for i, d in written.items() if d.value and not d.value.failed}
    adapted = stages.adapt([q for q in uncertain if q.id in examples], examples, setting.mode)  # T

    return [
        _adapted(q, answers[q.id], certainty[q.id], written.get(q.id), adapted.get(q.id)) for q in queries
    ]


ARMS: dict[str, Callable[[Stages, Sequence[Query], Setting], list[Outcome]]] = {"base": base, "tt_si": tt_si}
ADAPTING = frozenset({"tt_si"})


def majority(replies: Sequence[Generation]) -> Generation:
    """The reply whose calls are the most frequent, the first of them on a tie.

    Replies that can't be parsed vote only if none can: then the first reply stands.
    """
    keys = [None if (p := parse_calls(r.text)).error else canonical(p.calls) for r in replies]
    counts = Counter(k for k in keys if k is not None)
    if not counts:
        return replies[0]
    winner = counts.most_common(1)[0][0]  # insertion order decides a tie: the first seen
    return replies[keys.index(winner)]


def _answered(query: Query, answer: Done[tuple[Generation, ...]]) -> Outcome:
    return Outcome(
        query.id, answer.value or (), answer.error, source=answer.source, seconds={"answer": answer.seconds}
    )


def _adapted(
    query: Query,
    answer: Done[tuple[Generation, ...]],
    certainty: Done[Uncertainty],
    written: Done[Synthesis] | None,
    trained: Done[Adapted] | None,
) -> Outcome:
    """Puts the stages of one sample together; a failure of the machine at any of them is the outcome's."""
    used: list[Done[Any]] = [d for d in (certainty, written, trained) if d is not None]
    done = trained.value if trained else None
    replaced = done is not None and bool(done.replies)
    if not replaced:
        used.append(answer)
    seconds = {"h": certainty.seconds, "g": written.seconds if written else 0.0}
    seconds["t"] = done.seconds_t if done else 0.0
    seconds["answer"] = done.seconds_answer if done and replaced else answer.seconds
    return Outcome(
        query.id,
        done.replies if done and replaced else answer.value or (),
        error=next((d.error for d in used if d.error), ""),
        margin=certainty.value.margin if certainty.value else None,
        tokens_h=certainty.value.tokens if certainty.value else 0,
        uncertain=written is not None,
        adapted=replaced,
        diverged=done is not None and not replaced,
        synthesis=written.value if written else None,
        fit=done.fit if done else None,
        source="loaded" if any(d.source == "loaded" for d in used) else "computed",
        seconds=seconds,
    )
