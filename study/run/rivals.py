"""What the study computes besides Algorithm 1: for other estimators, for votes, and where questions lie."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ttsi import estimator, prompts
from ttsi.engines.base import Request
from ttsi.stages import Done, Replies, Stages, source, stage
from ttsi.types import Query, Sampling


class RivalStages(Stages):
    """The stages of Algorithm 1 and those of its rivals, nothing remembered."""

    voting: Sampling
    """How votes are drawn: `n` to a block."""

    @stage
    def whole(self, queries: Sequence[Query]) -> list[Replies]:
        """For each tool of a query the best call that names it: greedy behind the forced opening."""
        opening = prompts.opening(self.method.layout)
        asked = [(q, tool) for q in queries for tool in q.tools]
        requests = [
            Request(self._act(q), 0, opening + estimator.continuation(tool.name), lookup=True)
            for q, tool in asked
        ]
        greedy = Sampling(max_tokens=self.method.answering.max_tokens)
        replies = iter(self.engine().generate(requests, greedy))
        return [tuple(next(replies)[0] for _ in q.tools) for q in queries]

    @stage
    def embed(self, queries: Sequence[Query], texts: Callable[[Query], list[str]]) -> list[list[str]]:
        """Mean-pooled hidden states (float16, in base64) of each query's texts."""
        groups = [texts(q) for q in queries]
        with self.engine().outside_failures():
            vectors = iter(self.engine().embed([t for group in groups for t in group]))
        return [
            [base64.b64encode(next(vectors).astype("<f2").tobytes()).decode() for _ in group]
            for group in groups
        ]

    def votes(self, queries: Sequence[Query], counts: Mapping[str, int]) -> dict[str, Done[Replies]]:
        """So many sampled replies to each query; the first of them are those of the majority vote."""
        size, sampled = self.voting.n, self.under(answering=self.voting)
        blocks: dict[str, list[Done[Replies]]] = {q.id: [] for q in queries}
        while wanting := [q for q in queries if counts[q.id] > size * len(blocks[q.id])]:
            for i, done in sampled.answer(wanting, block=len(blocks[wanting[0].id])).items():
                blocks[i].append(done)
        return {i: _together(parts, counts[i], size) for i, parts in blocks.items()}


def _together(blocks: Sequence[Done[Replies]], count: int, size: int) -> Done[Replies]:
    """The first `count` replies of some blocks; the first failure of the machine, if any."""
    if (bad := next((d for d in blocks if d.value is None), None)) is not None:
        return bad
    replies = tuple(r for d in blocks for r in d.value or ())[:count]
    # Of the last block only the replies that count are paid for, as with tokens.
    seconds = count / (size * len(blocks)) * sum(d.seconds for d in blocks)
    return Done(replies, "", seconds, source(blocks))


def vector(text: str) -> np.ndarray:
    """A vector as `RivalStages.embed` writes it, float32."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
