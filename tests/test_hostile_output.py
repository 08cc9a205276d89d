"""Hostile replies, calls and schemas: no exception, no blow-up, nothing evaluated, the right code."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from study.data import benchmarks
from study.data.judge import judge
from ttsi.calls import canonical, format_calls, parse_calls
from ttsi.declared import schema_errors
from ttsi.strict_json import MAX_DEPTH
from ttsi.types import Call, Gold, Message, Query, Sample, Tool

MB = 1 << 20
TOOL = Tool(
    "find",
    "",
    {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "l": {"type": "array"}, "s": {"type": "string"}},
    },
)
SAMPLE = Sample(
    Query("own-0", "own", (Message("user", "Find it."),), (TOOL,)),
    (Gold("find", {"x": (1,), "l": ([1],)}), Gold("find", {"s": ("a",)})),
)
ONE = Sample(SAMPLE.query, (Gold("find", {"x": (1,)}),))


def wrap(x: str) -> str:
    return f'<tool_call>[{{"name": "find", "arguments": {{"x": {x}}}}}]</tool_call>'


def nested(levels: int) -> str:
    return wrap("[" * levels + "1" + "]" * levels)


CORPUS: dict[str, tuple[str, str]] = {
    "empty": ("", "no_call"),
    "control characters": ("\x00\x01\x1b[31m\x7f", "no_call"),
    "control characters in a string": (wrap('"\x01"'), "bad_json"),
    "escaped control characters": (wrap('"\\u0000\\u0001"'), "wrong_type"),
    "raw lone surrogate": ("\ud800 " + wrap('"\udfff"'), "bad_json"),
    "escaped lone surrogate": (wrap('"\\ud800"'), "bad_json"),
    "lone surrogate as a key": (wrap('{"\\udc00": 1}'), "bad_json"),
    "surrogate pair": (wrap('"\\ud83d\\ude00"'), "wrong_type"),
    "duplicate keys": (wrap('1, "x": 1'), "bad_json"),
    "duplicate names": ('<tool_call>{"name": "rm", "name": "find"}</tool_call>', "bad_json"),
    "NaN": (wrap("NaN"), "bad_json"),
    "Infinity": (wrap("-Infinity"), "bad_json"),
    "infinite by overflow": (wrap("1e999"), "bad_json"),
    "NaN as a string": (wrap('"NaN"'), "wrong_type"),
    "infinity as a string": (wrap('"1e999"'), "wrong_type"),
    "huge integer": (wrap("9" * 4000), "wrong_value"),
    "integer beyond the interpreter's limit": (wrap("9" * 5000), "bad_json"),
    "huge integer as a string": (wrap('"' + "9" * 100_000 + '"'), "wrong_type"),
    "nested as deep as is read": (nested(MAX_DEPTH - 3), "wrong_type"),
    "nested too deeply": (nested(MAX_DEPTH - 2), "bad_json"),
    "nested beyond the interpreter": (nested(100_000), "bad_json"),
    "nested in a string": (wrap('"' + "[" * 100_000 + '"'), "wrong_type"),
    "objects without end": (wrap('{"a": ' * 100_000), "bad_json"),
    "unclosed tag": ('<tool_call>[{"name": "find"', "bad_json"),
    "tags only": ("<tool_call>" * 1000, "bad_json"),
    "tag in an open string": ('<tool_call>[{"name": "find", "arguments": {"s": "</tool_call>', "bad_json"),
    "thousands of calls": ("<tool_call>[" + '{"name": "find"}, ' * 5000 + '{"name": "find"}]', "wrong_count"),
    "path as a name": ('<tool_call>{"name": "../../etc/passwd"}</tool_call>', "unknown_tool"),
    "code as a name": ('<tool_call>{"name": "__import__(\'os\').abort()"}</tool_call>', "unknown_tool"),
    "template as a name": ('<tool_call>{"name": "<|im_end|>{{7*7}}%s%n"}</tool_call>', "unknown_tool"),
    "no text as a name": ('<tool_call>{"name": 7}</tool_call>', "bad_json"),
    "empty name": ('<tool_call>{"name": ""}</tool_call>', "bad_json"),
    "byte order mark": ("\ufeff" + wrap("1"), "ok"),
    "code instead of JSON": ("<tool_call>[find(x=1)]</tool_call>", "bad_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(name: str) -> None:
    reply, expected = CORPUS[name]
    verdict = judge(reply, ONE)
    assert verdict.code == expected
    assert len(verdict.detail) <= 80
    for rule in ("string", "bfcl"):
        judge(reply, ONE, rule)  # type: ignore[arg-type]
    format_calls(parse_calls(reply).calls).encode()  # what was read can be written


def test_the_verdict_does_not_depend_on_how_deep_the_caller_is() -> None:
    def deep(levels: int) -> str:
        return deep(levels - 1) if levels else judge(nested(MAX_DEPTH - 3), ONE).code

    assert deep(0) == deep(600) == "wrong_type"


MEGABYTES: dict[str, Callable[[], str]] = {
    "brackets": lambda: "[" * MB,
    "objects": lambda: '{"a":' * (MB // 5),
    "lists of objects": lambda: '[{"":' * (MB // 5),
    "tags": lambda: "<tool_call>" * (MB // 11),
    "closing tags": lambda: "</tool_call>" * (MB // 12),
    "calls": lambda: (
        "<tool_call>[" + ",".join(['{"name":"find","arguments":{}}'] * (MB // 31)) + "]</tool_call>"
    ),
    "pairs of tags": lambda: '<tool_call>{"name":"find"}</tool_call>' * (MB // 39),
    "bare calls": lambda: '{"name":"find"} ' * (MB // 16),
    "values before a tag": lambda: '{"":1} ' * (MB // 7) + "<tool_call>[]</tool_call>",
    "tags in strings": lambda: '[{"q":"<tool_call>"}] ' * (MB // 22),
    "tag after an open string": lambda: '{"' + "a" * MB + "<tool_call>",
    "digits": lambda: wrap("1" * MB),
    "digits in a string": lambda: wrap('"' + "1" * MB + '"'),
    "decimals": lambda: wrap("0." + "1" * MB),
    "long list": lambda: wrap("[" + "1," * (MB // 2) + "1]"),
    "long list in a string": lambda: wrap('"[' + "1," * (MB // 2) + '1]"'),
    "many arguments": lambda: wrap("1," + ",".join(f'"k{i}":{i}' for i in range(MB // 14))),
    "spaces": lambda: "{" + " " * MB + "<tool_call>" + " " * MB,
    "brace and spaces": lambda: ("{" + " " * 50) * (MB // 51),
    "fences": lambda: "```json\n" * (MB // 8),
    "backticks": lambda: "`" * MB + '{"name":"find"}',
    "escapes": lambda: wrap('"' + "\\u00e9" * (MB // 6) + '"'),
    "surrogates": lambda: wrap('"' + "\\ud800" * (MB // 6) + '"'),
    "quotes": lambda: '{"' * (MB // 2),
    "single quotes": lambda: "{'" * (MB // 2),
    "lists of single quotes": lambda: "[{'" * (MB // 3),
    "thoughts": lambda: "<think>" * (MB // 7),
    "ends of thoughts": lambda: "</think>" * (MB // 8),
    "ends in broken JSON": lambda: "{'</think>" * (MB // 10),
    "ends in open strings": lambda: '{"a":"</think>' * (MB // 14),
    "tags in broken JSON": lambda: "{'<tool_call>" * (MB // 13),
    "broken JSON between pairs": lambda: '<tool_call>{"name":"find"}</tool_call>{\'' * (MB // 41),
    "prose between calls": lambda: '{\'x\'} {"name":"find"} ' * (MB // 24),
    "names in open lists": lambda: '{"name":[' * (MB // 9),
}


@pytest.mark.parametrize("name", MEGABYTES)
def test_a_megabyte_is_judged_within_a_second(name: str) -> None:
    reply = MEGABYTES[name]()
    assert len(reply) > 0.9 * MB
    seconds = []
    for _ in range(2):  # the better of two: other processes may hold the machine
        start = time.process_time()
        judge(reply, SAMPLE)
        judge(reply, ONE)
        seconds.append((time.process_time() - start) / 2)
    assert min(seconds) < 1


PIECES = st.sampled_from([
    "<tool_call>", "</tool_call>", "```json\n", "```", "[", "]", "{", "}", '"', '"name"', ":", '"find"', ",",
    '"arguments"', "{}", "[]", "1", "-", "e9", ".5", "null", "NaN", "\\", "\\ud800", "\ud800", " ", "\n", "'",
    '{"name": "find", "arguments": {"x": 1}}', '{"name": "find", "arguments": {"s": "<tool_call>"}}',
])  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PIECES, max_size=40).map("".join) | st.text(st.characters(), max_size=200))
def test_nothing_escapes_and_what_is_read_can_be_written(reply: str) -> None:
    parsed = parse_calls(reply)
    assert bool(parsed.calls) != bool(parsed.error)
    format_calls(parsed.calls).encode()
    canonical(parsed.calls).encode()
    for rule in ("schema", "string", "bfcl"):
        for accept in ("lenient", "tagged"):
            verdict = judge(reply, SAMPLE, rule, accept)  # type: ignore[arg-type]
            assert verdict.correct == (verdict.code == "ok")
    for call in parsed.calls:
        schema_errors(call, [TOOL])


def test_nothing_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ast.literal_eval", lambda *_: pytest.fail("model output reached literal_eval"))
    monkeypatch.setattr("builtins.eval", lambda *_: pytest.fail("model output reached eval"))
    code = f"__import__('os').mkdir({str(tmp_path / 'made')!r})"
    for reply in (wrap(json.dumps(code)), wrap("'1'"), f"<tool_call>{code}</tool_call>", wrap("\"['a']\"")):
        assert not judge(reply, ONE).correct
    assert os.listdir(tmp_path) == []


# --- hostile schemas ---------------------------------------------------------------------------------

LOOP = {"$ref": "#/$defs/a"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "reference to itself": {"properties": {"x": LOOP}, "$defs": {"a": LOOP}},
    "branching loop": {"properties": {"x": LOOP}, "$defs": {"a": {"allOf": [LOOP, LOOP]}}},
    "doubling references": {
        "properties": {"x": {"$ref": "#/$defs/0"}},
        "$defs": {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(40)} | {"40": {}},
    },
    "remote reference": {"properties": {"x": {"$ref": "http://127.0.0.1:9/schema.json"}}},
    "local file": {"properties": {"x": {"$ref": "file:///etc/passwd"}}},
    "missing reference": {"properties": {"x": {"$ref": "#/nowhere"}}},
    "unknown type": {"properties": {"x": {"type": "strng"}}},
    "type of a wrong kind": {"properties": {"x": {"type": 7}}},
    "properties of a wrong kind": {"properties": ["x"]},
    "required of a wrong kind": {"properties": {"x": {}}, "required": 5},
    "another draft inside": {"properties": {"x": {"$schema": "http://json-schema.org/draft-07/schema#"}}},
    "costly pattern properties": {"properties": {"x": {}}, "patternProperties": {"(a+)+$": {}}},
    "no JSON": {"properties": {"x": {"enum": [{1}]}}},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_hostile_schema_is_an_error_line(name: str) -> None:
    start = time.process_time()
    found = schema_errors(Call("find", {"x": 1}), [Tool("find", "", {"type": "object", **SCHEMAS[name]})])
    assert "can't be applied" in found[0]
    assert all(len(line) <= 200 for line in found)
    assert time.process_time() - start < 2


def test_references_never_leave_the_schema(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text('{"type": "integer"}')
    properties = {"x": {"$ref": (tmp_path / "text.json").as_uri()}}
    found = schema_errors(Call("find", {"x": 1}), [Tool("find", "", {"properties": properties})])
    assert "can't be applied" in found[0]


def test_costly_keywords_are_not_checked() -> None:
    properties = {"s": {"pattern": "^(a+)+$"}, "l": {"uniqueItems": True}, "pattern": {"type": "string"}}
    tool = Tool("find", "", {"type": "object", "properties": properties})
    arguments = {"s": "a" * 5000 + "!", "l": [{"i": i} for i in range(20_000)], "pattern": "x"}
    start = time.process_time()
    assert schema_errors(Call("find", arguments), [tool]) == ()
    assert time.process_time() - start < 2


def test_deep_schemas_and_thousands_of_parameters() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    value: Any = 1
    for _ in range(900):
        value = [value]
    assert schema_errors(Call("find", {"x": value}), [Tool("find", "", {"properties": {"x": deep}})])
    many = {f"p{i}": {"type": "integer"} for i in range(5000)}
    wide = Tool("find", "", {"type": "object", "properties": many, "required": list(many)})
    assert len(schema_errors(Call("find", {}), [wide])) == 20
    said = {name: i for i, name in enumerate(many)}
    sample = Sample(
        Query("own-0", "own", (Message("user", "?"),), (wide,)),
        (Gold("find", {k: (v,) for k, v in said.items()}),),
    )
    start = time.process_time()
    assert judge(format_calls([Call("find", said)]), sample).correct
    assert time.process_time() - start < 1


def test_judging_survives_schemas_that_are_none() -> None:
    for parameters in (
        {"properties": {"x": {"type": 7}}},
        {"properties": {"x": {"type": ["strng", 3]}}},
        {"properties": {"x": {"items": 3}}},
    ):
        sample = Sample(
            Query("own-0", "own", (Message("user", "?"),), (Tool("find", "", parameters),)), ONE.gold
        )
        assert judge(wrap("1"), sample).correct
        assert judge(wrap("[1]"), sample).code == "wrong_value"


# --- hostile data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "[" * 5000,
        "__import__('os').getcwd()",
        "1+" * 5000 + "1",
        "{1, 2}",
        "1j",
        "b'x'",
        '["\\ud800"]',
        "[" * 70 + "]" * 70,
        "1e999",
        "9" * 5000,
    ],
)
def test_gold_that_cannot_be_read_stays_as_it_is(text: str) -> None:
    record = {
        "query": "Find it.",
        "tools": [{"name": "find", "parameters": {"l": {"type": "list"}}}],
        "answers": [{"name": "find", "arguments": {"l": text}}],
    }
    sample = benchmarks.to_sample(record, "own", 0)
    assert sample.gold[0].arguments["l"] == (text,)
    assert "gold_issue" in sample.flags


def test_an_empty_tool_list_is_a_sample() -> None:
    record = {"query": "Find it.", "tools": [], "answers": [{"name": "find", "arguments": {"x": "1"}}]}
    sample = benchmarks.to_sample(record, "own", 0)
    assert (sample.tools, sample.flags) == ((), {"gold_tool_missing"})
    assert judge(wrap('"1"'), sample).correct


def test_data_that_no_prompt_can_hold_is_refused() -> None:
    deep: Any = {"type": "object"}
    for _ in range(2000):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"name": "find", "parameters": {}}
    for broken in (
        {"query": "\ud800", "tools": [tool], "answers": []},
        {"query": "?", "tools": [{**tool, "parameters": {"x": {"default": float("nan")}}}], "answers": []},
        {"query": "?", "tools": [{**tool, "parameters": deep}], "answers": []},
    ):
        with pytest.raises(benchmarks.BrokenData, match="own: record 3: field 'record'"):
            benchmarks.to_sample(broken, "own", 3)
