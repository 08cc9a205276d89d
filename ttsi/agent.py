"""Algorithm 1 for one live query: an agent that improves itself on the question it is asked, then forgets it.

    agent = Agent("path/to/a/model", tools)
    answer = agent.call("Remind me to water the plants at 7 pm")

The study answers samples in batches and keeps every stage in a store; this module runs the same algorithm on
one question at a time and keeps nothing but the loaded model.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

from ttsi import estimator
from ttsi.algorithm import own_examples, self_improve
from ttsi.calls import parse_calls
from ttsi.conversations import read_messages
from ttsi.declared import schema_errors
from ttsi.engines.base import Engine, EngineError
from ttsi.schemas import BadField, read_tool
from ttsi.stages import Done, Lesson, Method, Replies, Stages, Trained, Who
from ttsi.strict_json import require_plain
from ttsi.types import (
    PAPER_SAMPLING,
    Call,
    Example,
    Fit,
    Generation,
    Layout,
    LoraSettings,
    Message,
    Query,
    Sampling,
    Scored,
    Synthesis,
    Tool,
    Uncertainty,
)

if TYPE_CHECKING:
    from ttsi.engines.lora import Adapter
    from ttsi.engines.torch import TorchEngine

T = TypeVar("T")
Stage = Literal["h", "g", "t", "answer", "base"]
Turn = Message | Mapping[str, Any]

_LOCKS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What the model called, and how it came to that.

    calls: the calls of the reply, unchecked; `problems` says what is wrong with them, and is empty for calls
    to known tools with arguments of the declared kind. No calls: `error` is `no_call` (plain text, which may
    be an answer) or `bad_json`.
    margin: in [0, 1], higher = more certain. log_probs: nats by tool, in the order given.
    uncertain: margin < tau. adapted: the reply is that of the adapted model; an uncertain query whose
    synthesis failed, or whose training diverged, is answered by the model as it is.
    failures: codes of the syntheses that could not be read. losses: nats per label token, one per step.
    seconds: what each stage took, "h", "g", "t" and "answer"; a stage that did not run took 0.
    """

    calls: tuple[Call, ...]
    text: str
    error: Literal["", "no_call", "bad_json"]
    problems: tuple[str, ...]
    finished: bool
    margin: float
    log_probs: Mapping[str, float]
    tau: float
    uncertain: bool
    adapted: bool
    diverged: bool
    examples: tuple[Example, ...]
    failures: tuple[str, ...]
    losses: tuple[float, ...]
    seconds: Mapping[str, float]


class Agent:
    """A tool-calling model that adapts itself to the questions it is unsure about.

    model: the path of a ChatML model folder, or a loaded `TorchEngine`.
    tools: JSON Schema as OpenAI's function format has it (`{"type": "function", "function": {…}}`), or the
    inner part alone, or flat parameters; a `Tool` does too.
    tau: 0 never adapts; above 1, always. k: synthetic examples per question. writer: an engine that writes
    them instead of the model itself (TT-D), e.g. an `OpenAIEngine`.
    required: the reply begins as a call does, as a chat API has it with `tool_choice="required"`; else it may
    be words. layout: how the question is put, see `prompts`.
    answering, writing: decoding of answers (greedy) and of syntheses (the paper's).
    The same question, tools and seed give the same answer.

    Safe for several threads: calls on one model take turns, also those of several agents that share it, as
    every call uses all cores. The base weights are never changed; an adapter lives as long as its call.
    Raises ValueError for tools or messages that can't be read and for a folder that isn't there, and
    EngineError where the machine fails: never a wrong answer in place of a failure.
    """

    def __init__(
        self,
        model: str | Path | TorchEngine,
        tools: Sequence[Any],
        *,
        tau: float = 0.95,
        mode: Literal["exact", "activated"] = "activated",
        k: int = 1,
        retries: int = 5,
        lora: LoraSettings | None = None,
        answering: Sampling | None = None,
        writing: Sampling = PAPER_SAMPLING,
        writer: Engine | None = None,
        required: bool = False,
        layout: Layout = "native",
        seed: int = 0,
        dtype: str = "auto",
    ) -> None:
        self.method = Method(
            tau=tau,
            k=k,
            retries=retries,
            lora=replace(lora or LoraSettings(), mode=mode),
            answering=replace(answering or Sampling(), n=1),
            writing=replace(writing, n=1),
            layout=layout,
            answer_opening=required,
            seed=seed,
        )
        self.tools = [_tool(t) for t in tools]
        self._query("…")  # tools that can't be read are refused before a model is loaded
        self.engine = _load(model, dtype) if isinstance(model, str | Path) else model
        self.writer = writer or self.engine
        with _LOCKS_LOCK:
            self.lock = _LOCKS.setdefault(self.engine, threading.Lock())

    def call(self, messages: str | Sequence[Turn], *, tau: float | None = None) -> Answer:
        """The answer to a question or a conversation, by Algorithm 1. Paper: section 3.

        messages: text, or turns with role and content as OpenAI has them; past `tool_calls` are read.
        """
        return self.open(messages).answer(tau)

    def open(self, messages: str | Sequence[Turn]) -> Live:
        """The question's stages, nothing of them computed yet."""
        return Live(self, self._query(messages))

    def _query(self, messages: str | Sequence[Turn]) -> Query:
        turns = messages if isinstance(messages, str) else [_turn(m) for m in messages]
        record = {"query": turns, "tools": self.tools, "answers": []}
        try:
            require_plain(record)
            tools = tuple(read_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools))
            read = tuple(read_messages(turns, "messages"))
        except BadField as error:
            raise ValueError(f"{error.args[0]} {error.args[1]}") from error
        if not any(message.role == "user" for message in read):
            raise ValueError("the messages have nothing said by the user")
        if not tools or len({tool.name for tool in tools}) < len(tools):
            raise ValueError("an agent needs tools, each with a name of its own")
        name = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
        return Query(f"live-{name}", "live", read, tools)


