"""The decoding loop: replies share passes over the weights, and each that ends makes room for the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ttsi.engines.attention import GROUP_TOKENS
from ttsi.engines.base import Request
from ttsi.engines.cache import KeyValues, RowCache
from ttsi.engines.drafts import propose
from ttsi.engines.guide import Guide
from ttsi.seeds import reply_seed
from ttsi.types import Generation, Sampling

_FREE_ROWS = 6  # so many tokens cost a pass little more than one: room for guesses from the prompt
_DRAFT_ROWS = 32  # room for guesses from an earlier answer, most of which come true


@dataclass
class Row:
    """One reply in the making."""

    request: int
    place: int  # among the replies
    ids: list[int]  # prompt and opening
    draft: tuple[int, ...]
    lookup: tuple[int, ...]
    rng: torch.Generator
    limit: int
    guide: Guide | None
    out: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False
    trust: int = GROUP_TOKENS  # length of the next draft: grows while drafts come true

    @property
    def done(self) -> bool:
        return self.finished or len(self.out) >= self.limit


class Decoder:
    """Replies to requests, `sampling.n` to each, at most `most` of them in flight at a time.

    Raises TooLong if a prompt and its reply exceed the context window, ValueError for adapters of different
    ranks and for a grammar that can't be read.
    """

    def __init__(
        self, engine: Any, requests: Sequence[Request], sampling: Sampling, most: int | None
    ) -> None:
        self.engine, self.requests, self.sampling = engine, requests, sampling
        self.asked = [engine.asked(r) for r in requests]
        longest = max(len(ids) for _, ids in self.asked) + sampling.max_tokens
        engine.check_room(longest, "asked for")
        n = sampling.n
        self.replies = [self._row(p // n, p, requests[p // n].seed) for p in range(n * len(requests))]
        self.waiting = deque(self.replies)
        self.read: dict[int, tuple[KeyValues, Tensor]] = {}
        """By request, what was read of a prompt whose replies have not all joined, or may be drawn again."""
        apart = engine.dtype == torch.float32  # else the shape of a batch can turn a near-tie
        self.undecided = {i for i, r in enumerate(requests) if r.again and apart}
        self.flying: list[Row] = []
        self.slots = min(most or len(self.replies), len(self.replies))
        self.cache = RowCache(engine.prefix(()), self.slots, longest + GROUP_TOKENS)
        self.bank = engine.lora.blank([r.adapter for r in requests], self.slots)

    def _row(self, request: int, place: int, seed: int) -> Row:
        r, ids = self.requests[request], self.asked[request][1]
        rng = torch.Generator().manual_seed(reply_seed(seed, place % self.sampling.n))
        guide = Guide(r.grammar, self.engine.chat) if r.grammar else None
        lookup = (*r.draft, *ids) if r.lookup else ()
        return Row(request, place, ids, r.draft, lookup, rng, self.sampling.max_tokens, guide)

    def run(self) -> list[Generation]:
        """All replies, in the order of the requests."""
        while True:
            while self.waiting and (free := self._free()):  # a first token may be a reply's last
                self._join(free)
            active = [i for i, row in enumerate(self.flying) if not row.done]
            if not active:
                return [self.reply(row) for row in self.replies]
            if not self.waiting and 4 * len(active) <= 3 * len(self.flying):
                self._keep(active)
            drafts = [self._draft(row) for row in self.flying]
            tokens = [[row.out[-1], *d] for row, d in zip(self.flying, drafts, strict=True)]
            starts = [len(row.ids) + len(row.out) - 1 for row in self.flying]
            with self.engine.lora.applied(self.bank):
                hidden = self.engine.step(self.cache, tokens, starts)
            self.engine.counters.decode_rows += len(self.flying)
            logits = self.engine.head(torch.cat([hidden[i, : len(t)] for i, t in enumerate(tokens)]))
            parts = torch.split(logits, [len(t) for t in tokens])
            for row, part, draft in zip(self.flying, parts, drafts, strict=True):
                self._accept(row, part, draft)

    def _free(self) -> list[int]:
        return [i for i in range(self.slots) if i >= len(self.flying) or self.flying[i].done]

    def _join(self, free: Sequence[int]) -> None:
        """Gives the free slots to the next replies; each prompt is read once, whatever n is."""
        joining = [self.waiting.popleft() for _ in free[: len(self.waiting)]]
        fresh = sorted({row.request for row in joining} - self.read.keys())
        if fresh:
            read = self.engine.prefill([self.requests[i] for i in fresh], [self.asked[i] for i in fresh])
            self.read |= zip(fresh, read, strict=True)
        for slot, row in zip(free, joining, strict=False):
            keys, logits = self.read[row.request]
            self.cache.write(slot, keys)
            if self.bank:
                self.engine.lora.put(self.bank, slot, self.requests[row.request].adapter)
            self.flying[slot : slot + 1] = [row]
            self._accept(row, logits, ())
        wanted = {*self.undecided, *(row.request for row in list(self.waiting)[:1])}
        self.read = {i: r for i, r in self.read.items() if i in wanted}

    def _keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.engine.device)
        self.cache.select(index)
        self.bank = [(a[index], b[index]) for a, b in self.bank] if self.bank else None
        self.flying = [self.flying[i] for i in rows]
        self.slots = len(rows)  # another reply may yet be drawn in the place of one of these

    def _draft(self, row: Row) -> tuple[int, ...]:
        if row.done or not self.engine.drafts:
            return ()
        rows, left = len(self.flying), row.limit - len(row.out) - 1
        free = max(0, min(_FREE_ROWS // rows - 1, left))
        most = max(free, min(_DRAFT_ROWS // rows - 1, GROUP_TOKENS - 1, row.trust, left))
        sure = tuple(row.guide.forced()[:most]) if row.guide else ()
        room = (most if row.draft else free) - len(sure)
        draft = (*sure, *propose([*row.out, *sure], row.draft, row.lookup, room))
        return row.guide.allowed(draft) if row.guide else draft

    def _accept(self, row: Row, logits: Tensor, draft: tuple[int, ...]) -> None:
        """Takes tokens from `logits` [1 + drafted, vocabulary] as long as the draft foresaw them.

        Every token is chosen from the model's own distribution with the row's own generator, so the text
        is that of decoding one token at a time; the draft only decides how many are had in one pass.
        """
        if row.done:
            return
        sampling, picked = self.sampling, []
        greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        best = logits.argmax(dim=-1).tolist() if greedy and not row.guide else []
        for i in range(len(draft) + 1):
            said = row.guide.masked(logits[i]) if row.guide else logits[i]
            token = best[i] if best else _pick(said, [*row.ids, *row.out], sampling, row.rng)
            picked.append(token)
            row.out.append(token)
            if row.guide:
                row.guide.take(token)
            row.finished = token in self.engine.chat.stop_ids
            if row.done or i == len(draft) or draft[i] != token:
                break
        came_true = len(picked) - 1
        if draft:
            row.trust = min(2 * row.trust, GROUP_TOKENS) if came_true == len(draft) else came_true + 1
        row.log_probs += log_probs(logits[: len(picked)], picked).tolist()
        self.engine.counters.drafted += len(draft)
        self.engine.counters.accepted += came_true
        self.engine.counters.decoded_tokens += len(picked)
        if row.done:
            self._ended(row)

    def _ended(self, row: Row) -> None:
        """Lets another reply have the place of one that its request isn't content with, at once."""
        if row.request not in self.undecided:
            return
        again = self.requests[row.request].again
        seed = again(self.reply(row)) if again else None
        if seed is None:
            self.undecided.discard(row.request)
        else:
            self.replies[row.place] = self._row(row.request, row.place, seed)
            self.waiting.appendleft(self.replies[row.place])

    def reply(self, row: Row) -> Generation:
        """A row's reply."""
        request = self.requests[row.request]
        done: Generation = self.engine.replied(request, row.out, row.log_probs, row.finished, len(row.ids))
        return done


def log_probs(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Log-probabilities (nats) [tokens] of token ids under logits [tokens, vocabulary]."""
    chosen = torch.tensor(ids, device=logits.device)
    return logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)


def _pick(logits: Tensor, history: list[int], sampling: Sampling, rng: torch.Generator) -> int:
    """One token: penalty, temperature, top-k and top-p in transformers' order."""
    logits = logits.float().cpu().clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(history)))
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    k = sampling.top_k or len(logits)
    top, index = (logits / sampling.temperature).topk(min(k, len(logits)))
    probabilities = top.softmax(dim=-1)
    if not bool(probabilities.isfinite().all()):
        return int(index[0])  # nothing to draw from; the log-probability says so, and the caller refuses it
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= sampling.top_p] = 0  # the first token always stays
    return int(index[torch.multinomial(probabilities, 1, generator=rng)])


def chunks(parts: Mapping[int, list[int]], limit: int) -> Iterator[list[int]]:
    """Rows grouped so that no pass exceeds `limit` tokens, padding included, and none is left out."""
    chunk: list[int] = []
    for i in parts:
        width = max(len(parts[j]) for j in [*chunk, i])
        if chunk and width * (len(chunk) + 1) > limit:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk
