"""The nouns of the study: what is asked, what is answered, and how it was judged.

`Query` is all that H, G and T ever see; gold lives in `Sample`, one level up, so that a gold
label cannot reach them by mistake: the type they take has no way to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["user", "assistant", "tool"]
TrainingMode = Literal["exact", "activated"]
Layout = Literal["native", "paper", "template"]
Form = Literal["tagged", "fenced", "bare", "none"]
Code = Literal[
    "ok",
    "no_call",
    "bad_json",
    "wrong_count",
    "unknown_tool",
    "wrong_name",
    "missing_argument",
    "extra_argument",
    "wrong_type",
    "wrong_value",
]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. A past tool call is assistant text: `<tool_call>[…]</tool_call>`."""

    role: Role
    content: str


@dataclass(frozen=True)
class Tool:
    """A candidate action. `parameters` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One function call, as predicted or as generated."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class AcceptedObject:
    """A gold object whose every property maps to its accepted values: what BFCL nests in its gold.

    `may_omit`: properties that may be absent ("" among the accepted).
    """

    properties: Mapping[str, tuple[Any, ...]]
    may_omit: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Gold:
    """One gold call. Each argument maps to its accepted values (one, except in BFCL).

    An accepted value is plain JSON; BFCL's also an `AcceptedObject` or a list of them.
    `may_omit`: arguments the gold itself allows to be absent (null or "" among the accepted).
    """

    name: str
    arguments: Mapping[str, tuple[Any, ...]]
    may_omit: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Query:
    """What the model is asked: the only view of a sample that H, G and T get."""

    id: str
    benchmark: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]

    @property
    def question(self) -> str:
        """The text of the last user turn: the seed question of the synthesizer."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")


@dataclass(frozen=True)
class Worked:
    """A question with its tools and the reply to it: to be trained on, or to be shown in a prompt."""

    query: Query
    reply: str


@dataclass(frozen=True)
class Sample:
    """A query with its gold calls.

    `flags`: what is odd about the sample: `gold_issue`, `gold_tool_missing`, `gold_coerced`, `duplicate`, or
    `unknowable`: its gold needs a secret or an address that stands in no turn and no tool. It stays in n.
    `cluster`: the unit whose samples are not independent (conversation, domain); id if alone.
    """

    query: Query
    gold: tuple[Gold, ...]
    flags: frozenset[str] = frozenset()
    cluster: str = ""

    @property
    def id(self) -> str:
        return self.query.id

    @property
    def benchmark(self) -> str:
        return self.query.benchmark

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.query.messages

    @property
    def tools(self) -> tuple[Tool, ...]:
        return self.query.tools


@dataclass(frozen=True)
class Verdict:
    """How a reply was judged. `code` is `ok` exactly when `correct`; `form` says how it was written."""

    correct: bool
    code: Code
    form: Form
    detail: str = ""


@dataclass(frozen=True)
class Sampling:
    """Decoding settings. Temperature 0 is greedy; the penalty follows the usual definition (1 = off)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    n: int = 1


PAPER_SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
"""The paper's decoding settings (section 4): used for synthesis and for votes everywhere."""


@dataclass(frozen=True)
class Generation:
    """One reply. `log_probs`: nats per token, before temperature and penalties.

    `finished` is False when the reply was cut at `max_tokens`.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Scored:
    """Token log-probabilities (nats) of one continuation.

    `ends[i]`: number of characters of the continuation covered once token i is read, so that a
    reader can sum up to any character of it.
    """

    continuation: str
    log_probs: tuple[float, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Uncertainty:
    """H's result. `margin` in [0, 1], higher = more certain; `log_probs` in nats, one per tool.

    `tokens`: candidate tokens that were scored.
    """

    margin: float
    log_probs: tuple[float, ...]
    tokens: int = 0

    @property
    def certainty(self) -> float:
        return self.margin


@dataclass(frozen=True)
class Likelihood:
    """H's result where it reads the answer: its probability as a whole, in [0, 1], higher = more certain.

    Its tokens were scored when the answer was written.
    """

    likelihood: float
    tokens: int = 0

    @property
    def certainty(self) -> float:
        return self.likelihood


@dataclass(frozen=True)
class Example:
    """A synthetic (question, calls) pair with what is known of its quality.

    `copy_ratio`: similarity of the question to its seed, 0 = nothing shared, 1 = the same.
    `schema_errors`: violations of the tools' schemas; empty = valid.
    """

    question: str
    calls: tuple[Call, ...]
    copy_ratio: float
    schema_errors: tuple[str, ...] = ()
    attempt: int = 0


@dataclass(frozen=True)
class Synthesis:
    """G's result: the examples, and the code of every attempt that failed."""

    examples: tuple[Example, ...]
    failures: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def failed(self) -> bool:
        return not self.examples


@dataclass(frozen=True)
class Fit:
    """How T went: the loss (nats per label token) of every step, and what it touched."""

    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    tokens: int
    label_tokens: int


@dataclass(frozen=True)
class LoraSettings:
    """T's settings; the defaults are the paper's (section 4, implementation details)."""

    rank: int = 8
    alpha: int = 16
    epochs: int = 3
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    mode: TrainingMode = "exact"
    init_seed: int = 0
