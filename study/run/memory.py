"""What a stage's results are stored under, and computing those that the store lacks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, Protocol, TypeVar

from pydantic import TypeAdapter
from tqdm import tqdm

from study.data import benchmarks
from study.data.models import model_hash
from study.run.config import Profile
from study.run.outcomes import NOT_RUN, Done, Who
from study.run.store import Row, Store, settings_hash
from ttsi import prompts
from ttsi.engines.base import EngineError
from ttsi.types import Layout, Query, Sample

T = TypeVar("T")

REDACTED = "redacted "
"""Before the name of a stage: rows of an exported run whose text was replaced by its SHA-256. They say how
a stage went; where the text itself is needed, the stage is run."""
_WHOLE_GROUPS = {"answer", "score"}


class Host(Protocol):
    """What the stages need of a study."""

    profile: Profile
    store: Store
    dtype: str

    @property
    def engine(self) -> Any: ...

    @property
    def teacher_engine(self) -> Any: ...

    def samples(self, benchmark: str, seed: int) -> list[Sample]: ...


class Memory:
    """The results of one benchmark and run seed, by stage, in a study's store.

    arm: whose results are wanted. asked, lacked: of each stage, the samples that results were wanted for, and
    those of them that had none. settings: hashes of what each ran under.
    """

    def __init__(self, study: Host, benchmark: str, seed: int, compute: bool, arm: str) -> None:
        self.study, self.benchmark, self.seed, self.compute = study, benchmark, seed, compute
        self.profile, self.arm = study.profile, arm
        self.asked: dict[str, set[str]] = {}
        self.lacked: dict[str, set[str]] = {}
        self.settings: dict[str, set[str]] = {}

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for so far was there."""
        return not any(self.lacked.values())

    def stored(self, label: str) -> set[str]:
        """The samples whose results of a stage were asked for and there."""
        return self.asked.get(label, set()) - self.lacked.get(label, set())

    def _settings(self, who: Who = "self", **more: Any) -> dict[str, Any]:
        """What affects a result, and nothing else: two runs that agree in it have the result in common.

        `samples` stands for every word of the prompts, whatever in the code put it there.
        """
        p = self.profile
        endpoint = who == "teacher" and isinstance(p.teacher, dict)
        return {
            "model": _identity(p.teacher if who == "teacher" else p.model),
            "dtype": "endpoint" if endpoint else self.study.dtype,
            **({} if endpoint or p.engine == "torch" else {"engine": p.engine}),
            "data": _data_hash(self.benchmark),
            "tool_order": p.tool_order,
            "keep_components": p.keep_components,
            "prompts": prompts.version(p.layout),
            "samples": prompts_hash(self.benchmark, self.seed, p.tool_order, p.keep_components, p.layout),
            **more,
        }

    def _stage(
        self,
        stage: str,
        settings: Mapping[str, Any],
        queries: Sequence[Query],
        kind: TypeAdapter[T],
        compute: Callable[[Sequence[Query]], list[T]],
        names: Mapping[str, Any] | None = None,
        label: str = "",
        redacted: bool = False,
    ) -> dict[str, Done[T]]:
        """A stage's results, computed where missing, group by group.

        names: by query id what the sample's result depends on besides the settings. redacted: results whose
        text is gone will do.
        """
        rows = self._rows(stage, settings, queries, names)
        if redacted:
            rows = self._rows(REDACTED + stage, settings, queries, names) | rows
        missing = {q.id for q in queries if q.id not in rows or _passing(rows[q.id])}
        self._note(label or stage, (q.id for q in queries), missing, settings)
        if missing and self.compute:
            groups = [g for g in self.groups(queries) if any(q.id in missing for q in g)]
            title = f"{self.benchmark} {self.arm}: {label or stage}"
            for group in tqdm(groups, desc=title, unit="batch", disable=len(groups) < 2, leave=False):
                # A group that was cut is computed whole: in bfloat16 the shape of a batch can turn a
                # near-tie. The store keeps the rows it has. G and T come in groups that the threshold
                # forms anyway.
                batch = group if stage in _WHOLE_GROUPS else [q for q in group if q.id in missing]
                self._put(stage, settings, _computed(batch, compute, kind), names)
            rows |= self._rows(stage, settings, queries, names)
        return {q.id: as_done(rows.get(q.id), kind) for q in queries}

    def groups(self, queries: Sequence[Query]) -> list[list[Query]]:
        """The queries by fixed groups of the permutation, whatever else is asked for."""
        at = {
            s.id: i // self.profile.batch for i, s in enumerate(self.study.samples(self.benchmark, self.seed))
        }
        groups: dict[int, list[Query]] = {}
        for query in queries:
            groups.setdefault(at.get(query.id, -1), []).append(query)
        return [groups[i] for i in sorted(groups)]

    def _rows(
        self,
        stage: str,
        settings: Mapping[str, Any],
        queries: Sequence[Query],
        names: Mapping[str, Any] | None,
    ) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for part, ids in _by_name(settings, [q.id for q in queries], names):
            rows |= self.study.store.get(stage, part, self.benchmark, self.seed, ids)
        return rows

    def _put(
        self,
        stage: str,
        settings: Mapping[str, Any],
        rows: Sequence[Row],
        names: Mapping[str, Any] | None = None,
    ) -> None:
        by_id = {r.sample: r for r in rows}
        for part, ids in _by_name(settings, list(by_id), names):
            self.study.store.put(stage, part, self.benchmark, self.seed, [by_id[i] for i in ids])

    def _note(
        self, label: str, asked: Iterable[str], lacked: set[str], settings: Mapping[str, Any] | None = None
    ) -> None:
        self.asked.setdefault(label, set()).update(asked)
        self.settings.setdefault(label, set()).add(settings_hash(settings or {}))
        self.lacked.setdefault(label, set()).update(lacked)


