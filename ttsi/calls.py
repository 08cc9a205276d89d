"""Calls: one reading of what people and models write, for replies, past turns, gold and examples alike.

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
NAME_KEYS = ("name", "function", "tool", "tool_name", "function_name", "action", "api", "api_name")
ARGUMENT_KEYS = (
    "arguments", "parameters", "input", "args", "params", "kwargs", "tool_input", "action_input",
    "tool_arguments", "function_arguments", "function_args",
)  # fmt: skip
"""Under what names a call's function and its arguments stand, out there."""
_WRAPPERS = (
    "function", "function_call", "functionCall", "tool_call", "toolCall", "tool_use", "toolUse", "call",
    "tool_calls", "toolCalls", "function_calls", "functionCalls", "calls",
)  # fmt: skip
_BESIDE = {"id", "call_id", "callId", "tool_call_id", "tool_use_id", "toolUseId", "type", "index", "status"}
_KEYS = "|".join(sorted({*NAME_KEYS, *ARGUMENT_KEYS, *_WRAPPERS}))
_ATTEMPT = re.compile(rf"""[\[{{\s]*["'](?:{_KEYS})["']\s*:""")
_ARGUMENTS = re.compile(rf"""["'](?:{"|".join(ARGUMENT_KEYS)})["']\s*:""")
_TAG = re.compile(r"<tool_call>\s*(?:```[\w-]*\s*)?")
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
    r"\s*(?:<(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)>|\[THINK\]|◁think▷)",
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
        if tag := _next_attempt(text, 0):
            calls = list(_tagged(text, tag, only_tagged))
        elif start and not only_tagged:
            form, calls = _untagged(text)
        elif start or not _TAG.search(text):
            return Parsed((), "no_call", _form(text, start.start()) if start else "none")
        else:
            raise ValueError("a tag without a call")
    except BrokenJSON as error:
        return Parsed((), "bad_json", error.form, str(error)[:80])
    except ValueError as error:
        return Parsed((), "bad_json", form, str(error)[:80])
    return Parsed(tuple(calls), None if calls else "no_call", form)


def read_calls(value: Any, strict: bool = False) -> list[Call]:
    """The calls that a JSON value is: one, a list of them, or either in a wrapper.

    A call is an object with a name and its arguments (NAME_KEYS, ARGUMENT_KEYS), these an object or JSON text
    that spells one; none, null or "" are no arguments. Wrappers are OpenAI's, Anthropic's, Hammer's and their
    like. Arguments are never dropped: an object that may be arguments under a key that nobody knows raises
    ValueError, as does what is no call. With a name alone an object is a call only if nothing else stands in
    it but what `_BESIDE` lists: `{"name": "cancel"}` is one, `{"name": "my-app", "version": "1.0"}` is none.
    strict: only `name` and `arguments` count.
    """
    if isinstance(value, list):
        return [call for row in value for call in read_calls(row, strict)]
    if not isinstance(value, dict):
        raise ValueError("a call without a name")
    wrapped = [] if strict else [k for k in _WRAPPERS if isinstance(value.get(k), dict | list)]
    if wrapped and not isinstance(value.get("name"), str):
        if len(wrapped) > 1:
            raise ValueError(f"calls under {wrapped[0]!r} and {wrapped[1]!r}")
        return read_calls(value[wrapped[0]])
    names = ("name",) if strict else NAME_KEYS
    named = next((key for key in names if isinstance(value.get(key), str)), None)
    if named is None and not {"name", "arguments"} & value.keys():
        raise NoCall("an object that is no call")
    if named is None or not value[named]:
        raise ValueError("a call without a name")
    held = [key for key in ARGUMENT_KEYS if key in value and key != named]
    if strict and held not in ([], ["arguments"]):
        raise ValueError(f"arguments under {held[0]!r}")
    found = {key: _arguments(value[key]) for key in held}
    given = [arguments for arguments in found.values() if arguments]
    if any(arguments != given[0] for arguments in given):
        raise ValueError(f"arguments under {held[0]!r} and {held[1]!r}")
    others = [key for key in value if key not in (named, *held) and key not in _BESIDE]
    if not held and (others or named != "name"):
        inner = [key for key in others if isinstance(value[key], dict)]
        if named != "name" or not inner or len(inner) < len(others):
            raise NoCall("an object with a name that is no call")
        raise ValueError(f"arguments under {inner[0]!r}")
    if "parameters" in held and given and isinstance(given[0].get("properties"), dict):
        raise NoCall("the definition of a function")
    return [Call(value[named], given[0] if given else {})]


