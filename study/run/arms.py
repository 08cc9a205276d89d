"""The arms: each is three choices, whom it teaches, from what, and how the lesson arrives.

`ttsi.algorithm` runs them all, so that arms stay paired; what they let its stages compute is remembered:
where two arms ask the same of the same question, it is computed once. A new arm is one line of `ARMS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

from study.run import lessons
from study.run.lessons import About
from study.run.stages import Remembered
from ttsi import algorithm
from ttsi.algorithm import Certainty, Lessons, Outcome, Taught, by_adapter, outcome, self_improve, uncertain
from ttsi.calls import canonical, parse_calls
from ttsi.method import THRESHOLDS
from ttsi.seeds import seed_for
from ttsi.stages import Done, Lesson, Replies, Stages
from ttsi.types import Generation, Query, TrainingMode

# --- whom -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whom:
    """Who is taught. whole: it takes all samples to say."""

    choose: algorithm.Whom[Remembered]
    whole: bool = False


def certain(stages: Remembered, queries: Sequence[Query], certainty: Certainty) -> list[Query]:
    """The queries that H calls certain."""
    unsure = {q.id for q in uncertain(stages, queries, certainty)}
    return [q for q in queries if certainty[q.id].value and q.id not in unsure]


def at_random(stages: Remembered, queries: Sequence[Query], certainty: Certainty) -> list[Query]:
    """As many as H would choose, drawn at random: is it H, or the adapting?"""
    drawn = sorted(queries, key=lambda q: seed_for(stages.method.seed, q.benchmark, q.id, "subset"))
    return drawn[: len(uncertain(stages, queries, certainty))]


UNCERTAIN = Whom(uncertain)
CERTAIN = Whom(certain)
EVERYONE = Whom(lambda stages, queries, certainty: queries)
AT_RANDOM = Whom(at_random, whole=True)

# --- from what ------------------------------------------------------------------------------------------


class Give(Protocol):
    """Lessons for queries, out of what a run says that may be learnt from."""

    def __call__(self, stages: Stages, queries: Sequence[Query], about: About) -> Lessons: ...


@dataclass(frozen=True)
class Source:
    """What is learnt. written: a model writes it, so that arms have it in common. whole: of all samples.

    pool: labelled samples, with which H has no place. teacher: another model writes. gold: the test sample
    itself; of all sources that one alone is shown labels.
    """

    give: Give
    written: bool = False
    whole: bool = False
    pool: Literal["in", "out"] | None = None
    teacher: bool = False
    gold: bool = False


OWN = Source(lessons.own, written=True)
TEACHERS = Source(lessons.teachers, written=True, teacher=True)
A_DONORS = Source(lessons.a_donors, written=True, whole=True)
THE_NEAREST = Source(lessons.the_nearest, written=True, whole=True)
ALL_OWN = Source(lessons.all_own, written=True, whole=True)
ONE_FOR_ALL = Source(lessons.one_for_all)
NEAREST_SHOT = Source(lessons.nearest_shot, pool="in")
RANDOM_SHOT = Source(lessons.random_shot, pool="in")
POOL = Source(lessons.pool, pool="in")
OTHER_POOL = Source(lessons.other_pool, pool="out")
GOLD = Source(lessons.gold, gold=True)

# --- how it arrives -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrives:
    """How a lesson reaches the model. trains: in a mode. shared: one adapter for all, so all come at once."""

    teach: algorithm.Arrival[Remembered]
    trains: bool = True
    shared: bool = False


def by_prompt(stages: Remembered, queries: Sequence[Query], taught: Mapping[str, Lesson]) -> Taught:
    """The example is shown in the prompt: no training. Paper: figure 2, left."""
    return Taught(shown=stages.show(queries, taught))


def by_both(stages: Remembered, queries: Sequence[Query], taught: Mapping[str, Lesson]) -> Taught:
    """The example stands in the prompt of the model that was adapted to it. Paper: figure 2, right."""
    return Taught(stages.adapt(queries, taught, shown=True))


def by_shared_adapter(
    stages: Remembered,
    queries: Sequence[Query],
    taught: Mapping[str, Lesson],
    epochs: int | None = None,
    labelled: bool = False,
) -> Taught:
    """One adapter, trained on the lesson that all have in common."""
    if not queries:
        return Taught()
    lesson = taught[queries[0].id]
    fitted, adapted = stages.share(queries, lesson, epochs)
    return Taught(adapted, shared=fitted.value, pool_n=lesson.count if labelled else None)


ADAPTER = Arrives(by_adapter)
PROMPT = Arrives(by_prompt, trains=False)
ADAPTER_AND_PROMPT = Arrives(by_both)
SHARED = Arrives(by_shared_adapter, shared=True)

# --- nobody is taught -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Who answers where nobody is taught. teacher: another model. priced: by what tt_si spends in a mode."""

    give: Callable[[Remembered, Sequence[Query], About], Mapping[str, Done[Replies]]]
    teacher: bool = False
    priced: bool = False


