"""Key-value caches: one that grows in place for decoding, and one of prefixes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

KeyValues = list[tuple[Tensor, Tensor]]
"""Per layer (keys, values), each [1, length, heads, dim]: the cache of one prefix."""


class RowCache(Cache):
    """Keys and values of a batch, each row contiguous from slot 0: a token's slot is its position.

    Rows of different length need no padding mask: a query at position p sees the slots ≤ p, and all of
    those are filled. Set `slots` [rows, tokens] before a forward pass; it says where the new ones go.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.slots: Tensor = torch.empty(0)
        self.visible = 0

    @classmethod
    def from_prefixes(cls, prefixes: Sequence[KeyValues], capacity: int) -> RowCache:
        """A cache of `capacity` slots per row whose first ones hold each row's prefix."""
        cache = cls()
        for layer in range(len(prefixes[0])):
            for store, side in ((cache.keys, 0), (cache.values, 1)):
                like = prefixes[0][layer][side]
                buffer = like.new_zeros(len(prefixes), capacity, *like.shape[2:])
                for row, prefix in enumerate(prefixes):
                    tensor = prefix[layer][side]
                    buffer[row, : tensor.shape[1]] = tensor[0]
                store.append(buffer)
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        rows = torch.arange(len(key_states), device=key_states.device)[:, None]
        keys[rows, self.slots] = key_states.transpose(1, 2)
        values[rows, self.slots] = value_states.transpose(1, 2)
        return keys[:, : self.visible].transpose(1, 2), values[:, : self.visible].transpose(1, 2)

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in that order; a row may be named more than once."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.visible


def padded(prefixes: Sequence[KeyValues]) -> KeyValues:
    """One (keys, values) per layer for a batch, each [rows, heads, longest, dim]; shorter ones are padded."""
    longest = max(p[0][0].shape[1] for p in prefixes)

    def rows(layer: int, side: int) -> Tensor:
        parts = [p[layer][side] for p in prefixes]
        pads = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, longest - t.shape[1])) for t in parts]
        return torch.cat(pads).transpose(1, 2)

    return [(rows(layer, 0), rows(layer, 1)) for layer in range(len(prefixes[0]))]


class PrefixCache:
    """The most recently used prefixes' keys and values, at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple[int, ...], KeyValues] = OrderedDict()

    def get(self, ids: tuple[int, ...], compute: Callable[[], KeyValues]) -> KeyValues:
        """The prefix's keys and values, computed at most once while it is kept.

        A prefix larger than the limit is computed and handed out but not kept.
        """
        if ids in self._kept:
            self.hits += 1
            self._kept.move_to_end(ids)
            return self._kept[ids]
        self.misses += 1
        fresh = compute()
        size = _bytes(fresh)
        if size <= self.limit:
            while self.bytes + size > self.limit:
                _, old = self._kept.popitem(last=False)
                self.bytes -= _bytes(old)
            self._kept[ids] = fresh
            self.bytes += size
        return fresh

    def clear(self) -> None:
        """Forgets every prefix."""
        self._kept.clear()
        self.bytes = 0


def _bytes(entry: KeyValues) -> int:
    return sum(t.numel() * t.element_size() for pair in entry for t in pair)
