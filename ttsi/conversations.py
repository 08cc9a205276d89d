"""Conversations as people write them, read as turns: OpenAI's, Anthropic's, ShareGPT's and plain ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ttsi.call_forms import read_calls
from ttsi.calls import format_calls
from ttsi.schemas import BadField
from ttsi.types import Message, Role

_SAID: dict[Role, str] = {
    "user": "user system developer human instruction prompter",
    "assistant": "assistant agent model bot gpt ai chatbot",
    "tool": "tool function ipython observation environment tool_response function_response",
}
_ROLES: dict[str, Role] = {word: role for role, words in _SAID.items() for word in words.split()}
_CALLS = ("tool_calls", "function_call")


def read_messages(query: Any, field: str = "query") -> Iterator[Message]:
    """The turns of a conversation, or the one turn of a question; turns that say nothing are left out.

    A turn has a role (`from`) and content (`value`): text, null, or a list of parts. Past calls, which OpenAI
    keeps beside the text and Anthropic among the parts, stand between tags as the model writes them. A tool's
    result stays a turn though it be empty. Raises BadField, naming the turn, for what can't be read.
    """
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    if not isinstance(turns, list):
        raise BadField(field, "is neither a question nor a list of turns")
    for i, turn in enumerate(turns):
        place = f"{field}[{i}]"
        if not isinstance(turn, dict):
            raise BadField(place, "is no turn with a role and content")
        said = turn.get("role", turn.get("from"))
        role = _ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise BadField(place, f"needs a role out of {', '.join(_ROLES)}")
        past = [turn[key] for key in _CALLS if turn.get(key)]
        content = turn.get("content", turn.get("value"))
        if content is None and not past and role != "tool":
            raise BadField(place, "needs a text as content")
        for speaker, text in _parts(content, role, past, place):
            if text.strip() or speaker == "tool":
                yield Message(speaker, text)


def is_assistant(turn: Mapping[str, Any]) -> bool:
    """Whether the assistant is said to speak in a turn."""
    said = turn.get("role", turn.get("from"))
    return isinstance(said, str) and _ROLES.get(said.lower()) == "assistant"


def _parts(content: Any, role: Role, past: list[Any], place: str) -> Iterator[tuple[Role, str]]:
    """(role, text) of what a turn says; results of tools, in user turns there, by themselves."""
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_result":
            yield from (("tool", text) for _, text in _parts(part.get("content"), "tool", [], place))
        elif kind == "tool_use":
            past = [*past, part]
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        elif part is not None and role == "tool":
            texts.append(json.dumps(part, ensure_ascii=False))
        elif part is not None:
            raise BadField(place, "has content that is neither text nor a list of texts")
    if past:
        try:
            texts.append(format_calls(read_calls(past)))
        except ValueError as error:
            raise BadField(place, f"has calls that can't be read: {error}") from error
    if texts or role == "tool":
        yield role, "\n".join(filter(None, texts)) if len(texts) > 1 else "".join(texts)