def votes(stages: Remembered, queries: Sequence[Query], about: About) -> dict[str, Done[Replies]]:
    """As many base replies as have the tokens that TT-SI spends on the question, at least one.

    Counted are tokens that the model writes or trains on; both methods read the prompt besides. There are
    `max_votes` replies at most, and the record says how many.
    """
    spent = {o.id: o for o in self_improve(stages, queries)}
    answers = stages.answer(queries)
    able = [q for q in queries if not spent[q.id].error and answers[q.id].value]
    counts = {q.id: _affordable(spent[q.id], answers[q.id], about.max_votes) for q in able}
    nothing = {q.id: Done[Replies](None, spent[q.id].error or answers[q.id].error) for q in queries}
    return nothing | stages.votes(able, counts)


def _affordable(spent: Outcome, answer: Done[Replies], most: int) -> int:
    tokens = sum(len(r.tokens) for r in spent.replies) + (spent.synthesis.tokens if spent.synthesis else 0)
    tokens += spent.fit.tokens if spent.fit else 0
    each = max(1, len(answer.value[0].tokens)) if answer.value else 1
    return min(most, max(1, round(tokens / each)))


AS_IT_IS = Answers(lambda stages, queries, about: stages.answer(queries))
TEACHER = Answers(lambda stages, queries, about: stages.answer(queries, "teacher"), teacher=True)
VOTES = Answers(votes, priced=True)

# --- the arms -------------------------------------------------------------------------------------------


_SELECTS = {"uncertainty", "tau", "answer_with", "surer_by", "filters", "constrained"}
"""What of the method an arm may change: the other keys of results know of it."""


@dataclass(frozen=True)
class Arm:
    """Whom it teaches (or who answers, where nobody is taught), from what, and how the lesson arrives.

    voted: also asked for a majority and pass@5. every_mode: run in each training mode, not in the first only.
    under: what of the run's method is another one here.
    """

    whom: Whom | Answers
    source: Source = OWN
    arrives: Arrives = ADAPTER
    voted: bool = False
    every_mode: bool = False
    under: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if other := self.under.keys() - _SELECTS:
            # Results are stored under the profile's settings, and would be found under the wrong ones.
            raise ValueError(f"an arm can't change {', '.join(other)}: a profile's variant does")

    @property
    def trains(self) -> bool:
        """Whether it is run in a training mode."""
        return self.whom.priced if isinstance(self.whom, Answers) else self.arrives.trains

    @property
    def whole(self) -> bool:
        """Whether it needs all samples at once."""
        taught = isinstance(self.whom, Whom)
        return taught and (self.whom.whole or self.source.whole or self.arrives.shared)  # type: ignore[union-attr]

    @property
    def mixed(self) -> bool:
        """Whether an answer depends on which other samples are asked."""
        return isinstance(self.whom, Whom) and (self.whom.whole or self.source.whole)

    @property
    def teacher(self) -> bool:
        """Whether it asks another model than that of the run."""
        return self.whom.teacher if isinstance(self.whom, Answers) else self.source.teacher

    @property
    def apart(self) -> bool:
        """Whether nothing it computes is any other arm's that runs after the groups."""
        return self.teacher or not self.source.written

    @property
    def pool(self) -> Literal["in", "out"] | None:
        """The training pool that it learns from."""
        return None if isinstance(self.whom, Answers) else self.source.pool


LIKELY: dict[str, Any] = {"uncertainty": "likelihood", "tau": THRESHOLDS["likelihood"]}
SURER: dict[str, Any] = {"answer_with": "surer"}
CONSTRAINED: dict[str, Any] = {"constrained": True}

