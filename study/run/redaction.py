"""What may not leave: text of a benchmark in what models wrote.

It is replaced by its SHA-256 where it resembles its sample's question or quotes eight words in a row of any
prompt. Numbers, verdicts and sample ids stay.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from study.data import benchmarks, pools
from study.run.frames import hidden
from study.run.memory import REDACTED
from ttsi.synthesizer import compared, copy_ratio
from ttsi.types import Sample

FREE = frozenset({"bfcl", "fixture"})
"""Benchmarks that may be quoted: BFCL by its licence, the fixture because it is this project's."""
QUOTE = 8
"""So many words in a row are a quotation."""
ALIKE = 0.6
"""From this similarity on, a text is taken for its sample's question."""
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


class Redactor:
    """Finds the text of one benchmark in what models wrote."""

    def __init__(self, benchmark: str, samples: Mapping[str, Sample]) -> None:
        self.free = benchmark in FREE
        self.samples = samples
        self._forbidden: set[tuple[str, ...]] = set()
        if self.free:
            return
        shown = [*samples.values()]
        if benchmark in pools.IN_DOMAIN:
            shown += benchmarks.load(pools.IN_DOMAIN[benchmark])
        for sample in shown:
            texts = [m.content for m in sample.messages]
            for tool in sample.tools:
                texts += [tool.description, *_words(dict(tool.parameters))]
            for text in texts:
                self._forbidden |= quotations(text)

    def matches(self, text: str, sample: str) -> bool:
        """Whether a text resembles its sample's question, or quotes any prompt."""
        if self.free or not text.strip():
            return False
        if quotations(text) & self._forbidden:
            return True
        if (known := self.samples.get(sample)) is None:
            return False
        # An argument may be the question itself, too short to be a quotation and lost in the reply around it.
        question = known.query.question
        return any(_alike(part, question) for part in (text, *_QUOTED.findall(text)))


def quotations(text: str) -> set[tuple[str, ...]]:
    """Every eight words in a row of a text, without case and punctuation."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + QUOTE]) for i in range(len(words) - QUOTE + 1)}


@lru_cache(1 << 16)  # most replies to a question are the same in every arm
def _alike(text: str, question: str) -> bool:
    left, right = compared(text), compared(question)
    # Each of the first two bounds the third from above and is far cheaper; a matcher first indexes its texts.
    if 2 * min(len(left), len(right)) < ALIKE * (len(left) + len(right)):
        return False
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    return matcher.quick_ratio() >= ALIKE and copy_ratio(text, question) >= ALIKE


def _words(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _words(part)
    elif isinstance(value, list):
        for part in value:
            yield from _words(part)


def redacted(stage: str, value: Any, hides: Callable[[str], bool]) -> tuple[str, Any] | None:
    """(stage, value) fit to leave; None where nothing would be left of use."""
    if not any(map(hides, _words(value))):
        return stage, value
    if stage != "example":
        return None

    examples = []
    for example in value["examples"]:
        if any(map(hides, _words(example))):
            example = {
                **example,
                "question": hidden(example["question"]),
                "calls": [
                    {**c, "name": hidden(c["name"]) if hides(c["name"]) else c["name"], "arguments": {}}
                    for c in example["calls"]
                ],
                "schema_errors": [""] * len(example["schema_errors"]),
            }
        examples.append(example)
    return REDACTED + stage, {**value, "examples": examples}
