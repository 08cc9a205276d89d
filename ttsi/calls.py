"""Calls in model output: read, judged against gold, written, checked against schemas.

Model output is hostile: it is only ever decoded as JSON, never evaluated, in time linear in its length.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import numpy as np
from scipy.optimize import linear_sum_assignment

from ttsi.types import AcceptedObject, Call, Code, Form, Gold, Sample, Tool, Verdict

Rule = Literal["schema", "string", "bfcl"]
Accept = Literal["lenient", "tagged"]
_How = Literal["schema", "strict", "string", "bfcl"]  # the rule, with strict_types folded in

MAX_DEPTH = 64
"""Levels of nesting that are read. A limit of our own: the interpreter's depends on who is calling."""
_PRECEDENCE: tuple[Code, ...] = tuple(code for code in get_args(Code) if code != "ok")
_OPEN, _CLOSE = re.compile(r"<tool_call>\s*"), re.compile(r"\s*(?:</tool_call>|\Z)")
_JSON_START = re.compile(r"""\{\s*["']|\[\s*\{""")
_FENCE = re.compile(r"```[\w-]*\Z")
_COSTLY = ("$schema", "$dynamicRef", "patternProperties", "unevaluatedProperties", "unevaluatedItems")
_KINDS = ("string", "integer", "number", "boolean", "array", "object", "null")
_FOLDED = re.compile(r"[ ,./\-_*^]")


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


def judge(
    reply: str, sample: Sample, rule: Rule = "schema", accept: Accept = "lenient", strict_types: bool = False
) -> Verdict:
    """Whether a reply makes exactly the gold calls, in any order; else the first code that applies.

    `schema`: values are equal under their declared types. `string`: `str(value)` is equal, empty ones
    dropped (Hammer). `bfcl`: exact types, strings folded (BFCL). `accept="tagged"`: other forms are
    `no_call`. `strict_types`: a string never counts as the number, list, … that it spells.
    `detail` names the argument or tool, never a value.
    """
    if rule not in get_args(Rule) or accept not in get_args(Accept):
        raise ValueError(f"no rule {rule!r} or no accepted form {accept!r}")
    parsed = parse_calls(reply)
    calls, error = parsed.calls, parsed.error
    if accept == "tagged" and parsed.form != "tagged":
        calls, error = (), "no_call"
    if error == "no_call" and not sample.gold:
        return Verdict(True, "ok", parsed.form)
    if error:
        return Verdict(False, error, parsed.form, parsed.detail)
    if len(calls) != len(sample.gold):
        return Verdict(False, "wrong_count", parsed.form, f"{len(calls)} instead of {len(sample.gold)}")
    how: _How = "strict" if rule == "schema" and strict_types else rule
    tools = {tool.name: tool.parameters for tool in sample.tools}
    misses = [[_miss(call, gold, tools, how) for gold in sample.gold] for call in calls]
    # As many right calls as can be matched come first, then the mildest codes.
    unit, worst = len(calls) * len(_PRECEDENCE), len(_PRECEDENCE)
    cost = np.array([[unit + worst - _PRECEDENCE.index(m[0]) if m else 0 for m in row] for row in misses])
    left = [m for i, j in zip(*linear_sum_assignment(cost), strict=True) if (m := misses[i][j])]
    if not left:
        return Verdict(True, "ok", parsed.form)
    code, detail = min(left, key=lambda miss: _PRECEDENCE.index(miss[0]))
    return Verdict(False, code, parsed.form, detail[:80])


def canonical(calls: Iterable[Call]) -> str:
    """Key under which calls are the same vote: order of calls and arguments, 29.0 or 29, outer spaces go."""
    keys = (json.dumps([c.name, _plain(c.arguments)], sort_keys=True) for c in calls)
    return "[" + ", ".join(sorted(keys)) + "]"


