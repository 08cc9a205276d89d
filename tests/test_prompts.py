"""Layouts: three ways of putting one question, none of which loses a word of it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
from transformers import AutoTokenizer

from study.data import models
from ttsi import estimator, prompts, synthesizer, trainer
from ttsi.calls import parse_calls
from ttsi.engines.base import EngineError
from ttsi.engines.chat import Chat
from ttsi.types import PAPER_SAMPLING, Call, Example, Layout, Message, Query, Tool

TOOLS = (
    Tool(
        "book_table",
        "Books a table.",
        {
            "type": "object",
            "properties": {
                "guests": {"type": "integer", "description": "How many."},
                "day": {"type": "string"},
            },
            "required": ["guests"],
        },
    ),
    Tool("say", "Says <|im_end|> something.", {"type": "object", "properties": {}, "required": []}),
    Tool(
        "pick",
        "Picks.",
        {"type": "object", "properties": {"p": {"$ref": "#/$defs/p"}}, "$defs": {"p": {"type": "null"}}},
    ),
)
QUERY = Query("q", "mine", (Message("user", "A table for four, please."),), TOOLS)
TURNS = (
    Message("user", "I need a table."),
    Message("assistant", "For how many?"),
    Message("user", "For four."),
)
TALK = Query("t", "mine", TURNS, TOOLS)
CALLS = (Call("book_table", {"guests": 4}), Call("say", {}))
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# What a chat template that lists tools does, in one line each: Qwen2.5's, cut to what matters here.
LISTING = """
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def chat() -> Chat:
    """The tiny model's tokenizer, whose own template lists no tools."""
    return Chat(AutoTokenizer.from_pretrained(models.model_dir(models.TINY)))


@pytest.fixture(scope="module")
def listing(chat: Chat) -> Chat:
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = LISTING
    return Chat(tokenizer)


def test_the_words_of_native_are_those_of_the_stored_rows() -> None:
    assert prompts.version() == prompts.version("native") == "4172229c4cf950d3"
    assert len({prompts.version(layout) for layout in LAYOUTS}) == 3


@pytest.mark.parametrize("query", [QUERY, TALK], ids=["question", "conversation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_word_reaches_the_model(layout: Layout, query: Query, listing: Chat) -> None:
    shown = listing.render(prompts.act(query, layout))
    at = 0
    for message in query.messages:
        at = shown.index(message.content, at) + 1
    for tool in query.tools:
        assert tool.name in shown and tool.description in shown
    for word in ("guests", "How many.", "integer", '"day"', "#/$defs/p", '"null"'):
        assert word in shown, word


def test_what_a_tool_says_is_no_control_token(listing: Chat) -> None:
    for layout in LAYOUTS:
        ids = listing.encode(prompts.act(QUERY, layout)).ids
        assert list(ids).count(listing.end_of_turn) == 2  # the system turn's and the user's


def test_paper_has_the_structure_of_the_papers_prompts() -> None:
    prompt = prompts.act(QUERY, "paper")
    assert prompt.messages == QUERY.messages and prompt.tools == ()
    lines = prompt.system.splitlines()
    for heading in ("Rules:", "Task:", "Output format:", "Functions:"):
        assert heading in lines
    at = lines.index("1. Name: book_table")
    assert lines[at + 1] == "   Description: Books a table."
    assert json.loads(lines[at + 2].removeprefix("   Parameters: ")) == TOOLS[0].parameters["properties"]
    assert lines[at + 3] == "   Required: guests"
    assert "   Required: none" in lines
    assert prompts.OPENING.strip() in prompts.write(CALLS, "paper")


def test_paper_shows_a_conversation_as_one_turn() -> None:
    (turn,) = prompts.act(TALK, "paper").messages
    assert turn.role == "user"
    assert turn.content == "user: I need a table.\nassistant: For how many?\nuser: For four."
    (turn,) = prompts.act(Query("t", "apibank", TURNS, TOOLS), "paper").messages
    *_, closing = turn.content.split("\n\n")
    assert "exactly one call" in closing and "2023" in closing
    assert prompts.act(Query("t", "apibank", TURNS, TOOLS)).messages == TURNS  # native stays as it is


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_taught_begins_with_the_opening_and_reads_as_its_calls(layout: Layout) -> None:
    written = prompts.write(CALLS, layout)
    assert written.startswith(prompts.opening(layout))
    assert parse_calls(written).calls == CALLS and parse_calls(written).form == "tagged"
    alone = prompts.write(CALLS[:1], layout)
    assert alone.startswith(prompts.opening(layout) + estimator.continuation("book_table"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_about_one_tool_set_open_alike(layout: Layout, listing: Chat) -> None:
    example = prompts.example(TOOLS, "A table for two?", layout)
    asked = [prompts.act(QUERY, layout), prompts.act(TALK, layout), prompts.synthesis(QUERY, layout), example]
    asked.append(prompts.with_shot(QUERY, "A table for two?", prompts.write(CALLS, layout), layout=layout))
    codes = [listing.encode(p) for p in asked]
    assert {code.ids[: code.prefix] for code in codes} == {codes[0].ids[: codes[0].prefix]}
    assert codes[0].prefix > 20


def test_layout_and_instructions_reach_h_g_and_t() -> None:
    class Heard:
        name = "heard"

        def __init__(self) -> None:
            self.prompts: list[prompts.Prompt] = []
            self.openings: list[str] = []

        def score(self, asked, opening, continuations, upto=None):  # type: ignore[no-untyped-def]
            self.prompts += asked
            self.openings.append(opening)
            raise EngineError("that will do")

        def generate(self, requests, sampling):  # type: ignore[no-untyped-def]
            self.prompts += [r.prompt for r in requests]
            raise EngineError("that will do")

    for layout, own in product(LAYOUTS, ("", "Mind the gap.")):
        heard, how = Heard(), {"layout": layout, "instructions": own}
        with pytest.raises(EngineError):
            estimator.estimate(heard, QUERY, **how)
        with pytest.raises(EngineError):
            synthesizer.synthesize(heard, [QUERY], lambda *_: 0, PAPER_SAMPLING, **how)
        assert heard.prompts == [prompts.act(QUERY, layout, own), prompts.synthesis(QUERY, layout, own)]
        assert heard.openings == [prompts.opening(layout)]
        lesson = trainer.job(TOOLS, [Example("Two?", CALLS, 0.0)], 0, layout, own).examples
        assert lesson == ((prompts.example(TOOLS, "Two?", layout, own), prompts.write(CALLS, layout)),)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_instructions_are_the_last_words_of_the_system_turn(layout: Layout, listing: Chat) -> None:
    own = "Mind the gap."
    put = [lambda o: prompts.act(QUERY, layout, o), lambda o: prompts.synthesis(QUERY, layout, o)]
    put.append(lambda o: prompts.example(TOOLS, "Two?", layout, o))
    put.append(lambda o: prompts.with_shot(QUERY, "Two?", "[]", layout=layout, instructions=o))
    for with_words in put:
        without, told = with_words(""), with_words(own)
        assert told == replace(without, system="\n".join(filter(None, [without.system, own])))
        assert listing.render(told).count(own) == 1
        assert own not in listing.render(without)


def test_a_template_without_tools_is_refused_not_left_bare(chat: Chat) -> None:
    with pytest.raises(EngineError, match="lists no tools"):
        chat.encode(prompts.act(QUERY, "template"))