def _by_name(
    settings: Mapping[str, Any], ids: Sequence[str], names: Mapping[str, Any] | None
) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Settings with the samples stored under them; `names` divides the samples."""
    if names is None:
        return [(settings, list(ids))]
    parts: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for i in ids:
        part = {**settings, "material": names[i]}
        parts.setdefault(repr(names[i]), (part, []))[1].append(i)
    return list(parts.values())


def _computed(
    queries: Sequence[Query], compute: Callable[[Sequence[Query]], list[T]], kind: TypeAdapter[T]
) -> list[Row]:
    """A batch's rows. If the machine fails on the batch, each sample is tried alone; what fails then is
    an error row: kept apart, never scored, tried again by the next run."""
    began = time.perf_counter()
    try:
        values = compute(queries)
    except EngineError as error:
        if len(queries) > 1:
            return [row for q in queries for row in _computed([q], compute, kind)]
        return [Row(queries[0].id, "error", f"{type(error).__name__}: {error}", 0.0, 1)]
    seconds = (time.perf_counter() - began) / len(queries)
    return [as_row(q, v, kind, seconds, len(queries)) for q, v in zip(queries, values, strict=True)]


def as_done(row: Row | None, kind: TypeAdapter[T]) -> Done[T]:
    """What a row says, None being a result that isn't there; its text is read as `kind`."""
    if row is None:
        return Done(None, NOT_RUN)
    if row.status == "error":
        return Done(None, row.value, row.seconds, row.source)
    return Done(_read(kind, row.value), "", row.seconds, row.source)


@lru_cache(maxsize=50_000)
def _read(kind: TypeAdapter[T], text: str) -> T:
    """A row's value. Arms read the same rows, so each is parsed once."""
    return kind.validate_json(text)


def as_row(query: Query, value: T, kind: TypeAdapter[T], seconds: float, batch: int = 1) -> Row:
    """A result as it is kept; seconds: this sample's share of a batch of so many."""
    return Row(query.id, "ok", kind.dump_json(value).decode(), seconds, batch)


def _passing(row: Row) -> bool:
    """Whether a row is a failure that may pass: tried again by the next run. What is too long stays so."""
    return row.status == "error" and not row.value.startswith("TooLong")


@cache
def prompts_hash(
    benchmark: str,
    seed: int,
    tool_order: Literal["shuffled", "original"],
    keep: bool,
    layout: Layout = "native",
) -> str:
    """A hash of every word that a benchmark's samples put into prompts, in their order, whatever n is."""
    parts = hashlib.sha256()
    for sample in benchmarks.load(benchmark, None, tool_order, seed, keep):
        for prompt in (prompts.act(sample.query, layout), prompts.synthesis(sample.query, layout)):
            turns = [(m.role, m.content) for m in prompt.messages]
            tools = [prompt.tools] if prompt.tools else []
            parts.update(json.dumps([sample.id, prompt.system, turns, *tools]).encode())
    return parts.hexdigest()[:16]


@cache
def _data_hash(benchmark: str) -> str:
    return benchmarks.fingerprint(benchmark)


def _identity(model: str | dict[str, Any] | None) -> str:
    """What identifies who answers: a model's hash, or that of an endpoint's settings."""
    if not isinstance(model, dict):
        return model_hash(model or "")
    from ttsi.engines.openai import Endpoint

    return Endpoint.model_validate(model).fingerprint
