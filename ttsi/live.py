"""One live question: its stages, each computed once when first needed, and the answer they come to."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

from ttsi import estimator
from ttsi.algorithm import Lessons, Outcome, outcome, own_examples, self_improve
from ttsi.calls import parse_calls
from ttsi.declared import schema_errors
from ttsi.engines.base import EngineError
from ttsi.filters import REJECTED
from ttsi.method import Method
from ttsi.stages import Done, Lesson, Replies, Stages, Trained, Who
from ttsi.types import Call, Example, Fit, Generation, Query, Scored, Synthesis, Uncertainty

if TYPE_CHECKING:
    from ttsi.engines.lora import Adapter

T = TypeVar("T")
Stage = Literal["h", "g", "t", "answer", "base"]
_LOCKS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def turn(engine: Any) -> AbstractContextManager[Any]:
    """One's turn on an engine: every call uses all cores, and an applied adapter is all rows'.

    An engine that several may ask at once says so by `concurrent`.
    """
    if getattr(engine, "concurrent", False):
        return nullcontext()
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(engine, threading.Lock())


@dataclass(frozen=True)
class Answer:
    """What the model called, and how it came to that.

    calls: the calls of the reply, unchecked; `problems` says what is wrong with them, and is empty for calls
    to known tools with arguments of the declared kind. No calls: `error` is `no_call` (plain text, which may
    be an answer) or `bad_json`.
    why: how it came to be the answer, in a sentence.
    margin, likelihood: H's, in [0, 1], higher = more certain; None where H was asked for the other.
    likelihood_adapted: that of the adapted answer, which is compared with the base answer's.
    log_probs: nats by tool, in the order given; empty where H read the answer.
    uncertain: H's is < tau. adapted: the reply is that of the adapted model. An uncertain query whose
    synthesis failed, whose training diverged (`diverged`), or whose adapted answer was no likelier
    (`refused`) is answered by the model as it is.
    failures: codes of the syntheses that could not be read. losses: nats per label token, one per step.
    seconds: what each stage took, "h", "g", "t" and "answer" (of both models, where both answered); a stage
    that did not run took 0.
    """

    calls: tuple[Call, ...]
    text: str
    error: Literal["", "no_call", "bad_json"]
    problems: tuple[str, ...]
    finished: bool
    why: str
    margin: float | None
    likelihood: float | None
    likelihood_adapted: float | None
    log_probs: Mapping[str, float]
    tau: float
    uncertain: bool
    adapted: bool
    diverged: bool
    refused: bool
    examples: tuple[Example, ...]
    failures: tuple[str, ...]
    losses: tuple[float, ...]
    seconds: Mapping[str, float]


class _Once(Stages):
    """One question's stages: each is computed once, by one thread at a time on one model, and then kept.

    seconds: what each stage that has run took, less the wait for its turn.
    """

    def __init__(self, engine: Any, method: Method, writer: Any) -> None:
        super().__init__(engine, method, writer)
        self.seconds: dict[Stage, float] = {}
        self._kept: dict[tuple[Any, ...], Any] = {}

    def answer(self, queries: Sequence[Query], who: Who = "self", block: int = 0) -> dict[str, Done[Replies]]:
        return self._once("base", queries, super().answer, who, block)

    def scored(
        self, queries: Sequence[Query], form: estimator.Candidate = "name"
    ) -> dict[str, Done[tuple[Scored, ...]]]:
        return self._once("h", queries, super().scored, form)

    def synthesize(
        self, queries: Sequence[Query], who: Who = "self", first: int = 0, k: int | None = None
    ) -> dict[str, Done[Synthesis]]:
        return self._once("g", queries, super().synthesize, who, first, k, key=(first, k), who=who)

    def probe(self, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> dict[str, Done[Replies]]:
        asked = tuple(lessons[q.id].read()[0].query.question for q in queries)
        return self._once("g", queries, super().probe, lessons, key=(asked, self.method.answering))

    def train(self, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> dict[str, Done[Trained]]:
        return self._once("t", queries, super().train, lessons)

    def reply(
        self,
        queries: Sequence[Query],
        adapters: Mapping[str, Any],
        lessons: Mapping[str, Lesson] | None = None,
        shown: bool = False,
    ) -> dict[str, Done[Replies]]:
        return self._once("answer", queries, super().reply, adapters, lessons, shown)

    def answered(self, query: Query) -> tuple[int, ...]:
        known = self._kept.get(("base",))
        if known is None or self.method.answering.temperature:
            return ()
        return tuple(known[query.id].value[0].tokens)

    def _once(
        self,
        name: Stage,
        queries: Sequence[Query],
        compute: Any,
        *args: Any,
        key: tuple[Any, ...] = (),
        who: Who = "self",
    ) -> Any:
        if queries and (name, *key) not in self._kept:
            with turn(self.engine(who)):
                done = self._kept[name, *key] = compute(queries, *args)
            self.seconds[name] = self.seconds.get(name, 0.0) + done[queries[0].id].seconds
        return self._kept[name, *key] if queries else {}


class Live:
    """One question, whose stages are computed when they are first needed and then kept.

    So τ can be moved, and answers before and after compared, without computing anything twice. It belongs to
    one thread; the agent that opened it may be shared.
    """

    def __init__(self, engine: Any, method: Method, query: Query, writer: Any) -> None:
        self.method, self.query = method, query
        self._stages = _Once(engine, method, writer)
        self._found = Lessons()
        self.seconds = self._stages.seconds
        """What each stage that has run took; "base" is the answer of the model as it is."""

    @property
    def certainty(self) -> Uncertainty:
        """The paper's H: the margin over the tools, and their log-probabilities (nats)."""
        return self._value(self._stages.score([self.query]))

    @property
    def synthesis(self) -> Synthesis:
        """G: the examples that the model (or the teacher) writes of the question and the tools."""
        return self._value(self._written(self._stages, [self.query]).written)

    @property
    def trained(self) -> tuple[Adapter, Fit] | None:
        """T: an adapter trained on the examples; None if there are none or training diverged."""
        if not (lessons := self._written(self._stages, [self.query]).by_id):
            return None
        done = self._value(self._stages.train([self.query], lessons))
        return (done.adapter, done.fit) if done.fit else None

    @property
    def before(self) -> Generation:
        """The reply of the model as it is."""
        return self._value(self._stages.answer([self.query]))[0]

    @property
    def after(self) -> Generation | None:
        """The reply of the adapted model; None if there is no adapter or it spoils every token."""
        if not (lessons := self._written(self._stages, [self.query]).by_id):
            return None
        return next(iter(self._value(self._stages.adapt([self.query], lessons)).replies), None)

    def answer(self, tau: float | None = None) -> Answer:
        """Algorithm 1 at a threshold (the agent's own by default), from the stages that it needs."""
        stages = self._stages if tau is None else self._stages.under(tau=tau)
        failed = ""
        try:
            done = self_improve(stages, [self.query], source=self._written)[0]
        except EngineError as error:
            if "base" not in self.seconds:
                raise
            failed, done = f"{type(error).__name__}: {error}", self._as_it_is(stages)
        if done.error:
            raise EngineError(done.error)
        scored = done.margin is not None
        reply, written = done.replies[0], done.synthesis or Synthesis(())
        parsed = parse_calls(reply.text)
        problems = [f"{c.name}: {e}" for c in parsed.calls for e in schema_errors(c, self.query.tools)]
        return Answer(
            calls=parsed.calls,
            text=reply.text,
            error=parsed.error or "",
            problems=tuple(problems),
            finished=reply.finished,
            why=_why(done, failed),
            margin=done.margin,
            likelihood=done.likelihood,
            likelihood_adapted=done.likelihood_adapted,
            log_probs=dict(zip((t.name for t in self.query.tools), self.certainty.log_probs, strict=True))
            if scored
            else {},
            tau=stages.method.tau,
            uncertain=done.uncertain,
            adapted=done.adapted,
            diverged=done.diverged,
            refused=done.refused,
            examples=written.examples,
            failures=written.failures,
            losses=done.fit.losses if done.fit else (),
            seconds=done.seconds,
        )

    def _as_it_is(self, stages: Stages) -> Outcome:
        """The base answer where adapting failed: it is there, and as good as it was."""
        one, name = [self.query], self.query.id
        written = self._found.written.get(name)  # not asked for again: it may be what failed
        done = outcome(
            name, stages.method.tau, stages.answer(one)[name], stages.certainty(one)[name], written
        )
        spent = {stage: self.seconds.get(stage, 0.0) for stage in ("g", "t")}
        return replace(done, seconds={**done.seconds, **spent})

    def _written(self, stages: Stages, queries: Sequence[Query]) -> Lessons:
        """G's source: an agent's teacher is its writer, which may be the model itself."""
        self._found = own_examples(stages, queries, who="teacher")
        return self._found

    def _value(self, found: Mapping[str, Done[T]]) -> T:
        done = found[self.query.id]
        if done.value is None:
            raise EngineError(done.error)
        return done.value


def _why(done: Outcome, failed: str) -> str:
    """How an outcome came about, in a sentence."""
    if not done.uncertain:
        return "certain"
    if done.adapted:
        return "adapted"
    if failed:
        reason = f"the machine failed to adapt: {failed}"
    elif done.refused:
        likelier = (done.likelihood_adapted or 0) > (done.likelihood or 0)
        reason = f"the adapted answer is {'too little' if likelier else 'no'} likelier"
    elif done.diverged:
        reason = "training diverged"
    elif done.synthesis and set(done.synthesis.failures) & {*REJECTED.values()}:
        reason = "no example passed the filters"
    else:
        reason = "no example could be written"
    return f"kept the base answer because {reason}"
