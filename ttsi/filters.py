"""Which synthetic examples are worth learning from: four filters, and writing until an example passes them.

None sees a label. They are not the paper's, which learns from the first example that can be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ttsi import prompts
from ttsi.calls import canonical, parse_calls
from ttsi.method import Filter
from ttsi.stages import Done, Lesson, Stages, Who
from ttsi.synthesizer import folded
from ttsi.types import PAPER_SAMPLING, Example, Generation, Query, Sampling, Synthesis

REJECTED: dict[Filter, str] = {
    "valid": "schema",
    "novel": "copy",
    "agreeing": "disagrees",
    "in_reach": "out_of_reach",
}
"""The code under which a rejected example stands among a synthesis's failures."""
TRIES = 4
"""Examples that are written of a query at most."""
DRAWS = 4


def passing(
    stages: Stages, queries: Sequence[Query], who: Who = "self"
) -> tuple[dict[str, Lesson], dict[str, Done[Synthesis]]]:
    """By query id the lesson of the first K examples that pass the method's filters, and what was written.

    A query of which none passes has no lesson. The failures of what was written name what was rejected; its
    examples are those that passed.
    """
    k = stages.method.k
    kept: dict[str, list[int]] = {q.id: [] for q in queries}
    all_written: dict[str, Done[Synthesis]] = {}
    left = list(queries)
    for index in range(TRIES * k):
        written = stages.synthesize(left, who, first=index, k=1)
        usable = [q for q in left if (w := written[q.id].value) and not w.failed]
        lessons = {q.id: stages.lesson(q, _value(written[q.id]), who, [index]) for q in usable}
        codes, spent = _codes(stages, usable, lessons, written)
        for q in left:
            now = replace(written[q.id], seconds=written[q.id].seconds + spent.get(q.id, 0.0))
            all_written[q.id] = _added(all_written.get(q.id), now, codes.get(q.id, ""))
            kept[q.id] += [index] if codes.get(q.id) == "" else []
        left = [q for q in left if all_written[q.id].value and len(kept[q.id]) < k]
    able = [q for q in queries if kept[q.id] and all_written[q.id].value]
    return {q.id: stages.lesson(q, _value(all_written[q.id]), who, kept[q.id]) for q in able}, all_written


def _codes(
    stages: Stages,
    queries: Sequence[Query],
    lessons: Mapping[str, Lesson],
    written: Mapping[str, Done[Synthesis]],
) -> tuple[dict[str, str], dict[str, float]]:
    """By query id the code of the first filter that rejects its example ("" = none does), and its seconds.

    The cheap ones come first; what they reject is not asked.
    """
    examples = {q.id: _value(written[q.id]).examples[0] for q in queries}
    codes, spent = dict.fromkeys(examples, ""), dict.fromkeys(examples, 0.0)
    for name in sorted(stages.method.filters, key=list(REJECTED).index):
        left = [q for q in queries if not codes[q.id]]
        if name == "valid":
            good = {q.id: not examples[q.id].schema_errors for q in left}
        elif name == "novel":
            good = {q.id: not copies(examples[q.id].question, q) for q in left}
        else:
            most = stages.method.answering.max_tokens
            draws = {"agreeing": Sampling(), "in_reach": replace(PAPER_SAMPLING, n=DRAWS)}
            sampling = replace(draws[name], max_tokens=most)
            asked = stages.under(answering=sampling).probe(left, lessons)
            spent |= {i: spent[i] + done.seconds for i, done in asked.items()}
            same = {q.id: agreements(asked[q.id].value or (), examples[q.id]) for q in left}
            good = {i: (n == 1 if name == "agreeing" else 0 < n < DRAWS) for i, n in same.items()}
        codes |= {i: REJECTED[name] for i, kept in good.items() if not kept}
    return codes, spent


def copies(question: str, query: Query) -> bool:
    """Whether a question is one of the query's user turns, or all of it, up to case and spaces."""
    turns = [m.content for m in query.messages if m.role == "user"]
    return folded(question) in map(folded, [*turns, prompts.transcript(query)])


def agreements(replies: Sequence[Generation], example: Example) -> int:
    """How many of the replies make the example's calls."""
    wanted = canonical(example.calls)
    return sum(bool(c := parse_calls(r.text).calls) and canonical(c) == wanted for r in replies)


def _value(done: Done[Synthesis]) -> Synthesis:
    assert done.value is not None
    return done.value


def _added(before: Done[Synthesis] | None, now: Done[Synthesis], code: str) -> Done[Synthesis]:
    """What was written of a query so far, less the example that a filter rejects with a code."""
    if now.value is None or before is None:
        old, seconds = Synthesis(()), 0.0
    else:
        old, seconds = _value(before), before.seconds
    if now.value is None:
        return now
    examples = () if code else now.value.examples
    failures = (*old.failures, *now.value.failures, *([code] if code else []))
    whole = Synthesis((*old.examples, *examples), failures, old.tokens + now.value.tokens)
    return replace(now, value=whole, seconds=seconds + now.seconds)
