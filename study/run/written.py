"""What people write, read: profiles in YAML, parameters on a command line. What is wrong is one line."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

NAME = re.compile(r"[A-Za-z0-9][\w .+-]*")


def folder_name(name: str) -> str:
    """The name, which must be one for a folder. Raises ValueError."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a folder: letters, digits and '-_.+'")
    return name


class WrongParameter(ValueError):
    """A parameter that the notebook doesn't have, or that can't be read; the message lists the right ones."""


# --- profiles -------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a profile's file. Raises ValueError, naming file and place, for what is none."""
    try:
        read = _OneOfEach(path.read_bytes()).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}:{where} {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: can't be read: {error}".splitlines()[0]) from None
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        said = "is empty" if read is None else "holds no keys with values"
        raise ValueError(f"{path}: {said}; a profile names a model and benchmarks at least")
    return read


class _OneOfEach(yaml.SafeLoader):
    """Plain YAML, but a key that is given twice is an error, not the second value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def counts_and_files(benchmarks: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers of samples and paths, by benchmark, out of what may stand for either, or of a list of names."""
    counts: dict[str, Any] = {}
    files: dict[str, str] = {}
    if not isinstance(benchmarks, dict):
        if not isinstance(benchmarks, list | tuple) or not all(isinstance(b, str) for b in benchmarks):
            raise ValueError(f"benchmarks = {benchmarks!r} is no list of names, and no mapping")
        return dict.fromkeys(benchmarks), files
    for name, value in benchmarks.items():
        own = {"path": value} if isinstance(value, str) else value
        if isinstance(own, dict):
            if not isinstance(own.get("path"), str) or own.keys() - {"path", "n"}:
                raise ValueError(f"benchmarks.{name}: write a number, null, a path, or {{path: …, n: …}}")
            files[name] = own["path"]
            own = own.get("n")
        counts[name] = own
    return counts, files


def at_most(n: int, variant: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's settings with at most n samples of a benchmark, where it counts them itself."""
    if not isinstance(variant.get("benchmarks"), dict):
        return dict(variant)
    counts, files = counts_and_files(variant["benchmarks"])
    fewer = {b: n if c is None else min(n, c) for b, c in counts.items()}
    return {
        **variant,
        "benchmarks": {b: {"path": files[b], "n": m} if b in files else m for b, m in fewer.items()},
    }


def problems(error: ValidationError, keys: Iterable[str]) -> str:
    """What pydantic finds wrong, in one line; keys: those that there are."""
    found = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            found.append(f"no key {place!r}{meant(place, keys)}")
        else:
            said = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
            value = problem["input"]
            if problem["type"] != "value_error" and isinstance(value, str | int | float):
                said += f", not {repr(value)[:80]}"
            found.append(f"{place}: {said}" if place else said)
    return "; ".join(found)


def meant(name: str, known: Iterable[str]) -> str:
    """The known names, and the one that may be meant."""
    near = difflib.get_close_matches(name, list(known), 1)
    return (f", did you mean {near[0]!r}?" if near else ";") + f" there are {', '.join(known)}"


# --- parameters -----------------------------------------------------------------------------------------


def read_parameters(text: str) -> dict[str, Any]:
    """Parameters from 'key=value key=value': values are Python literals, any other word is a string.

    A value may hold spaces inside quotes or brackets. Raises WrongParameter for what can't be read,
    as happens to ['sealtool'] when a shell has eaten its quotes.
    """
    given, rest = {}, text.strip()
    while rest:
        found = re.match(r"([A-Za-z_]\w*)=(?=\S)", rest)
        end = _end_of_value(rest, found.end()) if found else 0
        if not found or not end:
            raise WrongParameter(f"can't read {rest!r}: write key=value, e.g. n=8 benchmarks=['sealtool']")
        given[found[1]] = _value(found[1], rest[found.end() : end])
        rest = rest[end:].lstrip()
    return given


def _end_of_value(text: str, start: int) -> int:
    """Where a value ends: at a space outside quotes and brackets. 0 for one that is left open."""
    depth, quote, at = 0, "", start
    while at < len(text) and (quote or depth or not text[at].isspace()):
        char = text[at]
        if quote:
            at += char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "[({") - (char in "])}")
        at += 1
    return 0 if quote or depth else at


def _value(key: str, text: str) -> Any:
    try:
        return _literal(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        if text[0] in "[{('\"":
            raise WrongParameter(
                f"{key}={text} is not a Python literal; quote it so that the shell leaves it"
            ) from None
        return text


def _literal(node: ast.expr) -> Any:
    """What a literal says, products and powers of whole numbers (`10**3`) worked out. Nothing is run."""
    match node:
        case ast.List(elts=parts):
            return [_literal(part) for part in parts]
        case ast.Tuple(elts=parts):
            return tuple(map(_literal, parts))
        case ast.Dict(keys=keys, values=values) if all(keys):
            return {_literal(k): _literal(v) for k, v in zip(keys, values, strict=True) if k}
        case ast.BinOp(left=left, op=ast.Mult() | ast.Pow() as op, right=right):
            one, other = _literal(left), _literal(right)
            if type(one) is not int or type(other) is not int or not 0 <= other < 10**6 or abs(one) > 10**6:
                raise ValueError("arithmetic of other things than small whole numbers")
            if isinstance(op, ast.Pow) and other * one.bit_length() > 64:
                raise ValueError("a power beyond 64 bits")
            return one * other if isinstance(op, ast.Mult) else one**other
    return ast.literal_eval(node)