class _Once(Stages):
    """One question's stages: each is computed once, by one thread at a time on one model, and then kept.

    seconds: what each stage that has run took, less the wait for its turn.
    """

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent.engine, agent.method, agent.writer)
        self.seconds: dict[Stage, float] = {}
        self._lock = agent.lock
        self._kept: dict[Stage, Any] = {}

    def answer(self, queries: Sequence[Query], who: Who = "self", block: int = 0) -> dict[str, Done[Replies]]:
        return self._once("base", queries, super().answer, who, block)

    def scored(
        self, queries: Sequence[Query], form: estimator.Candidate = "name"
    ) -> dict[str, Done[tuple[Scored, ...]]]:
        return self._once("h", queries, super().scored, form)

    def synthesize(
        self, queries: Sequence[Query], who: Who = "self", first: int = 0, k: int | None = None
    ) -> dict[str, Done[Synthesis]]:
        return self._once("g", queries, super().synthesize, who, first, k)

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

    def _once(self, name: Stage, queries: Sequence[Query], compute: Any, *args: Any) -> Any:
        if queries and name not in self._kept:
            alone = name != "g" or self.engine("teacher") is self.engine()
            with self._lock if alone else nullcontext():
                self._kept[name] = compute(queries, *args)
            self.seconds[name] = self._kept[name][queries[0].id].seconds
        return self._kept[name] if queries else {}


class Live:
    """One question, whose stages are computed when they are first needed and then kept.

    So τ can be moved, and answers before and after compared, without computing anything twice. It belongs to
    one thread; the agent that opened it may be shared.
    """

    def __init__(self, agent: Agent, query: Query) -> None:
        self.agent, self.query = agent, query
        self._stages = _Once(agent)
        self.seconds = self._stages.seconds
        """What each stage that has run took; "base" is the answer of the model as it is."""

    @property
    def certainty(self) -> Uncertainty:
        """H: the margin over the tools, and their log-probabilities (nats)."""
        return self._value(self._stages.score([self.query]))

    @property
    def synthesis(self) -> Synthesis:
        """G: the examples that the model (or the teacher) writes of the question and the tools."""
        return self._value(_written(self._stages, [self.query]).written)

    @property
    def trained(self) -> tuple[Adapter, Fit] | None:
        """T: an adapter trained on the examples; None if there are none or training diverged."""
        if not (lessons := _written(self._stages, [self.query]).by_id):
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
        if not (lessons := _written(self._stages, [self.query]).by_id):
            return None
        return next(iter(self._value(self._stages.adapt([self.query], lessons)).replies), None)

    def answer(self, tau: float | None = None) -> Answer:
        """Algorithm 1 at a threshold (the agent's own by default), from the stages that it needs."""
        tau = self.agent.method.tau if tau is None else tau
        done = self_improve(self._stages.under(tau=tau), [self.query], source=_written)[0]
        reply, written = done.replies[0], done.synthesis or Synthesis(())
        parsed = parse_calls(reply.text)
        problems = [f"{c.name}: {e}" for c in parsed.calls for e in schema_errors(c, self.query.tools)]
        return Answer(
            calls=parsed.calls,
            text=reply.text,
            error=parsed.error or "",
            problems=tuple(problems),
            finished=reply.finished,
            margin=self.certainty.margin,
            log_probs=dict(zip((t.name for t in self.query.tools), self.certainty.log_probs, strict=True)),
            tau=tau,
            uncertain=done.uncertain,
            adapted=done.adapted,
            diverged=done.diverged,
            examples=written.examples,
            failures=written.failures,
            losses=done.fit.losses if done.fit else (),
            seconds=done.seconds,
        )

    def _value(self, found: Mapping[str, Done[T]]) -> T:
        done = found[self.query.id]
        if done.value is None:
            raise EngineError(done.error)
        return done.value


_written = partial(own_examples, who="teacher")
"""G's source: an agent's teacher is its writer, which may be the model itself."""


def _load(model: str | Path, dtype: str) -> TorchEngine:
    from ttsi.engines.torch import TorchEngine

    if not Path(model).is_dir():
        raise ValueError(
            f"{model} is no model folder; study.data.models.model_dir fetches those it knows by name"
        )
    return TorchEngine(Path(model), name=str(model), dtype=dtype)


def _tool(given: Any) -> Any:
    if isinstance(given, Tool):
        return {"name": given.name, "description": given.description, "parameters": dict(given.parameters)}
    return given


def _turn(given: Turn) -> dict[str, Any]:
    return {"role": given.role, "content": given.content} if isinstance(given, Message) else dict(given)


__all__ = ["Agent", "Answer", "Live"]
