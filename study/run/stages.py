"""The stages of one benchmark and run seed: read from the store, computed and kept where missing."""

from __future__ import annotations

import base64
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import TypeAdapter

from study.data.downloads import digest
from study.data.pools import Worked
from study.run import keys
from study.run.config import Profile
from study.run.memory import Host, Memory, as_done, as_row
from study.run.outcomes import Adapted, Done, Fitted, Material, Mode, Who
from study.run.store import settings_hash
from ttsi import estimator, prompts, synthesizer
from ttsi.calls import format_calls, parse_calls
from ttsi.engines.base import EngineError, Prompt, Request
from ttsi.seeds import seed_for
from ttsi.types import (
    Generation,
    LoraSettings,
    Message,
    Query,
    Sampling,
    Scored,
    Synthesis,
    Uncertainty,
)

if TYPE_CHECKING:
    from ttsi.engines.lora import Adapter

_REPLIES = TypeAdapter(tuple[Generation, ...])
_SCORED = TypeAdapter(tuple[Scored, ...])
_SYNTHESIS = TypeAdapter(Synthesis)
_ADAPTED = TypeAdapter(Adapted)
_FITTED = TypeAdapter(Fitted)
_VECTORS = TypeAdapter(list[str])


@dataclass(frozen=True)
class _Form:
    """One way to ask an adapted model: how the reply is decoded, and whether the example is shown as well."""

    votes: bool = False
    shown: bool = False


