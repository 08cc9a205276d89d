"""Benchmarks as samples: one shape for what five upstreams write in five ways."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from ttsi import fixture, sources
from ttsi.calls import fits, require_plain
from ttsi.types import AcceptedObject, Gold, Message, Query, Role, Sample, Tool

FILES = {
    "sealtool": ("sealtool",),
    "apibank": ("apibank_l1", "apibank_l2"),
    "nexusraven": ("nexusraven",),
    "toolalpaca": ("toolalpaca",),
    "bfcl": ("multiple", "live_multiple", "parallel_multiple", "live_parallel_multiple"),
    "sealtool_train": ("sealtool_train",),
    "fixture": ("test",),
    "fixture_train": ("train",),
}
"""What each benchmark is read from: data files, for BFCL the categories with several tools."""

_KINDS = {
    "string": "str string char",
    "integer": "int integer long short byte bigint",
    "number": "float number double",
    "boolean": "bool boolean",
    "array": "list array tuple set arraylist",
    "object": "dict object hashmap hashtable",
    "null": "null none",
}
_TYPES = {word: kind for kind, words in _KINDS.items() for word in words.split()}
_ROLES: dict[str, Role] = {
    "user": "user", "system": "user", "agent": "assistant", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
_REQUEST_LINE = re.compile(r"(?:\A|\n)[ \t]*Generate API Request:\s*\Z")
_FENCED = re.compile(r"\s*```(?:json)?\s*([\[{].*[\]}])\s*```\s*", re.DOTALL)


class BrokenData(ValueError):
    """A benchmark's file or record can't be read; the message names file, index and field."""


class _Broken(Exception):
    """(field, what is wrong with it)."""


@dataclass(frozen=True)
class _Raw:
    """One upstream record before it is read. `sets`: gold arguments are lists of accepted values."""

    id: str
    file: str
    index: int
    record: Any
    sets: bool = False
    duplicate: bool = False


def load(
    name: str,
    n: int | None = None,
    tool_order: Literal["shuffled", "original"] = "shuffled",
    seed: int = 0,
    keep_components: bool = False,
) -> list[Sample]:
    """The first `n` samples of a benchmark (a key of FILES) in its fixed permutation; None = all.

    The permutation is the same for every seed; `seed` shuffles the tools only, alike for samples with
    the same tools. `keep_components` keeps ToolAlpaca's pseudo-tool. Raises BrokenData, and what
    `sources` raises where the data can't be had.
    """
    if name not in FILES:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(FILES)}")
    if n is not None and n < 0:
        raise ValueError(f"n = {n} is negative")
    raws = sorted(_raws(name), key=lambda raw: _hash(name, raw.id))
    # Everything is read, whatever n is: a broken record shouldn't wait for a larger n to be found.
    return [_sample(raw, name, tool_order, seed, keep_components) for raw in raws][:n]


def to_sample(
    record: dict[str, Any],
    benchmark: str,
    index: int,
    *,
    tool_order: Literal["shuffled", "original"] = "shuffled",
    seed: int = 0,
    keep_components: bool = False,
) -> Sample:
    """One raw `{"query", "tools", "answers"}` record as a sample with the id `benchmark-index`.

    `query`: a question or a list of `{"role", "content"}` turns. `tools`: flat parameters
    (`{"city": {"type": "str"}}`) or JSON Schema. `answers`: `{"name", "arguments"}` each. `tools` and
    `answers` may be JSON text. Raises BrokenData for a bad field; odd gold is flagged, never refused.
    """
    _require_plain(record, benchmark, index)
    raw = _Raw(f"{benchmark}-{index}", benchmark, index, record)
    return _sample(raw, benchmark, tool_order, seed, keep_components)


def _raws(name: str) -> Iterator[_Raw]:
    for part in FILES[name]:
        file, records = _read(name, part)
        prefix = {"bfcl": f"bfcl_{part}", "fixture": name, "fixture_train": name}.get(name, part)
        if name == "nexusraven" and not all(isinstance(r, dict) and "domain" in r for r in records):
            prefix = "nexusraven_twin"  # upstream's processed file: must not pass for the rebuilt one
        seen: set[str] = set()
        for i, record in enumerate(records):
            _require_plain(record, file, i)
            fields = record if isinstance(record, dict) else {"record": record}
            content = {k: v for k, v in fields.items() if k not in ("id", "domain")}
            key = _hash(json.dumps(content, sort_keys=True))
            yield _Raw(f"{prefix}-{i}", file, i, record, name == "bfcl", key in seen)
            seen.add(key)


def _require_plain(record: Any, file: str, index: int) -> None:
    """A lone surrogate, NaN or endless nesting would break a prompt, a hash or the store much later."""
    try:
        require_plain(record)
    except ValueError as error:
        raise BrokenData(f"{file}: record {index}: field 'record' is no plain JSON: {error}") from error


def _read(name: str, part: str) -> tuple[str, list[Any]]:
    if name == "bfcl":
        return _bfcl(part)
    if part in get_args(fixture.Split):
        return f"fixture {part}", [*fixture.records(cast(fixture.Split, part))]
    return _file(part)


def fingerprint(name: str) -> str:
    """What a benchmark's samples are made from: a hash of its files or, for the fixture, of its records."""
    if name == "bfcl":
        return sources.data_hash(name)[:16]
    if name in ("fixture", "fixture_train"):
        return _hash(json.dumps([_read(name, part)[1] for part in FILES[name]]))[:16]
    return "-".join(sources.data_hash(part)[:16] for part in FILES[name])


def _file(name: str) -> tuple[str, list[Any]]:
    path = sources.benchmark_file(name)
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BrokenData(f"{path.name}: is no JSON: {error}") from error
    if not isinstance(records, list):
        raise BrokenData(f"{path.name}: is no list of records")
    return path.name, records


