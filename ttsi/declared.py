"""What a tool's schema declares of its arguments, in whatever dialect, and how a call breaks it.

The dialects are JSON Schema from draft 4 to 2020-12 and OpenAPI 3.0's. References never leave the schema.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from ttsi.types import Call, Tool

_COSTLY = ("$schema", "$dynamicRef", "patternProperties", "unevaluatedProperties", "unevaluatedItems")
_KINDS = ("string", "integer", "number", "boolean", "array", "object", "null")
_LEAST = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
_MOST = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}
_BRANCHES = 64
"""Alternatives of one node that are told apart; a node with more of them declares anything."""


class Declared:
    """What one place of a schema declares: its alternatives, with references, allOf and anyOf read.

    nodes: the place as it is written, in as many ways as its surroundings allow; none = nothing is allowed.
    """

    def __init__(self, nodes: Sequence[Any], root: Any) -> None:
        self._nodes, self._root = nodes, root

    @classmethod
    def of(cls, schema: Any) -> Declared:
        """What a whole schema declares."""
        return cls([schema], schema)

    @cached_property
    def ways(self) -> list[Mapping[str, Any]]:
        """The alternatives, each an object of keywords without references."""
        try:
            found = [way for node in self._nodes for way in _flat(node, self._root, 0)]
        except (_TooMany, RecursionError):
            return [{}]
        return found if len(found) <= _BRANCHES else [{}]

    @property
    def alternatives(self) -> list[Declared]:
        """Each alternative alone."""
        return [Declared([way], self._root) for way in self.ways]

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The JSON types that a value may have; empty = any."""
        kinds = [_kinds(way) for way in self.ways]
        return frozenset(k for part in kinds for k in part) if all(kinds) else frozenset()

    def fits(self, value: Any) -> bool:
        """Whether a value has a declared type. None declared: any. 29.0 is an integer, True isn't."""
        # Imported here and below: with all its extras jsonschema builds a grammar of IRIs, for two seconds.
        from jsonschema import Draft202012Validator

        is_type = Draft202012Validator.TYPE_CHECKER.is_type
        return not self.kinds or any(is_type(value, kind) for kind in self.kinds)

    @property
    def allows_null(self) -> bool:
        """Whether null is allowed in so many words."""
        return "null" in self.kinds or (self.enum is not None and None in self.enum)

    @property
    def properties(self) -> set[str]:
        """The names of the declared properties."""
        return {name for way in self.ways for name in _mapping(way.get("properties"))}

    @property
    def required(self) -> set[str]:
        """The names that every alternative requires."""
        listed = [way.get("required") for way in self.ways]
        sets = [
            {n for n in names if isinstance(n, str)} if isinstance(names, list) else set() for names in listed
        ]
        return set.intersection(*sets) if sets else set()

    @property
    def open(self) -> bool:
        """Whether properties beyond the declared ones are allowed in so many words."""
        return any(way.get("additionalProperties") not in (None, False) for way in self.ways)

    @property
    def enum(self) -> list[Any] | None:
        """The only values allowed; None = no such list."""
        listed = [way.get("enum") for way in self.ways]
        return (
            [v for values in listed for v in values or ()]
            if all(isinstance(v, list) for v in listed)
            else None
        )

    def property(self, name: str) -> Declared:
        """What is declared of a property: by its name, else by `additionalProperties`."""
        nodes = []
        for way in self.ways:
            properties = _mapping(way.get("properties"))
            nodes.append(properties[name] if name in properties else way.get("additionalProperties", True))
        return Declared(nodes or [True], self._root)

    def item(self, index: int) -> Declared:
        """What is declared of an array's item."""
        nodes = []
        for way in self.ways:
            first = way.get("prefixItems")
            inside = isinstance(first, list) and index < len(first)
            nodes.append(first[index] if inside else way.get("items", True))  # type: ignore[index]
        return Declared(nodes or [True], self._root)


def fits(value: Any, schema: Any) -> bool:
    """Whether a value has the type that a schema declares: see `Declared.fits`."""
    return Declared.of(schema).fits(value)


class _TooMany(Exception):
    pass


