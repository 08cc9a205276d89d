"""From what arms learn: examples that models write, labelled samples, one example for all.

Each is a function of stages, queries and what a run says of its pools; `gold` alone looks at labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from study.data import pools
from study.run import keys
from ttsi.algorithm import Lessons, own_examples
from ttsi.calls import format_calls
from ttsi.seeds import seed_for
from ttsi.stages import NOT_RUN, Done, Lesson, Stages
from ttsi.types import Call, Message, Query, Sample, Synthesis, Tool, Worked


@dataclass(frozen=True)
class About:
    """What a run says of what arms may learn from and spend. samples: the test's own, with their labels.

    size: training samples of `sft_ood`.
    """

    sft_samples: int | None = None
    sft_calls: Literal["single", "all"] = "single"
    sft_epochs: int | None = None
    size: int = 1
    max_votes: int = 40
    samples: Mapping[str, Sample] = field(default_factory=dict)

    def blind(self) -> About:
        """The same without the labels."""
        return replace(self, samples={})


# --- what models write ----------------------------------------------------------------------------------


def own(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """Each query's own examples."""
    return own_examples(stages, queries)


def teachers(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """Examples that a teacher writes of each query. Paper: section 3.2."""
    return own_examples(stages, queries, "teacher")


def a_donors(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """The examples of the next of the queries that has other tools, trained under those."""
    wrote = own_examples(stages, queries)
    usable = [q for q in queries if q.id in wrote.by_id]
    donors = {q.id: d for q in queries if (d := next_with_other_tools(q, queries, usable))}
    return _given(wrote, donors)


def the_nearest(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """The examples of that other query whose question is the most similar, trained under its tools."""
    wrote = own_examples(stages, queries)
    usable = [q for q in queries if q.id in wrote.by_id]
    if len(usable) < 2:
        return Lessons(unknown=_half_known(wrote.written))
    alike = pools.likeness([q.question for q in queries], [q.question for q in usable])
    alike[[[q.id == u.id for u in usable] for q in queries]] = -1.0
    best = alike.argmax(axis=1)
    return _given(wrote, {q.id: usable[int(i)] for q, i in zip(queries, best, strict=True)})


def _given(wrote: Lessons, donors: Mapping[str, Query]) -> Lessons:
    """By query id what was written of its donor."""
    given = {i: wrote.by_id[d.id] for i, d in donors.items()}
    return Lessons(
        {i: replace(g, name={"donor": donors[i].id, "of": g.name}) for i, g in given.items()},
        {i: wrote.written[d.id] for i, d in donors.items()},
        unknown=_half_known(wrote.written),
    )


def all_own(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """All the examples that are written of the queries, as one lesson."""
    wrote = own_examples(stages, queries)
    order = sorted(
        (q for q in queries if q.id in wrote.by_id),
        key=lambda q: seed_for(stages.method.seed, q.benchmark, q.id, "order"),
    )
    parts = [wrote.by_id[q.id] for q in order]
    name = keys.digest([{"sample": q.id, "of": p.name} for q, p in zip(order, parts, strict=True)])
    together = Lesson(lambda: tuple(w for p in parts for w in p.read()), name, sum(p.count for p in parts))
    for_all = dict.fromkeys((q.id for q in queries), together) if parts else {}
    return Lessons(for_all, unknown=_half_known(wrote.written))


def next_with_other_tools(query: Query, among: Sequence[Query], usable: Sequence[Query]) -> Query | None:
    """The next usable query in the order of `among`, from the first again after the last."""
    tools, able = {t.name for t in query.tools}, {q.id for q in usable}
    at = next(i for i, q in enumerate(among) if q.id == query.id)
    following = [*among[at + 1 :], *among[:at]]
    return next((q for q in following if q.id in able and {t.name for t in q.tools} != tools), None)


def _half_known(written: Mapping[str, Done[Synthesis]]) -> bool:
    """Whether some of what all the samples' lessons depend on was not run yet."""
    return any(d.error == NOT_RUN for d in written.values())


# --- what people labelled -------------------------------------------------------------------------------


def nearest_shot(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """For each query the training pool's sample with the most similar question."""
    return _shots(pools.nearest(queries, _in_domain(stages, queries, about)))


def random_shot(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """For each query a sample of the training pool, drawn at random."""
    return _shots(pools.drawn(queries, _in_domain(stages, queries, about), stages.method.seed))


def pool(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """The benchmark's own training pool, as one lesson."""
    return _from_pool(queries, _in_domain(stages, queries, about)[: about.sft_samples])


def other_pool(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """Samples of other functions, as one lesson. Paper: figure 2, right, with xLAM."""
    return _from_pool(
        queries, pools.load(queries[0].benchmark, "out", "all", stages.method.seed)[: about.size]
    )


def gold(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """The test sample itself: an upper bound, and the one source that builds an example from labels."""
    return _shots({q.id: s for q in queries if (s := about.samples[q.id]).gold})


def _in_domain(stages: Stages, queries: Sequence[Query], about: About) -> list[Sample]:
    return pools.load(queries[0].benchmark, "in", about.sft_calls, stages.method.seed)


def _shots(samples: Mapping[str, Sample]) -> Lessons:
    return Lessons({i: lesson([pools.worked(sample)]) for i, sample in samples.items()})


def _from_pool(queries: Sequence[Query], samples: Sequence[Sample]) -> Lessons:
    shared = lesson(tuple(map(pools.worked, samples)))
    return Lessons(dict.fromkeys((q.id for q in queries), shared))


def lesson(taught: Sequence[Worked]) -> Lesson:
    """Worked examples as a lesson, named after all that is in them."""
    return Lesson(lambda: tuple(taught), keys.digest(taught), len(taught))


# --- one for all ----------------------------------------------------------------------------------------

GENERIC = Worked(
    Query(
        "generic",
        "generic",
        (Message("user", "Reserve a table for four at Luigi's on Friday at 7 pm."),),
        (
            Tool(
                "reserve_table",
                "Reserve a table at a restaurant.",
                {
                    "type": "object",
                    "properties": {
                        "restaurant": {"type": "string", "description": "Name of the restaurant."},
                        "people": {"type": "integer", "description": "Number of guests."},
                        "day": {"type": "string", "description": "Day of the week."},
                        "time": {"type": "string", "description": "Time of day, e.g. 18:30."},
                    },
                    "required": ["restaurant", "people", "day"],
                },
            ),
            Tool(
                "cancel_reservation",
                "Cancel a reservation.",
                {
                    "type": "object",
                    "properties": {"code": {"type": "string", "description": "The reservation's code."}},
                    "required": ["code"],
                },
            ),
        ),
    ),
    format_calls(
        [Call("reserve_table", {"restaurant": "Luigi's", "people": 4, "day": "Friday", "time": "19:00"})]
    ),
)
"""The one example of the arm `generic`, written for it."""


def one_for_all(stages: Stages, queries: Sequence[Query], about: About) -> Lessons:
    """One example that has nothing to do with any question: the format, no more."""
    return Lessons(dict.fromkeys((q.id for q in queries), lesson([GENERIC])))
