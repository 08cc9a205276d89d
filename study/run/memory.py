"""Looking into the store before anything is computed, and keeping what is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter
from tqdm import tqdm

from study.run.config import Profile
from study.run.keys import Keys
from study.run.rivals import RivalStages
from study.run.store import Row, Store
from ttsi.engines.base import EngineError
from ttsi.method import Method
from ttsi.stages import NOT_RUN, Done, Trained, Who
from ttsi.types import Query, Sample

T = TypeVar("T")

REDACTED = "redacted "
"""Before the name of a stage: rows of an exported run whose text was replaced by its SHA-256. They say how
a stage went; where the text itself is needed, the stage is run."""


class Host(Protocol):
    """What the stages need of a study. adapters: those just trained, which other arms may ask again.

    at_work: the samples that may be computed now; None = all. A sample that takes its process with it is
    tried apart from its group.
    """

    profile: Profile
    store: Store
    dtype: str
    adapters: dict[Any, Done[Trained]]
    at_work: frozenset[str] | None

    @property
    def engine(self) -> Any: ...

    @property
    def chat(self) -> Any: ...

    @property
    def teacher_engine(self) -> Any: ...

    def samples(self, benchmark: str, seed: int) -> list[Sample]: ...


class Memory(RivalStages):
    """What is known of one benchmark under one run seed. With `compute=False` nothing is added to it.

    lacking: the samples of which something was asked for that isn't there; "*": an adapter for many.
    """

    def __init__(
        self, study: Host, benchmark: str, seed: int, method: Method | None = None, compute: bool = False
    ) -> None:
        p = study.profile
        super().__init__(None, replace(method or p.method(), seed=seed))
        self.study, self.benchmark, self.compute = study, benchmark, compute
        self.voting = p.vote_sampling
        self.lacking: set[str] = set()

    def engine(self, who: Who = "self") -> Any:
        """Who answers; loaded when first needed."""
        return self.study.engine if who == "self" else self.study.teacher_engine

    @property
    def keys(self) -> Keys:
        """What results are stored under."""
        study, m = self.study, self.method
        return Keys(study.profile, study.dtype, self.benchmark, m.seed, m.constrained)

    @property
    def chat(self) -> Any:
        """The model's tokens and their text, without its weights."""
        return self.study.chat

    def kept(
        self,
        stage: str,
        key: Mapping[str, Any],
        queries: Sequence[Query],
        kind: TypeAdapter[T],
        compute: Callable[[Sequence[Query]], dict[str, Done[T]]] | None,
        names: Mapping[str, Any] | None = None,
        label: str = "",
        *,
        redacted: bool = False,
        whole: bool = False,
    ) -> dict[str, Done[T]]:
        """A stage's results, computed where missing, group by group.

        names: by query id what the sample's result depends on besides the key. label: what people call it.
        redacted: results whose text is gone will do. whole: of a group, all samples are computed.
        """
        rows = self._rows(stage, key, queries, names)
        if redacted:
            rows = self._rows(REDACTED + stage, key, queries, names) | rows
        missing = [q for q in queries if q.id not in rows or _passing(rows[q.id])]
        if missing and self.compute and compute:
            groups = self._groups(missing, whole)
            title = f"{self.benchmark}: {label or stage}"
            for group in tqdm(groups, desc=title, unit="batch", disable=len(groups) < 2, leave=False):
                self._put(stage, key, _computed(group, compute, kind), names)
            rows |= self._rows(stage, key, queries, names)
        self.lacking |= {q.id for q in missing if q.id not in rows or _passing(rows[q.id])}
        return {q.id: as_done(rows.get(q.id), kind) for q in queries}

    def _groups(self, queries: Sequence[Query], whole: bool) -> list[list[Query]]:
        """The queries by fixed groups of the permutation; `whole`: with the others of these, if at work."""
        order = [s.query for s in self.study.samples(self.benchmark, self.method.seed)]
        at = {q.id: i // self.study.profile.batch for i, q in enumerate(order)}
        groups: dict[int, list[Query]] = {at[q.id]: [] for q in queries}
        at_work = self.study.at_work
        for query in order if whole else queries:
            if at[query.id] in groups and (at_work is None or query.id in at_work):
                groups[at[query.id]].append(query)
        return [groups[i] for i in sorted(groups)]

    def _rows(
        self, stage: str, key: Mapping[str, Any], queries: Sequence[Query], names: Mapping[str, Any] | None
    ) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for part, ids in _by_name(key, [q.id for q in queries], names):
            rows |= self.study.store.get(stage, part, self.benchmark, self.method.seed, ids)
        return rows

    def _put(
        self,
        stage: str,
        key: Mapping[str, Any],
        rows: Sequence[Row],
        names: Mapping[str, Any] | None = None,
    ) -> None:
        by_id = {r.sample: r for r in rows}
        for part, ids in _by_name(key, list(by_id), names):
            self.study.store.put(stage, part, self.benchmark, self.method.seed, [by_id[i] for i in ids])


def _by_name(
    key: Mapping[str, Any], ids: Sequence[str], names: Mapping[str, Any] | None
) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Settings with the samples stored under them; `names` divides the samples."""
    if names is None:
        return [(key, list(ids))]
    parts: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for i in ids:
        parts.setdefault(repr(names[i]), ({**key, "material": names[i]}, []))[1].append(i)
    return list(parts.values())


def _computed(
    queries: Sequence[Query],
    compute: Callable[[Sequence[Query]], dict[str, Done[T]]],
    kind: TypeAdapter[T],
) -> list[Row]:
    """A batch's rows. If the machine fails on the batch, each sample is tried alone; what fails then is
    an error row: kept apart, never scored, tried again by the next run."""
    try:
        done = compute(queries)
    except EngineError as error:
        if len(queries) > 1:
            return [row for q in queries for row in _computed([q], compute, kind)]
        return [Row(queries[0].id, "error", f"{type(error).__name__}: {error}", 0.0, 1)]
    return [as_row(q, done[q.id], kind, len(queries)) for q in queries]


def as_row(query: Query, done: Done[T], kind: TypeAdapter[T], batch: int) -> Row:
    """A result as it is kept."""
    value: Any = done.value
    return Row(query.id, "ok", kind.dump_json(value).decode(), done.seconds, batch)


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


def _passing(row: Row) -> bool:
    """Whether a row is a failure that may pass: tried again by the next run. What is too long stays so."""
    return row.status == "error" and not row.value.startswith("TooLong")
