"""Gold calls as people write them, read under their tools' schemas."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from ttsi.call_forms import read_calls
from ttsi.declared import Declared
from ttsi.strict_json import require_plain
from ttsi.types import AcceptedObject, Call, Gold, Query, Tool

_SECRET = re.compile(r"(?:\b|_|api|access)(?:key|token|secret|password|passwd|credential)s?(?:\b|_)", re.I)
_LITERAL = re.compile(
    r"(?=.*\d)(?=.*[A-Za-z])[\w+/=-]{16,}|\d{1,3}(?:\.\d{1,3}){3}|(?:[\w-]+\.)+[a-z]{2,6}", re.ASCII
)


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
    declared = Declared.of(parameters)
    names, required = declared.properties, declared.required
    if required - set(given):
        flags.add("gold_issue")
    arguments, may_omit = {}, set()
    for key, value in given.items():
        schema = declared.property(key)
        values = value if sets and isinstance(value, list) else [value]
        empty = any(v is None or v == "" for v in values)
        omissible = "" in values or (empty and not sets)
        if sets and (schema.kinds or {"string"}) != {"string"}:
            values = [v for v in values if v != ""]  # there "" only marks what may be left out
        read = [_coerce(v, schema, sets) for v in values]
        arguments[key] = tuple(v for v, _ in read)
        may_omit |= {key} if omissible else set()
        if empty:
            odd = not sets and key in required
        else:
            odd = not any(fit and _listed(v, schema) for v, fit in read)
        if odd or (key not in names and not declared.open):
            flags.add("gold_issue")
        if [v for v in values if isinstance(v, str)] != [v for v in arguments[key] if isinstance(v, str)]:
            flags.add("gold_coerced")
    return Gold(name, arguments, frozenset(may_omit)), flags


def unknowable(gold: Gold, query: Query) -> bool:
    """Whether a gold call needs what nobody can know: a secret, or an address, that stands nowhere.

    An argument called a key, token, secret, password or credential, or whose accepted values are random
    literals (16 characters or more, letters and digits), IP addresses or host names, of which none is found
    in a turn or in the tools.
    """
    read = [turn.content for turn in query.messages]
    read += [json.dumps([t.name, t.description, t.parameters], ensure_ascii=False) for t in query.tools]
    seen = "\n".join(read).casefold()
    for name, values in gold.arguments.items():
        texts = [v for v in values if isinstance(v, str) and v.strip()]
        if name in gold.may_omit or not texts or len(texts) < len(values):
            continue
        secret = _SECRET.search(name) or all(_LITERAL.fullmatch(text) for text in texts)
        if secret and not any(text.casefold() in seen for text in texts):
            return True
    return False


def _listed(value: Any, declared: Declared) -> bool:
    """Whether a value, or every item of a list, is one of those that an enum allows, if there is one."""
    if isinstance(value, list) and declared.enum is None:
        return all(_listed(v, declared.item(i)) for i, v in enumerate(value))
    return declared.enum is None or value in declared.enum


def _coerce(value: Any, declared: Declared, sets: bool = False) -> tuple[Any, bool]:
    """(gold value under its declared type, whether it has that type): JSON first, then a Python literal.

    `sets`: an object of lists, alone or in a list, holds the accepted values of its properties (BFCL).
    """
    if sets and isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        omit = frozenset(k for k, v in value.items() if "" in v)
        return AcceptedObject({k: tuple(v) for k, v in value.items()}, omit), declared.fits({})
    if isinstance(value, str) and not declared.fits(value):
        for read in (json.loads, ast.literal_eval):
            try:
                candidate = json.loads(json.dumps(read(value)))  # makes lists of tuples, refuses sets
                require_plain(candidate)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
            if declared.fits(candidate):
                value = candidate
                break
    parts: list[tuple[Any, bool]] = []
    if isinstance(value, list):
        parts = [_coerce(v, declared.item(i), sets) for i, v in enumerate(value)]
        value = [v for v, _ in parts]
    elif isinstance(value, dict):
        parts = [_coerce(v, declared.property(k)) for k, v in value.items()]
        value = dict(zip(value, (v for v, _ in parts), strict=True))
    return value, declared.fits(value) and all(fit for _, fit in parts)