class StoredStages(Memory):
    """An `arms.Stages` that remembers. With `compute=False` what is missing is a `Done` without value.

    inference: what is asked for, one reply or votes. arm: it decides which forms of an answer are had from an
    adapter before it is dropped.
    """

    def __init__(
        self, study: Host, benchmark: str, seed: int, inference: str, compute: bool, arm: str = "base"
    ) -> None:
        super().__init__(study, benchmark, seed, compute, arm)
        self.inference = inference

    # --- H, G and plain answers -------------------------------------------------------------------------

    def answer(
        self, queries: Sequence[Query], who: Who = "self", block: int = 0
    ) -> dict[str, Done[tuple[Generation, ...]]]:
        """Replies without training: one, or a block of votes; block i + 1 goes on where block i ends."""
        sampling = self._sampling(self.inference != "direct" or block > 0)
        more: dict[str, Any] = {"block": block} if block else {}

        def compute(batch: Sequence[Query]) -> list[tuple[Generation, ...]]:
            requests = [
                Request(self._act(q), self._seed(q, "answer", block), self._opening, lookup=True)
                for q in batch
            ]
            engine = self.study.engine if who == "self" else self.study.teacher_engine
            return [tuple(r) for r in engine.generate(requests, sampling)]

        settings = self._settings(who, sampling=keys.settings(sampling), **self._opened, **more)
        label = "answer" if who == "self" else "teacher answer"
        return self._stage("answer", settings, queries, _REPLIES, compute, label=label)

    def votes(
        self, queries: Sequence[Query], counts: Mapping[str, int]
    ) -> dict[str, Done[tuple[Generation, ...]]]:
        """So many sampled replies to each query; the first five are those of the majority vote."""
        size = self.profile.votes
        sampled = StoredStages(self.study, self.benchmark, self.seed, "majority", self.compute, self.arm)
        parts: dict[str, list[Done[tuple[Generation, ...]]]] = {q.id: [] for q in queries}
        block = 0
        while wanting := [q for q in queries if counts[q.id] > block * size]:
            done = sampled.answer(wanting, block=block)
            for q in wanting:
                parts[q.id].append(done[q.id])
            block += 1
        self._note("votes", parts, {i for i, p in parts.items() if not all(d.value for d in p)})
        out = {}
        for i, blocks in parts.items():
            missing = next((d for d in blocks if d.value is None), None)
            replies = tuple(r for d in blocks for r in d.value or ())[: counts[i]]
            loaded = any(d.source == "loaded" for d in blocks)
            # Of the last block only the replies that count are paid for, as with tokens.
            share = counts[i] / (size * len(blocks))
            seconds = share * sum(d.seconds for d in blocks)
            out[i] = missing or Done(replies, "", seconds, "loaded" if loaded else "computed")
        return out

    def score(self, queries: Sequence[Query]) -> dict[str, Done[Uncertainty]]:
        """The margin over each query's tools, from the stored token log-probabilities."""
        p = self.profile
        tools = {q.id: q.tools for q in queries}
        out: dict[str, Done[Uncertainty]] = {}
        for i, d in self.scored(queries, p.candidate).items():
            value, error = None, d.error
            if d.value is not None:
                try:
                    value = estimator.uncertainty(d.value, tools[i], p.candidate, p.normalise)
                except ValueError as problem:
                    error = str(problem)
            out[i] = Done(value, error, d.seconds, d.source)
        return out

    def scored(
        self, queries: Sequence[Query], form: estimator.Candidate = "name"
    ) -> dict[str, Done[tuple[Scored, ...]]]:
        """H's token log-probabilities (nats) of each query's tools, in this form of a candidate."""
        p = self.profile

        def compute(batch: Sequence[Query]) -> list[tuple[Scored, ...]]:
            return [tuple(r) for r in estimator.score(self.study.engine, batch, form, p.layout)]

        settings = self._settings(opening=prompts.opening(p.layout), form=form)
        label = "score" if form == self.profile.candidate else f"score {form}"
        return self._stage("score", settings, queries, _SCORED, compute, label=label)

    def whole(self, queries: Sequence[Query]) -> dict[str, Done[tuple[Generation, ...]]]:
        """For each tool of a query the best call that names it: greedy behind the forced opening."""
        sampling = Sampling(max_tokens=self.profile.answer_tokens)
        opening = prompts.opening(self.profile.layout)

        def compute(batch: Sequence[Query]) -> list[tuple[Generation, ...]]:
            asked = [(q, tool) for q in batch for tool in q.tools]
            requests = [
                Request(self._act(q), 0, opening + estimator.continuation(tool.name), lookup=True)
                for q, tool in asked
            ]
            replies = iter(self.study.engine.generate(requests, sampling))
            return [tuple(next(replies)[0] for _ in q.tools) for q in batch]

        settings = self._settings(opening=opening, sampling=keys.settings(sampling))
        return self._stage("whole", settings, queries, _REPLIES, compute)

    def synthesize(
        self, queries: Sequence[Query], writer: Who = "self", whole: bool = False
    ) -> dict[str, Done[Synthesis]]:
        """K examples per query. whole: their text is needed, an exported run's SHA-256 of it won't do."""
        p = self.profile
        label = "example" if writer == "self" else "teacher example"
        parts = []
        for index in range(p.k):

            def compute(batch: Sequence[Query], index: int = index) -> list[Synthesis]:
                return synthesizer.synthesize(
                    self.study.engine if writer == "self" else self.study.teacher_engine,
                    batch,
                    lambda sample, attempt: seed_for(self.seed, self.benchmark, sample, "example", attempt),
                    p.synthesis_sampling,
                    first=index,
                    retries=p.retries,
                    validate=p.validate_examples,
                    novelty=p.novelty,
                    layout=p.layout,
                )

            settings = self._writing(index, writer)
            parts.append(
                self._stage(
                    "example", settings, queries, _SYNTHESIS, compute, label=label, redacted=not whole
                )
            )
        return {q.id: _join([part[q.id] for part in parts]) for q in queries}

    def written(self, query: Query, writer: Who = "self") -> Material:
        """A query's own synthetic examples as training material."""
        name = [self._writing(i, writer) for i in range(self.profile.k)]
        return Material(settings_hash({"examples": name}), partial(self._examples, query, writer))

    def _examples(self, query: Query, writer: Who) -> tuple[Worked, ...]:
        done = self.synthesize([query], writer, whole=True)[query.id]
        if done.value is None:
            raise EngineError(f"the example of {query.id} can't be had: {done.error}")
        if done.value.failed:  # an exported run had one; written anew here, none could be read
            raise EngineError(f"the example of {query.id} can't be written again on this machine")
        return tuple(
            Worked(
                Query(query.id, query.benchmark, (Message("user", e.question),), query.tools),
                format_calls(e.calls),
            )
            for e in done.value.examples
        )

    # --- answers with an example in the prompt ----------------------------------------------------------

    def shown(
        self, queries: Sequence[Query], shots: Mapping[str, Material]
    ) -> dict[str, Done[tuple[Generation, ...]]]:
        """Replies without training, with the first example of each query's material in its prompt."""
        sampling = self._sampling(self.inference != "direct")

        def compute(batch: Sequence[Query]) -> list[tuple[Generation, ...]]:
            lessons = {q.id: shots[q.id].read() for q in batch}
            requests = [
                Request(
                    self._with_shot(q, lessons[q.id][0]),
                    self._seed(q, "answer"),
                    self._opening,
                    draft=self._draft(lessons[q.id], self.inference != "direct"),
                    lookup=True,
                )
                for q in batch
            ]
            return [tuple(r) for r in self.study.engine.generate(requests, sampling)]

        settings = self._settings(sampling=keys.settings(sampling), **self._opened)
        names = {q.id: shots[q.id].name for q in queries}
        return self._stage("shown", settings, queries, _REPLIES, compute, names)

    # --- T: one adapter per question --------------------------------------------------------------------

    def adapt(
        self, queries: Sequence[Query], material: Mapping[str, Material], mode: Mode, shown: bool = False
    ) -> dict[str, Done[Adapted]]:
        """Replies of an adapter trained on each query's material.

        All forms of an answer that the profile will ask of the same adapters are had at once.
        """
        lora = self.profile.lora(mode)
        form = _Form(self.inference != "direct", shown)
        names = {q.id: material[q.id].name for q in queries}

        def compute(batch: Sequence[Query]) -> list[Adapted]:
            others = [f for f in self._forms(mode) - {form} if self._lacks(f, batch, names, lora)]
            done = self._adapt(batch, material, lora, [form, *sorted(others, key=repr)])
            for other in [f for f in others if f in done]:
                rows = [
                    as_row(q, v, _ADAPTED, 0.0, len(batch)) for q, v in zip(batch, done[other], strict=True)
                ]
                for q, row in zip(batch, rows, strict=True):
                    self._put("adapted", self._adapting(other, lora), [row], {q.id: names[q.id]})
            return done[form]

        label = f"adapted{'+shown' if shown else ''} {mode}"
        settings = self._adapting(form, lora)
        return self._stage("adapted", settings, queries, _ADAPTED, compute, names, label=label)

    def _forms(self, mode: Mode) -> set[_Form]:
        """What the profile asks of the adapters that this arm trains."""
        forms = {_Form()}
        if self.arm in ("tt_si", "tt_d") and set(self.profile.inference) - {"direct"}:
            forms.add(_Form(votes=True))
        first = self.profile.modes_of(self.benchmark)[0]
        if self.arm == "tt_si" and "tt_si_and_icl" in self.profile.arms_of(self.benchmark) and mode == first:
            forms.add(_Form(shown=True))
        return forms

    def _lacks(
        self, form: _Form, batch: Sequence[Query], names: Mapping[str, Any], lora: LoraSettings
    ) -> bool:
        rows = self._rows("adapted", self._adapting(form, lora), batch, names)
        return any(q.id not in rows or rows[q.id].status == "error" for q in batch)

    def _adapting(self, form: _Form, lora: LoraSettings) -> dict[str, Any]:
        shown: dict[str, Any] = {"shown": True} if form.shown else {}
        sampling = keys.settings(self._sampling(form.votes))
        return self._settings(lora=keys.settings(lora), sampling=sampling, **self._opened, **shown)

    def _adapt(
        self,
        batch: Sequence[Query],
        material: Mapping[str, Material],
        lora: LoraSettings,
        forms: Sequence[_Form],
    ) -> dict[_Form, list[Adapted]]:
        from ttsi import trainer

        lessons = [material[q.id].read() for q in batch]
        began = time.perf_counter()
        jobs = [
            trainer.Job(self._lesson(lesson), self._seed(q, "adapter"))
            for q, lesson in zip(batch, lessons, strict=True)
        ]
        fitted = trainer.fit(self.study.engine, jobs, lora, bank=self.profile.bank)
        seconds_t = (time.perf_counter() - began) / len(batch)
        able = [i for i, f in enumerate(fitted) if f is not None]
        out: dict[_Form, list[Adapted]] = {}
        for form in forms:
            began = time.perf_counter()
            asked = [
                self._request(
                    batch[i],
                    fitted[i][0],  # type: ignore[index]
                    self._draft(lessons[i], form.votes),
                    lessons[i][0] if form.shown else None,
                )
                for i in able
            ]
            try:
                given = self.study.engine.generate(asked, self._sampling(form.votes)) if able else []
            except EngineError:
                if form is forms[0]:
                    raise
                continue  # what else was to be had must not cost what was asked for: its own arm tries again
            # The last step's update is seen by no loss: what it spoils shows in the reply, and is divergence.
            replies = {i: r for i, r in zip(able, given, strict=True) if _finite(r)}
            seconds = (time.perf_counter() - began) / max(1, len(able))
            out[form] = [
                Adapted(f[1] if f else None, tuple(replies.get(i, ())), seconds_t, seconds if f else 0.0)
                for i, f in enumerate(fitted)
            ]
        return out

    # --- T: one adapter for many questions --------------------------------------------------------------

    def share(
        self, queries: Sequence[Query], material: Material, mode: Mode, epochs: int | None = None
    ) -> tuple[Done[Fitted], dict[str, Done[Adapted]]]:
        """How one adapter was trained on the material, and its reply to each query.

        The adapter is kept in PEFT's format beside the store, so that a run that is cut needn't train it
        again; a file that isn't what was written is trained anew.
        """
        lora = self.profile.lora(mode, epochs)
        sampling = self._sampling(self.inference != "direct")
        training = self._settings(lora=keys.settings(lora), material=material.name)
        one = Query("*", self.benchmark, (), ())

        @cache
        def adapter() -> Adapter | EngineError | None:
            try:
                return self._shared_adapter(one, material, lora, training)
            except EngineError as error:  # remembered: it would fail for every sample anew
                return error

        def compute(batch: Sequence[Query]) -> list[Adapted]:
            trained = adapter()
            if isinstance(trained, EngineError):
                raise trained
            if trained is None:
                return [Adapted(None, (), 0.0, 0.0)] * len(batch)
            began = time.perf_counter()
            asked = [self._request(q, trained) for q in batch]
            replies = self.study.engine.generate(asked, sampling)
            seconds = (time.perf_counter() - began) / len(batch)
            return [Adapted(None, tuple(r) if _finite(r) else (), 0.0, seconds) for r in replies]

        settings = {**training, "sampling": keys.settings(sampling), **self._opened}
        done = self._stage("shared", settings, queries, _ADAPTED, compute, label=f"shared {mode}")
        return self._fit(one, training, f"fit {mode}"), done

    def _fit(self, one: Query, training: Mapping[str, Any], label: str) -> Done[Fitted]:
        row = self._rows("fit", training, [one], None).get(one.id)
        self._note(label, [one.id], set() if row else {one.id}, training)
        return as_done(row, _FITTED)

    def _shared_adapter(
        self, one: Query, material: Material, lora: LoraSettings, training: Mapping[str, Any]
    ) -> Adapter | None:
        from ttsi import trainer

        engine = self.study.engine
        folder = self.study.store.path.parent / "adapters" / settings_hash({**training, "seed": self.seed})
        weights = folder / "adapter_model.safetensors"
        known = as_done(self._rows("fit", training, [one], None).get(one.id), _FITTED).value
        if known is not None and known.fit is None:
            return None
        if known is not None and weights.is_file() and digest(weights) == known.sha256:
            return cast("Adapter", engine.lora.load(folder, lora, engine.device))
        began = time.perf_counter()
        seed = seed_for(self.seed, self.benchmark, str(material.name), "shared adapter")
        done = trainer.fit(engine, [trainer.Job(self._lesson(material.read()), seed)], lora)[0]
        seconds = time.perf_counter() - began
        if done is None:
            self._put("fit", training, [as_row(one, Fitted(None, seconds), _FITTED, seconds)])
            return None
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        engine.lora.save(done[0], new, base_model=self.profile.model, invocation=engine.chat._user)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        fitted = Fitted(done[1], seconds, digest(weights))
        self._put("fit", training, [as_row(one, fitted, _FITTED, seconds)])
        return done[0]

    # --- where questions lie ----------------------------------------------------------------------------

    def embeddings(self, queries: Sequence[Query], synthetic: bool) -> dict[str, Done[list[np.ndarray]]]:
        """The model's mean-pooled hidden states (float16) of each query's question or of its examples'."""

        def compute(batch: Sequence[Query]) -> list[list[str]]:
            texts = [
                [w.query.question for w in self._examples(q, "self")] if synthetic else [q.question]
                for q in batch
            ]
            with self.study.engine.outside_failures():
                vectors = iter(self.study.engine.embed([t for group in texts for t in group]))
            return [
                [base64.b64encode(next(vectors).astype("<f2").tobytes()).decode() for _ in group]
                for group in texts
            ]

        name = self.written(queries[0]).name if synthetic and queries else "question"
        settings = self._settings(of=name)
        done = self._stage("embedding", settings, queries, _VECTORS, compute)
        return {
            i: Done(
                None
                if d.value is None
                else [np.frombuffer(base64.b64decode(v), "<f2").astype(np.float32) for v in d.value],
                d.error,
                d.seconds,
                d.source,
            )
            for i, d in done.items()
        }

    # --- asking -----------------------------------------------------------------------------------------

    def _draft(self, lesson: Sequence[Worked], votes: bool) -> tuple[int, ...]:
        """The reply just learnt or shown, as a guess at a greedy answer.

        Not the base model's answer: a live query has none, and nobody would have paid for it.
        """
        if votes or self.profile.direct_sampling.temperature:
            return ()
        return tuple(self.study.engine.tokens(self._written(lesson[0]).removeprefix(self._opening)))

    def _request(
        self,
        query: Query,
        adapter: Any,
        draft: tuple[int, ...] = (),
        shot: Worked | None = None,
    ) -> Request:
        return Request(
            self._with_shot(query, shot) if shot else self._act(query),
            self._seed(query, "answer"),
            self._opening,
            adapter,
            draft=draft,
            lookup=True,
        )

    def _act(self, query: Query) -> Prompt:
        return prompts.act(query, self.profile.layout)

    def _written(self, worked: Worked) -> str:
        """A worked example's reply in the layout's own form."""
        if self.profile.layout == "native":
            return worked.reply
        return prompts.write(parse_calls(worked.reply).calls, self.profile.layout)

    def _with_shot(self, query: Query, shot: Worked) -> Prompt:
        """The act prompt with a worked example, which is shown with its own tools where they are others."""
        tools = () if shot.query.tools == query.tools else shot.query.tools
        asked = shot.query.question, self._written(shot)
        return prompts.with_shot(query, *asked, tools, self.profile.layout)

    def _lesson(self, worked: Iterable[Worked]) -> tuple[tuple[Prompt, str], ...]:
        return tuple((self._act(w.query), self._written(w)) for w in worked)

    @property
    def _opening(self) -> str:
        return prompts.opening(self.profile.layout) if self.profile.answer_opening else ""

    @property
    def _opened(self) -> dict[str, Any]:
        return {"opening": self._opening} if self._opening else {}

    def _seed(self, query: Query, stage: str, attempt: int = 0) -> int:
        return seed_for(self.seed, self.benchmark, query.id, stage, attempt)

    def _sampling(self, votes: bool) -> Sampling:
        return self.profile.vote_sampling if votes else self.profile.direct_sampling

    def _writing(self, index: int, writer: Who = "self") -> dict[str, Any]:
        return self._settings(writer, **writing(self.profile, index, writer))


def writing(p: Profile, index: int, writer: Who = "self") -> dict[str, Any]:
    """What affects the writing of an example, besides the model and what it is shown."""
    return {
        "writer": writer,
        "index": index,
        "sampling": keys.settings(p.synthesis_sampling),
        "retries": p.retries,
        "validate": p.validate_examples,
        "novelty": p.novelty,
        "reader": synthesizer.READER,
    }


def together(values: Sequence[Synthesis]) -> Synthesis:
    """The examples of several indices as one synthesis."""
    return Synthesis(
        tuple(e for v in values for e in v.examples),
        tuple(f for v in values for f in v.failures),
        sum(v.tokens for v in values),
    )


def _join(parts: Sequence[Done[Synthesis]]) -> Done[Synthesis]:
    """The examples of all indices as one synthesis; the first failure of the machine, if any."""
    bad = next((d for d in parts if d.value is None), None)
    if bad is not None:
        return bad
    joined = together([d.value for d in parts if d.value is not None])
    loaded = any(d.source == "loaded" for d in parts)
    return Done(joined, "", sum(d.seconds for d in parts), "loaded" if loaded else "computed")


def _finite(replies: Iterable[Generation]) -> bool:
    return all(math.isfinite(x) for r in replies for x in r.log_probs)
