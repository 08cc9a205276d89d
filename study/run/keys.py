"""What results are stored under: the settings that affect them, and nothing else.

A result is stored under the hash of its settings, and those hold digests of what was taught. Both have a form
of their own: classes may be renamed and fields added, keys stay. Written by `repr` or `asdict`, they would be
other ones as soon as a class is called something else, and hours of results would be orphaned without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, Literal

from study.data import benchmarks
from study.data.models import model_hash
from study.run.config import Profile
from study.run.store import settings_hash
from ttsi import grammar, prompts, synthesizer
from ttsi.stages import Who
from ttsi.types import Layout, LoraSettings, Message, Query, Sampling, Tool, Worked

_PINNED: dict[type, tuple[str, str]] = {
    Worked: ("Worked", "query reply"),
    Query: ("Query", "id benchmark messages tools"),
    Message: ("Message", "role content"),
    Tool: ("Tool", "name description parameters"),
    Sampling: ("Sampling", "temperature top_p top_k repetition_penalty max_tokens n"),
    LoraSettings: (
        "LoraSettings",
        "rank alpha epochs learning_rate warmup_ratio weight_decay clip betas mode init_seed",
    ),
}
"""What a class is called in keys, and those of its fields that have always been in them, in their order."""


def settings(value: Sampling | LoraSettings) -> dict[str, Any]:
    """What settings add to a key: by name. A field that came later counts where it isn't at its default."""
    pinned = _PINNED[type(value)][1].split()
    later = {f.name for f in fields(value) if getattr(value, f.name) != _default(f)} - {*pinned}
    return {name: getattr(value, name) for name in (*pinned, *sorted(later))}


def digest(taught: Sequence[Worked] | Sequence[Mapping[str, Any]]) -> str:
    """A hash of what is taught, worked examples or names of material, in its order.

    A list and a tuple of the same have different ones; so had they always.
    """
    return hashlib.sha256(_written(taught).encode()).hexdigest()[:16]


