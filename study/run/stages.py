"""Stages that remember: the methods of `ttsi.stages.Stages`, each with what its results are stored under.

A method names its key, and hands on what is missing to the method that it overrides.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from study.data.downloads import digest
from study.run.memory import Memory, as_done, as_row
from study.run.store import settings_hash
from ttsi import estimator
from ttsi.engines.base import EngineError
from ttsi.seeds import seed_for
from ttsi.stages import NOT_RUN, Adapted, Done, Fitted, Lesson, Replies, Trained, Who, finite, source, worked
from ttsi.types import Generation, LoraSettings, Query, Scored, Synthesis, Worked

_REPLIES = TypeAdapter(tuple[Generation, ...])
_SCORED = TypeAdapter(tuple[Scored, ...])
_SYNTHESIS = TypeAdapter(Synthesis)
_ADAPTED = TypeAdapter(Adapted)
_FITTED = TypeAdapter(Fitted)
_SHA256 = "adapter_model.sha256"
_VECTORS = TypeAdapter(list[str])


class Remembered(Memory):
    """The stages of Algorithm 1 and its rivals; where two arms ask the same, it is computed once."""

    def answer(self, queries: Sequence[Query], who: Who = "self", block: int = 0) -> dict[str, Done[Replies]]:
        key = self.keys.answer(self.method.answering, who, block)
        votes = " votes" if self.method.answering.n > 1 else ""
        label = "teacher answer" if who == "teacher" else f"answer{votes}" if not block else "votes"
        # A group that was cut is computed whole: in bfloat16 the shape of a batch can turn a near-tie. What
        # comes after H comes in groups that the threshold forms anyway.
        compute = partial(super().answer, who=who, block=block)
        return self.kept("answer", key, queries, _REPLIES, compute, label=label, whole=not block)

    def scored(
        self, queries: Sequence[Query], form: estimator.Candidate = "name"
    ) -> dict[str, Done[tuple[Scored, ...]]]:
        label = "score" if form == self.method.candidate else f"score {form}"
        compute = partial(super().scored, form=form)
        return self.kept("score", self.keys.score(form), queries, _SCORED, compute, label=label, whole=True)

    def whole(self, queries: Sequence[Query]) -> dict[str, Done[Replies]]:
        key = self.keys.whole(self.study.profile.greedy_sampling)
        return self.kept("whole", key, queries, _REPLIES, super().whole)

    def synthesize(
        self,
        queries: Sequence[Query],
        who: Who = "self",
        first: int = 0,
        k: int | None = None,
        text: bool = False,
    ) -> dict[str, Done[Synthesis]]:
        """G, each example stored for itself. text: an exported run's SHA-256 of it won't do.

        Nor will it where filters judge the example: all but `valid`, whose verdict is kept, read its text.
        """
        text = text or bool({*self.method.filters} - {"valid"})
        fresh, parts = super().synthesize, []
        for index in range(first, first + (k or self.method.k)):
            compute = partial(fresh, who=who, first=index, k=1)
            label = "example" if who == "self" else "teacher example"
            key = self.keys.example(index, who)
            parts.append(
                self.kept("example", key, queries, _SYNTHESIS, compute, label=label, redacted=not text)
            )
        return {q.id: _joined([part[q.id] for part in parts]) for q in queries}

    def lesson(
        self, query: Query, written: Synthesis, who: Who = "self", indices: Sequence[int] | None = None
    ) -> Lesson:
        read = partial(self._examples, query, who, indices)
        return Lesson(read, self.keys.examples(who, indices), len(written.examples))

    def probe(self, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> dict[str, Done[Replies]]:
        key, names = self.keys.probe(self.method.answering), _names(queries, lessons)
        compute = partial(super().probe, lessons=lessons)
        return self.kept("probe", key, queries, _REPLIES, compute, names)

    def _examples(
        self, query: Query, who: Who = "self", indices: Sequence[int] | None = None
    ) -> tuple[Worked, ...]:
        numbers = range(self.method.k) if indices is None else indices
        parts = [self.synthesize([query], who, first=i, k=1, text=True)[query.id] for i in numbers]
        done = _joined(parts)
        if done.value is None:
            raise EngineError(f"the example of {query.id} can't be had: {done.error}")
        if done.value.failed:  # an exported run had one; written anew here, none could be read
            raise EngineError(f"the example of {query.id} can't be written again on this machine")
        return worked(query, done.value)

    def show(self, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> dict[str, Done[Replies]]:
        key = self.keys.shown(self.method.answering)
        compute = partial(super().show, lessons=lessons)
        return self.kept("shown", key, queries, _REPLIES, compute, _names(queries, lessons))

    def train(self, queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> dict[str, Done[Trained]]:
        """Adapters, not stored but held while the arms of a group are run: each is trained once for them."""
        held, names = self.study.adapters, _names(queries, lessons)
        keys = {
            q.id: (self.benchmark, self.method.seed, q.id, repr(names[q.id]), self.method.lora)
            for q in queries
        }
        done = super().train([q for q in queries if keys[q.id] not in held], lessons)
        held |= {keys[i]: d for i, d in done.items()}
        found = {q.id: held[keys[q.id]] for q in queries}
        while len(held) > 2 * self.study.profile.batch:  # both modes of a group
            held.pop(next(iter(held)))
        return found

    def adapt(
        self, queries: Sequence[Query], lessons: Mapping[str, Lesson], shown: bool = False
    ) -> dict[str, Done[Adapted]]:
        m, names = self.method, _names(queries, lessons)
        key = self.keys.adapted(m.lora, m.answering, shown)
        label = f"adapted{'+shown' * shown}{' votes' * (m.answering.n > 1)} {m.lora.mode}"
        compute = partial(super().adapt, lessons=lessons, shown=shown)
        return self.kept("adapted", key, queries, _ADAPTED, compute, names, label)

    def answered(self, query: Query) -> tuple[int, ...]:
        key, sampling = self.keys.answer(self.method.answering), self.method.answering
        row = None if sampling.temperature else self._rows("answer", key, [query], None).get(query.id)
        known = as_done(row, _REPLIES).value
        return known[0].tokens if known else ()

    def embed(
        self, queries: Sequence[Query], texts: Callable[[Query], list[str]] | None = None
    ) -> dict[str, Done[list[str]]]:
        """Where the questions lie, or with `texts` those of the examples written after them."""
        compute = partial(super().embed, texts=texts or (lambda q: [q.question]))
        return self.kept("embedding", self.keys.embedding(bool(texts)), queries, _VECTORS, compute)

    def written_questions(self, query: Query) -> list[str]:
        """The questions of a query's own examples, as texts to embed."""
        return [w.query.question for w in self._examples(query)]

    # --- one adapter for many questions -----------------------------------------------------------------

    def share(
        self, queries: Sequence[Query], lesson: Lesson, epochs: int | None = None
    ) -> tuple[Done[Fitted], dict[str, Done[Adapted]]]:
        """How one adapter was trained on the lesson, and its reply to each query.

        The adapter is kept in PEFT's format beside the store, so that a run that is cut needn't train it
        again; a file that isn't what was written is trained anew.
        """
        if not queries:
            return Done(None, NOT_RUN), {}
        lora = replace(self.method.lora, epochs=epochs or self.method.lora.epochs)
        training = self.keys.fit(lora, lesson.name)
        fresh = super().reply

        @cache
        def adapter() -> Any:
            try:
                return self._shared_adapter(lesson, lora, training)
            except EngineError as error:  # remembered: it would fail for every sample anew
                return error

        def compute(batch: Sequence[Query]) -> dict[str, Done[Adapted]]:
            trained = adapter()
            if isinstance(trained, EngineError):
                raise trained
            if trained is None:
                return {q.id: Done(Adapted(None, (), 0.0, 0.0)) for q in batch}
            replies = fresh(batch, dict.fromkeys((q.id for q in batch), trained))
            return {
                i: Done(Adapted(None, finite(d.value or ()), 0.0, d.seconds), seconds=d.seconds)
                for i, d in replies.items()
            }

        key = self.keys.shared(lora, lesson.name, self.method.answering)
        done = self.kept("shared", key, queries, _ADAPTED, compute, label=f"shared {lora.mode}")
        fit = self.kept("fit", training, [self._one], _FITTED, None, label=f"fit {lora.mode}")
        return fit["*"], done

    @property
    def _one(self) -> Query:
        """What stands for all queries in the key of what they share."""
        return Query("*", self.benchmark, (), ())

    def _shared_adapter(self, lesson: Lesson, lora: LoraSettings, training: Mapping[str, Any]) -> Any:
        """The adapter, read or trained; None if training diverged."""
        from ttsi import trainer

        engine, store, seed = self.engine(), self.study.store, self.method.seed
        folder = store.path.parent / "adapters" / settings_hash({**training, "seed": seed})
        weights = folder / "adapter_model.safetensors"
        row = store.get("fit", training, self.benchmark, seed, ["*"]).get("*")
        known = as_done(row, _FITTED).value
        if known is not None and known.fit is None:
            return None
        if known is not None and _is_whole(weights):
            return engine.lora.load(folder, lora, engine.device)
        began = time.perf_counter()
        job = trainer.Job(
            self.taught(lesson), seed_for(seed, self.benchmark, str(lesson.name), "shared adapter")
        )
        done = trainer.fit(engine, [job], lora)[0]
        fitted = Fitted(done[1] if done else None, time.perf_counter() - began)
        if done:
            sha256 = _save(engine, done[0], weights, self.study.profile.model)
            fitted = replace(fitted, sha256=sha256)
        self._put("fit", training, [as_row(self._one, Done(fitted, seconds=fitted.seconds), _FITTED, 1)])
        return done[0] if done else None


