"""Algorithm 1 and its rivals. Each arm is a few lines over the same stages, so that arms stay paired.

An arm takes queries and gives an outcome for each. What it lets the stages compute they remember: where two
arms ask the same of the same question, it is computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from study.data import pools
from study.data.pools import Worked
from study.run import keys
from study.run.outcomes import NOT_RUN, Adapted, Done, Material, Outcome, Setting, Stages, Who
from ttsi.calls import canonical, format_calls, parse_calls
from ttsi.seeds import seed_for
from ttsi.types import Call, Generation, Message, Query, Sample, Synthesis, Tool, Uncertainty

Share = Literal["all", "uncertain", "certain", "once"]
Play = Callable[[Stages, Sequence[Query], Setting], list[Outcome]]


@dataclass(frozen=True)
class Arm:
    """An arm and how it is run.

    trains: once per training mode. voted: also by majority and pass@5. whole: it needs all samples at once,
    and runs after the others. pool: what it learns from. needs: its stages with the samples that each is
    for, as the plan counts them.
    """

    play: Play | None
    needs: tuple[tuple[str, Share], ...]
    trains: bool = False
    voted: bool = False
    whole: bool = False
    pool: Literal["in", "out"] | None = None


# --- Algorithm 1 ----------------------------------------------------------------------------------------


def base(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """The model as it is."""
    answers = stages.answer(queries)
    return [_answered(q, answers[q.id]) for q in queries]


def tt_si(
    stages: Stages, queries: Sequence[Query], setting: Setting, writer: Who = "self", shown: bool = False
) -> list[Outcome]:
    """Algorithm 1: adapt to the questions the model is unsure about, answer the rest as it is."""
    certainty = stages.score(queries)  # H
    uncertain = [q for q in queries if _unsure(certainty[q.id], setting.tau)]
    return _self_improved(stages, queries, uncertain, setting, certainty, writer, shown)


def tt_d(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """TT-SI with examples that a teacher writes. Paper: section 3.2."""
    return tt_si(stages, queries, setting, writer="teacher")


# --- TT-SI with another H -------------------------------------------------------------------------------


def tt_si_all(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """TT-SI without H: every question is adapted to. Paper: table 2, last row."""
    return _self_improved(stages, queries, queries, setting, stages.score(queries))


def tt_si_certain(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """TT-SI upside down: only what H calls certain is adapted to. Paper: arXiv v1."""
    certainty = stages.score(queries)
    certain = [q for q in queries if certainty[q.id].value and not _unsure(certainty[q.id], setting.tau)]
    return _self_improved(stages, queries, certain, setting, certainty)


def random_subset(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """As many questions adapted to as H would choose, drawn at random: is it H, or the adapting?"""
    certainty = stages.score(queries)
    count = sum(_unsure(certainty[q.id], setting.tau) for q in queries)
    drawn = sorted(queries, key=lambda q: seed_for(setting.seed, q.benchmark, q.id, "subset"))
    return _self_improved(stages, queries, drawn[:count], setting, certainty)


# --- examples in the prompt -----------------------------------------------------------------------------


def tt_si_icl(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """H and G as in TT-SI, but the example is shown in the prompt: no training. Paper: figure 2, left."""
    answers, certainty = stages.answer(queries), stages.score(queries)
    written = stages.synthesize([q for q in queries if _unsure(certainty[q.id], setting.tau)])
    usable = [q for q in queries if q.id in written and _usable(written[q.id])]
    shown = stages.shown(usable, {q.id: stages.written(q) for q in usable})
    return [
        _put_together(q, shown.get(q.id, answers[q.id]), certainty[q.id], written.get(q.id), setting)
        for q in queries
    ]


def tt_si_and_icl(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """TT-SI, and the example stands in the prompt of the adapted model too. Paper: figure 2, right."""
    return tt_si(stages, queries, setting, shown=True)


def icl_nearest(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """One labelled example out of the training pool in the prompt: that with the most similar question."""
    pool = pools.load(queries[0].benchmark, "in", setting.sft_calls, setting.seed)
    return _with_shots(stages, queries, pools.nearest(queries, pool))


def icl_random(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """One labelled example out of the training pool in the prompt, drawn at random."""
    pool = pools.load(queries[0].benchmark, "in", setting.sft_calls, setting.seed)
    return _with_shots(stages, queries, pools.drawn(queries, pool, setting.seed))


# --- one adapter for many questions ---------------------------------------------------------------------


def sft(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """One adapter trained on the benchmark's own training pool, then plain inference."""
    pool = pools.load(queries[0].benchmark, "in", setting.sft_calls, setting.seed)
    return _from_pool(stages, queries, pool[: setting.sft_samples], setting)


