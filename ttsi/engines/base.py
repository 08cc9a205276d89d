"""What the method asks of a language model, and nothing more. `torch`, beside this file, is the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Protocol

from ttsi.types import Generation, Message, Sampling, Scored


@dataclass(frozen=True)
class Prompt:
    """A system turn, with all that prompts over the same tools can share, and a conversation.

    The key-value cache of `system` is computed once and serves every prompt that opens the same way.
    tools: as JSON texts, for a model whose own chat template is to list them; `system` may then be empty.
    """

    system: str
    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()


class EngineError(Exception):
    """The machine failed (out of memory, endpoint down): never a wrong answer."""


class TooLong(EngineError):
    """The prompt leaves no room in the model's context window."""


def native_dtype() -> str:
    """`bfloat16` where this machine multiplies it natively, `float32` elsewhere; imports no torch.

    On a CPU without such instructions bfloat16 falls back to scalar code, some eight times slower.
    """
    cuda = any(not d.version.endswith("+cpu") for d in distributions(name="torch"))
    if cuda and Path("/proc/driver/nvidia/version").exists():
        return "bfloat16"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


@dataclass(frozen=True)
class Request:
    """One prompt to answer: what to say first, how to draw, and the adapter to answer with.

    draft: token ids the reply is expected to repeat. lookup: whether it may repeat the prompt. Both are
    checked, never trusted: they change the speed and not the text.
    grammar: what may follow the opening, in llguidance's Lark (`ttsi.grammar`); "" = anything. Among what it
    allows tokens are chosen as ever. A reply cut at `max_tokens` is the beginning of one that it allows.
    again: asked of a reply as soon as it ends; it may name the seed of another, drawn in its place while
    other requests are still answered. An engine need not ask: then the first reply is returned.
    """

    prompt: Prompt
    seed: int = 0
    opening: str = ""
    adapter: Any = None
    draft: tuple[int, ...] = ()
    lookup: bool = False
    grammar: str = ""
    again: Callable[[Generation], int | None] | None = field(default=None, compare=False)


class Engine(Protocol):
    """A language model that scores and generates.

    All log-probabilities are natural logarithms (nats) of the raw distribution: before grammar, temperature,
    penalties and truncation. Failures of the machine raise `EngineError`.
    """

    name: str

    def score(
        self,
        prompts: Sequence[Prompt],
        opening: str,
        continuations: Sequence[Sequence[str]],
        upto: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Scored]]:
        """Token log-probabilities of each prompt's continuations of `opening`.

        Opening and continuation are tokenised together; only the continuation's tokens are returned.
        upto: per continuation the number of its characters after which no more tokens are wanted.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        """`sampling.n` replies to each request, opening included in the text, batched across requests."""
