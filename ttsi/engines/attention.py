"""Attention as the torch engine needs it: under explicit masks, and behind a prefix that isn't trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

_sdpa = torch.nn.functional.scaled_dot_product_attention
GROUP_TOKENS = 16
"""Up to so many query tokens per row, heads that share keys are folded instead of the keys being repeated."""


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention under an explicit mask [rows, 1, queries, keys]; None means causal.

    Under a mask that `additive` made, query tokens are folded into the group dimension, so that shared
    key-value heads are not copied once per query head at every decoding step.

    ttsi_prefix: keys and values per layer that stand in front of the new ones in a training pass. ttsi_near:
    the mask of layers that attend to a sliding window. ttsi_ends: of each row the key behind its last, where
    reading all rows to the longest one's would be the greater part. Raises ValueError for what is not done.
    """
    if other := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise ValueError(f"the model's attention has {other[0]}, which ttsi's engine doesn't compute")
    near: Any = kwargs.get("ttsi_near") if kwargs.get("sliding_window") else None
    mask: Any = kwargs.get("ttsi_mask") if near is None else near
    scale, prefix = kwargs.get("scaling"), kwargs.get("ttsi_prefix")
    if prefix is not None:
        keys, values = prefix[module.layer_idx]
        if query.device.type == "cpu" and query.dtype == torch.float32:
            if len(query) == 1 and near is None:  # no padding: the prefix is seen whole
                mask = mask[..., keys.shape[2] :]
            out = _BehindPrefix.apply(query, key, value, keys, values, mask, scale)  # type: ignore[no-untyped-call]
            return out.transpose(1, 2), None
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    shape, groups = query.shape, query.shape[1] // key.shape[1]
    fold = mask is not None and mask.shape[2] != shape[2]
    if fold:
        query = query.reshape(shape[0], key.shape[1], groups * shape[2], shape[3])
    if fold and (ends := kwargs.get("ttsi_ends")):
        rows = [(slice(i, i + 1), slice(end)) for i, end in enumerate(ends)]
        each = [
            _sdpa(query[i], key[i, :, to], value[i, :, to], mask[i, ..., to], scale=scale) for i, to in rows
        ]
        return torch.cat(each).reshape(shape).transpose(1, 2), None
    out = _sdpa(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1 and not fold
    )
    return out.reshape(shape).transpose(1, 2), None


def uneven(ends: list[int]) -> list[int] | None:
    """The rows' ends, if padding them to the longest costs more than taking each for itself; else None."""
    return ends if 1.15 * sum(ends) < len(ends) * max(ends) else None


def additive(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """The mask of a few tokens per row as what is added to their scores, once per head of a group."""
    if groups == 1 or mask.shape[2] > GROUP_TOKENS:
        return mask
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return added.repeat(1, 1, groups, 1)


def within(window: int | None, positions: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask less the keys that are `window` or more positions back; None where there are none.

    positions [rows, queries] and keys [rows, keys] say where tokens stand.
    """
    if window is None or keys.shape[1] <= window:
        return None
    back = positions[:, :, None] - keys[:, None]
    # Padding, which stands behind all keys, sees the last: what is masked must be finite all the same.
    near = (back < window) | (keys == keys.amax())[:, None]
    return (near & (back >= 0))[:, None] if mask is None else near[:, None] & mask


class _BehindPrefix(torch.autograd.Function):
    """Attention of new tokens to a prefix and to themselves, with gradients to the new ones only.

    Query [rows, heads, tokens, dim]; new and prefix keys and values [rows, shared heads, length, dim]. On a
    CPU the library's own backward pass computes the gradients of the prefix too, the greater part by far, and
    copies the shared heads. A mask of fewer columns is of the last ones; the others are seen by all.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *behind: Any) -> Tensor:
        keys, values, mask, scale = behind
        rows, shared, length, dim = key.shape
        width = keys.shape[2]
        keys = torch.cat([keys, key], dim=2).flatten(0, 1)
        values = torch.cat([values, value], dim=2).flatten(0, 1)
        folded = (query * scale).reshape(rows * shared, -1, dim)  # heads that share keys, one after another
        scores = torch.bmm(folded, keys.transpose(1, 2))
        scores.view(rows, -1, length, width + length)[..., -mask.shape[3] :].masked_fill_(~mask, -torch.inf)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(folded, keys, values, weights)
        ctx.width, ctx.scale = width, scale
        return torch.bmm(weights, values).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        folded, keys, values, weights = ctx.saved_tensors
        shape, shared = gradient.shape, (gradient.shape[0], -1, gradient.shape[2], gradient.shape[3])
        gradient = gradient.reshape(folded.shape)
        into_value = torch.bmm(weights[..., ctx.width :].transpose(1, 2), gradient)
        into_scores = torch._softmax_backward_data(
            torch.bmm(gradient, values.transpose(1, 2)), weights, -1, weights.dtype
        )
        into_query = torch.bmm(into_scores, keys).mul_(ctx.scale)
        into_key = torch.bmm(into_scores[..., ctx.width :].transpose(1, 2), folded)
        return into_query.view(shape), into_key.view(shared), into_value.view(shared), None, None, None, None


AttentionInterface.register("ttsi", attention)
