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
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ttsi.types import LoraSettings

# Of weights that are not packed, `W @ x.T` is the faster order up to a few hundred rows on a CPU (measured).
_FLIPPED_ROWS = 300
# Half precision holds every weight that was published in it or in bfloat16, but for parts of very small ones:
# half a step of its smallest numbers. A float32 product of K terms rounds away more.
_HALF_STEP = 2.0**-25


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
        self.weight = FrozenWeight(base.weight)
        self.pair: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        bias, pair = self.base.bias, self.pair
        if pair is not None and pair[0].requires_grad and not self.weight.plain:
            return _Adapted.apply(x, self.weight, bias, *pair)  # type: ignore[no-untyped-call]
        y = self.weight(x)
        if bias is not None:
            y = y + bias
        if pair is None:
            return y
        low = torch.matmul(x.to(pair[0].dtype), pair[0].transpose(1, 2))
        return (y + torch.matmul(low, pair[1].transpose(1, 2))).to(y.dtype)


class FrozenWeight:
    """`x @ weight.T` for a weight that never changes, each time by the fastest way there is.

    `pack` makes a copy in half precision and FBGEMM's layout, and the first gradient another for its own
    product. They are read at half the cost and multiplied in float32: decoding, which is bound by reading
    weights, is up to twice as fast, and most other products are faster too (measured).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.plain = weight.device.type != "cpu" or weight.dtype != torch.float32
        self.packed: Any = None
        self.packed_back: Any = None

    def pack(self) -> None:
        """Packs a float32 weight on a CPU, if half precision holds it and torch has FBGEMM."""
        if not self.plain and _half_holds(self.weight):
            self.packed = _packed(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and not self.plain:
            return _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The product itself, without a graph."""
        return nn.functional.linear(x, self.weight) if self.plain else _product(x, self.weight, self.packed)

    def back(self, gradient: Tensor) -> Tensor:
        """What a gradient of the product makes of x: `gradient @ weight`."""
        if self.plain:
            return gradient @ self.weight
        if self.packed is not None and self.packed_back is None:
            # Not before: packing takes longer than loading does, and who only asks needs none of this.
            self.packed_back = _packed(self.weight.t())
        return _product(gradient, self.weight.t(), self.packed_back)


class _Frozen(torch.autograd.Function):
    """The product with a weight that needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        return weight.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.back(gradient), None


class LabelLoss(torch.autograd.Function):
    """Mean cross-entropy (nats) of labels [tokens] under an output head that is not trained.

    The gradient to the hidden states [tokens, width] is had at once, in the memory of the logits, of which
    autograd would keep four copies. On a CPU the library's own sum over a large vocabulary is off by some
    1e-5 nats in float32, this one by less than 1e-7 (measured).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: FrozenWeight, labels: Tensor) -> Tensor:
        logits = head.product(hidden).float()
        logits.sub_(logits.amax(dim=-1, keepdim=True))  # or a small loss loses its last digits
        wanted = logits.gather(1, labels[:, None])
        total = logits.exp_().sum(dim=-1, keepdim=True)
        loss = (total.log() - wanted).mean()
        gradient = logits.div_(total).scatter_add_(1, labels[:, None], -torch.ones_like(total))
        ctx.save_for_backward(head.back(gradient.to(hidden.dtype)) / len(labels))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


