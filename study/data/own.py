"""A file of one's own records, in whichever of four forms it is written.

This project's (`query`, `tools`, `answers`), which xLAM's columns have too, as JSON text; OpenAI's
(`messages`, `tools`, `tool_calls`); BFCL's (`question`, `function`, the ground truth beside). A JSON array,
or a record a line. What is wrong is said in one line that names file, line or record, and field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttsi.call_forms import read_calls
from ttsi.conversations import is_assistant
from ttsi.schemas import BadField
from ttsi.strict_json import decode
from ttsi.types import Tool

BESIDE = "possible_answer"
"""The folder beside BFCL's questions in which a file of the same name holds what is accepted."""


class BrokenData(ValueError):
    """A benchmark's file or record can't be read; the message names file, record and field."""


class Record(NamedTuple):
    """One record with the fields `query`, `tools` and `answers`; `names`: what its file calls them.

    place: the line, or the number of the record in an array. sets: arguments are lists of accepted values.
    """

    place: str
    record: Any
    names: Mapping[str, str] = {}
    sets: bool = False


class File(NamedTuple):
    """A file's name, its records, and the SHA-256 of what they were read from."""

    name: str
    records: list[Record]
    sha256: str


def read(path: Path) -> File:
    """A file of records. Raises BrokenData."""
    content = _content(path)
    rows, read_too = list(parsed(content, path.name)), b""
    if not rows:
        raise BrokenData(f"{path.name}: holds no record")
    truth: dict[Any, Any] = {}
    if any(_is_bfcl(row) and "ground_truth" not in row for _, row in rows):
        beside = path.parent / BESIDE / path.name
        read_too = _content(beside)
        truth = ground_truth(parsed(read_too, f"{BESIDE}/{path.name}"), f"{BESIDE}/{path.name}")
    records = []
    for place, row in rows:
        try:
            records.append(_record(place, row, truth))
        except BadField as error:
            raise broken(path.name, place, error) from error
    return File(path.name, records, hashlib.sha256(content + read_too).hexdigest())


def broken(file: str, place: str, error: BadField) -> BrokenData:
    """What is wrong with a field, and where it stands."""
    return BrokenData(f"{file}: {place}: field '{error.args[0]}' {error.args[1]}")


def parsed(content: bytes, file: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of every record of a JSON array, or of every line that isn't empty."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BrokenData(f"{file}: line {line}: is no UTF-8: {error.reason}") from error
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        values = _decoded(text, start, file)
        yield from ((f"record {i}", value) for i, value in enumerate(values))
        return
    for line, row in enumerate(text.split("\n"), 1):  # `splitlines` would cut strings in two
        if row.strip():
            yield f"line {line}", _decoded(row, len(row) - len(row.lstrip()), file, line)


def _decoded(text: str, start: int, file: str, line: int = 0) -> Any:
    """The one JSON value of a text. line: the text is this line of the file."""
    try:
        value, end = decode(text, start)
        if rest := text[end:].lstrip():
            raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno}, column {error.colno}"
        raise BrokenData(f"{file}: {where}: is no JSON: {error.msg}") from error
    except ValueError as error:
        where = f"line {line}: " if line else ""
        raise BrokenData(f"{file}: {where}is no plain JSON: {error}") from error
    return value


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BrokenData(f"{path}: can't be read: {error.strerror}") from error


def _record(place: str, row: Any, truth: Mapping[Any, Any]) -> Record:
    if not isinstance(row, dict):
        raise BadField("record", "is not an object")
    if "query" in row:
        return Record(place, row)
    if "messages" in row:
        return _openai(place, row)
    if _is_bfcl(row):
        names = {"query": "question", "tools": "function", "answers": "ground_truth"}
        return Record(place, bfcl(row, truth), names, sets=True)
    raise BadField("query", "is missing: a record has query, tools and answers, or messages and tools")


# --- OpenAI's -------------------------------------------------------------------------------------------


def _openai(place: str, row: dict[str, Any]) -> Record:
    """A chat with the calls that are wanted: beside it, or its last turn of the assistant that makes some.

    What follows that turn is no part of the question. A chat that ends with the assistant's words alone wants
    no call.
    """
    turns, tools = row["messages"], "functions" if "functions" in row and "tools" not in row else "tools"
    if not isinstance(turns, list):
        raise BadField("messages", "is not a list of turns")
    wanted, field, end = _calls(row), "tool_calls", len(turns)
    if wanted is None:
        said = [i for i, turn in enumerate(turns) if isinstance(turn, dict) and is_assistant(turn)]
        making = [i for i in said if _calls(turns[i]) is not None]
        if making:
            end, field = making[-1], f"messages[{making[-1]}].tool_calls"
            wanted = _calls(turns[end])
        elif said and said[-1] == len(turns) - 1:
            end, wanted = said[-1], []
        else:
            raise BadField("tool_calls", "is missing, and no turn of the assistant makes a call")
    names = {"query": "messages", "tools": tools, "answers": field}
    return Record(place, {"query": turns[:end], "tools": row.get(tools), "answers": wanted}, names)


def _calls(turn: Mapping[str, Any]) -> Any:
    """The calls beside a text, in OpenAI's two ways; None without any."""
    if turn.get("tool_calls") is not None:
        return turn["tool_calls"]
    return None if turn.get("function_call") is None else [turn["function_call"]]


# --- BFCL's ---------------------------------------------------------------------------------------------


def _is_bfcl(row: Any) -> bool:
    return isinstance(row, dict) and "question" in row and "function" in row


def ground_truth(rows: Iterator[tuple[str, Any]], file: str) -> dict[Any, Any]:
    """What BFCL accepts, by the question's id."""
    truth = {}
    for place, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or "ground_truth" not in row:
            raise BrokenData(f"{file}: {place}: field 'id' or 'ground_truth' is missing")
        truth[row["id"]] = row["ground_truth"]
    return truth


def bfcl(row: Mapping[str, Any], truth: Mapping[Any, Any]) -> dict[str, Any]:
    """A question of BFCL as a record; its calls' arguments are lists of accepted values. Raises BadField."""
    question, wanted = row.get("question"), row.get("ground_truth")
    if not isinstance(question, list) or len(question) != 1:
        raise BadField("question", "is not the one list of turns that a question of one step has")
    if wanted is None:
        name = row.get("id")
        wanted = truth.get(name) if isinstance(name, str) else None
    if not isinstance(wanted, list) or not all(isinstance(call, dict) for call in wanted):
        raise BadField("ground_truth", f"is no list of calls, here or under this id in {BESIDE}")
    calls = [{"name": k, "arguments": v} for call in wanted for k, v in call.items()]
    return {"query": question[0], "tools": row.get("function"), "answers": calls}


# --- what own data are held to --------------------------------------------------------------------------


def require_calls(answers: Sequence[Any], tools: Sequence[Tool], listed: str, wanted: str) -> None:
    """Raise BadField unless there are tools, and every answer is calls of them: one's own file can be mended.

    listed, wanted: what the file calls its tools and answers.
    """
    if not tools:
        raise BadField(listed, "is empty")
    known = {tool.name for tool in tools}
    for i, answer in enumerate(answers):
        try:
            calls = read_calls(answer)
        except ValueError as error:
            raise BadField(f"{wanted}[{i}]", f"is no call: {error}") from error
        for call in calls:
            if call.name not in known:
                raise BadField(f"{wanted}[{i}]", f"calls {call.name!r}, which is none of the record's tools")