def format_calls(calls: Iterable[Call]) -> str:
    """The calls as a model should write them: `<tool_call>[{"name": …, "arguments": {…}}]</tool_call>`."""
    rows = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return f"<tool_call>{json.dumps(rows, ensure_ascii=False)}</tool_call>"


def gold_calls(sample: Sample) -> tuple[Call, ...]:
    """Gold as calls: of each argument the first accepted value; what may be left out is, unless required."""
    calls = []
    for gold in sample.gold:
        tool = next((tool for tool in sample.tools if tool.name == gold.name), None)
        omit = gold.may_omit - set(tool.parameters.get("required", ()) if tool else ())
        arguments = {k: _first(v[0]) for k, v in gold.arguments.items() if v and k not in omit}
        calls.append(Call(gold.name, arguments))
    return tuple(calls)


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value has its declared type. None declared: any. 29.0 is an integer, True isn't."""
    # Imported here and below: with all its extras jsonschema builds a grammar of IRIs, for two seconds.
    from jsonschema import Draft202012Validator

    declared = schema.get("type")
    kinds = [k for k in (declared if isinstance(declared, list) else [declared]) if k in _KINDS]
    return not kinds or any(Draft202012Validator.TYPE_CHECKER.is_type(value, kind) for kind in kinds)


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


