"""Replies judged against gold calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import linear_sum_assignment

from ttsi.calls import parse_calls
from ttsi.declared import Declared
from ttsi.strict_json import spelled
from ttsi.types import AcceptedObject, Call, Code, Gold, Sample, Verdict

Rule = Literal["schema", "string", "bfcl"]
Accept = Literal["lenient", "tagged"]
_How = Literal["schema", "strict", "string", "bfcl"]  # the rule, with strict_types folded in

_PRECEDENCE: tuple[Code, ...] = tuple(code for code in get_args(Code) if code != "ok")
_FOLDED = re.compile(r"[ ,./\-_*^]")


def judge(
    reply: str, sample: Sample, rule: Rule = "schema", accept: Accept = "lenient", strict_types: bool = False
) -> Verdict:
    """Whether a reply makes exactly the gold calls, in any order; else the first code that applies.

    `schema`: values are equal under their declared types. `string`: `str(value)` is equal, empty ones
    dropped (Hammer). `bfcl`: exact types, strings folded (BFCL). `accept="tagged"`: other forms are
    `no_call`. `strict_types`: a string never counts as the number, list, … that it spells.
    `detail` names the argument or tool, never a value.

    Under `schema`, null for what may be left out is left out, at every depth. What gold says may be absent
    (BFCL's "" among the accepted values) may be, though the schema requires it: gold judges. The text
    "null" for a declared string whose gold is null is right, as is every text that spells its gold.
    """
    if rule not in get_args(Rule) or accept not in get_args(Accept):
        raise ValueError(f"no rule {rule!r} or no accepted form {accept!r}")
    parsed = parse_calls(reply, accept == "tagged")
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
    tools = {tool.name: Declared.of(tool.parameters) for tool in sample.tools}
    misses = [[_miss(call, gold, tools, how) for gold in sample.gold] for call in calls]
    # As many right calls as can be matched come first, then the mildest codes.
    unit, worst = len(calls) * len(_PRECEDENCE), len(_PRECEDENCE)
    cost = np.array([[unit + worst - _PRECEDENCE.index(m[0]) if m else 0 for m in row] for row in misses])
    left = [m for i, j in zip(*linear_sum_assignment(cost), strict=True) if (m := misses[i][j])]
    if not left:
        return Verdict(True, "ok", parsed.form)
    code, detail = min(left, key=lambda miss: _PRECEDENCE.index(miss[0]))
    return Verdict(False, code, parsed.form, detail[:80])


def gold_calls(sample: Sample) -> tuple[Call, ...]:
    """Gold as calls: of each argument the first accepted value; what may be left out is, unless required."""
    calls = []
    for gold in sample.gold:
        tool = next((tool for tool in sample.tools if tool.name == gold.name), None)
        omit = gold.may_omit - (Declared.of(tool.parameters).required if tool else set())
        arguments = {k: _first(v[0]) for k, v in gold.arguments.items() if v and k not in omit}
        calls.append(Call(gold.name, arguments))
    return tuple(calls)


def _miss(call: Call, gold: Gold, tools: Mapping[str, Declared], how: _How) -> tuple[Code, str] | None:
    """(code, where) of the first difference between a call and a gold call; None = the same."""
    if call.name != gold.name:
        return ("wrong_name" if call.name in tools else "unknown_tool"), call.name
    declared = tools.get(gold.name, Declared.of({}))
    names, required = declared.properties, declared.required
    given, expected = dict(call.arguments), set(gold.arguments)
    may_omit = set(gold.may_omit) | (_nulls(gold) if how != "bfcl" else set())
    if how == "string":
        given = {k: v for k, v in given.items() if v != ""}
        may_omit -= {k for k in required if gold.arguments.get(k) == (None,)}  # there "None" is a value
    elif how == "bfcl":
        expected |= required
        may_omit -= required
    else:
        optional = may_omit | (names - required)
        given = {k: v for k, v in given.items() if not (k in optional and _empty(v))}
        given = _said(given, set(gold.arguments), declared)
    if missing := sorted(expected - set(given) - may_omit):
        return "missing_argument", missing[0]
    allowed = set(gold.arguments) & names if how == "bfcl" and gold.name in tools else set(gold.arguments)
    if extra := sorted(set(given) - allowed):
        return "extra_argument", extra[0]
    codes = ((_best(v, gold.arguments[k], declared.property(k), how), k) for k, v in given.items())
    return min(((c, k) for c, k in codes if c), key=lambda miss: _PRECEDENCE.index(miss[0]), default=None)


def _nulls(gold: Gold) -> set[str]:
    """The arguments of which gold accepts null: saying nothing says that too, but not to BFCL."""
    return {name for name, values in gold.arguments.items() if None in values}


def _said(given: Mapping[str, Any], wanted: Iterable[str], declared: Declared) -> dict[str, Any]:
    """What is given, less nulls that mean leaving out: gold does leave it out, and the schema lets one."""
    names, required = declared.properties, declared.required

    def idle(name: str) -> bool:
        return name not in wanted and (name in names - required or declared.property(name).allows_null)

    return {k: v for k, v in given.items() if not (v is None and idle(k))}


def _best(value: Any, accepted: Iterable[Any], declared: Declared, how: _How) -> Code | None:
    """None if a value is one of the accepted ones, else how it misses them."""
    codes = {_difference(value, gold, declared, how) for gold in accepted}
    if None in codes:
        return None
    return "wrong_type" if codes == {"wrong_type"} else "wrong_value"


def _difference(value: Any, gold: Any, declared: Declared, how: _How) -> Code | None:
    if how == "string":
        return None if str(value) == str(_first(gold)) else "wrong_value"
    nested = isinstance(gold, AcceptedObject)
    gold_fits = declared.fits({} if nested else gold)
    if how == "schema" and isinstance(value, str) and not (gold_fits and declared.fits(value)):
        meant = spelled(value)  # what fits now is a string after all, under a gold that is none
        if declared.fits(value) or declared.fits(meant):
            value = meant
    if gold_fits and not declared.fits(value):
        return "wrong_type"
    if how == "bfcl" and isinstance(value, float) and declared.kinds == {"integer"}:
        return "wrong_type"
    if isinstance(gold, list) and isinstance(value, list):
        if len(value) != len(gold):
            return "wrong_value"
        items = [declared.item(i) for i in range(len(value))]
        mixed = (type(v) is int and type(g) is float for v, g in zip(value, gold, strict=True))
        if how == "bfcl" and any(mixed):
            return "wrong_type"  # there an integer passes for a number, but not in a list of them
        parts = [_difference(v, g, d, how) for v, g, d in zip(value, gold, items, strict=True)]
    elif isinstance(gold, dict | AcceptedObject) and isinstance(value, dict):
        accepted = gold.properties if isinstance(gold, AcceptedObject) else {k: (v,) for k, v in gold.items()}
        may_omit = gold.may_omit if isinstance(gold, AcceptedObject) else frozenset[str]()
        value = {k: v for k, v in value.items() if not (k in may_omit and _empty(v))}
        if how in ("schema", "strict"):
            value = _said(value, accepted, declared)
            if not isinstance(gold, AcceptedObject):
                may_omit = frozenset(k for k in gold if gold[k] is None and k not in declared.required)
        if not accepted.keys() - may_omit <= value.keys() <= accepted.keys():
            return "wrong_value"
        parts = [_best(v, accepted[k], declared.property(k), how) for k, v in value.items()]
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


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _first(gold: Any) -> Any:
    """A gold value as plain JSON: the first of each set of accepted ones, what may be left out is."""
    if isinstance(gold, AcceptedObject):
        return {k: _first(v[0]) for k, v in gold.properties.items() if v and k not in gold.may_omit}
    return [_first(part) for part in gold] if isinstance(gold, list) else gold
