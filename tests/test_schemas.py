"""Tools and schemas as people write them: one table of (input, outcome) per kind."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from study.data.benchmarks import BrokenData, to_sample
from study.data.judge import judge
from ttsi import prompts
from ttsi.declared import Declared, schema_errors
from ttsi.schemas import BadField, read_tool
from ttsi.types import Call, Verdict

CITY = {"city": {"type": "string"}}
SCHEMA = {"type": "object", "properties": CITY, "required": ["city"]}


def tool(props: Any, required: Any = (), **more: Any) -> dict[str, Any]:
    return {
        "name": "f",
        "parameters": {"type": "object", "properties": props, "required": [*required], **more},
    }


def judged(entry: dict[str, Any], gold: Any, said: Any, rule: Any = "schema", sets: bool = False) -> Verdict:
    sample = to_sample(
        {"query": "?", "tools": [entry], "answers": [{"name": "f", "arguments": gold}]}, "own", 0
    )
    return judge(json.dumps({"name": "f", "arguments": said}), sample, rule)


def test_all_of_keeps_the_strictest() -> None:
    declared = Declared.of(
        {"allOf": [{"minimum": 3, "enum": [3, 4]}, {"minimum": 1, "enum": [4, 5], "maximum": 9}]}
    )
    (way,) = declared.ways
    assert (way["minimum"], way["maximum"], way["enum"]) == (3, 9, [4])


def errors(entry: dict[str, Any], said: dict[str, Any]) -> tuple[str, ...]:
    return schema_errors(Call("f", said), [read_tool(entry, "tools[0]")])


# --- where a tool's schema stands ------------------------------------------------------------------------

TOOLS: dict[str, dict[str, Any]] = {
    "OpenAI": {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
    "Responses API": {
        "type": "function",
        "name": "f",
        "description": "d",
        "parameters": SCHEMA,
        "strict": True,
    },
    "Anthropic": {"name": "f", "description": "d", "input_schema": SCHEMA},
    "prompt caching": {
        "name": "f",
        "description": "d",
        "input_schema": SCHEMA,
        "cache_control": {"type": "ephemeral"},
    },
    "required beside it": {
        "name": "f",
        "description": "d",
        "required": ["city"],
        "parameters": {"type": "object", "properties": CITY},
    },
    "MCP": {"name": "f", "title": "F", "description": "d", "inputSchema": SCHEMA, "outputSchema": SCHEMA},
    "Bedrock": {"toolSpec": {"name": "f", "description": "d", "inputSchema": {"json": SCHEMA}}},
    "Gemini": {"name": "f", "description": "d", "parametersJsonSchema": SCHEMA},
    "LangChain": {"name": "f", "description": "d", "args_schema": SCHEMA},
    "args": {"name": "f", "description": "d", "args": SCHEMA},
    "JSON text": {"name": "f", "description": "d", "parameters": json.dumps(SCHEMA)},
    "null beside": {"name": "f", "description": "d", "parameters": None, "input_schema": SCHEMA},
    "flat": {"name": "f", "description": "d", "parameters": CITY, "required": ["city"]},
    "flat, marked": {
        "name": "f",
        "description": "d",
        "parameters": {"city": {"type": "str", "required": True}},
    },
    "a list": {
        "name": "f",
        "description": "d",
        "parameters": [{"name": "city", "type": "string", "required": True}],
    },
    "ToolBench": {
        "name": "f",
        "description": "d",
        "required_parameters": [{"name": "city", "type": "STRING"}],
        "optional_parameters": [],
    },
    "Seal-Tools": {
        "api_name": "f",
        "api_description": "d",
        "parameters": {"city": {"type": "str"}},
        "required": ["city"],
        "responses": {"temperature": {"type": "float"}},
    },
    "no type": {"name": "f", "description": "d", "parameters": {"properties": CITY, "required": ["city"]}},
    "$ref": {
        "name": "f",
        "description": "d",
        "parameters": {"$ref": "#/$defs/p", "$defs": {"p": SCHEMA}},
    },
    "allOf": {"name": "f", "description": "d", "parameters": {"allOf": [SCHEMA]}},
}


@pytest.mark.parametrize("form", TOOLS)
def test_a_tool_is_read_wherever_its_schema_stands(form: str) -> None:
    read = read_tool(TOOLS[form], "tools[0]")
    declared = Declared.of(read.parameters)
    assert (read.name, read.description) == ("f", "d")
    assert declared.properties == declared.required == {"city"}
    assert declared.property("city").kinds == {"string"}
    assert schema_errors(Call("f", {"city": "Oslo"}), [read]) == ()
    assert schema_errors(Call("f", {"town": "Oslo"}), [read])
    for layout in ("native", "paper", "template"):
        query = to_sample({"query": "?", "tools": [TOOLS[form]], "answers": []}, "own", 0).query
        prompt = prompts.act(query, layout)  # type: ignore[arg-type]
        assert '"city"' in prompt.system + "".join(prompt.tools)


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"name": "f", "payload": SCHEMA}, "tools[0].payload"),
        ({"name": "f", "payload": CITY}, "tools[0].payload"),
        ({"name": "f", "parameters": {}, "payload": SCHEMA}, "tools[0].payload"),
        ({"name": "f", "parameters": SCHEMA, "input_schema": {"type": "object"}}, "tools[0].input_schema"),
        ({"name": "f", "parameters": "{broken"}, "tools[0].parameters"),
        ({"name": "f", "parameters": "city"}, "tools[0].parameters"),
        ({"name": "f", "parameters": ["city"]}, "tools[0].parameters"),
        ({"name": "f", "parameters": {"city": 5}}, "tools[0].parameters.city"),
        ({"name": "f", "parameters": {"type": "object", "properties": []}}, "tools[0].parameters.properties"),
        (
            {"name": "f", "parameters": {"properties": CITY, "required": "city"}},
            "tools[0].parameters.required",
        ),
        ({"name": "f", "parameters": {"city": {"type": 7}}}, "tools[0].parameters.city.type"),
        ({"description": "d"}, "tools[0].name"),
        ("f", "tools[0].name"),
    ],
)
def test_what_cannot_be_read_is_refused_by_place(entry: Any, place: str) -> None:
    with pytest.raises(BadField) as error:
        read_tool(entry, "tools[0]")
    assert error.value.args[0] == place
    with pytest.raises(BrokenData):
        to_sample({"query": "?", "tools": [entry], "answers": []}, "own", 0)


@pytest.mark.parametrize("name", ["type", "properties", "required", "items", "enum", "nullable", "anyOf"])
def test_a_parameter_may_be_called_like_a_keyword(name: str) -> None:
    for given in ({name: {"type": "str"}}, {"type": "object", "properties": {name: {"type": "string"}}}):
        entry = {"name": "f", "parameters": given}
        assert Declared.of(read_tool(entry, "t").parameters).properties == {name}
        assert errors(entry, {name: "x"}) == () and errors(entry, {name: 5})
        assert judged(entry, {name: "x"}, {name: "x"}).correct


# --- what is declared, in every dialect --------------------------------------------------------------------

NUMBER = {"$defs": {"n": {"type": "integer"}}}
REF = {"$ref": "#/$defs/n"}
UNIONS: dict[str, tuple[Any, Any, Any, str]] = {  # parameter x, gold, said, code
    "list of types": ({"type": ["integer", "null"]}, 29, "29", "ok"),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 29, "29", "ok"),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, 29, "29", "ok"),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 0}]}, 29, "29", "ok"),
    "$ref": (REF, 29, "29", "ok"),
    "$ref in anyOf": ({"anyOf": [REF, {"type": "null"}]}, 29, "29", "ok"),
    "$ref in allOf": ({"allOf": [REF], "description": "n"}, 29, "29", "ok"),
    "boolean in anyOf": ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, True, "true", "ok"),
    "array in anyOf": ({"anyOf": [{"type": "array", "items": {"type": "integer"}}]}, [1, 2], "[1, 2]", "ok"),
    "items of $ref": ({"type": "array", "items": REF}, [1, 2], ["1", "2"], "ok"),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "string"}, REF]}, ["a", 1], ["a", "1"], "ok"),
    "tuple of draft 7": ({"type": "array", "items": [{"type": "string"}, REF]}, ["a", 1], ["a", "1"], "ok"),
    "additionalProperties": ({"type": "object", "additionalProperties": REF}, {"k": 1}, {"k": "1"}, "ok"),
    "properties inside": ({"type": "object", "properties": {"k": REF}}, {"k": 1}, {"k": "1"}, "ok"),
    "nullable": ({"type": "integer", "nullable": True}, 29, "29", "ok"),
    "a word": ({"type": "int | None"}, 29, "29", "ok"),
    "a wrong type stays one": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 29, "x", "wrong_type"),
    "a wrong value stays one": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 29, "30", "wrong_value"),
    "a string is one": ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, 29, "29", "wrong_value"),
}


@pytest.mark.parametrize("kind", UNIONS)
def test_a_declared_type_is_found_wherever_it_stands(kind: str) -> None:
    x, gold, said, code = UNIONS[kind]
    assert judged(tool({"x": x}, ["x"], **NUMBER), {"x": gold}, {"x": said}).code == code
    # Gold in text is read under the same declaration.
    if code == "ok" and not isinstance(gold, dict):
        assert judged(tool({"x": x}, ["x"], **NUMBER), {"x": json.dumps(gold)}, {"x": gold}).correct


VALID: dict[str, tuple[Any, Any, Any]] = {  # parameter x, a valid value, an invalid one
    "nullable": ({"type": "string", "nullable": True}, None, 5),
    "nullable enum": ({"type": "string", "nullable": True, "enum": ["a"]}, None, "b"),
    "nullable $ref": ({"$ref": "#/$defs/n", "nullable": True}, None, "x"),
    "not nullable": ({"type": "string", "nullable": False}, "a", None),
    "tuple of draft 7": ({"type": "array", "items": [{"type": "string"}, {"type": "integer"}]}, ["a", 1], [1, "a"]),
    "closed tuple": (
        {"type": "array", "items": [{"type": "string"}], "additionalItems": False},
        ["a"],
        ["a", 1],
    ),
    "exclusiveMinimum of draft 4": ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, 1, 0),
    "exclusiveMaximum of draft 4": ({"type": "number", "maximum": 9, "exclusiveMaximum": False}, 9, 10),
    "exclusiveMinimum of 2020-12": ({"type": "number", "exclusiveMinimum": 0}, 1, 0),
    "definitions": ({"$ref": "#/definitions/m"}, 1, "x"),
    "anything": (True, [5], ...),
    "nulls of a table": ({"type": "string", "enum": None, "items": None, "properties": None}, "a", 5),
    "a tuple in words": ({"type": "Tuple[str, int]"}, ["a", 1], ["a"]),
    "a list in words": ({"type": "string[]"}, ["a"], [1]),
    "a union in words": ({"type": "int | str"}, "a", [1]),
    "a nested list in words": ({"type": "List[Dict[str, int]]"}, [{"k": 1}], [{"k": "x"}]),
    "words below": ({"type": "array", "items": {"type": "int | str"}}, [1, "a"], [[1]]),
    "words in anyOf": ({"anyOf": [{"type": "int"}, {"type": "list[str]"}]}, ["a"], "a"),
    "words in additionalProperties": ({"type": "dict", "additionalProperties": {"type": "int"}}, {"k": 1}, {"k": "x"}),
    "Union": ({"type": "Union[int, List[str]]"}, ["a"], "a"),
    "Optional": ({"type": "Optional[List[int]]"}, [1], ["a"]),
    "or": ({"type": "integer or null"}, None, "a"),
    "prose behind": ({"type": "string (ISO date)"}, "2024-01-01", 5),
    "a type nobody knows": ({"type": "Widget"}, {"any": 1}, ...),
}  # fmt: skip


@pytest.mark.parametrize("kind", VALID)
def test_schemas_of_every_dialect_are_applied(kind: str) -> None:
    x, good, bad = VALID[kind]
    entry = tool({"x": x}, **NUMBER, definitions={"m": {"type": "integer"}})
    assert errors(entry, {"x": good}) == ()
    if bad is not ...:
        assert errors(entry, {"x": bad})


def test_false_allows_nothing() -> None:
    assert errors(tool({"x": False}), {"x": 1}) and errors(tool({"x": False}), {}) == ()


@pytest.mark.parametrize(
    ("more", "said", "valid"),
    [
        ({}, {"y": 1}, False),
        ({"additionalProperties": False}, {"y": 1}, False),
        ({"additionalProperties": True}, {"y": 1}, True),
        ({"additionalProperties": {"type": "integer"}}, {"y": 1}, True),
        ({"additionalProperties": {"type": "integer"}}, {"y": "a"}, False),
        ({"anyOf": [{"properties": {"y": {"type": "integer"}}}, {"properties": {"z": {}}}]}, {"y": 1}, True),
    ],
)
def test_more_arguments_only_where_the_schema_says_so(more: Any, said: Any, valid: bool) -> None:
    entry = tool({"x": {}}, **more)
    assert (errors(entry, said) == ()) == valid
    flags = to_sample(
        {"query": "?", "tools": [entry], "answers": [{"name": "f", "arguments": said}]}, "own", 0
    ).flags
    assert ("gold_issue" in flags) == (not valid)


# --- null for what may be left out ---------------------------------------------------------------------------

NULLABLE = {"type": ["string", "null"]}
INSIDE = {
    "type": "object",
    "properties": {"c": {"type": "string"}, "u": {"type": "string"}},
    "required": ["c"],
}
STRICT = {**INSIDE, "properties": {**INSIDE["properties"], "u": NULLABLE}, "required": ["c", "u"]}  # type: ignore[dict-item]
NULLS: dict[str, tuple[Any, Any, Any, str]] = {  # tool, gold, said, code
    "optional": (tool({"c": {}, "u": {"type": "string"}}, ["c"]), {"c": "Oslo"}, {"c": "Oslo", "u": None}, "ok"),
    "required, nullable": (tool({"c": {}, "u": NULLABLE}, ["c", "u"]), {"c": "Oslo"}, {"c": "Oslo", "u": None}, "ok"),
    "required, anyOf null": (
        tool({"c": {}, "u": {"anyOf": [{"type": "string"}, {"type": "null"}]}}, ["c", "u"]),
        {"c": "Oslo"}, {"c": "Oslo", "u": None}, "ok",
    ),
    "required, OpenAPI": (
        tool({"c": {}, "u": {"type": "string", "nullable": True}}, ["c", "u"]),
        {"c": "Oslo"}, {"c": "Oslo", "u": None}, "ok",
    ),
    "required, not nullable": (tool({"c": {}, "u": {"type": "string"}}, ["c", "u"]), {"c": "Oslo"}, {"c": "Oslo", "u": None}, "extra_argument"),
    "gold has a value": (tool({"c": {}, "u": NULLABLE}, ["c"]), {"c": "Oslo", "u": "C"}, {"c": "Oslo", "u": None}, "missing_argument"),
    "inside": (tool({"p": INSIDE}), {"p": {"c": "Oslo"}}, {"p": {"c": "Oslo", "u": None}}, "ok"),
    "inside, strict": (tool({"p": STRICT}), {"p": {"c": "Oslo"}}, {"p": {"c": "Oslo", "u": None}}, "ok"),
    "inside, gold says null": (tool({"p": INSIDE}), {"p": {"c": "Oslo", "u": None}}, {"p": {"c": "Oslo"}}, "ok"),
    "in a list": (tool({"p": {"type": "array", "items": INSIDE}}), {"p": [{"c": "a"}]}, {"p": [{"c": "a", "u": None}]}, "ok"),
    "inside, needed": (tool({"p": INSIDE}), {"p": {"c": "Oslo"}}, {"p": {"c": None}}, "wrong_type"),
    "not declared": (tool({"c": {}}), {"c": "Oslo"}, {"c": "Oslo", "u": None}, "extra_argument"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NULLS)
def test_null_says_that_something_is_left_out(kind: str) -> None:
    entry, gold, said, code = NULLS[kind]
    assert judged(entry, gold, said).code == code


# --- BFCL's rule ----------------------------------------------------------------------------------------------


def bfcl(
    gold: dict[str, list[Any]], said: dict[str, Any], props: Any, rule: Any = "bfcl", required: Any = ()
) -> str:
    from study.data import gold as gold_module
    from ttsi.types import Message, Query, Sample

    read = read_tool(tool(props, required), "t")
    calls = gold_module.read_gold({"name": "f", "arguments": gold}, (read,), sets=True)
    sample = Sample(Query("q", "bfcl", (Message("user", "?"),), (read,)), tuple(c for c, _ in calls))
    return judge(json.dumps({"name": "f", "arguments": said}), sample, rule).code


FLOATS = {"x": {"type": "array", "items": {"type": "float"}}}


@pytest.mark.parametrize(
    ("gold", "said", "props", "code"),
    [
        ({"x": [[1.0, 2.5]]}, {"x": [1, 2.5]}, FLOATS, "wrong_type"),
        ({"x": [[1.0, 2.5]]}, {"x": [1.0, 2.5]}, FLOATS, "ok"),
        ({"x": [[1, 2]]}, {"x": [1, 2]}, FLOATS, "ok"),
        ({"x": [1.0]}, {"x": 1}, {"x": {"type": "float"}}, "ok"),
        ({"x": ["", "a"]}, {}, {"x": {"type": "string"}}, "ok"),
        ({"x": [None]}, {}, {"x": {"type": "string"}}, "missing_argument"),
        ({"x": [None, 5]}, {}, {"x": {"type": "integer"}}, "missing_argument"),
        ({"x": ["", 5]}, {}, {"x": {"type": "integer"}}, "ok"),
        ({"x": ["a"], "y": ["b"]}, {"x": "a", "y": "b"}, {"x": {"type": "string"}}, "extra_argument"),
    ],
)
def test_bfcls_own_rule(gold: Any, said: Any, props: Any, code: str) -> None:
    assert bfcl(gold, said, props) == code


def test_what_the_default_rule_decides() -> None:
    text = {"x": {"type": "string"}}
    assert bfcl({"x": ["", "a"]}, {}, text, "schema", ["x"]) == "ok"  # required, but gold lets it be absent
    assert bfcl({"x": [None]}, {"x": "null"}, text, "schema", ["x"]) == "ok"  # the text spells its gold
    assert bfcl({"x": [None]}, {}, text, "schema") == "ok"


# --- what nobody can know ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "unknowable"),
    [
        ({"api_key": "abc"}, True),
        ({"password": "hunter2"}, True),
        ({"id": "a1b2c3d4e5f6a7b8"}, True),
        ({"host": "10.1.2.3"}, True),
        ({"site": "sample.org"}, True),
        ({"api_key": "K7"}, False),  # it stands in the question
        ({"site": "Example.com"}, False),
        ({"mode": "fast"}, False),
        ({"key": None}, False),
        ({"monkey": "abc"}, False),
    ],
)
def test_what_stands_nowhere_cannot_be_known(gold: dict[str, Any], unknowable: bool) -> None:
    props = {name: {"type": "string"} for name in gold}
    record = {
        "query": "Use K7 on example.com",
        "tools": [tool(props)],
        "answers": [{"name": "f", "arguments": gold}],
    }
    assert ("unknowable" in to_sample(record, "own", 0).flags) == unknowable


# --- hostile --------------------------------------------------------------------------------------------------------

LOOP = {"$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": LOOP}, "$defs": {"a": LOOP}},
        {"properties": {"x": LOOP}, "$defs": {"a": {"anyOf": [LOOP, LOOP]}}},
        {"properties": {"x": {"$ref": "http://127.0.0.1:9/x.json"}}},
        {"properties": {"x": {"$ref": "#/nowhere/at/all"}}},
        {"properties": {"x": {"allOf": [{"anyOf": [{"type": "string"}] * 8}] * 8}}},
        {"properties": {"x": {"anyOf": "string", "enum": 5, "items": 3, "required": "x"}}},
        {"properties": {"x": {"type": "list[" * 400}}},
        {"properties": {"x": {"type": "(" * 100_000}}},
    ],
)
def test_judging_has_an_end_whatever_the_schema(schema: dict[str, Any]) -> None:
    entry = {"name": "f", "parameters": {"type": "object", **schema}}
    began = time.process_time()
    with contextlib.suppress(BrokenData):
        assert judged(entry, {"x": "a"}, {"x": "a"}).correct
    assert time.process_time() - began < 2