def schema_errors(call: Call, tools: Sequence[Tool]) -> tuple[str, ...]:
    """How a call breaks its tool's schema, at most 20 lines; empty = valid.

    References are resolved inside the schema only, at most 1,000 of them; `pattern` and `uniqueItems` are
    not checked (their cost isn't linear). A schema that can't be applied is a line, never an exception.
    """
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry

    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return ("unknown tool",)
    budget = itertools.count()

    def reference(validator: Any, ref: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if next(budget) >= 1000:
            raise RecursionError("too many references")
        yield from Draft202012Validator.VALIDATORS["$ref"](validator, ref, instance, schema) or ()

    rules = {"$ref": reference, "pattern": lambda *_: (), "uniqueItems": lambda *_: ()}
    checker = validators.extend(Draft202012Validator, rules)
    try:
        schema = {key: value for key, value in tool.parameters.items() if key != "$schema"}
        if costly := [word for word in _COSTLY if f'"{word}":' in json.dumps(schema)]:
            raise ValueError(f"{costly[0]} is not supported")
        found = [f"unknown argument {k!r}" for k in call.arguments if k not in schema.get("properties", {})]
        errors = checker(schema, registry=Registry()).iter_errors(dict(call.arguments))
        found += [f"{error.json_path}: {error.message}" for error in itertools.islice(errors, 20)]
    except Exception as error:  # jsonschema lets through whatever a hostile schema causes
        found = [f"schema can't be applied: {type(error).__name__}: {error}"]
    return tuple(line[:200] for line in found[:20])


# --- reading ---------------------------------------------------------------------------------------


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
            arguments = _spelled(arguments)
        if not isinstance(arguments, dict | None):
            raise ValueError("arguments that are no object")
        calls.append(Call(name, arguments or {}))
    return calls


def _spelled(text: str) -> Any:
    """The JSON value that the whole string spells; the string itself if it spells none."""
    try:
        value, end = _decode(text, len(text) - len(text.lstrip()))
    except ValueError:
        return text
    return value if not text[end:].strip() else text


# --- judging ---------------------------------------------------------------------------------------


def _miss(
    call: Call, gold: Gold, tools: Mapping[str, Mapping[str, Any]], how: _How
) -> tuple[Code, str] | None:
    """(code, where) of the first difference between a call and a gold call; None = the same."""
    if call.name != gold.name:
        return ("wrong_name" if call.name in tools else "unknown_tool"), call.name
    declared = _inner(tools, gold.name, "properties")
    required = set(tools.get(gold.name, {}).get("required", ()))
    given, may_omit, expected = dict(call.arguments), set(gold.may_omit), set(gold.arguments)
    if how == "string":
        given = {k: v for k, v in given.items() if v != ""}
        may_omit -= {k for k in required if gold.arguments.get(k) == (None,)}  # there "None" is a value
    elif how == "bfcl":
        expected |= required
        may_omit -= required
    else:
        optional = may_omit | (set(declared) - required)
        given = {k: v for k, v in given.items() if not (k in optional and _empty(v))}
    if missing := sorted(expected - set(given) - may_omit):
        return "missing_argument", missing[0]
    if extra := sorted(set(given) - set(gold.arguments)):
        return "extra_argument", extra[0]
    codes = ((_best(v, gold.arguments[k], _inner(declared, k), how), k) for k, v in given.items())
    return min(((c, k) for c, k in codes if c), key=lambda miss: _PRECEDENCE.index(miss[0]), default=None)


def _best(value: Any, accepted: Iterable[Any], schema: Mapping[str, Any], how: _How) -> Code | None:
    """None if a value is one of the accepted ones, else how it misses them."""
    codes = {_difference(value, gold, schema, how) for gold in accepted}
    if None in codes:
        return None
    return "wrong_type" if codes == {"wrong_type"} else "wrong_value"


def _difference(value: Any, gold: Any, schema: Mapping[str, Any], how: _How) -> Code | None:
    if how == "string":
        return None if str(value) == str(_first(gold)) else "wrong_value"
    nested = isinstance(gold, AcceptedObject)
    gold_fits = fits({} if nested else gold, schema)
    if how == "schema" and isinstance(value, str) and not (gold_fits and fits(value, schema)):
        spelled = _spelled(value)  # what fits now is a string after all, under a gold that is none
        if fits(value, schema) or fits(spelled, schema):
            value = spelled
    if gold_fits and not fits(value, schema):
        return "wrong_type"
    if how == "bfcl" and isinstance(value, float) and schema.get("type") == "integer":
        return "wrong_type"
    if isinstance(gold, list) and isinstance(value, list):
        if len(value) != len(gold):
            return "wrong_value"
        items = _inner(schema, "items")
        parts = [_difference(v, g, items, how) for v, g in zip(value, gold, strict=True)]
    elif isinstance(gold, dict | AcceptedObject) and isinstance(value, dict):
        accepted = gold.properties if isinstance(gold, AcceptedObject) else {k: (v,) for k, v in gold.items()}
        may_omit = gold.may_omit if isinstance(gold, AcceptedObject) else frozenset()
        value = {k: v for k, v in value.items() if not (k in may_omit and _empty(v))}
        if not accepted.keys() - may_omit <= value.keys() <= accepted.keys():
            return "wrong_value"
        parts = [_best(v, accepted[k], _inner(schema, "properties", k), how) for k, v in value.items()]
    else:
        return None if _same(value, gold, how) else "wrong_value"
    return min(filter(None, parts), key=_PRECEDENCE.index, default=None)


def _same(value: Any, gold: Any, how: _How) -> bool:
    if isinstance(value, str) and isinstance(gold, str):
        value, gold = (_fold(value), _fold(gold)) if how == "bfcl" else (value.strip(), gold.strip())
    return bool(value == gold) and isinstance(value, bool) == isinstance(gold, bool)


def _fold(text: str) -> str:
    """BFCL's folding: spaces, some punctuation and case don't count."""
    return _FOLDED.sub("", text).lower().replace("'", '"')


def _inner(schema: Any, *path: str) -> Mapping[str, Any]:
    for key in path:
        schema = schema.get(key) if isinstance(schema, Mapping) else None
    return schema if isinstance(schema, Mapping) else {}


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _first(gold: Any) -> Any:
    """A gold value as plain JSON: the first of each set of accepted ones, what may be left out is."""
    if isinstance(gold, AcceptedObject):
        return {k: _first(v[0]) for k, v in gold.properties.items() if v and k not in gold.may_omit}
    return [_first(part) for part in gold] if isinstance(gold, list) else gold


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value
