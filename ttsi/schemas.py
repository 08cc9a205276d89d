"""Tools as people describe them, read as one: a name, a description, a JSON Schema of the arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ttsi.types import Tool

_WORDS = {
    "string": "str string char text",
    "integer": "int integer long short byte bigint",
    "number": "float number double decimal",
    "boolean": "bool boolean",
    "array": "list array tuple set arraylist sequence iterable",
    "object": "dict object hashmap hashtable map mapping",
    "null": "null none nonetype nil",
}
_TYPES = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_SCHEMA_KEYS = (
    "parameters", "inputSchema", "input_schema", "parametersJsonSchema", "parameters_json_schema",
    "json_schema", "args_schema", "schema", "arguments", "args", "params", "inputs", "input",
)  # fmt: skip
_RESULTS = {"returns", "return", "response", "responses", "result", "results"}
_ONE = ("additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("$defs", "definitions", "patternProperties", "dependentSchemas")
_MAY_BE_NULL = ("default", "const", "example")
_TOKEN = re.compile(r"[\w.]+|\[\]|[\[\](){}<>|,?]")
_LONGEST = 300
"""Characters of a type in words that are read, and levels of brackets: a limit of our own."""


class BadField(Exception):
    """(field, what is wrong with it)."""


def read_tool(entry: Any, field: str) -> Tool:
    """A tool as OpenAI, Anthropic, MCP, Bedrock or nobody in particular describes it.

    Its parameters may be a JSON Schema, an object of parameters by name (`{"city": {"type": "str"}}`), a list
    of them, or JSON text of any. Raises BadField, naming the place, for what can't be read; that includes an
    object that looks like a schema under a key that nobody knows: a tool is never emptied.
    """
    for wrapper in ("function", "toolSpec", "tool_spec"):
        if isinstance(entry, dict) and isinstance(entry.get(wrapper), dict):
            entry = entry[wrapper]
    if not isinstance(entry, dict):
        raise BadField(f"{field}.name", "is no text")
    name = entry.get("name", entry.get("api_name"))
    if not isinstance(name, str) or not name:
        raise BadField(f"{field}.name", "is no text")
    key, parameters = _parameters(entry, field)
    schema = {"type": "object", "properties": {}, "required": []} | _schema(parameters, f"{field}.{key}")
    described = entry.get("description") or entry.get("api_description")
    return Tool(name, str(described or ""), schema)


def _parameters(entry: dict[str, Any], field: str) -> tuple[str, dict[str, Any]]:
    """(key, the JSON Schema of type object) of a tool's parameters."""
    held = [key for key in _SCHEMA_KEYS if entry.get(key)]
    if len({json.dumps(entry[key], sort_keys=True) for key in held}) > 1:
        raise BadField(f"{field}.{held[1]}", f"is another schema than {held[0]!r}")
    for key, value in entry.items():
        if key in (*_SCHEMA_KEYS, "required") or _is_result(key):
            continue
        if isinstance(value, dict) and str(value.get("type", "object")).lower() not in _TYPES:
            value = {k: v for k, v in value.items() if k != "type"}  # `cache_control` has a type of its own
        if _is_schema(value) or (_is_flat(value) and not held):
            raise BadField(f"{field}.{key}", "looks like a schema under a key that nobody knows")
    key = held[0] if held else "parameters"
    given = entry.get(key) if held else {}
    lists = [entry.get(f"{kind}_parameters") for kind in ("required", "optional")]
    if not held and any(lists):  # ToolBench
        given = [{**p, "required": i == 0} for i, part in enumerate(lists) for p in part or ()]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise BadField(f"{field}.{key}", f"is no JSON: {error}") from error
    if isinstance(given, dict) and given.keys() == {"json"} and isinstance(given["json"], dict):
        given = given["json"]  # Bedrock
    if isinstance(given, list):
        if not all(isinstance(p, dict) and isinstance(p.get("name"), str) for p in given):
            raise BadField(f"{field}.{key}", "is a list, but not of parameters with names")
        flat = {p["name"]: {k: v for k, v in p.items() if k != "name"} for p in given}
        return key, {"type": "object", "properties": flat, "required": entry.get("required")}
    if not isinstance(given, dict):
        raise BadField(f"{field}.{key}", "is not an object")
    if _is_schema(given):
        beside = {"required": entry["required"]} if isinstance(entry.get("required"), list) else {}
        return key, {**beside, **given, "type": "object"}
    flat = {k: v for k, v in given.items() if v is not None}
    return key, {"type": "object", "properties": flat, "required": entry.get("required")}


def _is_result(key: str) -> bool:
    """Whether a tool's key says what it gives back, not what it takes."""
    return key.lower() in _RESULTS or key.lower().startswith("output")


def _is_schema(value: Any) -> bool:
    """Whether an object is a JSON Schema, not parameters by name, which may be called `type`."""
    if not isinstance(value, dict):
        return False
    properties = value.get("properties")
    return (
        isinstance(value.get("type"), str | list)
        or (
            isinstance(properties, dict)
            and all(isinstance(v, dict | bool | None) for v in properties.values())
        )
        or isinstance(value.get("$ref"), str)
        or isinstance(value.get("required"), list)
        or any(isinstance(value.get(word), list) for word in ("anyOf", "oneOf", "allOf"))
        or isinstance(value.get("additionalProperties"), bool)
        or (isinstance(value.get("$schema"), str))
    )


