"""JSON as it is read here: strictly, never evaluated, in time linear in its length, and nothing else."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 64
"""Levels of nesting that are read. A limit of our own: the interpreter's depends on who is calling."""


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
        value, end = decode(text, len(text) - len(text.lstrip()))
    except ValueError:
        return text
    return value if not text[end:].strip() else text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is repeated")
    return found


DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_object)


def decode(text: str, start: int) -> tuple[Any, int]:
    """(the JSON value that begins at `start`, where it ends). Raises ValueError, and nothing else."""
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    require_plain(value)
    return value, end
