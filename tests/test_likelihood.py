"""q, the likelihood of an answer: by hand, by part, and blind to what it must not see."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from study.data import models
from ttsi.calls import format_calls, parse_calls
from ttsi.engines.chat import Chat
from ttsi.estimator import answer_parts, likelihood
from ttsi.types import Call, Generation


def spelled(*pieces: tuple[str, float], opening: str = "") -> tuple[Generation, list[int]]:
    """A reply of these tokens, each with its probability, and the characters covered after each."""
    text, ends = opening, []
    for piece, _ in pieces:
        text += piece
        ends.append(len(text))
    logs = tuple(math.log(p) for _, p in pieces)
    return Generation(text, tuple(range(len(pieces))), logs, True), ends


def by_part(reply: Generation, ends: list[int]) -> dict[str, float]:
    return {part: likelihood(logs) for part, logs in answer_parts(reply, ends).items()}


def test_it_is_the_product_of_the_tokens() -> None:
    assert likelihood([math.log(0.5), math.log(0.4)]) == pytest.approx(0.2)
    assert likelihood([0.0]) == 1.0
    assert likelihood([]) == 0.0


OPENED = [("find", 0.5), ('", "arguments": {"', 0.8), ("city", 0.9), ('": "', 1.0), ("Rome", 0.25)]


@pytest.mark.parametrize(
    ("pieces", "opening", "want"),
    [
        pytest.param(
            [*OPENED, ('"}}]', 0.6), ("", 0.9)],
            '<tool_call>[{"name": "',
            {"name": 0.5, "keys": 0.8 * 0.9 * 0.6 * 0.9, "values": 0.25},
            id="behind an opening, with the end of the turn",
        ),
        pytest.param(
            [("Sure: ", 0.1), ('{"name": "', 0.2), *OPENED, ('"}}', 0.6)],
            "",
            {"name": 0.5, "keys": 0.8 * 0.9 * 0.6, "values": 0.25},
            id="free: what stands before the name doesn't count",
        ),
        pytest.param(
            [
                ('{"', 0.2),
                ('arguments": {"city": "', 0.9),
                ("Rome", 0.25),
                ('"}, "name": "', 0.8),
                ("f", 0.5),
                ('"}', 0.6),
            ],
            "",
            {"name": 0.5, "keys": 0.9 * 0.8 * 0.6, "values": 0.25},
            id="arguments before the name count",
        ),
        pytest.param(
            [('<think>"name": "f"?</think>', 0.1), ('{"name": "', 0.2), ("f", 0.5), ('"}', 0.6)],
            "",
            {"name": 0.5, "keys": 0.6, "values": 0.0},  # of no tokens
            id="reasoning about a name doesn't",
        ),
        pytest.param(
            [
                ("f", 0.5),
                ('", "arguments": {"a":', 0.5),
                (" [", 1.0),
                ("1", 0.3),
                (", ", 0.7),
                ("2", 0.2),
                ("]}}]", 0.9),
            ],
            '<tool_call>[{"name": "',
            {"name": 0.5, "keys": 0.5 * 0.9, "values": 0.3 * 0.7 * 0.2},
            id="a list is one value, commas and all",
        ),
        pytest.param(
            [
                ("f", 0.5),
                ('", "arguments": {"a": ', 0.5),
                ('{"b": "', 0.3),
                ("x", 0.5),
                ('"}', 0.5),
                ("}}, ", 0.9),
                ('{"name": "', 0.4),
                ("g", 0.1),
                ('", "arguments": {}}]', 0.8),
            ],
            '<tool_call>[{"name": "',
            {"name": 0.5 * 0.1, "keys": 0.5 * 0.9 * 0.4 * 0.8, "values": 0.3 * 0.5 * 0.5},
            id="a nested object is a value; two calls",
        ),
        pytest.param(
            [("f", 0.5), ('", "arguments": {"name": "', 0.5), ("arguments", 0.2), ('"}}]', 0.9)],
            '<tool_call>[{"name": "',
            {"name": 0.5, "keys": 0.5 * 0.9, "values": 0.2},
            id="an argument called name",
        ),
    ],
)
def test_by_part(pieces: list[tuple[str, float]], opening: str, want: dict[str, float]) -> None:
    reply, ends = spelled(*pieces, opening=opening)
    assert by_part(reply, ends) == pytest.approx(want)


@pytest.mark.parametrize(
    "text", ["", "I can't do that.", '{"city": "Rome"}', '<tool_call>[{"name": "f", "arguments": {', "[]"]
)
def test_no_readable_call_is_no_likely_answer(text: str) -> None:
    reply = Generation(text, tuple(range(len(text))), (0.0,) * len(text), True)
    assert by_part(reply, list(range(1, len(text) + 1))) == {"name": 0.0, "keys": 0.0, "values": 0.0}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.builds(
        Call, st.text('abc"\\\n', min_size=1, max_size=5), st.dictionaries(st.text(max_size=4), VALUES)
    ),
    min_size=1,
    max_size=3,
)


@given(CALLS, st.data())
def test_the_parts_multiply_to_the_whole_whatever_is_called(calls: list[Call], data: st.DataObject) -> None:
    text = format_calls(calls)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    ends = [*sorted(cuts), len(text)]
    logs = tuple(-0.01 * (i + 1) for i in range(len(ends)))
    reply = Generation(text, tuple(range(len(ends))), logs, True)
    parts = answer_parts(reply, ends)
    start = text.index('"', text.index('"name":') + 7) + 1
    counted = [log for end, log in zip(ends, logs, strict=True) if end > start]
    assert sorted(log for part in parts.values() for log in part) == sorted(counted)
    assert parse_calls(text).calls == tuple(calls)


def test_names_and_values_are_found_character_by_character() -> None:
    calls = [Call("f", {"a": 'x"y', "b": [1, {"c": None}]}), Call("g", {})]
    text = format_calls(calls)
    reply = Generation(text, tuple(range(len(text))), (-1.0,) * len(text), True)
    parts = answer_parts(reply, list(range(1, len(text) + 1)))
    assert len(parts["name"]) == len('f"g"')
    assert len(parts["values"]) == len('x\\"y"') + len('[1, {"c": null}]')


def test_long_replies_take_linear_time() -> None:
    text = format_calls([Call("f", {"a": [[0] * 5000] * 3})])
    reply = Generation(text, tuple(range(len(text))), (-1.0,) * len(text), True)
    began = time.perf_counter()
    answer_parts(reply, list(range(1, len(text) + 1)))
    assert time.perf_counter() - began < 2


def test_ends_cover_the_text_a_token_at_a_time() -> None:
    chat = Chat(AutoTokenizer.from_pretrained(models.model_dir(models.TINY)))
    written = 'find", "arguments": {"city": "Zürich 東京 🙂"}}]'
    tokens = (*chat.continuation("", written)[0], chat.end_of_turn)
    opening = '<tool_call>[{"name": "'
    ends = chat.ends(opening + written, tokens)
    assert len(ends) == len(tokens) and list(ends) == sorted(ends)
    assert ends[0] > len(opening) and ends[-1] == ends[-2] == len(opening + written)
    for i in range(1, len(tokens)):
        if (piece := chat.decode(tokens[i : i + 1])) and "\ufffd" not in piece:
            assert (opening + written)[ends[i - 1] : ends[i]] == piece
