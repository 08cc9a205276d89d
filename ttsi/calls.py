"""Calls in model output: read and written.

Model output is hostile: it is only ever decoded as JSON, never evaluated, in time linear in its length.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from ttsi.types import Call, Form

MAX_DEPTH = 64
"""Levels of nesting that are read. A limit of our own: the interpreter's depends on who is calling."""
_OPEN, _CLOSE = re.compile(r"<tool_call>\s*"), re.compile(r"\s*(?:</tool_call>|\Z)")
_JSON_START = re.compile(r"""\{\s*["']|\[\s*\{""")
_FENCE = re.compile(r"```[\w-]*\Z")


@dataclass(frozen=True)
class Parsed:
    """What a reply holds: calls, or the code of why there are none. `form` says how they were written."""

    calls: tuple[Call, ...]
    error: Literal["no_call", "bad_json"] | None
    form: Form
    detail: str = ""


def parse_calls(text: str) -> Parsed:
    """The calls in a reply: all pairs of `<tool_call>` tags, else all JSON calls, fenced or bare.

    Between tags stands one list of calls or one call; the last pair may lack its end. Prose around is
    ignored. JSON is strict: repeated keys, NaN, infinities, lone surrogates, integers beyond 4,300 digits
    and nesting beyond MAX_DEPTH are `bad_json`; so is what opens like a call and isn't one.
    An empty list is `no_call`.
    """
    form: Form = "tagged"
    try:
        if tag := _first_tag(text):
            calls = list(_tagged(text, tag))
        elif start := _JSON_START.search(text):
            form = "fenced" if _FENCE.search(text[: start.start()].rstrip()[-40:]) else "bare"
            calls = list(_untagged(text, start.start()))
        else:
            return Parsed((), "no_call", "none")
    except ValueError as error:
        return Parsed((), "bad_json", form, str(error)[:80])
    return Parsed(tuple(calls), None if calls else "no_call", form)


def canonical(calls: Iterable[Call]) -> str:
    """Key under which calls are the same vote: order of calls and arguments, 29.0 or 29, outer spaces go."""
    keys = (json.dumps([c.name, _plain(c.arguments)], sort_keys=True) for c in calls)
    return "[" + ", ".join(sorted(keys)) + "]"


def format_calls(calls: Iterable[Call]) -> str:
    """The calls as a model should write them: `<tool_call>[{"name": …, "arguments": {…}}]</tool_call>`."""
    rows = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return f"<tool_call>{json.dumps(rows, ensure_ascii=False)}</tool_call>"


def require_plain(value: Any) -> None:
    """Raise ValueError unless a value is JSON that can be written as UTF-8, nested at most MAX_DEPTH deep."""
    level, depth = [value], 0
    while level:  # level by level, without recursion
        depth += 1
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii():
                    item.encode()  # a lone surrogate: UnicodeEncodeError is a ValueError
            elif isinstance(item, dict):
                if not all(isinstance(key, str) for key in item):
                    raise ValueError("a key that is no text")
                inner += itertools.chain(item, item.values())
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number that is not finite")
            elif not isinstance(item, int | float | None):
                raise ValueError(f"a {type(item).__name__}")
        if inner and depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        level = inner


def spelled(text: str) -> Any:
    """The JSON value that the whole string spells; the string itself if it spells none."""
    try:
        value, end = _decode(text, len(text) - len(text.lstrip()))
    except ValueError:
        return text
    return value if not text[end:].strip() else text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is repeated")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_object)


def _decode(text: str, start: int) -> tuple[Any, int]:
    """(the JSON value that begins at `start`, where it ends). Raises ValueError, and nothing else."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    require_plain(value)
    return value, end


def _first_tag(text: str) -> re.Match[str] | None:
    """The first opening tag that isn't inside a JSON value."""
    position, tag = 0, _OPEN.search(text)
    while tag and (start := _JSON_START.search(text, position, tag.start())):
        try:
            _, position = _DECODER.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            return tag
        if position > tag.start():
            tag = _OPEN.search(text, position)
    return tag


def _tagged(text: str, tag: re.Match[str] | None) -> Iterator[Call]:
    while tag:
        value, end = _decode(text, tag.end())
        yield from _calls(value)
        if not (close := _CLOSE.match(text, end)):
            raise ValueError("text between the JSON and the closing tag")
        tag = _OPEN.search(text, close.end())


def _untagged(text: str, position: int) -> Iterator[Call]:
    """The calls among a text's JSON values. Other values are ignored as long as there is a call."""
    empty = True
    while start := _JSON_START.search(text, position):
        value, position = _decode(text, start.start())
        try:
            calls = _calls(value)
        except ValueError:
            continue
        empty = False
        yield from calls
    if empty:
        raise ValueError("JSON that is no call")


def _calls(value: Any) -> list[Call]:
    """One call, or a list of them. Missing arguments are none; arguments may be an object as JSON text."""
    calls = []
    for row in value if isinstance(value, list) else [value]:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError("a call without a name")
        arguments = row.get("arguments")
        if isinstance(arguments, str):
            arguments = spelled(arguments)
        if not isinstance(arguments, dict | None):
            raise ValueError("arguments that are no object")
        calls.append(Call(name, arguments or {}))
    return calls


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value
