"""Conversations in the formats people have: nothing said is lost, nothing repaired that isn't broken."""

from __future__ import annotations

from typing import Any

import pytest

from study.data.benchmarks import BrokenData, to_sample
from ttsi.conversations import read_messages
from ttsi.schemas import BadField

CALL = {"name": "w", "arguments": {"city": "Oslo"}}
SAID = '<tool_call>[{"name": "w", "arguments": {"city": "Oslo"}}]</tool_call>'
ASK = {"role": "user", "content": "Oslo?"}

TURNS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    *[
        (f"role {r}", {"role": r, "content": "x"}, [("user", "x")])
        for r in ("user", "system", "developer", "human")
    ],
    *[
        (f"role {r}", {"role": r, "content": "x"}, [("assistant", "x")])
        for r in ("assistant", "model", "gpt", "bot")
    ],
    *[
        (f"role {r}", {"role": r, "content": "x"}, [("tool", "x")])
        for r in ("tool", "function", "ipython", "observation")
    ],
    ("ShareGPT", {"from": "human", "value": "x"}, [("user", "x")]),
    ("upper case", {"role": "User", "content": "x"}, [("user", "x")]),
    (
        "parts",
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        [("user", "a\nb")],
    ),
    ("an empty result", {"role": "tool", "content": ""}, [("tool", "")]),
    ("a result of null", {"role": "tool", "content": None}, [("tool", "")]),
    ("an object as result", {"role": "tool", "content": {"t": 3}}, [("tool", '{"t": 3}')]),
    (
        "a past call",
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]},
        [("assistant", SAID)],
    ),
    (
        "text and a call",
        {"role": "assistant", "content": "Let me see.", "tool_calls": [{"function": CALL}]},
        [("assistant", f"Let me see.\n{SAID}")],
    ),
    ("an old call", {"role": "assistant", "content": "", "function_call": CALL}, [("assistant", SAID)]),
    (
        "Anthropic's call",
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Hm."},
                {"type": "tool_use", "id": "1", "name": "w", "input": {"city": "Oslo"}},
            ],
        },
        [("assistant", f"Hm.\n{SAID}")],
    ),
    (
        "Anthropic's result",
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "4 °C"},
                {"type": "text", "text": "And Rome?"},
            ],
        },
        [("tool", "4 °C"), ("user", "And Rome?")],
    ),
    (
        "fenced data",
        {"role": "assistant", "content": '```json\n{"a": 1}\n```'},
        [("assistant", '```json\n{"a": 1}\n```')],
    ),
    (
        "API-Bank's line",
        {"role": "user", "content": "Write:\nGenerate API Request:"},
        [("user", "Write:\nGenerate API Request:")],
    ),
    ("nothing said", {"role": "assistant", "content": ""}, []),
]


@pytest.mark.parametrize(("turn", "want"), [t[1:] for t in TURNS], ids=[t[0] for t in TURNS])
def test_a_turn_is_read(turn: dict[str, Any], want: list[tuple[str, str]]) -> None:
    assert [(m.role, m.content) for m in read_messages([turn])] == want


@pytest.mark.parametrize("turn", [t[1] for t in TURNS], ids=[t[0] for t in TURNS])
def test_a_benchmark_of_ones_own_is_repaired_nowhere(turn: dict[str, Any]) -> None:
    sample = to_sample({"query": [ASK, turn], "tools": [], "answers": []}, "own", 0)
    assert sample.messages == tuple(read_messages([ASK, turn]))


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "king", "content": "x"},
        {"content": "x"},
        {"role": "user"},
        {"role": "user", "content": 7},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": "{broken"}}]},
        "Oslo?",
        None,
    ],
)
def test_what_cannot_be_read_is_refused_by_place(turn: Any) -> None:
    with pytest.raises(BadField) as error:
        list(read_messages([ASK, turn], "messages"))
    assert error.value.args[0] == "messages[1]"
    with pytest.raises(BrokenData, match=r"query\[1\]"):
        to_sample({"query": [ASK, turn], "tools": [], "answers": []}, "own", 0)


def test_api_bank_is_repaired() -> None:
    turns = [
        ASK,
        {"role": "agent", "content": '```json\n{"name": "w", "arguments": {"city": "Oslo"}}\n```'},
        {"role": "tool", "content": "4"},
        {"role": "user", "content": "And now?\nGenerate API Request:"},
    ]
    messages = to_sample({"query": turns, "tools": [], "answers": []}, "apibank", 0).messages
    assert [m.content for m in messages] == ["Oslo?", SAID, "4", "And now?"]