class BrokenJSON(ValueError):
    """What opens like a call and isn't one; `form` says how it was written."""

    def __init__(self, problem: str, form: Form) -> None:
        super().__init__(problem)
        self.form: Form = form


class NoCall(ValueError):
    """A value that is no call, and no attempt at one."""


def answer_of(text: str) -> str:
    """A reply less its reasoning: what stands behind the last end of one that isn't inside a JSON value.

    Reasoning that was never ended leaves nothing.
    """
    cut = position = 0
    while end := _THOUGHT.search(text, position):
        while start := _JSON_START.search(text, position, end.start()):
            try:
                _, position = _DECODER.raw_decode(text, start.start())
            except (ValueError, RecursionError):
                break  # it was prose, or a draft
            if position > end.start():
                break
        if position <= end.start():
            cut = position = end.end()
    return "" if _THINKING.match(text, cut) else text[cut:]


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


def _next_attempt(text: str, position: int) -> re.Match[str] | None:
    """The next opening tag that is neither inside a JSON value nor a word of a sentence."""
    last_end = text.rfind("</tool_call>")
    tag = _TAG.search(text, position)
    while tag:
        while start := _JSON_START.search(text, position, tag.start()):
            try:
                _, position = _DECODER.raw_decode(text, start.start())
            except (ValueError, RecursionError):
                position = tag.start()
        if position > tag.start():
            tag = _TAG.search(text, position)
            continue
        position = tag.start()  # up to here there is no value that goes on: not searched again
        rest = text[tag.end() : tag.end() + 1]
        if rest in "[{":  # the end of the text too: a call that was cut
            return tag
        if last_end >= tag.end() and _LINE.search(text[max(0, tag.start() - 64) : tag.start()]):
            return tag
        tag = _TAG.search(text, tag.end())
    return None


def _tagged(text: str, tag: re.Match[str] | None, strict: bool) -> Iterator[Call]:
    while tag:
        value, end = _decode(text, tag.end())
        yield from read_calls(value, strict)
        while not (close := _CLOSE.match(text, end)):
            if strict or not (gap := _NEXT.match(text, end)):
                raise ValueError("text between the JSON and the closing tag")
            value, end = _decode(text, gap.end())
            yield from read_calls(value)
        tag = _next_attempt(text, close.end())


def _untagged(text: str) -> tuple[Form, list[Call]]:
    """The calls among a text's JSON values, and how the first of them is written.

    Raises BrokenJSON for a broken call; beside good ones only if it has arguments, or is cut.
    """
    form, calls, broken = None, list[Call](), ""
    position, effort = (
        0,
        256 * len(text) + 100_000,
    )  # an error counts the lines before it: not to be had often
    blank, first = len(text) - len(text.lstrip()), None
    while start := _JSON_START.search(text, position):
        found = _form(text, start.start())
        first = first or found
        try:
            value, position = _decode(text, start.start())
        except json.JSONDecodeError as error:
            effort -= 64 * (error.pos - start.start()) + error.pos
            position = start.end()
            cut = error.pos >= len(text.rstrip()) or "Unterminated" in error.msg
            if _ATTEMPT.match(text, start.start()):
                broken = broken or f"{error}"
                head = text[start.start() : text.find("}", start.start()) + 1 or None]
                if cut or _ARGUMENTS.search(head) or effort < 0:
                    raise BrokenJSON(str(error), found) from error
            if effort < 0:
                raise BrokenJSON("too much broken JSON", found) from error
            continue
        except ValueError as error:
            raise BrokenJSON(str(error), found) from error
        try:
            calls += read_calls(value)
            form = form or found
        except NoCall:
            data = isinstance(value, dict) and "name" in value
            if not data and found == "bare" and start.start() == blank and _END.match(text, position):
                broken = "JSON that is no call"
        except ValueError as error:
            raise BrokenJSON(str(error), found) from error
    if broken and not calls:
        raise BrokenJSON(broken, form or "bare")
    return form or first or "none", calls


def _form(text: str, start: int) -> Form:
    """How JSON that begins there is written: in a code fence, or bare."""
    return "fenced" if _FENCE.search(text[max(0, start - 40) : start].rstrip()) else "bare"


def _arguments(value: Any) -> dict[str, Any]:
    """A call's arguments: an object, or JSON text that spells one; null and empty text are none."""
    if isinstance(value, str):
        value = spelled(value) if value.strip() else {}
    if not isinstance(value, dict | None):
        raise ValueError("arguments that are no object")
    return value or {}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value
