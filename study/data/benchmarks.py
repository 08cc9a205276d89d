"""Benchmarks as samples: one shape for what five upstreams write in five ways."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from study.data import fixture, own, sources
from study.data.gold import read_gold, unknowable
from study.data.own import BrokenData
from ttsi.conversations import read_messages
from ttsi.schemas import BadField, read_tool
from ttsi.strict_json import require_plain
from ttsi.types import Query, Sample

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


_REQUEST_LINE = re.compile(r"(?:\A|\n)[ \t]*Generate API Request:\s*\Z")
_FENCED = re.compile(r"\s*```(?:json)?\s*([\[{].*[\]}])\s*```\s*", re.DOTALL)


_OWN: dict[str, own.File] = {}
"""Benchmarks and pools of the user's own, by the name that they were given."""


@dataclass(frozen=True)
class _Raw:
    """One upstream record before it is read. `strict`: gold that can't be read is refused."""

    id: str
    file: str
    found: own.Record
    duplicate: bool = False
    strict: bool = False


def add(name: str, path: Path) -> None:
    """Makes a file of records a benchmark of this process, under a name that none has.

    A name stands for one content: results are stored under the hash of what was read, and those of a file
    that changes while a run reads it would be mixed. Raises BrokenData, also for one that has changed.
    """
    found = own.read(path)
    if name in _OWN:
        if _OWN[name].sha256 != found.sha256:
            raise BrokenData(
                f"{name}: {found.name} is not what this process has read under this name: start anew "
                "(restart the kernel), or use another name"
            )
        return
    _OWN[name] = found
    try:
        load(name)  # every record is read, so that what is wrong is said at once
    except BrokenData:
        del _OWN[name]
        raise


def is_added(name: str) -> bool:
    """Whether a benchmark is the user's own."""
    return name in _OWN


def load(
    name: str,
    n: int | None = None,
    tool_order: Literal["shuffled", "original"] = "shuffled",
    seed: int = 0,
    keep_components: bool = False,
) -> list[Sample]:
    """The first `n` samples of a benchmark (in FILES, or added) in its fixed permutation; None = all.

    The permutation is the same for every seed; `seed` shuffles the tools only, alike for samples with
    the same tools. `keep_components` keeps ToolAlpaca's pseudo-tool. Raises BrokenData, and what
    `sources` raises where the data can't be had.
    """
    if name not in FILES and name not in _OWN:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join([*FILES, *_OWN])}")
    if n is not None and n < 0:
        raise ValueError(f"n = {n} is negative")
    # Everything is read, whatever n is: a broken record shouldn't wait for a larger n to be found.
    return list(_loaded(name, fingerprint(name), tool_order, seed, keep_components)[:n])


@lru_cache(maxsize=32)  # an analysis asks some thirty times for a dozen readings of a second each
def _loaded(name: str, content: str, tool_order: str, seed: int, keep_components: bool) -> tuple[Sample, ...]:
    """All samples; `content` is the fingerprint of what they are read from."""
    raws = sorted(_raws(name), key=lambda raw: _hash(name, raw.id))
    return tuple(_sample(raw, name, tool_order, seed, keep_components) for raw in raws)


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
    _require_plain(record, benchmark, f"record {index}")
    raw = _Raw(f"{benchmark}-{index}", benchmark, own.Record(f"record {index}", record))
    return _sample(raw, benchmark, tool_order, seed, keep_components)


def _raws(name: str) -> Iterator[_Raw]:
    for prefix, file, records in _parts(name):
        seen: set[str] = set()
        for i, found in enumerate(records):
            _require_plain(found.record, file, found.place)
            fields = found.record if isinstance(found.record, dict) else {"record": found.record}
            content = {k: v for k, v in fields.items() if k not in ("id", "domain")}
            key = _hash(json.dumps(content, sort_keys=True))
            yield _Raw(f"{prefix}-{i}", file, found, key in seen, name in _OWN)
            seen.add(key)


def _parts(name: str) -> Iterator[tuple[str, str, list[own.Record]]]:
    """(prefix of the ids, file, records) of every file that a benchmark is read from."""
    if name in _OWN:
        yield name, _OWN[name].name, _OWN[name].records
        return
    for part in FILES[name]:
        file, records = _read(name, part)
        prefix = {"bfcl": f"bfcl_{part}", "fixture": name, "fixture_train": name}.get(name, part)
        if name == "nexusraven" and not all(isinstance(r, dict) and "domain" in r for r in records):
            prefix = "nexusraven_twin"  # upstream's processed file: must not pass for the rebuilt one
        sets = name == "bfcl"
        yield prefix, file, [own.Record(f"record {i}", r, sets=sets) for i, r in enumerate(records)]


