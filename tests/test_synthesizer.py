"""G with a scripted engine: what is read, what is retried, what is recorded."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsi.engines.base import Request
from ttsi.filters import copies
from ttsi.synthesizer import Unreadable, copy_ratio, read_example, synthesize
from ttsi.types import Generation, Message, Query, Sampling, Tool

WEATHER = Tool(
    "get_weather",
    "Weather of a city",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
QUERY = Query("t-1", "t", (Message("user", "Weather in Oslo?"),), (WEATHER,))
GOOD = """Question: Is it raining in Rome?
Answer: [{"name": "get_weather", "arguments": {"city": "Rome"}}]"""
COPY = GOOD.replace("Is it raining in Rome?", " weather  in OSLO? ")
INVALID = GOOD.replace('"Rome"', "7")


class Scripted:
    """Replies in the order given; remembers what it was asked."""

    name = "scripted"

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        self.asked += requests
        return [[Generation(self.replies.pop(0), (1, 2), (-0.1, -0.2), True, 5)] for _ in requests]


def run(engine: Scripted, **settings: object):  # type: ignore[no-untyped-def]
    return synthesize(engine, [QUERY], lambda s, a: a, Sampling(), **settings)[0]  # type: ignore[arg-type]


def test_an_example_is_read_with_its_quality() -> None:
    example = read_example(GOOD, QUERY)
    assert example.question == "Is it raining in Rome?"
    assert example.calls[0].arguments == {"city": "Rome"}
    assert example.schema_errors == () and 0 < example.copy_ratio < 1
    assert read_example(COPY, QUERY).copy_ratio == 1
    assert read_example(INVALID, QUERY).schema_errors


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("", "no_question"),
        ("Question:   \nAnswer: x", "no_question"),
        ("no form at all", "no_question"),
        ("Question: a?\nAnswer: sorry", "no_call"),
        ('Question: a?\nAnswer: <tool_call>[{"name": "get_weather", "arguments": {</tool_call>', "bad_json"),
        (GOOD.replace("get_weather", "rm -rf"), "unknown_tool"),
    ],
)
def test_what_cannot_be_read_has_a_code(reply: str, code: str) -> None:
    with pytest.raises(Unreadable, match=code):
        read_example(reply, QUERY)


def test_parse_errors_are_drawn_again_with_new_seeds() -> None:
    engine = Scripted("nonsense", GOOD.replace("get_weather", "other"), GOOD)
    result = run(engine)
    assert len(result.examples) == 1 and result.failures == ("no_question", "unknown_tool")
    assert result.examples[0].attempt == 2 and result.tokens == 6
    assert len({r.seed for r in engine.asked}) == 3


class Asking(Scripted):
    """An engine that draws again by itself."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        out = []
        for request in requests:
            ((reply,),) = super().generate([request], sampling)
            while request.again and (seed := request.again(reply)) is not None:
                ((reply,),) = super().generate([replace(request, seed=seed)], sampling)
            out.append([reply])
        return out


def test_retries_in_flight_are_those_of_rounds() -> None:
    nonsense, other = "nonsense", GOOD.replace("get_weather", "other")
    rounds, flight = Scripted(nonsense, GOOD, other, COPY), Asking(nonsense, other, COPY, GOOD)
    expected, found = run(rounds, k=2), run(flight, k=2)
    assert found == expected and found.failures == ("no_question", "unknown_tool") and found.tokens == 8
    assert [r.seed for r in rounds.asked] == [0, 6, 1, 2], "a slot that failed twice comes in a third round"
    assert sorted(r.seed for r in flight.asked) == [0, 1, 2, 6]


def test_after_five_retries_the_synthesis_has_failed() -> None:
    engine = Scripted(*["nonsense"] * 6)
    result = run(engine)
    assert result.failed and len(result.failures) == 6 and not engine.replies


def test_schema_violations_and_copies_are_kept_unless_asked_otherwise() -> None:
    assert not run(Scripted(INVALID)).failed
    assert not run(Scripted(COPY)).failed
    assert run(Scripted(INVALID, GOOD), validate="schema").failures == ("schema",)
    assert run(Scripted(COPY, GOOD), novelty="reject_copies").failures == ("copy",)


def test_k_examples_contain_the_first_ones() -> None:
    two, one = Scripted(GOOD, COPY), Scripted(GOOD)
    assert run(two, k=2).examples[:1] == run(one, k=1).examples
    assert two.asked[0].seed == one.asked[0].seed
    second = Scripted(COPY)
    run(second, k=1, first=1)
    assert second.asked[0].seed == two.asked[1].seed


@settings(max_examples=200, deadline=None)
@given(*[st.text("ab", max_size=40) | st.text("abcdé ", max_size=40) | st.text(max_size=20)] * 2)
def test_copy_ratio_is_difflibs(one: str, two: str) -> None:
    left, right = (" ".join(t.casefold().split()) for t in (one, two))
    assert copy_ratio(one, two) == difflib.SequenceMatcher(None, left, right, autojunk=False).ratio()


def test_copy_ratio_of_long_questions_is_difflibs() -> None:
    words = ["weather", "in", "the", "town", "of", "Oslo", "tomorrow,", "please"]
    one, two = (" ".join(Random(seed).choices(words, k=60)) for seed in (1, 2))
    expected = difflib.SequenceMatcher(None, one.casefold(), two.casefold(), autojunk=False).ratio()
    assert copy_ratio(one, two) == expected


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("abc" * 667, "acb" * 667),  # with difflib: minutes
        ("ab" * 1000, "ba" * 1000),
        ("a b " * 500, "ab  " * 500),
        ("".join(map(chr, range(300, 2300))), "".join(map(chr, range(2299, 299, -1)))),
        ("".join("a" * i + "b" for i in range(62)), "".join("a" * i + "c" for i in range(62, 0, -1))),
    ],
)
def test_a_model_caught_in_a_loop_is_compared_in_seconds(one: str, two: str) -> None:
    began = time.process_time()
    assert 0 <= copy_ratio(one, two) < 1
    assert time.process_time() - began < 3


def test_copy_ratio_ignores_case_and_spaces() -> None:
    assert copy_ratio("A  b\nC", "a b c") == 1
    assert copy_ratio("xyz", "abc") == 0


def test_a_copy_is_of_any_turn_and_whole() -> None:
    turns = [Message("user", "Book me a flight to Oslo"), Message("assistant", "Which day?"),
             Message("user", "Tomorrow please")]  # fmt: skip
    chat = Query("q", "b", tuple(turns), ())
    assert copies("book me a  flight to Oslo", chat) and copies("Tomorrow PLEASE", chat)
    assert not copies("Book me a flight to Rome", chat)
    long = "a " * 1100
    one = Query("q", "b", (Message("user", long + "Set a=4"),), ())
    assert copies(long + "Set a=4", one) and not copies(long + "Set a=3", one)
