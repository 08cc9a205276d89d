"""G, self-augmentation: the model writes questions like the seed, with their answers. Paper: section 3.2."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ttsi import prompts
from ttsi.calls import answer_of, parse_calls
from ttsi.declared import schema_errors
from ttsi.engines.base import Engine, Request
from ttsi.types import Example, Generation, Layout, Query, Sampling, Synthesis

# Labels stand at the start of a line, with or without Markdown around them; found in linear time.
_LABEL = r"(?:\A|\n)(?:[^\S\n]|[#>*_\-])*{}[^\S\n]*[*_]*:[*_]*"
_QUESTION, _ANSWER = (
    re.compile(_LABEL.format(label.rstrip(":")), re.IGNORECASE)
    for label in (prompts.QUESTION, prompts.ANSWER)
)

READER = 2
"""Version of `read_example`: what another one read is another example. Part of every stored example's key."""
MAX_CALLS = 64
"""Calls in an example. A limit of our own: each is checked against its schema, and a model caught in a loop
may write thousands."""

Seeds = Callable[[str, int], int]
"""(query id, attempt) → seed."""


class Unreadable(ValueError):
    """A reply that holds no usable example; its message is the code of the failure."""


def compared(text: str) -> str:
    """A question as `copy_ratio` reads it: folded, 2,000 characters at most."""
    return folded(text)[:2000]


def folded(text: str) -> str:
    """A text in one case, single-spaced."""
    return " ".join(text.casefold().split())


def copy_ratio(question: str, seed: str) -> float:
    """Similarity of two questions up to case and spaces: 1 = a copy, 0 = nothing in common.

    Ratcliff–Obershelp ratio over characters, as difflib defines it. Questions are compared up to 2,000
    characters: repetitive ones, on which difflib takes half a minute, in under a second.
    """
    left, right = compared(question), compared(seed)
    if left == right:
        return 1.0
    return 2 * _matching(left, right) / (len(left) + len(right))


def _matching(left: str, right: str) -> int:
    """Characters in common: of the longest block in both, the first, and of what is before and after it.

    All blocks of one length are taken in a single pass over a rectangle of (left, right) positions. What is
    left of it are rectangles that share neither row nor column and hold shorter blocks only: with blocks of
    at least 1, 2, … characters there is room for some 60 such passes, where difflib may make 2,000.
    """
    a, b = (np.array([ord(c) for c in text], dtype=np.int32) for text in (left, right))
    ahead = np.zeros((len(a) + 1, len(b) + 1), dtype=np.int16)  # length of the block that begins at (i, j)
    for i in reversed(range(len(a))):
        ahead[i, :-1] = np.where(b == a[i], ahead[i + 1, 1:] + 1, 0)
    total, rectangles = 0, [(0, len(a), 0, len(b))]
    while rectangles:
        top, bottom, first, end = rectangles.pop()
        if top == bottom or first == end:
            continue
        down, across = (np.arange(n, 0, -1, dtype=np.int16) for n in (bottom - top, end - first))
        # A block must not reach beyond its rectangle.
        block = np.minimum(np.minimum(ahead[top:bottom, first:end], across), down[:, None])
        longest = int(block.max())
        if longest == 0:
            continue
        hits, row, column = block == longest, 0, 0
        for i in map(int, np.flatnonzero(hits.any(axis=1))):
            if i < row or not hits[i, column:].any():
                continue
            j = column + int(hits[i, column:].argmax())
            total += longest
            rectangles.append((top + row, top + i, first + column, first + j))
            row, column = i + longest, j + longest
        rectangles.append((top + row, bottom, first + column, end))
    return total


