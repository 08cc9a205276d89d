"""H, G, T and answers for batches of queries over an engine: what Algorithm 1 and its rivals are made of.

`Stages` computes and remembers nothing; whoever wants results kept overrides its methods. A question, its
tools and what models wrote is all that goes in: a `Query` has no way to a label, so none can reach a stage.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Self, TypeVar

from ttsi import estimator, prompts, synthesizer
from ttsi.calls import format_calls, parse_calls
from ttsi.engines.base import EngineError, Prompt, Request
from ttsi.grammar import grammar
from ttsi.method import Method
from ttsi.seeds import seed_for
from ttsi.types import (
    Fit,
    Generation,
    Likelihood,
    Message,
    Query,
    Scored,
    Synthesis,
    Uncertainty,
    Worked,
)

T = TypeVar("T")
U = TypeVar("U")
P = ParamSpec("P")
S = TypeVar("S", bound="Stages")
Who = Literal["self", "teacher"]
Replies = tuple[Generation, ...]


@dataclass(frozen=True)
class Done(Generic[T]):
    """A stage's result for one sample, or the machine's failure to give one (`value` None, `error` says why).

    seconds: this sample's share of the batch it was computed in. source: "computed" or "loaded".
    """

    value: T | None
    error: str = ""
    seconds: float = 0.0
    source: str = "computed"

    def then(self, read: Callable[[T], U]) -> Done[U]:
        """What `read` makes of the value; its ValueError is a failure like the machine's."""
        try:
            return replace(self, value=None if self.value is None else read(self.value))  # type: ignore[arg-type,return-value]
        except ValueError as error:
            return Done(None, str(error), self.seconds, self.source)


@dataclass(frozen=True)
class Trained:
    """T's result: an adapter, and how it was trained. Neither: training diverged."""

    adapter: Any = None
    fit: Fit | None = None


@dataclass(frozen=True)
class Adapted:
    """T and the answer that follows it. No replies: training diverged, and the base model answers."""

    fit: Fit | None
    replies: Replies
    seconds_t: float
    seconds_answer: float


@dataclass(frozen=True)
class Fitted:
    """How one adapter for many questions was trained: its fit (None: diverged), and the file's SHA-256."""

    fit: Fit | None
    seconds: float
    sha256: str = ""


@dataclass(frozen=True)
class Lesson:
    """Worked examples to learn from, `count` of them. `name` stands for them in keys; `read` gives them."""

    read: Callable[[], tuple[Worked, ...]]
    name: Any = None
    count: int = 1


NOT_RUN = "not run"
"""The error of a `Done` that nothing was computed for."""


def stage(
    compute: Callable[Concatenate[S, Sequence[Query], P], Sequence[T]],
) -> Callable[Concatenate[S, Sequence[Query], P], dict[str, Done[T]]]:
    """A computation on a batch as a stage: results by query id, each with its share of the seconds."""

    def timed(self: S, queries: Sequence[Query], /, *args: P.args, **kwargs: P.kwargs) -> dict[str, Done[T]]:
        began = time.perf_counter()
        values = compute(self, queries, *args, **kwargs) if queries else []
        share = (time.perf_counter() - began) / max(1, len(queries))
        return {q.id: Done(v, seconds=share) for q, v in zip(queries, values, strict=True)}

    timed.__doc__ = compute.__doc__
    return timed


