"""Gold calls as people write them, read under their tools' schemas."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ttsi.calls import read_calls, require_plain
from ttsi.schemas import fits
from ttsi.types import AcceptedObject, Call, Gold, Tool


def read_gold(answer: Any, tools: Sequence[Tool], sets: bool = False) -> list[tuple[Gold, set[str]]]:
    """The gold calls that an answer is, in any form that a reply may have, with what is odd about each.

    Nothing in it is an error: what can't be read as a call stays as one without arguments, flagged.
    sets: arguments are lists of accepted values (BFCL).
    """
    try:
        if calls := read_calls(answer):
            alone = isinstance(answer, dict) and answer.keys() == {"name"}  # were its arguments lost?
            odd = {"gold_issue"} if alone else set[str]()
            return [(gold, flags | odd) for gold, flags in (_gold(call, tools, sets) for call in calls)]
    except ValueError:
        pass
    name = answer.get("name", answer.get("tool")) if isinstance(answer, dict) else None
    gold, flags = _gold(Call(str(name), {}), tools, sets)
    return [(gold, flags | {"gold_issue"})]


def _gold(call: Call, tools: Sequence[Tool], sets: bool) -> tuple[Gold, set[str]]:
    name, given, flags = call.name, call.arguments, set[str]()
    parameters = next((tool.parameters for tool in tools if tool.name == name), None)
    if parameters is None:
        flags.add("gold_tool_missing")
        parameters = {"properties": {key: {} for key in given}, "required": []}
    if set(parameters["required"]) - set(given):
        flags.add("gold_issue")
    arguments, may_omit = {}, set()
    for key, value in given.items():
        schema = parameters["properties"].get(key, {})
        values = value if sets and isinstance(value, list) else [value]
        empty = any(v is None or v == "" for v in values)
        if sets and schema.get("type", "string") != "string":
            values = [v for v in values if v != ""]  # there "" only marks what may be left out
        read = [_coerce(v, schema, sets) for v in values]
        arguments[key] = tuple(v for v, _ in read)
        if empty:
            may_omit.add(key)
            odd = not sets and key in parameters["required"]
        else:
            odd = not any(fit for _, fit in read)
        if odd or key not in parameters["properties"]:
            flags.add("gold_issue")
        if [v for v in values if isinstance(v, str)] != [v for v in arguments[key] if isinstance(v, str)]:
            flags.add("gold_coerced")
    return Gold(name, arguments, frozenset(may_omit)), flags


def _coerce(value: Any, schema: Mapping[str, Any], sets: bool = False) -> tuple[Any, bool]:
    """(gold value under its declared type, whether it has that type): JSON first, then a Python literal.

    `sets`: an object of lists, alone or in a list, holds the accepted values of its properties (BFCL).
    """
    if sets and isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        omit = frozenset(k for k, v in value.items() if "" in v)
        return AcceptedObject({k: tuple(v) for k, v in value.items()}, omit), fits({}, schema)
    if isinstance(value, str) and not fits(value, schema):
        for read in (json.loads, ast.literal_eval):
            try:
                candidate = json.loads(json.dumps(read(value)))  # makes lists of tuples, refuses sets
                require_plain(candidate)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
            if fits(candidate, schema):
                value = candidate
                break
    parts: list[tuple[Any, bool]] = []
    if isinstance(value, list):
        items = schema.get("items")
        parts = [_coerce(v, items if isinstance(items, dict) else {}, sets) for v in value]
        value = [v for v, _ in parts]
    elif isinstance(value, dict):
        parts = [_coerce(v, schema.get("properties", {}).get(k, {})) for k, v in value.items()]
        value = dict(zip(value, (v for v, _ in parts), strict=True))
    return value, fits(value, schema) and all(fit for _, fit in parts)
