"""The grammar of a query's tools: what a reply may be where it can only be calls of them.

For llguidance, in its dialect of Lark. A finished reply names no unknown tool and no undeclared argument,
lacks no required one, and keeps to declared types, enums and bounds; arguments come in the schema's order, as
with structured output elsewhere. Not enforced: `pattern`, `format`, `uniqueItems`, checked nowhere, and what
no such grammar can: that an object without declared properties says no key twice, that a number is finite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ttsi.declared import Declared
from ttsi.types import Layout, Tool

VERSION = 1
"""Of the grammar that the same tools get. Part of the keys of what was answered under it."""
_START = r"""start: call (", {\"name\": \"" call)* "]" "</tool_call>"?"""
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SIZES = ("minLength", "maxLength", "minItems", "maxItems")
_quoted = partial(json.dumps, ensure_ascii=False)


def grammar(tools: Sequence[Tool], layout: Layout = "native") -> str:
    """The grammar of what may follow `prompts.opening(layout)`: one call or more, up to the end of the turn.

    Of tools that share a name the first counts. An argument whose schema llguidance can't read may be any
    JSON. Raises ValueError without tools, and for layout `template`: there each model has a form of its own.
    """
    if layout == "template":
        raise ValueError("layout template has no grammar: use layout native or paper")
    if not tools:
        raise ValueError("no tools, no grammar")
    named = {tool.name: tool for tool in reversed(tools)}
    lines = [_START, "call: " + " | ".join(f"tool_{i}" for i in range(len(named)))]
    for i, (name, tool) in enumerate(named.items()):
        head = _quoted(_quoted(name)[1:] + ', "arguments": ')
        lines.append(f'tool_{i}: {head} %json {_quoted(arguments(tool))} "}}"')
    return "\n".join(lines)


def arguments(tool: Tool) -> dict[str, Any]:
    """What a tool declares as a JSON Schema for llguidance: closed where it isn't opened in so many words."""
    values = _Values()
    ways = [values.object(way, closed=True) for way in Declared.of(tool.parameters).alternatives]
    whole = {"x-guidance": _SPACING, "$defs": values.defs, "anyOf": ways}
    if not _readable(whole):
        for held in (way["properties"] for way in ways):
            held |= {name: {} for name in held if not _readable({**whole, "anyOf": [held[name]]})}
    if not _readable(whole):
        names: dict[str, Any] = {name: {} for way in ways for name in way["properties"]}
        whole["anyOf"] = [{"type": "object", "properties": names, "additionalProperties": False}]
    return whole


class _Values:
    """Schemas of values. A container is a definition, so that one that holds its own kind can name itself."""

    def __init__(self) -> None:
        self.defs: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def value(self, declared: Declared) -> Any:
        """The schema of what is declared of a value; False = nothing is allowed."""
        ways = declared.alternatives
        if not any(_kinds(way) & {"object", "array"} for way in ways):
            return _any_of([self._way(way) for way in ways])
        said = json.dumps(declared.ways, default=str)
        if said not in self._names:
            name = self._names[said] = str(len(self._names))
            self.defs[name] = _any_of([self._way(way) for way in ways])
        return {"$ref": f"#/$defs/{self._names[said]}"}

    def _way(self, declared: Declared) -> dict[str, Any]:
        """The schema of one alternative."""
        (way,), kinds = declared.ways, _kinds(declared)
        if values := [way["const"]] if "const" in way else declared.enum:
            return {"enum": [v for v in values if declared.fits(v)] or values}
        out = self.object(declared) if "object" in kinds else {}
        out |= {"type": sorted(kinds)} if kinds else {}
        if "array" in kinds:
            first = len(way["prefixItems"]) if isinstance(way.get("prefixItems"), list) else 0
            out["prefixItems"] = [self.value(declared.item(i)) for i in range(first)]
            out["items"] = self.value(declared.item(first))
        out |= {word: way[word] for word in _BOUNDS if type(way.get(word)) in (int, float)}
        return out | {word: way[word] for word in _SIZES if type(way.get(word)) is int}

    def object(self, declared: Declared, closed: bool = False) -> dict[str, Any]:
        """The schema of an object. closed: whether it allows nothing where it declares nothing."""
        (way,) = declared.ways
        names = list(way["properties"]) if isinstance(way.get("properties"), Mapping) else []
        free = not names and not closed and "additionalProperties" not in way
        another = "".join(names) + "+"  # no property is called that
        more: Any = self.value(declared.property(another)) if declared.open else free
        return {
            "type": "object",
            "properties": {name: self.value(declared.property(name)) for name in names},
            "required": [name for name in names if name in declared.required],
            "additionalProperties": more,
        }


def _kinds(declared: Declared) -> frozenset[str]:
    """The types of one alternative; where it names none, what its keywords are about."""
    about = {"properties": "object", "items": "array", "prefixItems": "array"}
    return declared.kinds or frozenset(about[word] for word in about if word in declared.ways[0])


def _any_of(ways: list[dict[str, Any]]) -> Any:
    return {} if {} in ways else ways[0] if len(ways) == 1 else {"anyOf": ways} if ways else False


def _readable(schema: Mapping[str, Any]) -> bool:
    from llguidance import LLMatcher  # here, for who asks for no grammar may be without it

    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(dict(schema)))
