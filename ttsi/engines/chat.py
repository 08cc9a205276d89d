"""Conversations as token ids, shared by every engine that holds a tokenizer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, takewhile
from operator import itemgetter
from typing import Any

from ttsi.engines.base import EngineError, Prompt, Request, TooLong
from ttsi.types import Generation, Message

_PRIVATE_USE = 0xF0000  # a plane no text uses: stands in for '<|' while the template is rendered
# A template that writes today's date would ask something else every day: it is told the one that Llama 3's
# own falls back to.
_TODAY = (
    '{%- macro strftime_now(form) -%}{{ form | replace("%d", "26") | replace("%b", "Jul")'
    ' | replace("%B", "July") | replace("%m", "07") | replace("%Y", "2024") }}{%- endmacro -%}'
)
NO_ACTIVATED = (
    "the model's chat template opens a user's turn with no control token of its own, where mode 'activated' "
    "would begin: use mode 'exact'"
)


@dataclass(frozen=True)
class Encoded:
    """Ids of a prompt. `prefix`: length of what prompts about the same tools share; `turn`: start of the last
    user turn, which a template without a system turn has before the prefix's end."""

    ids: tuple[int, ...]
    prefix: int
    turn: int


class Chat:
    """A tokenizer's chat template, applied so that text can't pose as a control token.

    Control tokens split the text before byte-pair encoding, so encoding the runs between them one by
    one gives the ids of the whole string, except where a *content* spells out a control token: there
    it stays plain text.

    What a template has is found by rendering it: which roles it takes, how a user's turn begins, how a reply
    ends. Raises ValueError for a tokenizer without a template, and for a template that can't be read.

    invocation: the ids that open a user's turn; empty where they can't be told from text.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the model has no chat template: take an instruct model, or put chat_template.jinja beside it"
            )
        self.tokenizer = tokenizer
        added = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        controls = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._controls = re.compile(f"({'|'.join(map(re.escape, controls))})")
        self._guards = {t: t[:1] + chr(_PRIVATE_USE + i) + t[1:] for i, t in enumerate(controls)}
        self._guarded = re.compile(f"[{chr(_PRIVATE_USE)}-{chr(_PRIVATE_USE + len(controls))}]")
        self._id = tokenizer.convert_tokens_to_ids
        if not self._shows("user", "assistant", "user"):
            raise ValueError("the model's chat template doesn't show what users and assistants say")
        self._takes_system = self._shows("system", "user")
        self._takes_tool = self._shows("user", "assistant", "tool", "user")
        self._takes_any_order = self._shows("assistant", "assistant", "user", "user")
        self.end, self._opening, self.invocation = self._between()
        self.end_of_turn: int = self._id(self.end)
        self.stop_ids = frozenset({tokenizer.eos_token_id, self.end_of_turn} - {None})
        opened = self._apply([("user", "said")])
        replied = self._apply([("user", "said"), ("assistant", "-so-")], open_reply=False)
        self._lead = replied.removeprefix(opened).partition("-so-")[0] if replied.startswith(opened) else ""
        self._anchor = ""
        apart = [*self._encode(opened), *self.continuation("", "so")[0]]
        if self._encode(f"{opened}{self._lead}so") != apart:
            self._anchor = "\n"  # the tokenizer puts a space before what it reads alone
        self._shared = lru_cache(maxsize=64)(self._shared_ids)

    # --- what the template does -------------------------------------------------------------------------

    def _apply(self, turns: Sequence[tuple[str, str]], tools: Any = None, open_reply: bool = True) -> str:
        """The template's text for (role, content) turns; raises whatever the template does."""
        own = self.tokenizer.chat_template
        text: str = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=open_reply,
            chat_template=_TODAY + own if "strftime_now" in own and isinstance(own, str) else None,
            enable_thinking=False,  # H scores, and T teaches, what a reply begins with
        )
        return text

    def _shows(self, *roles: str) -> bool:
        """Whether the template takes turns of these roles, one after another, and loses none."""
        try:
            text = self._apply([(role, f"said-{i}-") for i, role in enumerate(roles)])
        except Exception:  # a template raises what it likes
            return False
        return bool(re.search(".*".join(f"said-{i}-" for i in range(len(roles))), text, re.DOTALL))

    def _between(self) -> tuple[str, str, tuple[int, ...]]:
        """The control token behind a reply, and what opens the user's next turn: text and ids, if a control
        token stands first there and its ids are found again in a conversation."""
        text = self._apply([("user", "said-0-"), ("assistant", "said-1-"), ("user", "said-2-")])
        said = text.index("said-2-")
        end = self._controls.search(text, text.index("said-1-"), said)
        if end is None:
            raise ValueError("the model's chat template ends a reply with no control token")
        header = self._controls.search(text, end.end(), said)
        if header is None:
            return end[0], "", ()
        opening = text[header.start() : said].rstrip()
        ids = tuple(self._encode(opening))
        found = _last(self._encode(text), ids) == len(self._encode(text[: header.start()]))
        return end[0], opening, ids if found else ()

    def _turns(self, system: str | None, turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The turns in the roles and the order that the template has; no word is lost, none is added.

        Tool results are said by the user, a system turn opens the user's first one, and where roles have to
        alternate neighbours are joined; an empty user turn stands before a reply that nobody asked for.
        """
        if not self._takes_tool:
            turns = [("user" if role == "tool" else role, content) for role, content in turns]
        if not self._takes_any_order:
            before, after = ([("user", "")] * (turn[0] != "user") for turn in (turns[0], turns[-1]))
            turns = [
                (role, "\n\n".join(content for _, content in same))
                for role, same in groupby([*before, *turns, *after], key=itemgetter(0))
            ]
        if system is None or self._takes_system:
            return [*([] if system is None else [("system", system)]), *turns]
        first, rest = (turns[0][1], turns[1:]) if turns[0][0] == "user" else ("", turns)
        return [("user", "\n\n".join(filter(None, [system, first]))), *rest]

    # --- prompts ----------------------------------------------------------------------------------------

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _guard(self, text: str) -> str:
        return self._controls.sub(lambda m: self._guards[m[0]], _valid(text))

    def render(self, prompt: Prompt, *, reply: str | None = None) -> str:
        """The prompt as one string up to the assistant's turn (or with `reply` closed behind it)."""
        text = self._unguard(self._render(prompt.system, prompt.tools, prompt.messages))
        return text if reply is None else f"{text}{self._lead}{_valid(reply)}{self.end}"

    def _unguard(self, text: str) -> str:
        if self._guarded.search(text):
            for control, guarded in self._guards.items():
                text = text.replace(guarded, control)
        return text

    def _render(self, system: str, listed: tuple[str, ...], messages: Sequence[Message]) -> str:
        said = [(m.role, self._guard(m.content)) for m in messages]
        turns = self._turns(self._guard(system) if system or not listed else None, said)
        tools = [{"type": "function", "function": json.loads(self._guard(tool))} for tool in listed]
        try:
            text = self._apply(turns, tools)
        except Exception as error:  # a template raises what it likes
            raise EngineError(f"the model's chat template refuses the prompt: {error}") from error
        if any(t["function"]["name"] not in text for t in tools):
            raise EngineError("the model's chat template lists no tools: use layout native or paper")
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        before = ""
        for part in filter(None, self._controls.split(text)):
            if part in self._guards:
                ids.append(self._id(part))
                before = part
            elif self._guarded.search(part):
                ids += self._plain(self._unguard(part))
            else:  # behind its control token, which may swallow a space or ask for one
                whole = self.tokenizer.encode(before + part, add_special_tokens=False)
                ids += whole[bool(before) :]
        return ids

    def _shared_ids(self, system: str, tools: tuple[str, ...]) -> list[int]:
        """Ids that all prompts with this system turn and these tools open with, up to the first user's turn
        or, where the system turn stands inside it, up to what the user says."""
        one, other = (self._render(system, tools, [Message("user", said)]) for said in "0~")
        shared = one[: _common(one, other)]
        return self._encode(shared.rstrip().removesuffix(self._opening) if self._opening else shared)

    def encode(self, prompt: Prompt, *, reply: str | None = None) -> Encoded:
        """Token ids of the prompt up to the assistant's turn, or with `reply` and its end behind it."""
        ids = self._encode(self._render(prompt.system, prompt.tools, prompt.messages))
        prefix = _common(ids, self._shared(prompt.system, prompt.tools))
        turn = max(_last(ids, self.invocation), 0) if self.invocation else 0
        if reply is not None:
            ids += [*self.continuation("", _valid(reply))[0], self.end_of_turn]
        return Encoded(tuple(ids), prefix, turn)

    def continuation(self, opening: str, text: str) -> tuple[list[int], int, list[int]]:
        """Ids of `opening + text` tokenised together, how many of them end within the opening, and
        for each of the rest the number of characters of `text` covered once it is read."""
        whole = self.tokenizer(
            f"{self._anchor}{opening}{text}",
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        ids, ends = whole["input_ids"], [end - len(self._anchor) for _, end in whole["offset_mapping"]]
        own = sum(1 for end in ends if end <= 0) if self._anchor else 0
        shared = sum(1 for end in ends[own:] if end <= len(opening))
        return ids[own:], shared, [end - len(opening) for end in ends[own + shared :]]

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

    def check_mode(self, mode: str) -> None:
        """Raises ValueError if the model's chat template can't serve adapters of this mode."""
        if mode == "activated" and not self.chat.invocation:
            raise ValueError(NO_ACTIVATED)

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


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate can't be tokenised


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long two sequences are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _last(ids: Sequence[int], wanted: tuple[int, ...]) -> int:
    """Where `wanted` stands last among ids; -1 if it doesn't."""
    starts = range(len(ids) - len(wanted), -1, -1)
    return next((i for i in starts if tuple(ids[i : i + len(wanted)]) == wanted), -1)
