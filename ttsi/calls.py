"""Calls: one reading of what people and models write, for replies, past turns, gold and examples alike.

Model output is hostile: it is only ever decoded as JSON, never evaluated, in time linear in its length.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ttsi.call_forms import ARGUMENT_KEYS, NAME_KEYS, WRAPPERS, NoCall, pattern, read_calls
from ttsi.strict_json import DECODER, decode
from ttsi.types import Call, Form

_KEY = re.compile(rf"""["'](?:{pattern(NAME_KEYS | WRAPPERS)})["']\s*:""", re.I)
_ARGUMENTS = re.compile(rf"""["'](?:{pattern(ARGUMENT_KEYS)})["']\s*:""", re.I)
# Code, tags, keys without quotes or with others: an attempt at a call in a form that is not read.
_CALLISH = re.compile(
    r"""\w\(\s*[\[{]|\w[{]["']|</?(?:function|invoke|tool)\b|\[TOOL_CALLS\]|Action Input\s*:"""
    r"""|[{,]\s*(?:name|arguments|parameters)\s*:|[“„«\\](?:name|arguments)[”“»"\\]""",
    re.I,
)
_TAG = re.compile(r"<tool_call>\s*(?:```[\w-]*\s*)?")
_TAG_FIRST = re.compile(r"(?:\A|\n)[^\S\n]*<tool_call>")
_CLOSE = re.compile(r"\s*(?:```\s*)?(?:</tool_call>|\Z)")
_END = re.compile(r"\s*\Z")
_NEXT = re.compile(r"\s*[,;]?\s*(?=[\[{])")
_LINE = re.compile(r"(?:\A|\n|</tool_call>)[^\S\n]*\Z")
_JSON_START = re.compile(r"""\{\s*["']|\[\s*\{""")
_FENCE = re.compile(r"```[\w-]*\Z")
_THOUGHT = re.compile(
    r"</(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)>|\[/THINK\]|◁/think▷",
    re.I,
)
_THINKING = re.compile(
    r"(?:<(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)>|\[THINK\]|◁think▷)",
    re.I,
)


@dataclass(frozen=True)
class Parsed:
    """What a reply holds: calls, or the code of why there are none. `form` says how they were written."""

    calls: tuple[Call, ...]
    error: Literal["no_call", "bad_json"] | None
    form: Form
    detail: str = ""


def parse_calls(text: str, only_tagged: bool = False) -> Parsed:
    """The calls in a reply: all pairs of `<tool_call>` tags, else all JSON calls, fenced or bare.

    Everything up to the last end of the reasoning (`</think>` and its like) is no part of the answer. Between
    tags stand calls in any form that `read_calls` knows, one after another, fenced or not; the last pair may
    lack its end. Without tags JSON that is no call is ignored, and so is prose, whatever it holds: a tag in
    the middle of a sentence, braces. JSON is strict: repeated keys, NaN, infinities, lone surrogates,
    integers beyond 4,300 digits and nesting beyond MAX_DEPTH are `bad_json`; so is what opens like a call and
    isn't one, beside good calls too. An empty list is `no_call`.
    only_tagged: any other form is `no_call`, and only `name` and `arguments` count.
    """
    form: Form = "tagged"
    try:
        text = answer_of(text)
        start = _JSON_START.search(text)
        tags = _attempts(text)
        if tag := next(tags, None):
            calls = list(_tagged(text, itertools.chain([tag], tags), only_tagged))
        elif start and not only_tagged:
            form, calls = _untagged(text)
        elif start or not _TAG_FIRST.search(text):
            return Parsed((), "no_call", _form(text, start.start()) if start else "none")
        else:
            raise ValueError("a tag without a call")
    except BrokenJSON as error:
        return Parsed((), "bad_json", error.form, str(error)[:80])
    except ValueError as error:
        return Parsed((), "bad_json", form, str(error)[:80])
    return Parsed(tuple(calls), None if calls else "no_call", form)


class BrokenJSON(ValueError):
    """What opens like a call and isn't one; `form` says how it was written."""

    def __init__(self, problem: str, form: Form) -> None:
        super().__init__(problem)
        self.form: Form = form


def answer_of(text: str) -> str:
    """A reply less its reasoning: what stands behind the last end of one that isn't inside a JSON value.

    Reasoning that is never ended goes on to the end of the text.
    """
    first, last = answer_span(text)
    return text[first:last]


def answer_span(text: str) -> tuple[int, int]:
    """Where in a reply stands what `answer_of` gives."""
    cut = max((end.end() for end in _outside(text, _THOUGHT)), default=0)
    begun = next(_outside(text[cut:], _THINKING), None)
    return cut, cut + begun.start() if begun else len(text)


def canonical(calls: Iterable[Call]) -> str:
    """Key under which calls are the same vote: order of calls and arguments, 29.0 or 29, outer spaces go."""
    keys = (json.dumps([c.name, _plain(c.arguments)], sort_keys=True) for c in calls)
    return "[" + ", ".join(sorted(keys)) + "]"


def format_calls(calls: Iterable[Call]) -> str:
    """The calls as a model should write them: `<tool_call>[{"name": …, "arguments": {…}}]</tool_call>`."""
    rows = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return f"<tool_call>{json.dumps(rows, ensure_ascii=False)}</tool_call>"


def _outside(text: str, wanted: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """The matches that stand outside JSON values; what is broken is no value, and is tried once."""
    position, effort = 0, _effort(text)
    match = wanted.search(text)
    while match:
        while effort > 0 and (start := _JSON_START.search(text, position, match.start())):
            try:
                _, position = DECODER.raw_decode(text, start.start())
            except (ValueError, RecursionError) as error:
                effort -= _cost(error, start.start())
                position = match.start()
        if position > match.start():
            match = wanted.search(text, position)
            continue
        position = match.end()
        yield match
        match = wanted.search(text, match.end())


def _attempts(text: str) -> Iterator[re.Match[str]]:
    """The opening tags that are no words of a sentence."""
    last_end = text.rfind("</tool_call>")
    for tag in _outside(text, _TAG):
        ahead = text[tag.end() : tag.end() + 1]
        first = _LINE.search(text[max(0, tag.start() - 64) : tag.start()])
        # With nothing behind it, it is a call that was cut.
        if ahead in "[{" or (first and last_end >= tag.end()):
            yield tag


def _tagged(text: str, tags: Iterable[re.Match[str]], strict: bool) -> Iterator[Call]:
    done = 0
    for tag in tags:
        if tag.start() < done:
            continue
        value, end = decode(text, tag.end())
        yield from read_calls(value, strict)
        while not (close := _CLOSE.match(text, end)):
            if strict or not (gap := _NEXT.match(text, end)):
                raise ValueError("text between the JSON and the closing tag")
            value, end = decode(text, gap.end())
            yield from read_calls(value)
        done = close.end()


def _untagged(text: str) -> tuple[Form, list[Call]]:
    """The calls among a text's JSON values, and how the first of them is written.

    Raises BrokenJSON for a broken call; beside good ones only if it has arguments.
    """
    form, first, calls, broken = None, None, list[Call](), ""
    position, effort = 0, _effort(text)
    blank = len(text) - len(text.lstrip())
    while start := _JSON_START.search(text, position):
        found, begin = _form(text, start.start()), start.start()
        first = first or found
        try:
            value, position = decode(text, begin)
        except ValueError as error:
            effort -= _cost(error, begin, len(text))
            reached = error.pos if isinstance(error, json.JSONDecodeError) else begin
            head = text[begin : max(reached, text.find("}", begin)) + 1 or None]
            named, given = _KEY.search(head), _ARGUMENTS.search(head)
            if effort < 0 or (named and given) or "deeply" in str(error):
                raise BrokenJSON(str(error), found) from error
            broken = broken or (str(error) if named or given else "")
            position = start.end()
            continue
        try:
            calls += read_calls(value)
            form = form or found
        except NoCall:
            data = isinstance(value, dict) and "name" in value
            if not data and found == "bare" and begin == blank and _END.match(text, position):
                broken = "JSON that is no call"
        except ValueError as error:
            raise BrokenJSON(str(error), found) from error
    if not calls and (broken or _CALLISH.search(text)):
        raise BrokenJSON(broken or "a call in a form that is not read", first or "bare")
    return form or first or "none", calls


def _effort(text: str) -> int:
    """What broken JSON may cost in a text: an error is found by reading on, and counts lines before it."""
    return 128 * len(text) + 100_000


def _cost(error: Exception, start: int, end: int = 0) -> int:
    reached = error.pos if isinstance(error, json.JSONDecodeError) else max(end, start + 1000)
    return 64 * (reached - start) + reached


def _form(text: str, start: int) -> Form:
    """How JSON that begins there is written: in a code fence, or bare."""
    return "fenced" if _FENCE.search(text[max(0, start - 40) : start].rstrip()) else "bare"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value
