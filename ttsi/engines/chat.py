"""Conversations as token ids, shared by every engine that holds a tokenizer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttsi.engines.base import EngineError, Prompt, Request, TooLong
from ttsi.types import Generation

_PRIVATE_USE = 0xF0000  # a plane no text uses: stands in for '<|' while the template is rendered


@dataclass(frozen=True)
class Encoded:
    """Ids of a prompt. `prefix`: length of the shared system turn; `turn`: start of the last user turn."""

    ids: tuple[int, ...]
    prefix: int
    turn: int


class Chat:
    """A tokenizer's chat template, applied so that text can't pose as a control token.

    Control tokens split the text before byte-pair encoding, so encoding the runs between them one by
    one gives the ids of the whole string, except where a *content* spells out a control token: there
    it stays plain text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        controls = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._controls = re.compile(f"({'|'.join(map(re.escape, controls))})")
        self._guards = {t: t[:1] + chr(_PRIVATE_USE + i) + t[1:] for i, t in enumerate(controls)}
        if "<|im_start|>" not in controls or "<|im_end|>" not in controls:
            raise ValueError("the tokenizer has no ChatML control tokens; ttsi reads turns by them")
        self._id = tokenizer.convert_tokens_to_ids
        self._begin = self._id("<|im_start|>")
        self._user = (self._begin, *self._plain("user"))
        self.end_of_turn: int = self._id("<|im_end|>")
        self.stop_ids = frozenset({tokenizer.eos_token_id, self.end_of_turn} - {None})

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _guard(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate can't be tokenised
        return self._controls.sub(lambda m: self._guards[m[0]], text)

    def render(self, prompt: Prompt, *, reply: str | None = None) -> str:
        """The prompt as one string up to the assistant's turn (or with `reply` closed behind it)."""
        return self._unguard(self._render(prompt, reply))

    def _unguard(self, text: str) -> str:
        for control, guarded in self._guards.items():
            text = text.replace(guarded, control)
        return text

    def _render(self, prompt: Prompt, reply: str | None = None) -> str:
        turns = [{"role": "system", "content": self._guard(prompt.system)}]
        turns = turns if prompt.system or not prompt.tools else []
        turns += [{"role": m.role, "content": self._guard(m.content)} for m in prompt.messages]
        tools = [{"type": "function", "function": json.loads(self._guard(tool))} for tool in prompt.tools]
        text: str = self.tokenizer.apply_chat_template(
            turns, tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        if any(t["function"]["name"] not in text for t in tools):
            raise EngineError("the model's chat template lists no tools: use layout native or paper")
        if reply is not None:
            text += self._guard(reply) + "<|im_end|>"
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in filter(None, self._controls.split(text)):
            control = part in self._guards
            ids += [self._id(part)] if control else self._plain(self._unguard(part))
        return ids

    def encode(self, prompt: Prompt, *, reply: str | None = None) -> Encoded:
        """Token ids of the prompt up to the assistant's turn, or with `reply` and its end behind it."""
        ids = self._encode(self._render(prompt, reply))
        second = [i for i, t in enumerate(ids) if t == self._begin][1:2]
        n = len(self._user)
        turns = [i for i in range(len(ids) - n + 1) if tuple(ids[i : i + n]) == self._user]
        return Encoded(tuple(ids), prefix=second[0] if second else 0, turn=turns[-1] if turns else 0)

    def continuation(self, opening: str, text: str) -> tuple[list[int], int, list[int]]:
        """Ids of `opening + text` tokenised together, how many of them end within the opening, and
        for each of the rest the number of characters of `text` covered once it is read."""
        whole = self.tokenizer(
            opening + text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        ids, ends = whole["input_ids"], [end for _, end in whole["offset_mapping"]]
        shared = sum(1 for end in ends if end <= len(opening))
        return ids, shared, [end - len(opening) for end in ends[shared:]]

    def upto(self, opening: str, text: str, limit: int) -> tuple[list[int], int, list[int]]:
        """As `continuation`, up to the first token that reaches character `limit` of `text`.

        A character that is cut in bytes comes with all its tokens.
        """
        ids, own, ends = self.continuation(opening, text)
        last = next((end for end in ends if end >= limit), len(text))
        count = sum(end <= last for end in ends)
        return ids[: own + count], own, ends[:count]

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """The text of reply tokens, without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def ends(self, text: str, tokens: Sequence[int]) -> tuple[int, ...]:
        """For each token of a reply the number of characters of its text covered once the token is read.

        text: the whole reply, of which the tokens are the end: an opening it was given stands before them.
        A character that is cut in bytes comes with its last token.
        """
        whole = self.decode(tuple(tokens))
        before, out = len(text) - len(whole), [0]
        for count in range(1, len(tokens) + 1):
            read = self.decode(tuple(tokens[:count]))
            read = read if whole.startswith(read) else read.rstrip("\ufffd")
            out.append(max(out[-1], min(len(read), len(whole))))
        return tuple(before + end for end in out[1:])


class ChatEngine:
    """What engines over a model folder have in common: token ids, and what fits into the context window."""

    chat: Chat
    context: int
    """Tokens of the context window."""

    def encode(self, prompt: Prompt, *, reply: str | None = None) -> Encoded:
        """Token ids of a prompt, with the ends of its shared prefix and of its history."""
        return self.chat.encode(prompt, reply=reply)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text: what a draft is made of."""
        return tuple(self.chat.continuation("", text)[0])

    def asked(self, request: Request) -> tuple[Encoded, list[int]]:
        """A request's encoded prompt, and the ids its reply goes on from: the prompt's and the opening's."""
        code = self.encode(request.prompt)
        return code, [*code.ids, *(self.tokens(request.opening) if request.opening else ())]

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether the prompt and a reply of `max_tokens` fit into the context window."""
        return len(self.encode(prompt).ids) + max_tokens <= self.context

    def check_room(self, tokens: int, what: str) -> None:
        """Raises TooLong if so many tokens are more than the context window holds."""
        if tokens > self.context:
            raise TooLong(f"{tokens} tokens {what}, but the context window holds {self.context}")

    def replied(
        self, request: Request, out: Sequence[int], log_probs: Sequence[float], finished: bool, prompt: int
    ) -> Generation:
        """The reply made of tokens `out` behind `prompt` tokens.

        Raises EngineError for log-probabilities of the base weights that are not finite.
        """
        if request.adapter is None and not all(map(math.isfinite, log_probs)):
            raise EngineError("a reply's log-probability is not a finite number")
        text = request.opening + self.chat.decode(tuple(out))
        return Generation(text, tuple(out), tuple(log_probs), finished, prompt)
