"""T, self-learning: a fresh LoRA adapter per sample, trained on its synthetic examples. Paper: section 3.3.

The base weights are never touched: nothing is merged, nothing is written to disk, and going back to θ0 is
dropping the adapter. Many samples train side by side, one adapter per batch row: rows share the forward
pass and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttsi import prompts
from ttsi.engines.base import Prompt
from ttsi.engines.lora import Adapter, Bank
from ttsi.types import Example, Fit, Layout, LoraSettings, Tool

if TYPE_CHECKING:
    from ttsi.engines.torch import TorchEngine

_EPSILON = 1e-8


class Diverged(ArithmeticError):
    """A loss that is not a finite number; the sample is answered by the base model."""


@dataclass(frozen=True)
class Job:
    """One adapter to train: prompts with the replies to learn, and the seed of its initialisation."""

    examples: tuple[tuple[Prompt, str], ...]
    seed: int


def schedule(step: int, steps: int, settings: LoraSettings) -> float:
    """Learning rate of a step (from 0): linear warm-up, then cosine, never exactly 0.

    Warm-up takes floor(warmup_ratio · steps) steps; step i of it runs at (i + 1) / (warm-up + 1).
    """
    warmup = math.floor(settings.warmup_ratio * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class _Encoded:
    """A training example: the tokens the adapter reads behind `start`, and how many at the end are labels."""

    ids: tuple[int, ...]
    start: int
    labels: int


def train(engine: TorchEngine, jobs: Sequence[Job], settings: LoraSettings) -> list[tuple[Adapter, Fit]]:
    """One trained adapter per job, each from its own fresh start, all trained side by side.

    The loss is the mean negative log-likelihood (nats) of the reply's tokens, its end included. Batch
    size 1: one step per example and epoch. Mode `exact` reads the whole prompt through the adapter;
    `activated` reads it from the last user turn on, behind the base model's cached prefix.
    Jobs must have equally many examples. A job whose loss is not finite raises Diverged, a mode that the
    model's chat template can't serve ValueError.
    """
    engine.check_mode(settings.mode)
    if len({len(j.examples) for j in jobs}) != 1 or not jobs[0].examples:
        raise ValueError("jobs trained side by side need the same number of examples, at least one")
    data = [[_encode(engine, p, r, settings) for p, r in job.examples] for job in jobs]
    start = [engine.lora.fresh(settings, job.seed, engine.device) for job in jobs]
    a = [torch.stack(t).requires_grad_() for t in zip(*(x.a for x in start), strict=True)]
    b = [torch.stack(t).requires_grad_() for t in zip(*(x.b for x in start), strict=True)]
    optimiser = _AdamW([*a, *b], settings)
    steps = settings.epochs * len(jobs[0].examples)
    losses: list[list[float]] = []
    rates = [schedule(i, steps, settings) for i in range(steps)]
    for step, rate in enumerate(rates):
        rows = [d[step % len(d)] for d in data]
        scale = settings.alpha / settings.rank
        loss = _losses(engine, rows, [(x, y * scale) for x, y in zip(a, b, strict=True)])
        if not torch.isfinite(loss).all():
            raise Diverged(f"loss {loss.tolist()} at step {step}")
        losses.append(loss.tolist())
        optimiser.step(torch.autograd.grad(loss.sum(), optimiser.parameters), rate)
    adapters = []
    for i in range(len(jobs)):
        matrices = [tuple(t.detach()[i].clone() for t in side) for side in (a, b)]
        fit = Fit(
            tuple(row[i] for row in losses),
            tuple(rates),
            tokens=settings.epochs * sum(len(e.ids) - e.start for e in data[i]),
            label_tokens=settings.epochs * sum(e.labels for e in data[i]),
        )
        adapters.append((Adapter(matrices[0], matrices[1], settings), fit))
    return adapters


def job(
    tools: tuple[Tool, ...],
    examples: Sequence[Example],
    seed: int,
    layout: Layout = "native",
    instructions: str = "",
) -> Job:
    """The training job of a sample: its synthetic examples under its own tools."""
    lessons = (
        (prompts.example(tools, e.question, layout, instructions), prompts.write(e.calls, layout))
        for e in examples
    )
    return Job(tuple(lessons), seed)


def fit(
    engine: TorchEngine, jobs: Sequence[Job], settings: LoraSettings, bank: int | None = None
) -> list[tuple[Adapter, Fit] | None]:
    """A trained adapter per job; None where training diverged.

    bank: how many adapters train side by side; by default all on a GPU and one at a time on a CPU,
    where a single example already fills the cores.
    """
    size = bank or (len(jobs) if engine.device.type == "cuda" else 1)
    out: dict[int, tuple[Adapter, Fit] | None] = {}
    by_count: dict[int, list[int]] = {}
    for i, j in enumerate(jobs):
        by_count.setdefault(len(j.examples), []).append(i)
    for members in by_count.values():
        for start in range(0, len(members), size):
            part = members[start : start + size]
            try:
                with engine.outside_failures():
                    trained = train(engine, [jobs[i] for i in part], settings)
                out.update(zip(part, trained, strict=True))
            except Diverged:
                if len(part) == 1:
                    out[part[0]] = None
                    continue
                # Alone, only the culprit diverges; the others train to the same weights as side by side.
                with engine.outside_failures():
                    out.update({i: _alone(engine, jobs[i], settings) for i in part})
    return [out[i] for i in range(len(jobs))]


def _alone(engine: TorchEngine, one: Job, settings: LoraSettings) -> tuple[Adapter, Fit] | None:
    try:
        return train(engine, [one], settings)[0]
    except Diverged:
        return None


def _encode(engine: TorchEngine, prompt: Prompt, reply: str, settings: LoraSettings) -> _Encoded:
    bare, whole = engine.encode(prompt), engine.encode(prompt, reply=reply)
    start = bare.turn if settings.mode == "activated" else 0
    return _Encoded(whole.ids, start, len(whole.ids) - len(bare.ids))


def _losses(engine: TorchEngine, rows: Sequence[_Encoded], bank: Bank) -> Tensor:
    """Mean label loss (nats) of each row, float32 [rows], with gradients to the bank."""
    activated = any(r.start for r in rows)
    prefixes = [engine.prefix(r.ids[: r.start]) for r in rows] if activated else None
    # The last token predicts nothing; only hidden states that predict a label are read.
    ends = [len(r.ids) - 1 - r.start for r in rows]
    begins = [end - r.labels for end, r in zip(ends, rows, strict=True)]
    with engine.lora.applied(bank):
        tokens = [r.ids[r.start : -1] for r in rows]
        hidden = engine.training_pass(tokens, [r.start for r in rows], prefixes, min(begins))
    out = []
    for i, row in enumerate(rows):
        labels = torch.tensor(row.ids[-row.labels :], device=hidden.device)
        out.append(engine.label_loss(hidden[i, begins[i] : ends[i]], labels))
    return torch.stack(out)


class _AdamW:
    """AdamW (Loshchilov & Hutter 2019) over stacked adapters, with clipping by each row's own norm.

    Row i of every tensor belongs to sample i; its state, its norm and its step never see another row.
    torch's own optimiser would do but for the clipping, which must not mix rows.
    """

    def __init__(self, parameters: list[Tensor], settings: LoraSettings) -> None:
        self.parameters = parameters
        self.settings = settings
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """One update of every row at learning rate `rate`."""
        self.steps += 1
        beta1, beta2 = self.settings.betas
        square = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0)
        shrink = (self.settings.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
        gradients = [g * shrink[:, None, None] for g in gradients]
        torch._foreach_lerp_(self.first, gradients, 1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - beta2)
        scale = [s.sqrt() for s in self.second]
        torch._foreach_div_(scale, math.sqrt(1 - beta2**self.steps))
        torch._foreach_add_(scale, _EPSILON)
        if self.settings.weight_decay:
            torch._foreach_mul_(self.parameters, 1 - rate * self.settings.weight_decay)
        torch._foreach_addcdiv_(self.parameters, self.first, scale, -rate / (1 - beta1**self.steps))
