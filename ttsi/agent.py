"""Algorithm 1 for one live query: an agent that improves itself on the question it is asked, then forgets it.

    agent = Agent("path/to/a/model", tools)
    answer = agent.call("Remind me to water the plants at 7 pm")

The study answers samples in batches and keeps every stage in a store; this module asks the same stages
(`estimator`, `synthesizer`, `trainer`) for one question at a time and keeps nothing but the loaded model.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

from ttsi import estimator, prompts, synthesizer
from ttsi.calls import parse_calls
from ttsi.conversations import read_messages
from ttsi.declared import schema_errors
from ttsi.engines.base import Engine, Request
from ttsi.schemas import BadField, read_tool
from ttsi.seeds import seed_for
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
        self.tau, self.k, self.retries, self.seed = tau, k, retries, seed
        self.layout: Layout = layout
        self.opening = prompts.opening(layout) if required else ""
        self.lora = replace(lora or LoraSettings(), mode=mode)
        self.answering, self.writing = replace(answering or Sampling(), n=1), replace(writing, n=1)
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


class Live:
    """One question's stages, each computed when it is first needed and then kept.

    So τ can be moved, and answers before and after compared, without computing anything twice. It belongs to
    one thread; the agent that opened it may be shared.
    """

    def __init__(self, agent: Agent, query: Query) -> None:
        self.agent, self.query = agent, query
        self.seconds: dict[Stage, float] = {}
        """What each stage that has run took; "base" is the answer of the model as it is."""

    @cached_property
    def certainty(self) -> Uncertainty:
        """H: the margin over the tools, and their log-probabilities (nats)."""
        with self._stage("h") as engine:
            return estimator.estimate(engine, self.query, layout=self.agent.layout)

    @cached_property
    def synthesis(self) -> Synthesis:
        """G: the examples that the model (or the teacher) writes of the question and the tools."""
        a = self.agent
        with self._stage("g", a.writer is a.engine):
            return synthesizer.synthesize(
                a.writer,
                [self.query],
                self._attempt_seed,
                a.writing,
                k=a.k,
                retries=a.retries,
                layout=a.layout,
            )[0]

    @cached_property
    def trained(self) -> tuple[Adapter, Fit] | None:
        """T: an adapter trained on the examples; None if there are none or training diverged."""
        if self.synthesis.failed:
            return None
        from ttsi import trainer

        seed, layout = self._seed("adapter"), self.agent.layout
        job = trainer.job(self.query.tools, self.synthesis.examples, seed, layout)
        with self._stage("t") as engine:
            return trainer.fit(engine, [job], self.agent.lora)[0]

    @cached_property
    def before(self) -> Generation:
        """The reply of the model as it is."""
        return self._reply("base")

    @cached_property
    def after(self) -> Generation | None:
        """The reply of the adapted model; None if there is no adapter or it spoils every token."""
        if not self.trained:
            return None
        reply = self._reply("answer", self.trained[0])
        # What the last step spoils no loss shows: that is divergence too, as in the study.
        return reply if all(map(math.isfinite, reply.log_probs)) else None

    def answer(self, tau: float | None = None) -> Answer:
        """Algorithm 1 at a threshold (the agent's own by default), from the stages that it needs."""
        tau = self.agent.tau if tau is None else tau
        uncertain = self.certainty.margin < tau  # H
        adapted = self.after if uncertain else None  # G and T
        reply = adapted or self.before
        written = self.synthesis if uncertain else Synthesis(())
        fit = self.trained[1] if uncertain and self.trained else None
        parsed = parse_calls(reply.text)
        problems = [f"{c.name}: {e}" for c in parsed.calls for e in schema_errors(c, self.query.tools)]
        ran: dict[str, Stage | None] = {"h": "h", "g": None, "t": None, "answer": "base"}
        ran |= {"g": "g", "t": "t"} if uncertain else {}
        ran |= {"answer": "answer"} if adapted else {}
        return Answer(
            calls=parsed.calls,
            text=reply.text,
            error=parsed.error or "",
            problems=tuple(problems),
            finished=reply.finished,
            margin=self.certainty.margin,
            log_probs=dict(zip((t.name for t in self.query.tools), self.certainty.log_probs, strict=True)),
            tau=tau,
            uncertain=uncertain,
            adapted=adapted is not None,
            diverged=uncertain and not written.failed and adapted is None,
            examples=written.examples,
            failures=written.failures,
            losses=fit.losses if fit else (),
            seconds={name: self.seconds.get(stage, 0.0) if stage else 0.0 for name, stage in ran.items()},
        )

    def _reply(self, stage: Stage, adapter: Adapter | None = None) -> Generation:
        # The base answer, where it is there already, is what the adapted one mostly repeats.
        draft = self.before.tokens if adapter and "before" in vars(self) else ()
        seed = self._seed("answer")
        prompt = prompts.act(self.query, self.agent.layout)
        request = Request(prompt, seed, self.agent.opening, adapter, draft=draft, lookup=True)
        with self._stage(stage) as engine:
            return engine.generate([request], self.agent.answering)[0][0]

    def _seed(self, stage: str, attempt: int = 0) -> int:
        return seed_for(self.agent.seed, "live", self.query.id, stage, attempt)

    def _attempt_seed(self, _: str, attempt: int) -> int:
        return self._seed("example", attempt)

    @contextmanager
    def _stage(self, stage: Stage, alone: bool = True) -> Iterator[TorchEngine]:
        """The model, if wanted for this thread alone; notes the time that the block takes, less the wait."""
        with self.agent.lock if alone else nullcontext():
            began = time.perf_counter()
            yield self.agent.engine
            self.seconds[stage] = time.perf_counter() - began


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
