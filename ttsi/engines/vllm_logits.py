"""What vLLM's processes do to logits for us: force a reply's tokens, or keep it to a grammar.

Both work on what a token is chosen by. vLLM reports raw log-probabilities, taken before: they are untouched.
Its own structured output masks the logits earlier, so that it would report those of what the grammar leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ttsi.engines.chat import Chat
from ttsi.engines.guide import Guide

FORCED, GRAMMAR = "ttsi_forced", "ttsi_grammar"
"""The names of a request's `extra_args`: the token ids of its reply, or the grammar that it keeps to."""


def forcing(ids: Sequence[int]) -> SamplingParams:
    """Makes a reply these token ids, and has their log-probabilities reported."""
    extra = {FORCED: ids}
    return SamplingParams(
        temperature=0.0, max_tokens=len(ids), logprobs=0, ignore_eos=True, detokenize=False, extra_args=extra
    )


class ForcedTokens(LogitsProcessor):  # type: ignore[misc]
    """Makes a request's reply the token ids it names; what vLLM reports of them is the scores."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.rows: dict[int, tuple[Sequence[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def row(params: SamplingParams, _: Any, out: list[int]) -> tuple[Sequence[int], list[int]] | None:
            forced = (params.extra_args or {}).get(FORCED)
            return (forced, out) if forced else None

        process_dict_updates(self.rows, batch_update, row)

    def apply(self, logits: Tensor) -> Tensor:
        # A prompt that is read in several passes is asked for tokens that are then thrown away.
        due = {row: forced[min(len(out), len(forced) - 1)] for row, (forced, out) in self.rows.items()}
        if due:
            rows = torch.tensor(list(due), device=self.device)
            logits[rows] = -math.inf
            logits[rows, torch.tensor(list(due.values()), device=self.device)] = 0.0
        return logits


@dataclass
class _Guided:
    guide: Guide
    out: list[int]
    """The reply so far; vLLM adds to it."""
    read: int = 0


class GuidedTokens(LogitsProcessor):  # type: ignore[misc]
    """Keeps a request's reply to the grammar it names, as the torch engine does."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.folder: str = vllm_config.model_config.model
        self.rows: dict[int, _Guided] = {}

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer, loaded for the first grammar."""
        return Chat(AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False))

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def row(params: SamplingParams, _: Any, out: list[int]) -> _Guided | None:
            grammar = (params.extra_args or {}).get(GRAMMAR)
            return _Guided(Guide(grammar, self.chat), out) if grammar else None

        process_dict_updates(self.rows, batch_update, row)

    def apply(self, logits: Tensor) -> Tensor:
        for row, reply in self.rows.items():
            for token in reply.out[reply.read :]:
                reply.guide.take(token)
            reply.read = len(reply.out)
            logits[row] = reply.guide.masked(logits[row])
        return logits