def _is_flat(value: Any) -> bool:
    """Whether an object looks like parameters by name."""
    parts = list(value.values()) if isinstance(value, dict) else []
    return bool(parts) and all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in parts)


def _schema(node: Any, field: str) -> Any:
    """JSON Schema of a parameter, object or item: type names made standard, nulls dropped, at every depth."""
    if isinstance(node, bool):
        return node
    if not isinstance(node, dict):
        raise BadField(field, "is not an object")
    kept = {k: v for k, v in node.items() if v is not None or k in _MAY_BE_NULL}
    typed = _type(kept.get("type"), f"{field}.type")
    said = {k: v for k, v in kept.items() if k not in ("type", "properties", "required", "optional")}
    out = (
        {k: v for k, v in typed.items() if k == "type"}
        | said
        | {k: v for k, v in typed.items() if k not in said}
    )
    out |= dict(_inner(out, field))
    choices = out.get("enum")
    listing = isinstance(choices, list) and not any(isinstance(c, list) for c in choices)
    if listing and out.get("type") == "array" and isinstance(out.get("items", {}), dict):
        out["items"] = {**out.get("items", {}), "enum": out.pop("enum")}  # BFCL lists what the items may be
    listed = kept.get("required", [])
    if "properties" in kept:
        properties = kept["properties"]
        if not isinstance(properties, dict):
            raise BadField(f"{field}.properties", "is not an object")
        properties = {k: v for k, v in properties.items() if v is not None}
        out["properties"] = {k: _schema(v, f"{field}.{k}") for k, v in properties.items()}
        marked = [k for k, v in properties.items() if isinstance(v, dict) and v.get("required") is True]
        if not isinstance(listed, list) and not isinstance(listed, bool):
            raise BadField(f"{field}.required", "is not a list of names")
        listed = [*(listed if isinstance(listed, list) else ()), *marked]
    if isinstance(listed, list):
        if not all(isinstance(name, str) for name in listed):
            raise BadField(f"{field}.required", "is not a list of names")
        out |= {"required": list(dict.fromkeys(listed))} if listed else {}
    return out


def _inner(node: dict[str, Any], field: str) -> Iterator[tuple[str, Any]]:
    """A node's inner schemas, read, by their keywords."""
    for word, value in node.items():
        place = f"{field}.{word}"
        if (word == "items" or word in _ONE) and isinstance(value, dict):
            yield word, _schema(value, place)
        elif (word == "items" or word in _MANY) and isinstance(value, list):
            yield word, [_schema(part, f"{place}[{i}]") for i, part in enumerate(value)]
        elif word in _NAMED and isinstance(value, dict):
            yield word, {k: _schema(v, f"{place}.{k}") for k, v in value.items()}


def _type(name: Any, field: str) -> dict[str, Any]:
    """What a type, or a list of them, is in JSON Schema: nothing = any, which unknown names mean too."""
    if isinstance(name, list):
        return _union([_type(part, field) for part in name])
    if name is not None and not isinstance(name, str):
        raise BadField(field, "is not the name of a type")
    tokens = _TOKEN.findall((name or "any").lower()[:_LONGEST])
    try:
        return _words(tokens)
    except RecursionError:
        return {}


def _words(tokens: list[str]) -> dict[str, Any]:
    """The type that begins a list of words, which are used up: `int | str`, `list[int]`, `string[]`."""
    parts = []
    while tokens:
        word, arguments = tokens.pop(0).rpartition(".")[2], list[dict[str, Any]]()
        if tokens and tokens[0] in "[(<":
            tokens.pop(0)
            while tokens and tokens[0] not in "])>":
                arguments.append(_words(tokens))
                tokens[:1] = [] if tokens and tokens[0] == "," else tokens[:1]
            tokens[:1] = []
        part = _applied(word, arguments)
        while tokens and tokens[0] in ("[]", "?"):
            part = (
                {"type": "array", "items": part}
                if tokens.pop(0) == "[]"
                else _union([part, {"type": "null"}])
            )
        parts.append(part)
        if not tokens or tokens[0] not in ("|", "or"):
            break
        tokens.pop(0)
    while tokens and tokens[0] not in ("]", ")", ">", ","):
        tokens.pop(0)  # `string (ISO date)`, `integer between 1 and 5`
    return _union(parts)


def _applied(word: str, arguments: list[dict[str, Any]]) -> dict[str, Any]:
    """A named type with the types in its brackets."""
    if word == "optional":  # of an argument it says that it may be left out
        return arguments[0] if arguments else {}
    if word == "union":
        return _union(arguments)
    kind = _TYPES.get(word)
    if kind == "array" and word == "tuple" and len(arguments) > 1:
        return {
            "type": kind,
            "prefixItems": arguments,
            "minItems": len(arguments),
            "maxItems": len(arguments),
        }
    if kind == "array" and arguments:
        return {"type": kind, "items": arguments[0]} if arguments[0] else {"type": kind}
    if kind == "object" and len(arguments) == 2 and arguments[1]:
        return {"type": kind, "additionalProperties": arguments[1]}
    return {"type": kind} if kind else {}


def _union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Any of the parts; anything, if one of them is that."""
    if len(parts) == 1 or not all(parts):
        return parts[0] if len(parts) == 1 else {}
    kinds = [k for p in parts for k in (p["type"] if isinstance(p.get("type"), list) else [p.get("type")])]
    if all(p.keys() == {"type"} for p in parts):
        return {"type": list(dict.fromkeys(kinds))}
    return {"anyOf": parts}