class Stages:
    """H, G, T and answers for batches of queries; results by query id, nothing remembered.

    engine: the model; teacher: who writes the examples of TT-D. Raises EngineError where the machine fails.
    """

    def __init__(self, engine: Any, method: Method | None = None, teacher: Any = None) -> None:
        self._engines = {"self": engine, "teacher": teacher or engine}
        self.method = method or Method()

    def engine(self, who: Who = "self") -> Any:
        """Who answers."""
        return self._engines[who]

    def under(self, **changes: Any) -> Self:
        """The same stages, with what they remember, under other settings of the method."""
        other = copy.copy(self)
        other.method = replace(self.method, **changes)
        return other

    @stage
    def answer(self, queries: Sequence[Query], who: Who = "self", block: int = 0) -> list[Replies]:
        """Replies of the model as it is; block i + 1 goes on where block i of sampled replies ends."""
        requests = [self._request(self._act(q), q, attempt=block) for q in queries]
        return [tuple(r) for r in self.engine(who).generate(requests, self.method.answering)]

    @stage
    def scored(
        self, queries: Sequence[Query], form: estimator.Candidate = "name"
    ) -> list[tuple[Scored, ...]]:
        """Token log-probabilities (nats) of each query's tools, in this form of a candidate."""
        m = self.method
        return [tuple(r) for r in estimator.score(self.engine(), queries, form, m.layout, m.instructions)]

    def score(self, queries: Sequence[Query]) -> dict[str, Done[Uncertainty]]:
        """H: how certain the model is of its best tool."""
        m, scored = self.method, self.scored(queries, self.method.candidate)
        read = partial(estimator.uncertainty, form=m.candidate, normalise=m.normalise)
        return {q.id: scored[q.id].then(partial(read, tools=q.tools)) for q in queries}

    def certainty(self, queries: Sequence[Query]) -> Mapping[str, Done[Uncertainty] | Done[Likelihood]]:
        """H by the method's estimator. The likelihood comes with the base answers, at no cost beside them."""
        if self.method.uncertainty == "margin":
            return self.score(queries)
        answers = self.answer(queries)
        return {
            i: replace(d.then(lambda r: Likelihood(self.likelihood(r[0]))), seconds=0.0)
            for i, d in answers.items()
        }

    def likelihood(self, reply: Generation) -> float:
        """Probability of a reply's calls under the model that gave it, see `estimator.likelihood`."""
        if (opening := self.method.opening) and reply.text.startswith(opening):
            # Its tokens are those that follow on the first name's quote: no need to tell them apart.
            return estimator.likelihood(reply.log_probs if parse_calls(reply.text).calls else ())
        return estimator.likelihood(list(chain(*self.parts(reply).values())))

    def parts(self, reply: Generation) -> dict[estimator.Part, list[float]]:
        """A reply's token log-probabilities (nats) by what they decide, see `estimator.answer_parts`."""
        return estimator.answer_parts(reply, self.chat.ends(reply.text, reply.tokens))

    @property
    def chat(self) -> Any:
        """The model's tokens and their text."""
        return self.engine().chat

    @stage
    def synthesize(
        self, queries: Sequence[Query], who: Who = "self", first: int = 0, k: int | None = None
    ) -> list[Synthesis]:
        """G: K examples per query, from number `first` on."""
        m = self.method
        return synthesizer.synthesize(
            self.engine(who), queries, lambda i, n: seed_for(m.seed, queries[0].benchmark, i, "example", n),
            m.writing, k=k or m.k, first=first, retries=m.retries, validate=m.validate, novelty=m.novelty,
            layout=m.layout, instructions=m.instructions,
        )  # fmt: skip

    def lesson(
        self, query: Query, written: Synthesis, who: Who = "self", indices: Sequence[int] | None = None
    ) -> Lesson:
        """A query's own examples as a lesson; indices: their numbers, where they aren't the first K."""
        return Lesson(partial(worked, query, written), count=len(written.examples))

    @stage
    def probe(self, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> list[Replies]:
        """Replies of the model as it is to the question of each query's lesson."""
        asked = {q.id: lessons[q.id].read()[0].query for q in queries}
        requests = [self._request(self._act(asked[q.id]), q) for q in queries]
        return [tuple(r) for r in self.engine().generate(requests, self.method.answering)]

    @stage
    def show(self, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> list[Replies]:
        """Replies without training, with the first example of each query's lesson in its prompt."""
        return self._ask(queries, {q.id: lessons[q.id].read() for q in queries}, shown=True)

    @stage
    def train(self, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> list[Trained]:
        """T: a fresh adapter per query, trained on its lesson."""
        from ttsi import trainer

        m = self.method
        jobs = [trainer.Job(self.taught(lessons[q.id]), self._seed(q, "adapter")) for q in queries]
        fitted = trainer.fit(self.engine(), jobs, m.lora, bank=m.bank)
        return [Trained(*f) if f else Trained() for f in fitted]

    @stage
    def reply(
        self,
        queries: Sequence[Query],
        adapters: Mapping[str, Any],
        lessons: Mapping[str, Lesson] | None = None,
        shown: bool = False,
    ) -> list[Replies]:
        """Replies of adapted models; `lessons` are guesses at them and, if `shown`, stand in the prompts."""
        return self._ask(queries, {q.id: lessons[q.id].read() for q in queries if lessons}, adapters, shown)

    def adapt(
        self, queries: Sequence[Query], lessons: Mapping[str, Lesson], shown: bool = False
    ) -> dict[str, Done[Adapted]]:
        """T, and what the adapted models reply; with `shown` the example stands in their prompts too."""
        trained = {i: d for i, d in self.train(queries, lessons).items() if d.value}
        adapters = {i: d.value.adapter for i, d in trained.items() if d.value and d.value.fit}
        replies = self.reply([q for q in queries if q.id in adapters], adapters, lessons, shown)
        out = {}
        for i, done in trained.items():
            told = replies.get(i, Done[Replies](()))
            fit = done.value.fit if done.value else None
            adapted = Adapted(fit, finite(told.value or ()), done.seconds, told.seconds)
            out[i] = Done(adapted, seconds=done.seconds + told.seconds)
        return out

    def taught(self, lesson: Lesson) -> tuple[tuple[Prompt, str], ...]:
        """A lesson as prompts with the replies to learn."""
        return tuple((self._act(w.query), self._said(w)) for w in lesson.read())

    def _ask(
        self,
        queries: Sequence[Query],
        lessons: Mapping[str, Sequence[Worked]],
        adapters: Mapping[str, Any] | None = None,
        shown: bool = False,
    ) -> list[Replies]:
        requests = []
        for q in queries:
            example = lessons[q.id][0] if q.id in lessons else None
            prompt = self._with_shot(q, example) if shown and example else self._act(q)
            draft = self.answered(q) or self._draft(example)
            requests.append(self._request(prompt, q, adapters[q.id] if adapters else None, draft))
        return [tuple(r) for r in self.engine().generate(requests, self.method.answering)]

    def _request(
        self, prompt: Prompt, query: Query, adapter: Any = None, draft: tuple[int, ...] = (), attempt: int = 0
    ) -> Request:
        m, seed = self.method, self._seed(query, "answer", attempt)
        if m.constrained and not query.tools:
            raise EngineError(f"{query.id} has no tools to keep to")
        allowed = grammar(query.tools, m.layout) if m.constrained else ""
        return Request(prompt, seed, m.opening, adapter, draft, lookup=True, grammar=allowed)

    def _draft(self, example: Worked | None) -> tuple[int, ...]:
        """The reply just learnt or shown, as a guess at a greedy answer; it costs nothing to have."""
        if example is None or self.method.answering.temperature:
            return ()
        return tuple(self.engine().tokens(self._said(example).removeprefix(self.method.opening)))

    def answered(self, query: Query) -> tuple[int, ...]:
        """The tokens of the base answer, if it is there anyway: the best guess at an adapted one."""
        return ()

    def _act(self, query: Query) -> Prompt:
        return prompts.act(query, self.method.layout, self.method.instructions)

    def _with_shot(self, query: Query, shot: Worked) -> Prompt:
        """The act prompt with a worked example, which is shown with its own tools where they are others."""
        m, said = self.method, self._said(shot)
        tools = () if shot.query.tools == query.tools else shot.query.tools
        return prompts.with_shot(query, shot.query.question, said, tools, m.layout, m.instructions)

    def _said(self, example: Worked) -> str:
        """A worked example's reply in the layout's own form."""
        if self.method.layout == "native":
            return example.reply
        return prompts.write(parse_calls(example.reply).calls, self.method.layout)

    def _seed(self, query: Query, purpose: str, attempt: int = 0) -> int:
        return seed_for(self.method.seed, query.benchmark, query.id, purpose, attempt)


def worked(query: Query, written: Synthesis) -> tuple[Worked, ...]:
    """The examples of a synthesis, each with its calls as the reply, under the query's tools."""
    return tuple(
        Worked(replace(query, messages=(Message("user", e.question),)), format_calls(e.calls))
        for e in written.examples
    )


def source(parts: Iterable[Done[Any]]) -> str:
    """Where something made of several results is from: "loaded" if any of them is."""
    return "loaded" if any(d.source == "loaded" for d in parts) else "computed"


def finite(replies: Replies) -> Replies:
    """The replies, or none if T's last step has spoilt one, which no loss shows: that is divergence too."""
    return replies if all(math.isfinite(x) for r in replies for x in r.log_probs) else ()
