"""A small benchmark written for this project: what the tests and the profile `smoke` are asked.

A dozen short tools, requests made from templates, arguments out of small vocabularies (`fixture.yaml`), so
that a model of some 200,000 parameters learns it in seconds (`tiny.py`). Some requests fit two tools, and
the gold call is now one, now the other: nothing can be sure of them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Split = Literal["test", "train"]
Record = dict[str, Any]

WRITTEN = Path(__file__).with_suffix(".yaml")
_WRITTEN = yaml.safe_load(WRITTEN.read_text())
_VALUES: dict[str, list[Any]] = _WRITTEN["values"]


@dataclass(frozen=True)
class Kind:
    """Requests that mean the same: wordings, and the tools that answer them, each as likely as listed.

    `ambiguous`: more than one tool fits.
    """

    wordings: list[str]
    tools: list[str]

    @property
    def ambiguous(self) -> bool:
        return len(set(self.tools)) > 1


KINDS = tuple(Kind(**kind) for kind in _WRITTEN["kinds"])


def tool(name: str) -> Record:
    """One tool as upstream benchmarks write it: flat parameters and a list of the required ones."""
    about = _WRITTEN["tools"][name]
    names = list(about["parameters"])
    types = {n: {"type": "int" if isinstance(_VALUES[n][0], int) else "str"} for n in names}
    return {"name": name, "description": about["description"], "parameters": types, "required": names}


def draw(rng: random.Random, rare: bool = False) -> Record:
    """One record `{"query", "tools", "answers"}`: a request among tools that can answer it.

    rare: a city in it, if there is one, is one that the training pool never names.
    """
    kind = rng.choice([k for k in KINDS for _ in range(2 if k.ambiguous else 1)])
    wording = rng.choice(kind.wordings)
    values: Record = {}
    for slot in re.findall(r"{(\w+)}", wording):
        values[slot] = rng.choice([v for v in _VALUES[slot] if v not in values.values()])
    if rare and (cities := [s for s in values if _VALUES[s] == _WRITTEN["cities"]]):
        values[cities[-1]] = rng.choice(_WRITTEN["rare"])
    name = rng.choice(kind.tools)
    arguments = {parameter: values[parameter] for parameter in _WRITTEN["tools"][name]["parameters"]}
    names = rng.choice([s for s in _WRITTEN["sets"] if set(kind.tools) <= set(s)])
    answers = [{"name": name, "arguments": arguments}]
    return {"query": wording.format(**values), "tools": [*map(tool, names)], "answers": answers}


def records(split: Split) -> list[Record]:
    """The records of a split: 40 to test on, 200 to train on, no question in both or twice in one.

    The test split ends with a record that has one tool, a conversation, and one with two gold calls.
    """
    special = [r | {"tools": [*map(tool, r["tools"])]} for r in _WRITTEN["special"]]
    test = _distinct("test", 37, set(map(question, special))) + special
    return test if split == "test" else _distinct("train", 200, set(map(question, test)))


def question(record: Record) -> str:
    """What a record's last user turn asks."""
    query = record["query"]
    return query if isinstance(query, str) else str(query[-1]["content"])


def _distinct(split: Split, count: int, taken: set[str]) -> list[Record]:
    rng = random.Random(f"ttsi fixture {split}")
    found: dict[str, Record] = {}
    while len(found) < count:
        record = draw(rng, rare=split == "test" and rng.random() < 0.15)
        if record["query"] not in taken:
            found.setdefault(record["query"], record)
    return list(found.values())
