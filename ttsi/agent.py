"""Algorithm 1 for one live query: an agent that improves itself on the question it is asked, then forgets it.

    agent = Agent("path/to/a/model", tools)
    answer = agent.call("Remind me to water the plants at 7 pm")

The study answers samples in batches and keeps every stage in a store; this module runs the same algorithm on
one question at a time and keeps nothing but the loaded model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ttsi.conversations import read_messages
from ttsi.engines.base import Engine
from ttsi.live import Answer, Live
from ttsi.method import THRESHOLDS, Filter, Method, Uncertain
from ttsi.schemas import BadField, read_tool
from ttsi.strict_json import require_plain
from ttsi.types import PAPER_SAMPLING, Layout, LoraSettings, Message, Query, Sampling, Tool, TrainingMode

if TYPE_CHECKING:
    from ttsi.engines.torch import TorchEngine

Turn = Message | Mapping[str, Any]


class Agent:
    """A tool-calling model that adapts itself to the questions it is unsure about.

    model: the path of a folder of a model with a chat template, or a loaded `TorchEngine`.
    tools: JSON Schema as OpenAI's function format has it (`{"type": "function", "function": {…}}`), or the
    inner part alone, or flat parameters; a `Tool` does too.
    uncertainty: H. "likelihood": of the base answer as a whole; a certain question then costs its answer and
    nothing more. "margin": the paper's, over the tools. answer_with: "surer" lets the adapted answer stand
    only if the adapted model finds it likelier, by more than the factor `surer_by`, than the base model found
    its own; "adapted", as the paper does, always. See docs/method.md.
    tau: 0 never adapts; above 1, always; by default ½ for the likelihood, .95 for the margin.
    k: synthetic examples per question. filters: what each must pass to be learnt from, see `filters`; () as
    in the paper and in every hypothesis that was tested (docs/hypotheses.md). writer: an engine that writes
    them instead of the model itself (TT-D), e.g. an `OpenAIEngine`.
    required: the reply begins as a call does, as a chat API has it with `tool_choice="required"`; else it may
    be words. constrained: it is calls that keep to the grammar of the tools, see `grammar`. layout: how the
    question is put, see `prompts`. instructions: words of your own, the last of the system turn.
    mode: what T trains, whatever the mode of `lora` is.
    answering, writing: decoding of answers (greedy) and of syntheses (the paper's).
    The same question, tools and seed give the same answer.

    Safe for several threads: calls on one model take turns, also those of several agents that share it, as
    every call uses all cores. The base weights are never changed; an adapter lives as long as its call.
    Raises ValueError for tools or messages that can't be read and for a folder that isn't there, and
    EngineError where the machine fails: never a wrong answer in place of a failure. Where the base answer is
    there already, as it is with `likelihood`, a failure to adapt leaves it standing, and `why` says so.
    """

    def __init__(
        self,
        model: str | Path | TorchEngine,
        tools: Sequence[Any],
        *,
        uncertainty: Uncertain = "likelihood",
        answer_with: Literal["adapted", "surer"] = "surer",
        surer_by: float = 1.0,
        tau: float | None = None,
        mode: TrainingMode = "activated",
        k: int = 1,
        retries: int = 5,
        lora: LoraSettings | None = None,
        answering: Sampling | None = None,
        writing: Sampling = PAPER_SAMPLING,
        filters: Sequence[Filter] = ("valid", "novel", "agreeing"),
        writer: Engine | None = None,
        required: bool = False,
        constrained: bool = False,
        layout: Layout = "native",
        instructions: str = "",
        seed: int = 0,
        dtype: str = "auto",
    ) -> None:
        self.method = Method(
            uncertainty=uncertainty,
            answer_with=answer_with,
            surer_by=surer_by,
            tau=THRESHOLDS.get(uncertainty, 0.5) if tau is None else tau,
            k=k,
            retries=retries,
            lora=replace(lora or LoraSettings(), mode=mode),
            answering=replace(answering or Sampling(), n=1),
            writing=replace(writing, n=1),
            filters=tuple(filters),
            layout=layout,
            instructions=instructions,
            answer_opening=required,
            constrained=constrained,
            seed=seed,
        )
        self.tools = [_tool(t) for t in tools]
        self._query("…")  # tools that can't be read are refused before a model is loaded
        self.engine = _load(model, dtype) if isinstance(model, str | Path) else model
        self.writer = writer or self.engine
        if check := getattr(self.engine, "check_mode", None):
            check(self.method.lora.mode)

    def call(self, messages: str | Sequence[Turn], *, tau: float | None = None) -> Answer:
        """The answer to a question or a conversation, by Algorithm 1. Paper: section 3.

        messages: text, or turns with role and content as OpenAI has them; past `tool_calls` are read.
        """
        return self.open(messages).answer(tau)

    def open(self, messages: str | Sequence[Turn]) -> Live:
        """The question's stages, nothing of them computed yet."""
        return Live(self.engine, self.method, self._query(messages), self.writer)

    def _query(self, messages: str | Sequence[Turn]) -> Query:
        if isinstance(messages, Mapping):
            raise ValueError("the messages are one turn: give a list of them")
        turns = messages if isinstance(messages, str) else [_turn(m) for m in messages]
        record = {"query": turns, "tools": self.tools, "answers": []}
        try:
            said = [turns] if isinstance(turns, str) else turns
            for name, parts in (("messages", said), ("tools", self.tools)):
                for i, part in enumerate(parts):
                    _require_json(part, f"{name}[{i}]")
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
    return _plain(given)


def _turn(given: Turn) -> Any:
    return {"role": given.role, "content": given.content} if isinstance(given, Message) else _plain(given)


def _plain(given: Any) -> Any:
    """What an SDK's object (pydantic) holds; everything else as it is."""
    return given.model_dump(exclude_none=True) if hasattr(given, "model_dump") else given


def _require_json(given: Any, place: str) -> None:
    try:
        require_plain(given)
    except ValueError as error:
        raise ValueError(f"{place} holds {error}, which is no JSON") from None


__all__ = ["Agent", "Answer", "Live"]