def _names(queries: Sequence[Query], lessons: Mapping[str, Lesson]) -> dict[str, Any]:
    return {q.id: lessons[q.id].name for q in queries}


def _joined(parts: Sequence[Done[Synthesis]]) -> Done[Synthesis]:
    """The examples of all indices as one synthesis; the first failure of the machine, if any."""
    if (bad := next((d for d in parts if d.value is None), None)) is not None:
        return bad
    whole = together([d.value for d in parts if d.value is not None])
    return Done(whole, "", sum(d.seconds for d in parts), source(parts))


def together(values: Sequence[Synthesis]) -> Synthesis:
    """The examples of several indices as one synthesis."""
    return Synthesis(
        tuple(e for v in values for e in v.examples),
        tuple(f for v in values for f in v.failures),
        sum(v.tokens for v in values),
    )


def _save(engine: Any, adapter: Any, weights: Path, model: str) -> str:
    """Writes an adapter in PEFT's format and its weights' SHA-256; the folder is whole or not there."""
    folder = weights.parent
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    engine.lora.save(adapter, new, base_model=model, invocation=engine.chat.invocation)
    sha256 = digest(new / weights.name)
    (new / _SHA256).write_text(sha256)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return sha256


def _is_whole(weights: Path) -> bool:
    """Whether an adapter's file is what was written here.

    The stored fit may be that of another machine, whose numbers end otherwise, and can't vouch for it.
    """
    written = weights.with_name(_SHA256)
    return weights.is_file() and written.is_file() and digest(weights) == written.read_text()
