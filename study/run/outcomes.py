"""What a stage gives and what an arm makes of it: the nouns that arms and stages have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from study.data.pools import Worked
from ttsi.types import Fit, Generation, Query, Synthesis, Uncertainty

NOT_RUN = "not run"
"""The error of a `Done` that nothing was computed for."""

T = TypeVar("T")
Mode = Literal["exact", "activated"]
Who = Literal["self", "teacher"]


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


@dataclass(frozen=True)
class Fitted:
    """How one adapter for many questions was trained: its fit (None: diverged), and the file's SHA-256."""

    fit: Fit | None
    seconds: float
    sha256: str = ""


@dataclass(frozen=True)
class Material:
    """What an answer is learnt from. `name` is what its results are stored under; `read` gives the text.

    It is read only where something is computed: results are found again without it.
    """

    name: Any
    read: Callable[[], tuple[Worked, ...]]


Answers = Mapping[str, Done[tuple[Generation, ...]]]
Adaptations = Mapping[str, Done[Adapted]]


class Stages(Protocol):
    """What an arm is made of; results by query id. The study's stages remember, so nothing runs twice."""

    def answer(self, queries: Sequence[Query], who: Who = "self") -> Answers: ...

    def votes(self, queries: Sequence[Query], counts: Mapping[str, int]) -> Answers: ...

    def score(self, queries: Sequence[Query]) -> Mapping[str, Done[Uncertainty]]: ...

    def synthesize(self, queries: Sequence[Query], writer: Who = "self") -> Mapping[str, Done[Synthesis]]: ...

    def written(self, query: Query, writer: Who = "self") -> Material: ...

    def shown(self, queries: Sequence[Query], shots: Mapping[str, Material]) -> Answers: ...

    def adapt(
        self, queries: Sequence[Query], material: Mapping[str, Material], mode: Mode, shown: bool = False
    ) -> Adaptations: ...

    def share(
        self, queries: Sequence[Query], material: Material, mode: Mode, epochs: int | None = None
    ) -> tuple[Done[Fitted], Adaptations]: ...


@dataclass(frozen=True)
class Outcome:
    """What an arm did for one query and what it replied. `error`: the machine failed; there is no answer.

    shared: how the adapter was trained that this answer shares with others; `pool_n`: on how many samples.
    """

    id: str
    replies: tuple[Generation, ...] = ()
    error: str = ""
    margin: float | None = None
    uncertain: bool = False
    adapted: bool = False
    diverged: bool = False
    synthesis: Synthesis | None = None
    fit: Fit | None = None
    shared: Fitted | None = None
    pool_n: int | None = None
    source: str = "computed"
    tokens_h: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What an arm may vary: the threshold on the margin, the training mode, and what it may learn from."""

    tau: float = 0.95
    mode: Mode = "exact"
    seed: int = 0
    sft_samples: int | None = None
    sft_calls: Literal["single", "all"] = "single"
    sft_epochs: int | None = None
    ood_size: int = 1
    max_votes: int = 40
