"""LoRA with a different adapter in every batch row, over weights that never change.

PEFT's own layers hold one active adapter per model; test-time training needs one per sample, trained and
applied side by side. The arithmetic, the initialisation and the saved format are PEFT's, and tests hold
them to it: h = W x + (α / r) · B A x, Hu et al. 2021, equation 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ttsi.types import LoraSettings

# Up to this many rows, `W @ x.T` is faster than `x @ W.T` in float32 on a CPU (measured: 1.1 to 3.5 times,
# since the library blocks over the long side); above, it is slower.
_FLIP_ROWS = 200
_FLIP_ROWS_GRAD = 48  # below it the backward pass of the flipped product is slow


@dataclass(frozen=True)
class Adapter:
    """One sample's LoRA matrices, float32: per adapted layer `a` [r, in] and `b` [out, r]."""

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    settings: LoraSettings


Bank = list[tuple[Tensor, Tensor]]
"""Adapters stacked by batch row: per adapted layer (A [rows, r, in], B [rows, out, r] scaled by α / r)."""


class LoraLinear(nn.Module):
    """A frozen linear layer plus, while a bank is applied, each row's own low-rank update."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.pair: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.base.weight, self.base.bias)
        if self.pair is None:
            return y
        a, b = self.pair
        low = torch.matmul(x.to(a.dtype), a.transpose(1, 2))
        return (y + torch.matmul(low, b.transpose(1, 2))).to(y.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, in the order of operands that the processor likes best."""
    rows = x.numel() // x.shape[-1]
    few = _FLIP_ROWS_GRAD if x.requires_grad else 0
    if x.device.type != "cpu" or x.dtype != torch.float32 or not few <= rows <= _FLIP_ROWS:
        return nn.functional.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(rows, -1).t()).t().reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class LoraLayers:
    """Every linear layer of a decoder but the output head, made ready for adapters."""

    def __init__(self, decoder: nn.Module) -> None:
        self.names: list[str] = []
        self.layers: list[LoraLinear] = []
        for name, module in list(decoder.named_modules()):
            for child_name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    wrapped = LoraLinear(child)
                    setattr(module, child_name, wrapped)
                    self.names.append(f"{name}.{child_name}".lstrip("."))
                    self.layers.append(wrapped)
        if not self.layers:
            raise ValueError("the model has no linear layers to adapt")

    @contextmanager
    def applied(self, bank: Bank | None) -> Iterator[None]:
        """Within the block the rows of `bank` act on the rows of each batch; after it, none does."""
        try:
            if bank is not None:
                for layer, pair in zip(self.layers, bank, strict=True):
                    layer.pair = pair
            yield
        finally:
            for layer in self.layers:
                layer.pair = None

    def fresh(self, settings: LoraSettings, seed: int, device: torch.device) -> Adapter:
        """A new adapter: A uniform in ±1/√in (PEFT's Kaiming initialisation), B zero.

        Drawn on the CPU from `seed` alone, so that it is the same on every device.
        """
        rng = torch.Generator().manual_seed(seed)
        a = []
        for layer in self.layers:
            bound = layer.base.in_features**-0.5
            a.append(
                torch.empty(settings.rank, layer.base.in_features).uniform_(-bound, bound, generator=rng)
            )
        b = [torch.zeros(layer.base.out_features, settings.rank) for layer in self.layers]
        return Adapter(tuple(t.to(device) for t in a), tuple(t.to(device) for t in b), settings)

    def stack(self, adapters: Sequence[Adapter | None]) -> Bank | None:
        """One bank whose row i is adapter i; a missing adapter is a row of zeros. None if all are missing."""
        present = [a for a in adapters if a is not None]
        if not present:
            return None
        rank = {a.settings.rank for a in present}
        if len(rank) > 1:
            raise ValueError(f"adapters of different ranks cannot share a batch: {sorted(rank)}")
        bank: Bank = []
        for i in range(len(self.layers)):
            like_a, like_b = present[0].a[i], present[0].b[i]
            a = [torch.zeros_like(like_a) if x is None else x.a[i] for x in adapters]
            b = [
                torch.zeros_like(like_b) if x is None else x.b[i] * (x.settings.alpha / x.settings.rank)
                for x in adapters
            ]
            bank.append((torch.stack(a), torch.stack(b)))
        return bank

    def save(self, adapter: Adapter, folder: Path, *, base_model: str, invocation: Sequence[int]) -> None:
        """Writes the adapter in PEFT's own format; plain PEFT loads it.

        `invocation`: token ids that open a user turn; an activated adapter acts from their last occurrence.
        """
        from peft import LoraConfig

        settings = adapter.settings
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=sorted({n.rsplit(".", 1)[-1] for n in self.names}),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
            inference_mode=True,
            alora_invocation_tokens=list(invocation) if settings.mode == "activated" else None,
        )
        tensors = {}
        for name, a, b in zip(self.names, adapter.a, adapter.b, strict=True):
            tensors[f"base_model.model.model.{name}.lora_A.weight"] = a.contiguous().cpu()
            tensors[f"base_model.model.model.{name}.lora_B.weight"] = b.contiguous().cpu()
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
