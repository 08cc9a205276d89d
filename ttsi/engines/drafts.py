"""Guesses at what a reply says next; the engine checks every one of them.

Prompt look-up decoding (Saxena 2023) and drafting from an earlier answer: a wrong guess costs a little
time, a right one saves a pass over the weights. A reply that runs on into the token limit mostly repeats
itself, so it is looked up in what it has said so far as well.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_MATCH = 5
_LOOKUP_TOKENS = 4  # a match found in the prompt is trusted for so many tokens, times its length


def propose(out: Sequence[int], draft: Sequence[int], lookup: Sequence[int], room: int) -> tuple[int, ...]:
    """At most `room` token ids likely to follow `out`; empty when nothing suggests any.

    draft: an earlier reply; followed as long as `out` repeats it, and found again by its last tokens
    after a difference. lookup: text to search, and `out` behind it, for the last tokens of `out`.
    """
    if room <= 0:
        return ()
    if draft and tuple(draft[: len(out)]) == tuple(out):
        return tuple(draft[len(out) : len(out) + room])
    for source in (draft, (*lookup, *out)):
        text = _searchable(source)
        for size in range(min(_LONGEST_MATCH, len(out)), 1, -1):
            at = text.rfind(_searchable(out[-size:]), 0, max(0, len(source) - 1))  # something must follow
            if at >= 0:
                length = room if source is draft else min(room, _LOOKUP_TOKENS * size)
                return tuple(source[at + size : at + size + length])
    return ()


def _searchable(ids: Sequence[int]) -> str:
    """A character for each token id: strings are searched at the speed of C."""
    return "".join(map(chr, ids))