class _Adapted(torch.autograd.Function):
    """A frozen layer and its adapters as one step of the graph: sums go where they belong, nothing is copied.

    What autograd would do by itself, in an order of operands that is two to three times faster for the thin
    products of rank r.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        y = weight.product(x)
        if bias is not None:
            y += bias
        low = torch.bmm(x, a.transpose(1, 2))
        ctx.save_for_backward(x, low, a, b)
        ctx.weight = weight
        return y.baddbmm_(low, b.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        x, low, a, b = ctx.saved_tensors
        into_low = torch.bmm(b.transpose(1, 2), gradient.transpose(1, 2))  # [rows, r, tokens]
        into_x = None
        if ctx.needs_input_grad[0]:
            into_x = ctx.weight.back(gradient).baddbmm_(into_low.transpose(1, 2), a)
        into_b = torch.bmm(low.transpose(1, 2), gradient).transpose(1, 2)
        return into_x, None, None, torch.bmm(into_low, x), into_b


def _half_holds(weight: Tensor) -> bool:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    some = torch.split(weight, 256)  # a processor's cache holds them: five times as fast as all at once
    return all(bool((w.half().float() - w).abs().max() <= _HALF_STEP) for w in some)


def _packed(weight: Tensor) -> Any:
    return torch.ops.quantized.linear_prepack_fp16.default(weight.contiguous(), None)


def _product(x: Tensor, weight: Tensor, packed: Any) -> Tensor:
    """`x @ weight.T`, row-major; `packed`: the same weight in half precision, if there is one."""
    if packed is not None:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, packed)
        return y
    rows = x.reshape(-1, x.shape[-1])
    if 1 < len(rows) <= _FLIPPED_ROWS:
        y = torch.mm(weight, rows.t()).t().contiguous()
    else:
        y = torch.mm(rows, weight.t())
    return y.view(*x.shape[:-1], -1)


class LoraLayers:
    """Every linear layer of a decoder but the output head, made ready for adapters.

    root: the decoder's own name in the whole model.
    """

    def __init__(self, decoder: nn.Module, root: str = "model") -> None:
        self.root = f"base_model.model.{root}"
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
        if bank is None:
            yield
            return
        try:
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
        a, b = [], []
        for layer in self.layers:
            width, bound = layer.base.in_features, layer.base.in_features**-0.5
            drawn = torch.empty(settings.rank, width).uniform_(-bound, bound, generator=rng)
            a.append(drawn.to(device))
            b.append(torch.zeros(layer.base.out_features, settings.rank, device=device))
        return Adapter(tuple(a), tuple(b), settings)

    def blank(self, adapters: Sequence[Adapter | None], rows: int) -> Bank | None:
        """A bank of `rows` rows of zeros, in the shapes of these adapters; None if all are missing."""
        present = [a for a in adapters if a is not None]
        ranks = {a.settings.rank for a in present}
        if len(ranks) > 1:
            raise ValueError(f"adapters of different ranks cannot share a batch: {sorted(ranks)}")
        layers = zip(present[0].a, present[0].b, strict=True) if present else ()
        return [(a.new_zeros(rows, *a.shape), b.new_zeros(rows, *b.shape)) for a, b in layers] or None

    def put(self, bank: Bank, row: int, adapter: Adapter | None) -> None:
        """Makes a row of the bank this adapter, zeros if it is missing."""
        for i, (a, b) in enumerate(bank):
            a[row] = 0 if adapter is None else adapter.a[i]
            b[row] = 0 if adapter is None else adapter.b[i] * (adapter.settings.alpha / adapter.settings.rank)

    def stack(self, adapters: Sequence[Adapter | None]) -> Bank | None:
        """One bank whose row i is adapter i; a missing adapter is a row of zeros. None if all are missing."""
        bank = self.blank(adapters, len(adapters))
        if bank:
            for row, adapter in enumerate(adapters):
                self.put(bank, row, adapter)
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
            tensors[f"{self.root}.{name}.lora_A.weight"] = a.contiguous().cpu()
            tensors[f"{self.root}.{name}.lora_B.weight"] = b.contiguous().cpu()
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})

    def load(self, folder: Path, settings: LoraSettings, device: torch.device) -> Adapter:
        """An adapter that `save` wrote for such a model; `settings`: those it was trained under."""
        tensors = load_file(str(folder / "adapter_model.safetensors"), device=str(device))
        a, b = (
            tuple(tensors[f"{self.root}.{name}.lora_{side}.weight"].float() for name in self.names)
            for side in "AB"
        )
        return Adapter(a, b, settings)