def _flat(node: Any, root: Any, depth: int) -> list[Mapping[str, Any]]:
    """A node's alternatives. Raises _TooMany where they or their references have no end."""
    if node is False:
        return []
    if not isinstance(node, Mapping):
        return [{}]
    if depth > _BRANCHES:
        raise _TooMany
    node = modern(node)
    ways: list[Mapping[str, Any]] = [
        {k: v for k, v in node.items() if k not in ("$ref", "allOf", "anyOf", "oneOf")}
    ]
    parts = [[_resolved(node["$ref"], root)]] if isinstance(node.get("$ref"), str) else []
    parts += [[part] for part in _list(node.get("allOf"))]
    parts += [_list(node[word]) for word in ("anyOf", "oneOf") if _list(node.get(word))]
    for choices in parts:
        inner = [way for choice in choices for way in _flat(choice, root, depth + 1)]
        ways = [_merged(way, other) for way in ways for other in inner]
        if len(ways) > _BRANCHES:
            raise _TooMany
    return ways


def _resolved(reference: str, root: Any) -> Any:
    """What a reference names inside the schema; anything, where it leads elsewhere or nowhere."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        resolver = Registry().resolver_with_root(DRAFT202012.create_resource(root))
        return resolver.lookup(reference).contents
    except (Unresolvable, ValueError, LookupError, TypeError, AttributeError):
        return True


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """What holds under both."""
    out = {**one, **other}
    for word in ("properties", "$defs"):
        if word in one and word in other:
            out[word] = {**_mapping(one[word]), **_mapping(other[word])}
    for words, strictest in ((_LEAST, max), (_MOST, min)):
        for word in words & one.keys() & other.keys():
            limits = [x for x in (one[word], other[word]) if isinstance(x, int | float)]
            out[word] = strictest(limits, default=other[word])
    if "enum" in one and "enum" in other:
        out["enum"] = [x for x in _list(one["enum"]) if x in _list(other["enum"])]
    if "required" in one and "required" in other:
        out["required"] = [*_list(one["required"]), *_list(other["required"])]
    if (mine := _kinds(one)) and (theirs := _kinds(other)):
        out["type"] = [k for k in mine if k in theirs or (k == "integer" and "number" in theirs)] or mine
    return out


def modern(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """One node of any dialect in the words of draft 2020-12."""
    out = dict(node)
    if isinstance(out.get("items"), list):  # up to draft 2019-09: a tuple
        out["prefixItems"], out["items"] = out["items"], out.pop("additionalItems", True)
    for bound, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):  # draft 4
        if isinstance(out.get(bound), bool) and out.pop(bound) and limit in out:
            out[bound] = out.pop(limit)
    if out.pop("nullable", None) is True:  # OpenAPI 3.0
        if kinds := _kinds(out):
            out["type"] = [*kinds, "null"]
        for word in ("anyOf", "oneOf"):
            if _list(out.get(word)):
                out[word] = [*out[word], {"type": "null"}]
        if isinstance(out.get("enum"), list):
            out["enum"] = [*out["enum"], None]
        if isinstance(out.get("$ref"), str):
            out = {"anyOf": [out, {"type": "null"}]}
    return out


def _modern(node: Any) -> Any:
    """A whole schema, or a list or object of schemas, in the words of draft 2020-12."""
    if isinstance(node, list):
        return [_modern(part) for part in node]
    if not isinstance(node, Mapping):
        return node
    kept = ("enum", "const", "default", "required", "examples", "example")
    out = {k: v if k in kept else _modern(v) for k, v in node.items()}
    # A property may be called `items` or `nullable`: where schemas stand by name is nothing but schemas.
    return out if all(isinstance(v, Mapping | bool) for v in node.values()) else modern(out)


def schema_errors(call: Call, tools: Sequence[Tool]) -> tuple[str, ...]:
    """How a call breaks its tool's schema, at most 20 lines; empty = valid.

    References are resolved inside the schema only, at most 1,000 of them; `pattern` and `uniqueItems` are not
    checked (their cost isn't linear). A schema that can't be applied is a line, never an exception.
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
        schema = _modern({key: value for key, value in tool.parameters.items() if key != "$schema"})
        if costly := [word for word in _COSTLY if f'"{word}":' in json.dumps(schema)]:
            raise ValueError(f"{costly[0]} is not supported")
        declared = Declared.of(schema)
        known = declared.properties
        extra = [] if declared.open else [k for k in call.arguments if k not in known]
        found = [f"unknown argument {k!r}" for k in extra]
        errors = checker(schema, registry=Registry()).iter_errors(dict(call.arguments))
        found += [f"{error.json_path}: {error.message}" for error in itertools.islice(errors, 20)]
    except Exception as error:  # jsonschema lets through whatever a hostile schema causes
        found = [f"schema can't be applied: {type(error).__name__}: {error}"]
    return tuple(line[:200] for line in found[:20])


def _kinds(node: Mapping[str, Any]) -> list[str]:
    declared = node.get("type")
    return [k for k in (declared if isinstance(declared, list) else [declared]) if k in _KINDS]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
