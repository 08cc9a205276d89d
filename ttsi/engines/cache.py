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

    def __init__(self, like: KeyValues, rows: int, capacity: int) -> None:
        """Room for so many rows of `capacity` tokens, in the shape, type and place of `like`; all zeros."""
        super().__init__(layers=[])
        self.capacity = capacity
        self.pairs = [
            (k.new_zeros(rows, capacity, *k.shape[2:]), v.new_zeros(rows, capacity, *v.shape[2:]))
            for k, v in like
        ]
        self.slots: Tensor = torch.empty(0)
        self.visible = 0

    @classmethod
    def of(cls, prefixes: Sequence[KeyValues], capacity: int) -> RowCache:
        """A cache of `capacity` slots per row whose first ones hold each row's prefix."""
        cache = cls(prefixes[0], len(prefixes), capacity)
        for row, prefix in enumerate(prefixes):
            cache.write(row, prefix)
        return cache

    def write(self, row: int, prefix: KeyValues) -> None:
        """Makes the row hold this prefix and zeros behind it: a masked value must be finite all the same."""
        for pair, new in zip(self.pairs, prefix, strict=True):
            for buffer, tensor in zip(pair, new, strict=True):
                buffer[row, : tensor.shape[1]] = tensor[0]
                buffer[row, tensor.shape[1] :] = 0

    def read(self, row: int, length: int) -> KeyValues:
        """The first `length` keys and values of a row, as a view."""
        return [(k[row : row + 1, :length], v[row : row + 1, :length]) for k, v in self.pairs]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.pairs[layer_idx]
        rows = torch.arange(len(key_states), device=key_states.device)[:, None]
        keys[rows, self.slots] = key_states.transpose(1, 2)
        values[rows, self.slots] = value_states.transpose(1, 2)
        return keys[:, : self.visible].transpose(1, 2), values[:, : self.visible].transpose(1, 2)

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in that order."""
        self.pairs = [(k[rows], v[rows]) for k, v in self.pairs]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.visible


class PrefixCache:
    """The most recently used prefixes' keys and values, at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = self.hits = self.misses = 0
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
                self.bytes -= _bytes(self._kept.popitem(last=False)[1])
            self._kept[ids] = fresh
            self.bytes += size
        return fresh

    def clear(self) -> None:
        """Forgets every prefix."""
        self._kept.clear()
        self.bytes = 0


def _bytes(entry: KeyValues) -> int:
    return sum(t.numel() * t.element_size() for pair in entry for t in pair)