ARMS: dict[str, Arm] = {
    "base": Arm(AS_IT_IS, voted=True),
    "tt_si": Arm(UNCERTAIN, OWN, ADAPTER, voted=True, every_mode=True),
    "tt_si_and_icl": Arm(UNCERTAIN, OWN, ADAPTER_AND_PROMPT),
    "tt_si_icl": Arm(UNCERTAIN, OWN, PROMPT),
    "tt_si_all": Arm(EVERYONE, OWN, ADAPTER),
    "tt_si_selective": Arm(UNCERTAIN, OWN, ADAPTER, under=LIKELY | SURER),
    "tt_si_likelihood": Arm(UNCERTAIN, OWN, ADAPTER, under=LIKELY),
    "tt_si_surer": Arm(UNCERTAIN, OWN, ADAPTER, under=SURER),
    "constrained": Arm(AS_IT_IS, under=CONSTRAINED),
    "tt_si_constrained": Arm(UNCERTAIN, OWN, ADAPTER, under=CONSTRAINED),
    "tt_si_selective_constrained": Arm(UNCERTAIN, OWN, ADAPTER, under=LIKELY | SURER | CONSTRAINED),
    "tt_si_valid": Arm(UNCERTAIN, OWN, ADAPTER, under={"filters": ("valid",)}),
    "tt_si_novel": Arm(UNCERTAIN, OWN, ADAPTER, under={"filters": ("novel",)}),
    "tt_si_agreeing": Arm(UNCERTAIN, OWN, ADAPTER, under={"filters": ("agreeing",)}),
    "tt_si_in_reach": Arm(UNCERTAIN, OWN, ADAPTER, under={"filters": ("in_reach",)}),
    "tt_si_certain": Arm(CERTAIN, OWN, ADAPTER),
    "icl_nearest": Arm(EVERYONE, NEAREST_SHOT, PROMPT),
    "icl_random": Arm(EVERYONE, RANDOM_SHOT, PROMPT),
    "oracle": Arm(EVERYONE, GOLD, ADAPTER),
    "random_subset": Arm(AT_RANDOM, OWN, ADAPTER),
    "donor": Arm(UNCERTAIN, A_DONORS, ADAPTER),
    "nearest": Arm(UNCERTAIN, THE_NEAREST, ADAPTER),
    "self_consistency": Arm(VOTES),
    "generic": Arm(UNCERTAIN, ONE_FOR_ALL, SHARED),
    "amortised": Arm(UNCERTAIN, ALL_OWN, SHARED),
    "sft": Arm(EVERYONE, POOL, SHARED),
    "sft_ood": Arm(EVERYONE, OTHER_POOL, SHARED),
    "teacher": Arm(TEACHER),
    "tt_d": Arm(UNCERTAIN, TEACHERS, ADAPTER, voted=True),
}
"""Every arm, in the order in which they run: who asks for more comes before who asks for a part of it."""


def play(name: str, stages: Remembered, queries: Sequence[Query], about: About) -> list[Outcome]:
    """An arm's outcomes, in the order of the queries. Only `oracle` gets to see labels.

    Raises `pools.NoPool` where the benchmark has nothing to learn from.
    """
    arm = ARMS[name]
    if not queries:
        return []
    stages = stages.under(**arm.under)
    if isinstance(arm.whom, Answers):
        given = arm.whom.give(stages, queries, about.blind())
        return [outcome(q.id, stages.method.tau, given[q.id]) for q in queries]
    seen = about if arm.source.gold else about.blind()
    teach: algorithm.Arrival[Remembered] = arm.arrives.teach
    if arm.pool and arm.arrives.shared:
        teach = partial(by_shared_adapter, epochs=about.sft_epochs, labelled=True)
    return self_improve(
        stages, queries, arm.whom.choose, lambda s, q: arm.source.give(s, q, seen), teach, asks_h=not arm.pool
    )


class Step(NamedTuple):
    """What is done with samples: an arm, in a mode, an inference and a size of its pool, or what is below."""

    arm: str
    mode: TrainingMode | None = None
    inference: str = "direct"
    size: int = 0


SCORES, EMBEDDINGS = Step("scores"), Step("embeddings")
"""What the estimators need, and where the questions lie."""


@dataclass(frozen=True)
class Work:
    """Steps for the same samples, one after the other: of a group, or of all where an arm needs them."""

    benchmark: str
    seed: int
    steps: tuple[Step, ...]
    samples: tuple[str, ...]
    whole: bool = False


def phases(steps: Sequence[Step]) -> list[list[tuple[list[Step], bool]]]:
    """The steps in phases of parts (steps, whether all samples are needed at once).

    Parts of a phase have no results in common, so they may run at once; the steps of a part may have, and run
    one after the other. The teacher comes last: its model may take the memory of the run's own.
    """
    whole = [s for s in steps if ARMS[s.arm].whole]
    grouped = [s for s in steps if s not in whole]
    own, teachers = ([s for s in grouped if ARMS[s.arm].teacher is t] for t in (False, True))
    apart = [([s], True) for s in whole if ARMS[s.arm].apart]
    together = [[([s], True)] for s in whole if not ARMS[s.arm].apart]
    return [[(own, False)], *together, [*apart, (teachers, False)]]


# --- votes ----------------------------------------------------------------------------------------------


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
