"""Calls as people and models really write them: one table of (input, outcome) per kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from study.data import benchmarks
from study.data.judge import judge
from ttsi.call_forms import read_calls
from ttsi.calls import format_calls, parse_calls
from ttsi.synthesizer import Unreadable, read_example
from ttsi.types import Call, Message, Query, Tool

OSLO = Call("w", {"city": "Oslo"})
GOOD = json.dumps({"name": "w", "arguments": {"city": "Oslo"}})
BARE = '{"city": "Oslo"}'


def calls(text: str) -> tuple[Call, ...] | str | None:
    parsed = parse_calls(text)
    return parsed.calls or parsed.error


# --- arguments under another key, in another wrapper ------------------------------------------------

WRITTEN = {
    "arguments": {"name": "w", "arguments": {"city": "Oslo"}},
    "parameters (Llama)": {"name": "w", "parameters": {"city": "Oslo"}},
    "typed (Llama)": {"type": "function", "name": "w", "parameters": {"city": "Oslo"}},
    "input (Anthropic)": {"type": "tool_use", "id": "t1", "name": "w", "input": {"city": "Oslo"}},
    "args (Gemini)": {"functionCall": {"name": "w", "args": {"city": "Oslo"}}},
    "kwargs": {"name": "w", "kwargs": {"city": "Oslo"}},
    "params": {"name": "w", "params": {"city": "Oslo"}},
    "tool_input (LangChain)": {"action": "w", "action_input": {"city": "Oslo"}},
    "tool and tool_input": {"tool": "w", "tool_input": {"city": "Oslo"}},
    "tool_name (Cohere)": {"tool_call_id": "0", "tool_name": "w", "parameters": {"city": "Oslo"}},
    "api (Seal-Tools)": {"api": "w", "parameters": {"city": "Oslo"}},
    "function as the name": {"function": "w", "arguments": {"city": "Oslo"}},
    "OpenAI": {"id": "c1", "type": "function", "function": {"name": "w", "arguments": BARE}},
    "OpenAI, index": {"index": 0, "id": "c", "function": {"name": "w", "arguments": BARE}},
    "Responses API": {"type": "function_call", "call_id": "c", "name": "w", "arguments": BARE},
    "a message": {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": BARE}}]},
    "Hammer": {"tool_calls": [{"name": "w", "arguments": {"city": "Oslo"}}]},
    "old OpenAI": {"function_call": {"name": "w", "arguments": BARE}},
    "Bedrock": {"toolUse": {"toolUseId": "t", "name": "w", "input": {"city": "Oslo"}}},
    "a function beside its arguments": {"function": {"name": "w"}, "arguments": {"city": "Oslo"}},
    "toolInput": {"toolName": "w", "toolInput": {"city": "Oslo"}},
    "Arguments": {"name": "w", "Arguments": {"city": "Oslo"}},
    "arguments_json": {"name": "w", "arguments_json": BARE},
    "text beside": [{"type": "text", "text": "Hm."}, {"type": "tool_use", "name": "w", "input": {"city": "Oslo"}}],
    "a thought beside": {"thought": "Oslo it is.", "name": "w", "arguments": {"city": "Oslo"}},
    "null beside": {"name": "w", "arguments": {"city": "Oslo"}, "parameters": None},
}  # fmt: skip


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    "around", ["{}", "[{}]", "```json\n{}\n```", "<tool_call>{}</tool_call>", "<tool_call>[{}]"]
)
def test_every_form_in_every_dress(form: str, around: str) -> None:
    assert calls(around.replace("{}", json.dumps(WRITTEN[form]))) == (OSLO,)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "w", "payload": {"city": "Oslo"}}',
        '[{"name": "w", "id": "1", "fields": {"city": "Oslo"}}]',
        '{"name": "w", "arguments": {"city": "Oslo"}, "parameters": {"city": "Rome"}}',
        '{"name": "w", "arguments": [1]}',
        '{"name": "w", "arguments": "Oslo"}',
        '{"name": "w", "arguments": 5}',
        '{"arguments": {"city": "Oslo"}}',
        '{"name": "w", "payload": "{\\"city\\": \\"Oslo\\"}"}',
        '{"function": {"name": "w", "arguments": {"city": "Rome"}}, "arguments": {"city": "Oslo"}}',
        '{"name": "w", "tool_input": {"city": "Oslo"}, "toolInput": {"city": "Rome"}}',
        '{"name": null, "arguments": {}}',
    ],
)
def test_arguments_that_cannot_be_read_are_never_dropped(text: str) -> None:
    assert calls(text) == calls(f"<tool_call>{text}</tool_call>") == "bad_json"


def test_the_place_is_named() -> None:
    assert "'payload'" in parse_calls('{"name": "w", "payload": {"city": "Oslo"}}').detail


@pytest.mark.parametrize("empty", ["", "null", '""', '" "', "{}", '"{}"', '"null"'])
def test_no_arguments_are_no_arguments(empty: str) -> None:
    text = f'{{"name": "ping", "arguments": {empty}}}' if empty else '{"name": "ping"}'
    assert calls(text) == (Call("ping", {}),)


@pytest.mark.parametrize("form", WRITTEN)
def test_tagged_knows_its_own_form_only(form: str) -> None:
    tagged = f"<tool_call>[{json.dumps(WRITTEN[form])}]</tool_call>"
    parsed = parse_calls(tagged, only_tagged=True)
    own = form in ("arguments", "a thought beside", "Responses API")
    assert (parsed.calls == (OSLO,)) == own and (parsed.error == "bad_json") == (not own)
    assert parse_calls(json.dumps(WRITTEN[form]), only_tagged=True).error == "no_call"


# --- reasoning ---------------------------------------------------------------------------------------

DRAFT = '{"name": "w", "arguments": {"city": "Rome"}}'
REASONED = [
    f"<think>I write <tool_call> first.</think>{GOOD}",
    f"<think>{DRAFT}</think>\n\n{GOOD}",
    f"<think><tool_call>{DRAFT}</tool_call></think><tool_call>{GOOD}</tool_call>",
    f"the user wants Oslo, so {DRAFT}?\n</think>\n{GOOD}",
    f"<think>a</think>b {DRAFT} <think>c</think>```json\n{GOOD}\n```",
    f"<think>close with </think> they said</think>{GOOD}",
    f'<think>{{"name": "w", "argu</think>{GOOD}',
    f"<thinking>{DRAFT}</thinking>{GOOD}",
    f"<reasoning>\n{{'x'}} {DRAFT}</reasoning>\n{GOOD}",
    f"<THINK>{DRAFT}</THINK>{GOOD}",
    f"[THINK]{DRAFT}[/THINK]{GOOD}",
]


@pytest.mark.parametrize("text", REASONED)
def test_reasoning_belongs_to_no_answer(text: str) -> None:
    assert calls(text) == (OSLO,)


@pytest.mark.parametrize(
    "text",
    [
        f"Okay <think>maybe {DRAFT}",
        f"<think>{DRAFT}",
        f"{GOOD}</think>",
        "<think>a</think> Sorry.",
        f"{GOOD}</think>No.",
    ],
)
def test_a_draft_is_no_call(text: str) -> None:
    assert calls(text) == "no_call"


def test_an_end_tag_in_a_string_ends_nothing() -> None:
    said = Call("say", {"text": "a </think> b"})
    for before in ("", "<think>quick: </think>"):
        assert calls(before + format_calls([said])) == (said,)
        assert calls(before + format_calls([said])[len("<tool_call>") : -len("</tool_call>")]) == (said,)


# --- what is no call ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"name": "my-app", "version": "1.0.0"}\n```',
        '```json\n{"name": "my-app", "version": "1.0.0", "scripts": {"test": "jest"}}\n```',
        '{"name": "Bob", "age": 7}',
        'As in {"name": "Bob", "age": 7}.',
        'No tool fits. Set {"debug": true}.',
        '```json\n{"name": "w", "description": "", "parameters": {"type": "object", "properties": {}}}\n```',
        "It is {'x'} and <tool_call> is a tag.",
        'Try {"action": "saved"}.',
        '{"id": 1, "name": "Alice"}',
        '{"name": "my-app", "type": "module"}',
        '{"name": "a", "status": "ok"}',
        "No tool fits. I won't use <tool_call> here.",
        "Use <tool_call>…</tool_call>.",
        'Result {"x": NaN}.',
        'Set {"x": 1, "x": 2}.',
    ],
)
def test_data_is_no_call(text: str) -> None:
    assert calls(text) == "no_call"
    assert calls(f"{GOOD}\n{text}") == (OSLO,)


def test_a_name_alone_is_a_call() -> None:
    assert calls('{"name": "cancel"}') == calls('[{"name": "cancel", "id": "1"}]') == (Call("cancel", {}),)


# --- prose around a good call -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prose",
    [
        "Here {'x'} is what I set.",
        "I used the <tool_call> format.",
        "Calls stand between <tool_call> and </tool_call>.",
        "{'city'} and {\"unit\"} are mine.",
        "In LaTeX: \\frac{'a'}{\"b\"}",
        'I set {"city": "Oslo"}.',
        'The result would be {"status": "done", "code": 0}.',
        "The list [{1}, {2}] is empty.",
    ],
)
@pytest.mark.parametrize("form", ["{}", "```\n{}\n```", "<tool_call>{}</tool_call>"])
def test_prose_spoils_no_call(form: str, prose: str) -> None:
    good = form.replace("{}", GOOD)
    assert calls(f"{good}\n{prose}") == calls(f"{prose}\n{good}") == (OSLO,)


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD} {GOOD[:-3]}",
        f'{GOOD} {{"id": "c1", "name": "w", "arguments": {{"city": "O',
        '{"id": 1, "name": "w", "arguments": {"x": }}',
        '{"thought": "hm", "name": "w", "arguments": {"city": "Oslo"',
        'w({"city": "Oslo"})',
        '<function=w>{"city": "Oslo"}</function>',
        '[TOOL_CALLS]w{"city": "Oslo"}',
        'Action: w\nAction Input: {"city": "Oslo"}',
        '{name: "w", "arguments": {"city": "Oslo"}}',
        '{“name”: “w”, "arguments": {"city": "Oslo"}}',
        f"{GOOD}\n{{'name': 'w', 'arguments': {{'city': 'Rome'}}}}",
        f"<tool_call>{GOOD}</tool_call><tool_call>{GOOD[:-2]}</tool_call>",
        f"<tool_call>{GOOD}</tool_call>\n<tool_call>w(city=1)</tool_call>",
        f"<tool_call>{GOOD}</tool_call>\n<tool_call>",
        f"```json\n{GOOD[:-2]}\n```",
        "{'name': 'w', 'arguments': {}}",
        '{"name": "w", "arguments": {"city": "Os',
        '{"name": "w", "arguments": {"city": "Oslo",}}',
        '<tool_call>{"debug": true}</tool_call>',
        '<tool_call>{"name": "my-app", "version": "1"}</tool_call>',
    ],
)
def test_a_broken_attempt_is_bad_json(text: str) -> None:
    assert calls(text) == "bad_json"


# --- between tags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside",
    [
        f"{GOOD}\n{GOOD}",
        f"{GOOD}, {GOOD}",
        f"```json\n[{GOOD}, {GOOD}]\n```",
        f"```\n{GOOD}\n{GOOD}\n```\n",
        json.dumps({"tool_calls": [WRITTEN["OpenAI"], WRITTEN["Hammer"]]}),
        f"[{GOOD}]\n[{GOOD}]",
    ],
)
def test_between_tags_stand_calls_in_any_form(inside: str) -> None:
    assert calls(f"<tool_call>{inside}</tool_call>") == calls(f"<tool_call>\n{inside}") == (OSLO, OSLO)


# --- gold and examples ----------------------------------------------------------------------------------

TOOLS = [{"name": "w", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
QUERY = Query("q", "mine", (Message("user", "Rome?"),), (Tool("w", "", TOOLS[0]["parameters"]),))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", WRITTEN)
def test_gold_is_read_in_every_form(form: str) -> None:
    sample = benchmarks.to_sample({"query": "Rome?", "tools": TOOLS, "answers": [WRITTEN[form]]}, "mine", 0)
    assert sample.flags == frozenset() and judge(GOOD, sample).correct
    assert judge('{"name": "w", "arguments": {"city": "Rome"}}', sample).code == "wrong_value"


def test_gold_of_a_message_is_all_its_calls() -> None:
    both = {"tool_calls": [WRITTEN["OpenAI"], WRITTEN["OpenAI"]]}
    for answers in ([both], [WRITTEN["Hammer"], WRITTEN["arguments"]], json.dumps([both])):
        sample = benchmarks.to_sample({"query": "Rome?", "tools": TOOLS, "answers": answers}, "mine", 0)
        assert len(sample.gold) == 2 and judge(f"[{GOOD}, {GOOD}]", sample).correct


ODD = [{"name": "w", "payload": {"city": "Oslo"}}, {"city": "Oslo"}, "w", None, 3, []]


@pytest.mark.parametrize("odd", ODD)
def test_gold_that_cannot_be_read_is_flagged(odd: Any) -> None:
    sample = benchmarks.to_sample({"query": "Rome?", "tools": TOOLS, "answers": [odd]}, "mine", 0)
    assert len(sample.gold) == 1 and "gold_issue" in sample.flags


@pytest.mark.parametrize("form", WRITTEN)
def test_an_example_teaches_its_arguments(form: str) -> None:
    reply = f"Question: How is Oslo?\nAnswer: {json.dumps([WRITTEN[form]])}"
    assert read_example(reply, QUERY).calls == (OSLO,)


@pytest.mark.parametrize(
    "reply",
    [
        "**Question:** Oslo?\n**Answer:** [GOOD]",
        "**Question**: Oslo?\n**Answer**: [GOOD]",
        "__Question:__ Oslo?\n__Answer:__ [GOOD]",
        "### Question: Oslo?\n### Answer: [GOOD]",
        "* Question: Oslo?\n* Answer: ```json\n[GOOD]\n```",
        "Question: Oslo?\nAnswer: [GOOD]\n\nI used the <tool_call> format. Here {'x'} is what I set.",
        "Question: Oslo?\nAnswer: [GOOD]\n**Question:** Rome?\n**Answer:** [broken",
        "<think>Question: Rome?\nAnswer: {\"name\": 3}</think>Question: Oslo?\nAnswer: GOOD",
        "I think of Oslo.</think>\n**Question:** Oslo?\n**Answer:** <tool_call>GOOD</tool_call>",
        "QUESTION: Oslo?\nANSWER: GOOD",
    ],
)  # fmt: skip
def test_an_example_is_read_however_it_is_labelled(reply: str) -> None:
    example = read_example(reply.replace("GOOD", GOOD), QUERY)
    assert (example.question, example.calls) == ("Oslo?", (OSLO,))


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("Oslo?", "no_question"),
        ("Question:\nAnswer: [GOOD]", "no_question"),
        ("<think>Question: Oslo?\nAnswer: [GOOD]", "no_question"),
        ("Question: Oslo?\nAnswer: Sure.", "no_call"),
        ('Question: Oslo?\nAnswer: {"name": "w", "payload": {"city": 1}}', "bad_json"),
        ('Question: Oslo?\nAnswer: {"name": "v", "arguments": {}}', "unknown_tool"),
    ],
)
def test_an_example_that_cannot_be_read_says_why(reply: str, code: str) -> None:
    with pytest.raises(Unreadable, match=f"^{code}$"):
        read_example(reply.replace("GOOD", GOOD), QUERY)


# --- round trips -------------------------------------------------------------------------------------------

NAMES = st.text(min_size=1, max_size=8).filter(lambda s: s.strip())
SOME = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
        max_leaves=5,
    ),
    max_size=3,
).filter(lambda d: not isinstance(d.get("properties"), dict))  # under `parameters` that is a definition
SHAPES = [
    lambda c: {"name": c.name, "arguments": dict(c.arguments)},
    lambda c: {"name": c.name, "parameters": dict(c.arguments)},
    lambda c: {"type": "tool_use", "id": "1", "name": c.name, "input": dict(c.arguments)},
    lambda c: {"type": "function", "function": {"name": c.name, "arguments": json.dumps(dict(c.arguments))}},
    lambda c: {"tool": c.name, "args": dict(c.arguments)},
]
AROUND = [
    "{}", "```json\n{}\n```", "Sure:\n{}\nDone.", "<tool_call>{}</tool_call>", "<tool_call>\n{}\n",
    "<think>{\"name\": \"x\", \"arguments\": {}} hm</think>\n{}", "so it goes</think>{}",
]  # fmt: skip


@given(
    st.lists(st.builds(Call, NAMES, SOME), min_size=1, max_size=3),
    st.sampled_from(SHAPES),
    st.sampled_from(AROUND),
    st.booleans(),
)
def test_what_is_written_in_any_form_is_read(
    made: list[Call], shape: Any, around: str, wrapped: bool
) -> None:
    rows = [shape(call) for call in made]
    text = json.dumps({"tool_calls": rows} if wrapped else rows)
    head, _, tail = around.rpartition("{}")
    parsed = parse_calls(head + text + tail)
    assert parsed.calls == tuple(made), parsed
    assert tuple(read_calls(json.loads(text))) == tuple(made)
