"""Conversations as people write them, read as turns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ttsi.schemas import BadField
from ttsi.types import Message, Role

_ROLES: dict[str, Role] = {
    "user": "user", "system": "user", "agent": "assistant", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
_REQUEST_LINE = re.compile(r"(?:\A|\n)[ \t]*Generate API Request:\s*\Z")
_FENCED = re.compile(r"\s*```(?:json)?\s*([\[{].*[\]}])\s*```\s*", re.DOTALL)


def read_messages(query: Any) -> Iterator[Message]:
    """The turns. API-Bank's request line goes, its past calls stand between tags as the model writes them."""
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    if not isinstance(turns, list):
        raise BadField("query", "is neither a question nor a list of turns")
    for i, turn in enumerate(turns):
        role, text = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise BadField(f"query[{i}]", f"needs a text as content and a role out of {', '.join(_ROLES)}")
        if isinstance(query, list) and i == len(turns) - 1:
            text = _REQUEST_LINE.sub("", text)
        if _ROLES[role] == "assistant" and (fenced := _FENCED.fullmatch(text)):
            calls = fenced[1] if fenced[1][0] == "[" else f"[{fenced[1]}]"
            text = f"<tool_call>{calls}</tool_call>"
        if text.strip():
            yield Message(_ROLES[role], text)
