"""What is a call: one reading of the forms in use, for replies, past turns, gold and examples alike."""

from __future__ import annotations

from typing import Any

from ttsi.strict_json import spelled
from ttsi.types import Call

NAME_KEYS = frozenset({
    "name", "function", "tool", "toolname", "functionname", "func", "action", "api", "apiname",
    "recipientname",
})  # fmt: skip
ARGUMENT_KEYS = frozenset({
    "arguments", "parameters", "input", "inputs", "args", "arg", "params", "param", "kwargs", "toolinput",
    "actioninput", "toolarguments", "toolargs", "toolparameters", "functionarguments", "functionargs",
    "functionparameters", "argumentsjson",
})  # fmt: skip
"""Under what names a call's function and its arguments stand, out there; case, _ and - don't count."""
WRAPPERS = frozenset({
    "function", "functioncall", "toolcall", "tooluse", "call", "toolcalls", "functioncalls", "calls",
    "tooluses",
})  # fmt: skip
_PLAIN = {"name", "arguments"}
_IDS = {"id", "callid", "toolcallid", "tooluseid"}
_TYPES = {"function", "functioncall", "tooluse", "toolcall", "call", "custom"}
_NO_CALLS = {"text", "thinking", "reasoning", "redactedthinking", "outputtext"}


class NoCall(ValueError):
    """A value that is no call, and no attempt at one."""


def fold(key: str) -> str:
    """A key as it is compared: `toolCalls`, `tool-calls` and `tool_calls` are one."""
    return key.lower().replace("_", "").replace("-", "")


def read_calls(value: Any, strict: bool = False) -> list[Call]:
    """The calls that a JSON value is: one, a list of them, or either in a wrapper.

    A call is an object with a name and its arguments (NAME_KEYS, ARGUMENT_KEYS), these an object or JSON text
    that spells one; none, null or "" are no arguments. Wrappers are OpenAI's, Anthropic's, Hammer's and their
    like. Arguments are never dropped: what may be arguments under a key that nobody knows raises ValueError,
    as does what is no call. With a name alone an object is a call only if nothing else stands in it but an id
    and a type: `{"name": "cancel"}` is one, `{"name": "my-app", "version": "1.0"}` is none.
    strict: only `name` and `arguments` count.
    """
    if isinstance(value, list):
        parts = [row for row in value if not _is_text(row)] if not strict else value
        return [call for row in parts for call in read_calls(row, strict)]
    if not isinstance(value, dict):
        raise ValueError("a call without a name")
    if strict:
        return _strict(value)
    if value.keys() <= _PLAIN and value.get("name") and isinstance(value["name"], str):
        return [Call(value["name"], _arguments(value.get("arguments")))]  # nothing to look for: most calls
    held = {fold(key): key for key in value}
    if len(held) < len(value):
        raise ValueError("a key that stands twice, in two spellings")
    arguments = [held[k] for k in held if k in ARGUMENT_KEYS]
    if not isinstance(value.get("name"), str):
        wrapped = [held[k] for k in held if k in WRAPPERS and isinstance(value[held[k]], dict | list)]
        if len(wrapped) > 1:
            raise ValueError(f"calls under {wrapped[0]!r} and {wrapped[1]!r}")
        if wrapped:
            return _unwrapped(value[wrapped[0]], {key: value[key] for key in arguments if value[key]})
    named = "name" if isinstance(value.get("name"), str) else None
    named = named or next((held[k] for k in held if k in NAME_KEYS and isinstance(value[held[k]], str)), None)
    if named is None and not {"name", "arguments"} & value.keys():
        raise NoCall("an object that is no call")
    if named is None or not value[named]:
        raise ValueError("a call without a name")
    arguments = [key for key in arguments if key != named]
    given = [found for key in arguments if (found := _arguments(value[key]))]
    if any(found != given[0] for found in given):
        raise ValueError(f"arguments under {arguments[0]!r} and {arguments[1]!r}")
    if not arguments:
        _require_alone(value, named)
    definition = given[0] if "parameters" in arguments and given else {}
    if definition.get("type") == "object" and isinstance(definition.get("properties"), dict):
        raise NoCall("the definition of a function")
    return [Call(value[named], given[0] if given else {})]


def _strict(value: dict[str, Any]) -> list[Call]:
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("a call without a name")
    if others := [key for key in value if fold(key) in ARGUMENT_KEYS and key != "arguments"]:
        raise ValueError(f"arguments under {others[0]!r}")
    return [Call(value["name"], _arguments(value.get("arguments")))]


def _unwrapped(inner: Any, beside: dict[str, Any]) -> list[Call]:
    """The calls in a wrapper; arguments beside it are those of the one call inside."""
    if not beside:
        return read_calls(inner)
    if not isinstance(inner, dict) or any(inner.get(key, beside[key]) != beside[key] for key in beside):
        raise ValueError(f"arguments under {next(iter(beside))!r} beside calls")
    return read_calls({**inner, **beside})


def _require_alone(value: dict[str, Any], named: str) -> None:
    """Raise NoCall unless an object without arguments is a call, and ValueError where they may be lost."""
    others = [key for key in value if key != named and not _beside(fold(key), value[key])]
    if not others and named == "name":
        return
    unknown = [key for key in others if isinstance(value[key], dict) or _spells_an_object(value[key])]
    if named != "name" or not unknown or len(unknown) < len(others):
        raise NoCall("an object with a name that is no call")
    raise ValueError(f"arguments under {unknown[0]!r}")


def _beside(key: str, value: Any) -> bool:
    """Whether a key may stand in a call that has no arguments."""
    if key == "type":
        return isinstance(value, str) and fold(value) in _TYPES
    return (
        (key in _IDS and isinstance(value, str))
        or (key == "index" and isinstance(value, int))
        or value is None
    )


def _spells_an_object(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] == "{" and isinstance(spelled(value), dict)


def _is_text(row: Any) -> bool:
    """Whether a part of a list is what was said or thought beside the calls."""
    kind = row.get("type") if isinstance(row, dict) else None
    return isinstance(kind, str) and fold(kind) in _NO_CALLS


def _arguments(value: Any) -> dict[str, Any]:
    """A call's arguments: an object, or JSON text that spells one; null and empty text are none."""
    if isinstance(value, str):
        value = spelled(value) if value.strip() else {}
    if not isinstance(value, dict | None):
        raise ValueError("arguments that are no object")
    return value or {}


def pattern(keys: frozenset[str]) -> str:
    """A regular expression for these keys, however they are spelled."""
    return "|".join("[_-]?".join(key) for key in sorted(keys))


__all__ = ["ARGUMENT_KEYS", "NAME_KEYS", "WRAPPERS", "NoCall", "fold", "pattern", "read_calls"]
