"""What a grammar lets a reply say next: llguidance's parser over a tokenizer's tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from ttsi.engines.base import EngineError
from ttsi.engines.chat import Chat

_LIMITS = LLParserLimits(verbose_errors=False)  # the parser's own, and errors of a line
_TAG = re.compile("<[!-~]+>")  # in characters that byte-level vocabularies spell as they are


class Guide:
    """Where one reply stands in a grammar.

    grammar: what may follow the opening (`Request.grammar`). Raises ValueError if llguidance can't read it.
    """

    def __init__(self, grammar: str, chat: Chat) -> None:
        self._matcher = LLMatcher(_tokens(chat, chat.stop_ids), grammar, log_level=0, limits=_LIMITS)
        if self._matcher.is_error():
            raise ValueError(f"no grammar: {self._matcher.get_error()}")

    def masked(self, logits: Tensor) -> Tensor:
        """Logits [vocabulary], −∞ where the grammar forbids a token; it forbids the turn to end too soon."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, count=len(logits), bitorder="little")).bool()
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Goes on behind a token. Raises EngineError where it is forbidden, or the parser at its limit."""
        if not self._matcher.consume_token(token):
            raise EngineError(f"a reply left its grammar: {self._matcher.get_error()}")

    def forced(self) -> list[int]:
        """The text that must come next, as the tokenizer would spell it; the model may spell it otherwise."""
        return self._matcher.compute_ff_tokens()

    def allowed(self, draft: Sequence[int]) -> tuple[int, ...]:
        """A draft up to the first token that the grammar forbids."""
        return tuple(draft[: self._matcher.validate_tokens(list(draft))])


@lru_cache(maxsize=4)
def _tokens(chat: Chat, stop_ids: frozenset[int]) -> LLTokenizer:
    """A tokenizer's tokens as llguidance knows them, which takes seconds where they are many.

    Text is what is decoded as text. llguidance takes every added token in angle brackets for a control token,
    `</tool_call>` with it; here such a one is part of the vocabulary, unless it is a control token.
    """
    core = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"] |= {token["content"]: token["id"] for token in core["added_tokens"]}
    core["added_tokens"] = [
        token for token in core["added_tokens"] if token["special"] or not _TAG.fullmatch(token["content"])
    ]
    core["truncation"] = core["padding"] = None
    return LLTokenizer(json.dumps(core), eos_token=sorted(stop_ids))


__all__ = ["Guide"]
