"""Tools and what their schemas declare: one way to read them, for prompt, judge and checks alike."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ttsi.types import Call, Tool

_COSTLY = ("$schema", "$dynamicRef", "patternProperties", "unevaluatedProperties", "unevaluatedItems")
_KINDS = ("string", "integer", "number", "boolean", "array", "object", "null")
_WORDS = {
    "string": "str string char",
    "integer": "int integer long short byte bigint",
    "number": "float number double",
    "boolean": "bool boolean",
    "array": "list array tuple set arraylist",
    "object": "dict object hashmap hashtable",
    "null": "null none",
}
_TYPES = {word: kind for kind, words in _WORDS.items() for word in words.split()}


class BadField(Exception):
    """(field, what is wrong with it)."""


def read_tool(entry: Any, field: str) -> Tool:
    entry = entry.get("function", entry) if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise BadField(f"{field}.name", "is no text")
    parameters = entry.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadField(f"{field}.parameters", "is not an object")
    if not isinstance(parameters.get("type"), str):  # flat: a parameter called `type` is an object
        parameters = {"type": "object", "properties": parameters, "required": entry.get("required")}
    schema = {"type": "object", "properties": {}, "required": []}
    schema |= _schema({**parameters, "type": "object"}, f"{field}.parameters")
    return Tool(entry["name"], str(entry.get("description") or ""), schema)


def _schema(node: Any, field: str) -> dict[str, Any]:
    """JSON Schema of one parameter, object or item: type names made standard, at every depth."""
    if not isinstance(node, dict):
        raise BadField(field, "is not an object")
    kind, item = _type(node.get("type"), f"{field}.type")
    out: dict[str, Any] = {"type": kind} if kind else {}
    out |= {k: v for k, v in node.items() if k not in ("type", "properties", "required", "optional")}
    if isinstance(node.get("items"), dict):
        out["items"] = _schema(node["items"], f"{field}.items")
    elif item:
        out["items"] = {"type": item}
    choices = node.get("enum")
    if kind == "array" and isinstance(choices, list) and not any(isinstance(c, list) for c in choices):
        out["items"] = {**out.get("items", {}), "enum": out.pop("enum")}  # BFCL lists what the items may be
    if node.get("properties") is not None:
        properties, listed = node["properties"], node.get("required") or []
        if not isinstance(properties, dict):
            raise BadField(f"{field}.properties", "is not an object")
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise BadField(f"{field}.required", "is not a list of names")
        out["properties"] = {k: _schema(v, f"{field}.{k}") for k, v in properties.items()}
        marked = [k for k, v in properties.items() if v.get("required") is True]
        if required := list(dict.fromkeys([*listed, *marked])):
            out["required"] = required
    return out


def _type(name: Any, field: str) -> tuple[str | list[str] | None, str | None]:
    """(JSON Schema type, type of the items). None = any, which is what unknown names mean too."""
    if isinstance(name, list):
        kinds = [_type(part, field)[0] for part in name]
        return ([k for k in kinds if isinstance(k, str)] if all(kinds) else None), None
    if name is not None and not isinstance(name, str):
        raise BadField(field, "is not the name of a type")
    words = re.findall(r"\w+", (name or "any").lower())
    if words[:1] == ["optional"]:  # Optional[int]; `list(str)`, `List[str]`, `str, optional` need no care
        words = words[1:]
    kind = _TYPES.get(words[0]) if words else None
    return kind, _TYPES.get(words[1]) if kind == "array" and len(words) > 1 else None


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value has its declared type. None declared: any. 29.0 is an integer, True isn't."""
    # Imported here and below: with all its extras jsonschema builds a grammar of IRIs, for two seconds.
    from jsonschema import Draft202012Validator

    declared = schema.get("type")
    kinds = [k for k in (declared if isinstance(declared, list) else [declared]) if k in _KINDS]
    return not kinds or any(Draft202012Validator.TYPE_CHECKER.is_type(value, kind) for kind in kinds)


def schema_errors(call: Call, tools: Sequence[Tool]) -> tuple[str, ...]:
    """How a call breaks its tool's schema, at most 20 lines; empty = valid.

    References are resolved inside the schema only, at most 1,000 of them; `pattern` and `uniqueItems` are
    not checked (their cost isn't linear). A schema that can't be applied is a line, never an exception.
    """
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry

    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return ("unknown tool",)
    budget = itertools.count()

    def reference(validator: Any, ref: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if next(budget) >= 1000:
            raise RecursionError("too many references")
        yield from Draft202012Validator.VALIDATORS["$ref"](validator, ref, instance, schema) or ()

    rules = {"$ref": reference, "pattern": lambda *_: (), "uniqueItems": lambda *_: ()}
    checker = validators.extend(Draft202012Validator, rules)
    try:
        schema = {key: value for key, value in tool.parameters.items() if key != "$schema"}
        if costly := [word for word in _COSTLY if f'"{word}":' in json.dumps(schema)]:
            raise ValueError(f"{costly[0]} is not supported")
        found = [f"unknown argument {k!r}" for k in call.arguments if k not in schema.get("properties", {})]
        errors = checker(schema, registry=Registry()).iter_errors(dict(call.arguments))
        found += [f"{error.json_path}: {error.message}" for error in itertools.islice(errors, 20)]
    except Exception as error:  # jsonschema lets through whatever a hostile schema causes
        found = [f"schema can't be applied: {type(error).__name__}: {error}"]
    return tuple(line[:200] for line in found[:20])


def inner(schema: Any, *path: str) -> Mapping[str, Any]:
    for key in path:
        schema = schema.get(key) if isinstance(schema, Mapping) else None
    return schema if isinstance(schema, Mapping) else {}