def _bfcl(category: str) -> tuple[str, list[Any]]:
    file, records = f"BFCL {category}", []
    try:
        asked, answered = (
            [json.loads(line) for line in sources.bfcl_file(category, answers=part).splitlines() if line]
            for part in (False, True)
        )
        gold = {row["id"]: row["ground_truth"] for row in answered}
        for row in asked:
            calls = [{"name": k, "arguments": v} for call in gold[row["id"]] for k, v in call.items()]
            records.append({"query": row["question"][0], "tools": row["function"], "answers": calls})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BrokenData(f"{file}: record {len(records)}: {error!r}") from error
    return file, records


def _sample(raw: _Raw, benchmark: str, tool_order: str, seed: int, keep_components: bool) -> Sample:
    if tool_order not in ("shuffled", "original"):
        raise ValueError(f"tool_order = {tool_order!r} is neither 'shuffled' nor 'original'")
    record = raw.record
    try:
        if not isinstance(record, dict):
            raise _Broken("record", "is not an object")
        messages = tuple(_messages(record.get("query")))
        if not any(message.role == "user" for message in messages):
            raise _Broken("query", "has nothing said by the user")
        tools = [_tool(entry, f"tools[{i}]") for i, entry in enumerate(_list(record, "tools"))]
        if benchmark == "toolalpaca" and not keep_components:
            tools = [tool for tool in tools if tool.name != "components"]
        gold = [_gold(answer, tools, raw.sets) for answer in _list(record, "answers")]
    except _Broken as error:
        raise BrokenData(
            f"{raw.file}: record {raw.index}: field '{error.args[0]}' {error.args[1]}"
        ) from error
    keys = {id(tool): _hash(json.dumps([tool.name, tool.description, tool.parameters])) for tool in tools}
    tool_set = _hash(*sorted(keys.values()))
    if tool_order == "shuffled":
        tools.sort(key=lambda tool: _hash(str(seed), tool_set, keys[id(tool)]))
    cluster = raw.id
    if benchmark == "apibank":  # hashed: clusters are committed, benchmark text isn't
        cluster = f"apibank:{_hash(messages[0].content)[:12]}"
    elif benchmark == "nexusraven":
        cluster = f"nexusraven:{record.get('domain', tool_set[:12])}"
    flags = {"duplicate"} if raw.duplicate else set()
    return Sample(
        Query(raw.id, benchmark, messages, tuple(tools)),
        tuple(call for call, _ in gold),
        frozenset(flags.union(*(odd for _, odd in gold))),
        cluster,
    )


def _list(record: dict[str, Any], field: str) -> list[Any]:
    value = record.get(field)
    try:
        value = json.loads(value) if isinstance(value, str) else value
        require_plain(value)
    except (ValueError, RecursionError) as error:
        raise _Broken(field, f"is no plain JSON: {error}") from error
    if not isinstance(value, list):
        raise _Broken(field, "is not a list")
    return value


def _messages(query: Any) -> Iterator[Message]:
    """The turns. API-Bank's request line goes, its past calls stand between tags as the model writes them."""
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    if not isinstance(turns, list):
        raise _Broken("query", "is neither a question nor a list of turns")
    for i, turn in enumerate(turns):
        role, text = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise _Broken(f"query[{i}]", f"needs a text as content and a role out of {', '.join(_ROLES)}")
        if isinstance(query, list) and i == len(turns) - 1:
            text = _REQUEST_LINE.sub("", text)
        if _ROLES[role] == "assistant" and (fenced := _FENCED.fullmatch(text)):
            calls = fenced[1] if fenced[1][0] == "[" else f"[{fenced[1]}]"
            text = f"<tool_call>{calls}</tool_call>"
        if text.strip():
            yield Message(_ROLES[role], text)


def _tool(entry: Any, field: str) -> Tool:
    entry = entry.get("function", entry) if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise _Broken(f"{field}.name", "is no text")
    parameters = entry.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise _Broken(f"{field}.parameters", "is not an object")
    if not isinstance(parameters.get("type"), str):  # flat: a parameter called `type` is an object
        parameters = {"type": "object", "properties": parameters, "required": entry.get("required")}
    schema = {"type": "object", "properties": {}, "required": []}
    schema |= _schema({**parameters, "type": "object"}, f"{field}.parameters")
    return Tool(entry["name"], str(entry.get("description") or ""), schema)


def _schema(node: Any, field: str) -> dict[str, Any]:
    """JSON Schema of one parameter, object or item: type names made standard, at every depth."""
    if not isinstance(node, dict):
        raise _Broken(field, "is not an object")
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
            raise _Broken(f"{field}.properties", "is not an object")
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise _Broken(f"{field}.required", "is not a list of names")
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
        raise _Broken(field, "is not the name of a type")
    words = re.findall(r"\w+", (name or "any").lower())
    if words[:1] == ["optional"]:  # Optional[int]; `list(str)`, `List[str]`, `str, optional` need no care
        words = words[1:]
    kind = _TYPES.get(words[0]) if words else None
    return kind, _TYPES.get(words[1]) if kind == "array" and len(words) > 1 else None


def _gold(answer: Any, tools: Iterable[Tool], sets: bool) -> tuple[Gold, set[str]]:
    """A gold call and what is odd about it. Nothing in it is an error: the sample stays, flagged."""
    raw = answer if isinstance(answer, dict) else {}
    name, given = raw.get("name", raw.get("tool")), raw.get("arguments", raw.get("parameters"))
    flags = set() if isinstance(name, str) and isinstance(given, dict) else {"gold_issue"}
    name, given = str(name), given if isinstance(given, dict) else {}
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


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
