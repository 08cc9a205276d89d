"""Training pools: labelled samples that may be learnt from, never those of a test.

In domain: the benchmark's own training split, which only SealTool (and the fixture) has, and what a profile
names beside a benchmark of its own. Out of domain: BFCL, as a stand-in for the paper's xLAM, which is gated;
never where BFCL is what is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from study.data import benchmarks
from study.data.judge import gold_calls
from ttsi.calls import format_calls
from ttsi.seeds import seed_for
from ttsi.types import Query, Sample, Worked

IN_DOMAIN = {"sealtool": "sealtool_train", "fixture": "fixture_train"}
OUT_OF_DOMAIN = {"fixture": "fixture_train"}  # the fixture must do without a download
_TOOLS = 8  # a pool's samples have no more tools than the benchmarks' usually do


class NoPool(ValueError):
    """A benchmark has no pool of the asked kind; the message says so."""


def add(benchmark: str, path: Path) -> None:
    """Makes a file of records the pool of an added benchmark. Raises what `benchmarks.add` raises."""
    benchmarks.add(f"{benchmark}_train", path)
    IN_DOMAIN[benchmark] = f"{benchmark}_train"


def name(benchmark: str, kind: Literal["in", "out"]) -> str:
    """Which pool a benchmark learns from. Raises NoPool."""
    if kind == "in":
        if benchmark not in IN_DOMAIN:
            raise NoPool(f"{benchmark}: no training split")
        return IN_DOMAIN[benchmark]
    if benchmark == "bfcl":
        raise NoPool("bfcl: no out-of-domain pool, since that pool is bfcl")
    return OUT_OF_DOMAIN.get(benchmark, "bfcl")


def load(
    benchmark: str, kind: Literal["in", "out"], calls: Literal["single", "all"], seed: int
) -> list[Sample]:
    """A benchmark's pool in a seeded order, so that its first n samples are nested in its first n + 1.

    calls: "single" keeps samples with one gold call. Samples with odd gold, without a call or with more than
    eight tools are left out, and for an added benchmark those that ask what it asks; tools are in the run
    seed's order. Raises NoPool, also where none is left, and what `benchmarks` raises.
    """
    found = _load(name(benchmark, kind), calls, seed)
    if benchmarks.is_added(benchmark):  # whose files nobody has looked at
        asked = {_folded(s.query.question) for s in benchmarks.load(benchmark)}
        found = tuple(s for s in found if _folded(s.query.question) not in asked)
    if not found:
        raise NoPool(f"{benchmark}: no sample of its training pool can be learnt from")
    return list(found)


def _folded(text: str) -> str:
    """A question as it is compared: words, without case."""
    return " ".join(text.casefold().split())


@cache
def _load(pool: str, calls: Literal["single", "all"], seed: int) -> tuple[Sample, ...]:
    fit = [
        s
        for s in benchmarks.load(pool, seed=seed)
        if s.gold and (calls == "all" or len(s.gold) == 1) and len(s.tools) <= _TOOLS
        if not s.flags & {"gold_issue", "gold_tool_missing", "duplicate"}
    ]
    return tuple(sorted(fit, key=lambda s: seed_for(seed, pool, s.id, "pool")))


def worked(sample: Sample) -> Worked:
    """A labelled sample with its gold calls as the reply: for a pool's samples, and for the arm `oracle`."""
    return Worked(sample.query, format_calls(gold_calls(sample)))


def nearest(queries: Sequence[Query], pool: Sequence[Sample]) -> dict[str, Sample]:
    """By query id the pool's sample with the most similar question."""
    best = likeness([q.question for q in queries], [s.query.question for s in pool]).argmax(axis=1)
    return {q.id: pool[int(i)] for q, i in zip(queries, best, strict=True)}


def likeness(questions: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """How similar each question is to each of the known ones, in [0, 1]: cosine of TF-IDF over words."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # here: it takes a second to import

    vectors = TfidfVectorizer(sublinear_tf=True)
    others = vectors.fit_transform(known)
    return np.asarray((vectors.transform(questions) @ others.T).toarray())


def drawn(queries: Sequence[Query], pool: Sequence[Sample], seed: int) -> dict[str, Sample]:
    """By query id a sample of the pool, drawn with the query's own random number."""
    return {q.id: pool[seed_for(seed, q.benchmark, q.id, "shot") % len(pool)] for q in queries}