def sft_ood(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """One adapter trained on samples of other functions. Paper: figure 2, right, with xLAM."""
    pool = pools.load(queries[0].benchmark, "out", "all", setting.seed)
    return _from_pool(stages, queries, pool[: setting.ood_size], setting)


def amortised(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """One adapter trained on all the examples that TT-SI wrote for its uncertain questions."""
    certainty = stages.score(queries)
    uncertain = [q for q in queries if _unsure(certainty[q.id], setting.tau)]
    written = stages.synthesize(uncertain)
    taught = [q for q in uncertain if _usable(written[q.id])]
    taught.sort(key=lambda q: seed_for(setting.seed, q.benchmark, q.id, "order"))
    if _half_known(certainty, written):
        return [Outcome(q.id, error=NOT_RUN) for q in queries]
    if not taught:
        return base(stages, queries, setting)
    parts = [stages.written(q) for q in taught]
    names = [{"sample": q.id, "of": p.name} for q, p in zip(taught, parts, strict=True)]
    everything = Material(keys.digest(names), lambda: tuple(w for p in parts for w in p.read()))
    return _shared(stages, queries, uncertain, everything, setting, certainty)


def generic(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """One adapter trained on one example that has nothing to do with any question: the format, no more."""
    certainty = stages.score(queries)
    uncertain = [q for q in queries if _unsure(certainty[q.id], setting.tau)]
    example = Material(keys.digest([_GENERIC]), lambda: (_GENERIC,))
    return _shared(stages, queries, uncertain, example, setting, certainty)


def donor(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """TT-SI with the example of the next uncertain question that has other tools, trained under those."""
    answers, certainty = stages.answer(queries), stages.score(queries)
    uncertain = [q for q in queries if _unsure(certainty[q.id], setting.tau)]
    written = stages.synthesize(uncertain)
    if _half_known(certainty, written):
        return [Outcome(q.id, error=NOT_RUN) for q in queries]
    usable = [q for q in uncertain if _usable(written[q.id])]
    donors = {q.id: d for q in uncertain if (d := _next_with_other_tools(q, uncertain, usable))}
    material = {}
    for i, d in donors.items():
        given = stages.written(d)
        material[i] = Material({"donor": d.id, "of": given.name}, given.read)
    adapted = stages.adapt([q for q in queries if q.id in donors], material, setting.mode)
    given_by = {i: written[d.id] for i, d in donors.items()}
    return [
        _put_together(q, answers[q.id], certainty[q.id], given_by.get(q.id), setting, adapted.get(q.id))
        for q in queries
    ]


# --- bounds and controls --------------------------------------------------------------------------------


def teacher(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """The teacher answers for itself."""
    answers = stages.answer(queries, who="teacher")
    return [_answered(q, answers[q.id]) for q in queries]


def self_consistency(stages: Stages, queries: Sequence[Query], setting: Setting) -> list[Outcome]:
    """The vote of as many base replies as have the tokens that TT-SI spends on the question, at least one.

    Counted are tokens that the model writes or trains on; both methods read the prompt besides. The vote
    can't have more than `max_votes` replies, and the record says how many it had.
    """
    spent = {o.id: o for o in tt_si(stages, queries, setting)}
    answers = stages.answer(queries)
    able = [q for q in queries if not spent[q.id].error and answers[q.id].value]
    counts = {q.id: _affordable(spent[q.id], answers[q.id], setting.max_votes) for q in able}
    votes = stages.votes(able, counts)
    nothing = {
        q.id: Done[tuple[Generation, ...]](None, spent[q.id].error or answers[q.id].error) for q in queries
    }
    return [_answered(q, votes.get(q.id) or nothing[q.id]) for q in queries]


def oracle(
    stages: Stages, queries: Sequence[Query], setting: Setting, samples: Mapping[str, Sample]
) -> list[Outcome]:
    """Trained on the test sample itself: an upper bound, and the one arm that builds an example from gold."""
    answers, certainty = stages.answer(queries), stages.score(queries)
    labelled = [q for q in queries if samples[q.id].gold]
    material = {}
    for q in labelled:
        right = pools.worked(samples[q.id])
        material[q.id] = Material(keys.digest([right]), lambda right=right: (right,))  # type: ignore[misc]
    adapted = stages.adapt(labelled, material, setting.mode)
    return [
        _put_together(q, answers[q.id], certainty[q.id], None, setting, adapted.get(q.id)) for q in queries
    ]


_ANSWER: tuple[str, Share] = ("answer", "all")
_H: tuple[str, Share] = ("score", "all")
_G: tuple[str, Share] = ("example", "uncertain")
_T: tuple[str, Share] = ("adapted", "uncertain")
_FIT: tuple[str, Share] = ("fit", "once")

ARMS: dict[str, Arm] = {
    "base": Arm(base, (_ANSWER,), voted=True),
    "tt_si": Arm(tt_si, (_ANSWER, _H, _G, _T), trains=True, voted=True),
    "tt_si_and_icl": Arm(tt_si_and_icl, (_ANSWER, _H, _G, ("adapted+shown", "uncertain")), trains=True),
    "tt_si_icl": Arm(tt_si_icl, (_ANSWER, _H, _G, ("shown", "uncertain"))),
    "tt_si_all": Arm(tt_si_all, (_ANSWER, _H, ("example", "all"), ("adapted", "all")), trains=True),
    "tt_si_certain": Arm(
        tt_si_certain, (_ANSWER, _H, ("example", "certain"), ("adapted", "certain")), trains=True
    ),
    "icl_nearest": Arm(icl_nearest, (("shown", "all"),), pool="in"),
    "icl_random": Arm(icl_random, (("shown", "all"),), pool="in"),
    "oracle": Arm(None, (_ANSWER, _H, ("adapted", "all")), trains=True),  # with gold: see `play`
    "random_subset": Arm(random_subset, (_ANSWER, _H, _G, _T), trains=True, whole=True),
    "donor": Arm(donor, (_ANSWER, _H, _G, _T), trains=True, whole=True),
    "self_consistency": Arm(
        self_consistency, (_ANSWER, _H, _G, _T, ("votes", "all")), trains=True, whole=True
    ),
    "generic": Arm(generic, (_ANSWER, _H, _FIT, ("shared", "uncertain")), trains=True, whole=True),
    "amortised": Arm(amortised, (_ANSWER, _H, _G, _FIT, ("shared", "uncertain")), trains=True, whole=True),
    "sft": Arm(sft, (_FIT, ("shared", "all")), trains=True, whole=True, pool="in"),
    "sft_ood": Arm(sft_ood, (_FIT, ("shared", "all")), trains=True, whole=True, pool="out"),
    "teacher": Arm(teacher, (("teacher answer", "all"),), whole=True),
    "tt_d": Arm(
        tt_d, (_ANSWER, _H, ("teacher example", "uncertain"), _T), trains=True, voted=True, whole=True
    ),
}
"""Every arm, in the order in which they run: who asks for more comes before who asks for a part of it."""


def play(
    arm: str, stages: Stages, queries: Sequence[Query], setting: Setting, samples: Mapping[str, Sample]
) -> list[Outcome]:
    """An arm's outcomes, in the order of the queries. Only `oracle` gets to see `samples`.

    Raises `pools.NoPool` where the benchmark has nothing to learn from.
    """
    if not queries:
        return []
    played = ARMS[arm].play
    if played is None:
        return oracle(stages, queries, setting, samples)
    return played(stages, queries, setting)


def majority(replies: Sequence[Generation]) -> Generation:
    """The reply whose calls are the most frequent, the first of them on a tie.

    Replies that can't be parsed vote only if none can: then the first reply stands.
    """
    given = vote_keys(replies)
    counts = Counter(k for k in given if k is not None)
    if not counts:
        return replies[0]
    winner = counts.most_common(1)[0][0]  # insertion order decides a tie: the first seen
    return replies[given.index(winner)]


def vote_keys(replies: Iterable[Generation]) -> list[str | None]:
    """What each reply votes for: its canonical calls, None where it can't be parsed."""
    return [None if (p := parse_calls(r.text)).error else canonical(p.calls) for r in replies]


# --- what arms are put together from --------------------------------------------------------------------

_GENERIC = Worked(
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


def _self_improved(
    stages: Stages,
    queries: Sequence[Query],
    chosen: Sequence[Query],
    setting: Setting,
    certainty: Mapping[str, Done[Uncertainty]],
    writer: Who = "self",
    shown: bool = False,
) -> list[Outcome]:
    """G and T for the chosen queries, the base model's answer for the rest."""
    answers = stages.answer(queries)
    written = stages.synthesize(chosen, writer)  # G
    usable = [q for q in chosen if _usable(written[q.id])]
    material = {q.id: stages.written(q, writer) for q in usable}
    adapted = stages.adapt(usable, material, setting.mode, shown)  # T
    return [
        _put_together(q, answers[q.id], certainty[q.id], written.get(q.id), setting, adapted.get(q.id))
        for q in queries
    ]


def _unsure(certainty: Done[Uncertainty], tau: float) -> bool:
    return certainty.value is not None and certainty.value.margin < tau


def _half_known(*stages: Mapping[str, Done[Any]]) -> bool:
    """Whether some of what all the samples' outcomes depend on was not run yet."""
    return any(d.error == NOT_RUN for stage in stages for d in stage.values())


def _usable(written: Done[Synthesis]) -> bool:
    return written.value is not None and not written.value.failed


def _with_shots(stages: Stages, queries: Sequence[Query], shots: Mapping[str, Sample]) -> list[Outcome]:
    material = {}
    for i, sample in shots.items():
        shot = pools.worked(sample)
        material[i] = Material(keys.digest([shot]), lambda shot=shot: (shot,))  # type: ignore[misc]
    shown = stages.shown(queries, material)
    return [_answered(q, shown[q.id]) for q in queries]


def _from_pool(
    stages: Stages, queries: Sequence[Query], pool: Sequence[Sample], setting: Setting
) -> list[Outcome]:
    lessons = tuple(map(pools.worked, pool))
    material = Material(keys.digest(lessons), lambda: lessons)
    answers = stages.answer(queries)
    fitted, adapted = stages.share(queries, material, setting.mode, setting.sft_epochs)
    return [
        replace(
            _put_together(q, answers[q.id], None, None, setting, adapted[q.id]),
            shared=fitted.value,
            pool_n=len(pool),
        )
        for q in queries
    ]


def _shared(
    stages: Stages,
    queries: Sequence[Query],
    chosen: Sequence[Query],
    material: Material,
    setting: Setting,
    certainty: Mapping[str, Done[Uncertainty]],
) -> list[Outcome]:
    """One adapter answers the chosen queries, the base model the rest."""
    answers = stages.answer(queries)
    fitted, adapted = stages.share(chosen, material, setting.mode)
    return [
        replace(
            _put_together(q, answers[q.id], certainty[q.id], None, setting, adapted.get(q.id)),
            shared=fitted.value,
        )
        for q in queries
    ]


def _next_with_other_tools(query: Query, uncertain: Sequence[Query], usable: Sequence[Query]) -> Query | None:
    """The next usable query in the order of the uncertain ones, from the first again after the last."""
    own, able = {t.name for t in query.tools}, {q.id for q in usable}
    at = next(i for i, q in enumerate(uncertain) if q.id == query.id)
    following = [*uncertain[at + 1 :], *uncertain[:at]]
    return next((q for q in following if q.id in able and {t.name for t in q.tools} != own), None)


def _affordable(spent: Outcome, answer: Done[tuple[Generation, ...]], most: int) -> int:
    tokens = sum(len(r.tokens) for r in spent.replies) + (spent.synthesis.tokens if spent.synthesis else 0)
    tokens += spent.fit.tokens if spent.fit else 0
    each = max(1, len(answer.value[0].tokens)) if answer.value else 1
    return min(most, max(1, round(tokens / each)))


def _answered(query: Query, answer: Done[tuple[Generation, ...]]) -> Outcome:
    return Outcome(
        query.id, answer.value or (), answer.error, source=answer.source, seconds={"answer": answer.seconds}
    )


def _put_together(
    query: Query,
    answer: Done[tuple[Generation, ...]],
    certainty: Done[Uncertainty] | None,
    written: Done[Synthesis] | None,
    setting: Setting,
    trained: Done[Adapted] | None = None,
) -> Outcome:
    """The stages of one sample as its outcome; a failure of the machine at any of them is the outcome's."""
    used: list[Done[Any]] = [d for d in (certainty, written, trained) if d is not None]
    done = trained.value if trained else None
    replaced = done is not None and bool(done.replies)
    if not replaced:
        used.append(answer)
    known = certainty.value if certainty else None
    seconds = {
        "h": certainty.seconds if certainty else 0.0,
        "g": written.seconds if written else 0.0,
        "t": done.seconds_t if done else 0.0,
        "answer": done.seconds_answer if done and replaced else answer.seconds,
    }
    return Outcome(
        query.id,
        done.replies if done and replaced else answer.value or (),
        error=next((d.error for d in used if d.error), ""),
        margin=known.margin if known else None,
        tokens_h=known.tokens if known else 0,
        uncertain=known is not None and known.margin < setting.tau,
        adapted=replaced,
        diverged=done is not None and not replaced,
        synthesis=written.value if written else None,
        fit=done.fit if done else None,
        source="loaded" if any(d.source == "loaded" for d in used) else "computed",
        seconds=seconds,
    )