def _require_plain(record: Any, file: str, place: str) -> None:
    """A lone surrogate, NaN or endless nesting would break a prompt, a hash or the store much later."""
    try:
        require_plain(record)
    except ValueError as error:
        raise BrokenData(f"{file}: {place}: field 'record' is no plain JSON: {error}") from error


def _read(name: str, part: str) -> tuple[str, list[Any]]:
    if name == "bfcl":
        return _bfcl(part)
    if part in get_args(fixture.Split):
        return f"fixture {part}", [*fixture.records(cast(fixture.Split, part))]
    return _file(part)


def fingerprint(name: str) -> str:
    """What a benchmark's samples are made from: a hash of its files or, for the fixture, of its records."""
    if name in _OWN:
        return _OWN[name].sha256[:16]
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
    asked, answered = (own.parsed(sources.bfcl_file(category, answers=part), file) for part in (False, True))
    truth = own.ground_truth(answered, file)
    for i, (_, row) in enumerate(asked):
        try:
            records.append(own.bfcl(row if isinstance(row, dict) else {}, truth))
        except BadField as error:
            raise own.broken(file, f"record {i}", error) from error
    return file, records


def _sample(raw: _Raw, benchmark: str, tool_order: str, seed: int, keep_components: bool) -> Sample:
    if tool_order not in ("shuffled", "original"):
        raise ValueError(f"tool_order = {tool_order!r} is neither 'shuffled' nor 'original'")
    record, names = raw.found.record, raw.found.names
    try:
        if not isinstance(record, dict):
            raise BadField("record", "is not an object")
        asked = _apibank(record.get("query")) if benchmark == "apibank" else record.get("query")
        said, listed, wanted = (names.get(f, f) for f in ("query", "tools", "answers"))
        messages = tuple(read_messages(asked, said))
        if not any(message.role == "user" for message in messages):
            raise BadField(said, "has nothing said by the user")
        entries, answers = _list(record, "tools", listed), _list(record, "answers", wanted)
        tools = [read_tool(entry, f"{listed}[{i}]") for i, entry in enumerate(entries)]
        if benchmark == "toolalpaca" and not keep_components:
            tools = [tool for tool in tools if tool.name != "components"]
        if raw.strict:
            own.require_calls(answers, tools, listed, wanted)
        gold = [part for answer in answers for part in read_gold(answer, tools, raw.found.sets)]
    except BadField as error:
        raise own.broken(raw.file, raw.found.place, error) from error
    keys = {id(tool): _hash(json.dumps([tool.name, tool.description, tool.parameters])) for tool in tools}
    tool_set = _hash(*sorted(keys.values()))
    if tool_order == "shuffled":
        tools.sort(key=lambda tool: _hash(str(seed), tool_set, keys[id(tool)]))
    cluster = raw.id
    if benchmark == "apibank":  # hashed: clusters are committed, benchmark text isn't
        cluster = f"apibank:{_hash(messages[0].content)[:12]}"
    elif benchmark == "nexusraven":
        cluster = f"nexusraven:{record.get('domain', tool_set[:12])}"
    query = Query(raw.id, benchmark, messages, tuple(tools))
    flags = {"duplicate"} if raw.duplicate else set()
    flags |= {"unknowable"} if any(unknowable(call, query) for call, _ in gold) else set()
    return Sample(
        query,
        tuple(call for call, _ in gold),
        frozenset(flags.union(*(odd for _, odd in gold))),
        cluster,
    )


def _apibank(query: Any) -> Any:
    """API-Bank's turns: its request line goes, and past calls, fenced there, stand between tags."""
    if not isinstance(query, list):
        return query
    turns = [dict(turn) if isinstance(turn, dict) else turn for turn in query]
    for i, turn in enumerate(turns):
        text = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            continue
        if i == len(turns) - 1:
            text = _REQUEST_LINE.sub("", text)
        if turn.get("role") in ("agent", "assistant") and (fenced := _FENCED.fullmatch(text)):
            calls = fenced[1] if fenced[1][0] == "[" else f"[{fenced[1]}]"
            text = f"<tool_call>{calls}</tool_call>"
        turn["content"] = text
    # An empty result of a tool says nothing there.
    return [t for t in turns if not isinstance(t, dict) or t.get("role") != "tool" or t.get("content") != ""]


def _list(record: dict[str, Any], key: str, field: str) -> list[Any]:
    value = record.get(key)
    try:
        value = json.loads(value) if isinstance(value, str) else value
        require_plain(value)
    except (ValueError, RecursionError) as error:
        raise BadField(field, f"is no plain JSON: {error}") from error
    if not isinstance(value, list):
        raise BadField(field, "is not a list")
    return value


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