def _written(value: Any) -> str:
    """A value as `repr` wrote it when the first keys were made."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return repr(dict(value))
    if type(value) not in _PINNED:
        return repr(value)
    parts = [f"{name}={_written(part)}" for name, part in settings(value).items()]
    return f"{_PINNED[type(value)][0]}({', '.join(parts)})"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


# --- what each stage depends on -------------------------------------------------------------------------


class Keys:
    """The settings of each stage's results, for one benchmark and run seed.

    Two runs that agree in them have the results in common.
    """

    def __init__(
        self, profile: Profile, dtype: str, benchmark: str, seed: int, constrained: bool = False
    ) -> None:
        self.profile, self.dtype, self.benchmark, self.seed = profile, dtype, benchmark, seed
        opening = prompts.opening(profile.layout) if profile.answer_opening or constrained else ""
        self._opened: dict[str, Any] = {"opening": opening} if opening else {}
        self._opened |= {"grammar": grammar.VERSION} if constrained else {}

    def common(self, who: Who = "self", **more: Any) -> dict[str, Any]:
        """What every result depends on, and `more`. `samples` stands for every word of the prompts."""
        p = self.profile
        endpoint = who == "teacher" and isinstance(p.teacher, dict)
        return {
            "model": identity(p.teacher if who == "teacher" else p.model),
            "dtype": "endpoint" if endpoint else self.dtype,
            **({} if endpoint or p.engine == "torch" else {"engine": p.engine}),
            "data": _data_hash(self.benchmark),
            "tool_order": p.tool_order,
            "keep_components": p.keep_components,
            "prompts": prompts.version(p.layout),
            "samples": prompts_of(p, self.benchmark, self.seed),
            **more,
        }

    def answer(self, sampling: Sampling, who: Who = "self", block: int = 0) -> dict[str, Any]:
        """Replies without training; a block of votes beyond the first is one of its own."""
        more: dict[str, Any] = {"block": block} if block else {}
        return self.common(who, sampling=settings(sampling), **self._opened, **more)

    def score(self, form: str) -> dict[str, Any]:
        """H's log-probabilities of the tools, in this form of a candidate."""
        return self.common(opening=prompts.opening(self.profile.layout), form=form)

    def whole(self, sampling: Sampling) -> dict[str, Any]:
        """For each tool the best call that names it."""
        return self.common(opening=prompts.opening(self.profile.layout), sampling=settings(sampling))

    def example(self, index: int, who: Who = "self") -> dict[str, Any]:
        """One of a query's K examples."""
        return self.common(who, **writing(self.profile, index, who))

    def examples(self, who: Who = "self", indices: Sequence[int] | None = None) -> str:
        """What stands for a query's own examples, the first K or these, where they are learnt from."""
        numbers = range(self.profile.k) if indices is None else indices
        return settings_hash({"examples": [self.example(i, who) for i in numbers]})

    def probe(self, sampling: Sampling) -> dict[str, Any]:
        """Replies to the question of an example."""
        return self.common(sampling=settings(sampling), asked="example", **self._opened)

    def shown(self, sampling: Sampling) -> dict[str, Any]:
        """Replies with an example in the prompt."""
        return self.common(sampling=settings(sampling), **self._opened)

    def adapted(self, lora: LoraSettings, sampling: Sampling, shown: bool = False) -> dict[str, Any]:
        """An adapter of a query's own, and its replies."""
        more: dict[str, Any] = {"shown": True} if shown else {}
        return self.common(lora=settings(lora), sampling=settings(sampling), **self._opened, **more)

    def fit(self, lora: LoraSettings, lesson: Any) -> dict[str, Any]:
        """An adapter for many queries."""
        return self.common(lora=settings(lora), material=lesson)

    def shared(self, lora: LoraSettings, lesson: Any, sampling: Sampling) -> dict[str, Any]:
        """Replies of an adapter for many queries."""
        return self.fit(lora, lesson) | {"sampling": settings(sampling), **self._opened}

    def embedding(self, synthetic: bool) -> dict[str, Any]:
        """Hidden states of the question, or of the examples written after it."""
        return self.common(of=self.examples() if synthetic else "question")


def writing(p: Profile, index: int, writer: Who = "self") -> dict[str, Any]:
    """What affects the writing of an example, besides the model and what it is shown."""
    return {
        "writer": writer,
        "index": index,
        "sampling": settings(p.synthesis_sampling),
        "retries": p.retries,
        "validate": p.validate_examples,
        "novelty": p.novelty,
        "reader": synthesizer.READER,
    }


def prompts_of(p: Profile, benchmark: str, seed: int) -> str:
    """A hash of every word that a profile's prompts about a benchmark's samples have, whatever n is."""
    return prompts_hash(benchmark, seed, p.tool_order, p.keep_components, p.layout, p.instructions)


@cache
def prompts_hash(
    benchmark: str,
    seed: int,
    tool_order: Literal["shuffled", "original"],
    keep: bool,
    layout: Layout = "native",
    instructions: str = "",
) -> str:
    """See `prompts_of`."""
    parts = hashlib.sha256()
    for sample in benchmarks.load(benchmark, None, tool_order, seed, keep):
        for put in (prompts.act, prompts.synthesis):
            prompt = put(sample.query, layout, instructions)
            turns = [(m.role, m.content) for m in prompt.messages]
            tools = [prompt.tools] if prompt.tools else []
            parts.update(json.dumps([sample.id, prompt.system, turns, *tools]).encode())
    return parts.hexdigest()[:16]


@cache
def _data_hash(benchmark: str) -> str:
    return benchmarks.fingerprint(benchmark)


def identity(model: str | dict[str, Any] | None) -> str:
    """What identifies who answers: a model's hash, or that of an endpoint's settings."""
    if not isinstance(model, dict):
        return model_hash(model or "")
    from ttsi.engines.openai import Endpoint

    return Endpoint.model_validate(model).fingerprint