def read_example(reply: str, query: Query, attempt: int = 0) -> Example:
    """The (question, calls) pair a reply holds, with what is known of its quality.

    Raises Unreadable with a code: `no_question`, `unknown_tool`, `too_many_calls`, or a parse error of
    `parse_calls`.
    Arguments are not checked here: schema violations are recorded, not refused.
    """
    reply = answer_of(reply)
    asked, answered = _QUESTION.search(reply), _ANSWER.search(reply)
    if answered is None:
        raise Unreadable("no_question")
    begin = asked.end() if asked and asked.end() <= answered.start() else 0
    question = reply[begin : answered.start()].strip()
    if not question:
        raise Unreadable("no_question")
    # Some models go on with another pair.
    parsed = parse_calls(_QUESTION.split(reply[answered.end() :], maxsplit=1)[0].lstrip())
    if parsed.error:
        raise Unreadable(parsed.error)
    if len(parsed.calls) > MAX_CALLS:
        raise Unreadable("too_many_calls")
    names = {t.name for t in query.tools}
    if any(c.name not in names for c in parsed.calls):
        raise Unreadable("unknown_tool")
    errors = tuple(e for c in parsed.calls for e in schema_errors(c, query.tools))
    return Example(question, parsed.calls, copy_ratio(question, query.question), errors, attempt)


def synthesize(
    engine: Engine,
    queries: Sequence[Query],
    seeds: Seeds,
    sampling: Sampling,
    *,
    k: int = 1,
    first: int = 0,
    retries: int = 5,
    validate: Literal["none", "schema"] = "none",
    novelty: Literal["any", "reject_copies"] = "any",
    layout: Layout = "native",
    instructions: str = "",
) -> list[Synthesis]:
    """K examples per query, written by `engine` from the question and tools alone.

    Example i of a query is drawn with seeds of its own, so that K = 1 is contained in K = 2; `first` skips
    those already there. A reply that
    can't be read is drawn again, at most `retries` times, then given up: an empty Synthesis is a failed
    one. Paper: section 3.2; at most 5 retries on parse errors.
    validate="schema" also refuses schema violations, novelty="reject_copies" copies of the seed.
    """
    tries = [
        _Try(
            query,
            tuple(seeds(query.id, i * (retries + 1) + a) for a in range(retries + 1)),
            validate,
            novelty,
        )
        for query in queries
        for i in range(first, first + k)
    ]
    while open_ones := [t for t in tries if t.seed is not None]:
        requests = [
            Request(
                prompts.synthesis(t.query, layout, instructions),
                seed=t.seed or 0,
                opening=prompts.QUESTION,
                lookup=True,
                again=t.read,
            )
            for t in open_ones
        ]
        before = [t.attempt for t in open_ones]
        for t, attempt, (reply,) in zip(open_ones, before, engine.generate(requests, sampling), strict=True):
            if t.attempt == attempt:  # an engine that asks for no more than the first reply
                t.read(reply)
    each = [tries[i : i + k] for i in range(0, len(tries), k)]
    return [
        Synthesis(
            tuple(t.example for t in own if t.example),
            tuple(code for _, code in sorted((f for t in own for f in t.failures), key=lambda f: f[0])),
            sum(t.tokens for t in own),
        )
        for own in each
    ]


@dataclass
class _Try:
    """An example in the making. seeds: of its attempts, the first and the retries."""

    query: Query
    seeds: Sequence[int]
    validate: str
    novelty: str
    attempt: int = 0
    tokens: int = 0
    example: Example | None = None
    failures: list[tuple[int, str]] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        """Of the next attempt; None: there is an example, or no retry is left."""
        return None if self.example or self.attempt == len(self.seeds) else self.seeds[self.attempt]

    def read(self, reply: Generation) -> int | None:
        """Takes an attempt's reply; the seed of the next, if one is needed."""
        self.tokens += len(reply.tokens)
        try:
            example = read_example(reply.text, self.query, self.attempt)
            if self.validate == "schema" and example.schema_errors:
                raise Unreadable("schema")
            if self.novelty == "reject_copies" and example.copy_ratio == 1:
                raise Unreadable("copy")
            self.example = example
        except Unreadable as error:
            self.failures.append((self.attempt, str(error)))
        self.attempt += 1
        return self.seed
