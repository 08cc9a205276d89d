"""T against plain PEFT, step by step; adapters side by side against one by one; θ0 bit-identical after."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ttsi.engines.attention import attention
from ttsi.engines.base import Prompt, Request
from ttsi.engines.lora import FrozenWeight, LabelLoss
from ttsi.engines.torch import TorchEngine
from ttsi.trainer import Diverged, Job, fit, schedule, train
from ttsi.types import LoraSettings, Message, Sampling

JOBS = [
    Job(((Prompt("a system turn", (Message("user", "hello " * (i + 1)),)), f"[name: call {i}]"),), seed=i)
    for i in range(3)
]


@pytest.fixture
def engine(tiny_folder: Path) -> TorchEngine:
    return TorchEngine(tiny_folder, dtype="float32")


def peft_losses(folder: Path, engine: TorchEngine, job: Job, settings: LoraSettings) -> list[float]:
    """The losses of the usual way: PEFT, torch's AdamW, full logits, masked labels."""
    tokens = list(engine.chat.invocation) if settings.mode == "activated" else None
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        alora_invocation_tokens=tokens,
    )
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    named = dict(model.named_parameters())
    for name, a in zip(
        engine.lora.names, engine.lora.fresh(settings, job.seed, engine.device).a, strict=True
    ):
        named[f"base_model.model.model.{name}.lora_A.default.weight"].data.copy_(a)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    (prompt, reply) = job.examples[0]
    ids = torch.tensor([engine.encode(prompt, reply=reply).ids])
    labels = ids.clone()
    labels[:, : len(engine.encode(prompt).ids)] = -100
    losses = []
    for step in range(settings.epochs):
        optimiser.param_groups[0]["lr"] = schedule(step, settings.epochs, settings)
        loss = model(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimiser.step()
    return losses


@pytest.mark.parametrize("mode", ["exact", "activated"])
@pytest.mark.parametrize("clip", [1.0, 0.01])
@pytest.mark.parametrize("pack", [True, False])
def test_losses_equal_plain_peft(tiny_folder: Path, mode: Any, clip: float, pack: bool) -> None:
    engine = TorchEngine(tiny_folder, dtype="float32", pack=pack)
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert all((layer.weight.packed is not None) == pack for layer in engine.lora.layers)
    settings = LoraSettings(mode=mode, learning_rate=1e-3, epochs=4, clip=clip)
    for job in JOBS[:2]:
        ours = train(engine, [job], settings)[0][1].losses
        assert ours == pytest.approx(peft_losses(tiny_folder, engine, job, settings), abs=1e-5)
        assert ours[-1] < ours[0]


@pytest.mark.parametrize("mode", ["exact", "activated"])
def test_side_by_side_equals_one_by_one(engine: TorchEngine, mode: Any) -> None:
    settings = LoraSettings(mode=mode)
    together = train(engine, JOBS, settings)
    for job, (adapter, result) in zip(JOBS, together, strict=True):
        alone, alone_result = train(engine, [job], settings)[0]
        assert result.losses == pytest.approx(alone_result.losses, abs=1e-5)
        for ours, theirs in zip((*adapter.a, *adapter.b), (*alone.a, *alone.b), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_attention_behind_prefixes_and_its_gradients_are_the_librarys() -> None:
    rng = torch.Generator().manual_seed(0)
    rows, heads, shared, length, dim, widths = 2, 6, 2, 5, 8, (7, 3)
    query, key, value, gradient = (
        torch.randn(rows, n, length, dim, generator=rng) for n in (heads, shared, shared, heads)
    )
    keys, values = (torch.randn(rows, shared, max(widths), dim, generator=rng) for _ in range(2))
    before = torch.arange(max(widths))[None] < torch.tensor(widths)[:, None]
    own = torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.cat([before[:, None].expand(-1, length, -1), own.expand(rows, -1, -1)], dim=2)[:, None]
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    found = []
    for ours in (True, False):
        q, k, v = (t.clone().requires_grad_() for t in (query, key, value))
        if ours:
            out, _ = attention(
                module, q, k, v, None, ttsi_mask=mask, ttsi_prefix=[(keys, values)], scaling=0.3
            )
        else:
            whole = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
            out = torch.nn.functional.scaled_dot_product_attention(
                q, *whole, attn_mask=mask, scale=0.3, enable_gqa=True
            ).transpose(1, 2)
        found.append([out, *torch.autograd.grad(out, (q, k, v), gradient.transpose(1, 2))])
    for mine, librarys in zip(*found, strict=True):
        torch.testing.assert_close(mine, librarys, atol=1e-5, rtol=0)


def packed(weight: torch.Tensor) -> FrozenWeight:
    frozen = FrozenWeight(weight)
    frozen.pack()
    return frozen


needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no FBGEMM on this processor"
)


@needs_fbgemm
@pytest.mark.parametrize("rows", [(1,), (7,), (3, 50), (700,)])
def test_packed_products_are_those_of_the_whole_weight(rows: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(300, 500, generator=rng)).bfloat16().float()
    weight[0, :4] = torch.tensor([1e-6, -3e-8, 1e-12, 0.0])  # smaller than half precision holds exactly
    frozen = packed(weight)
    assert frozen.packed is not None and torch.equal(frozen.weight, weight)
    x = torch.randn(*rows, 500, generator=rng)
    gradient = torch.randn(*rows, 300, generator=rng)
    for ours, a, b in ((frozen.product(x), x, weight.t()), (frozen.back(gradient), gradient, weight)):
        torch.testing.assert_close(ours.double(), a.double() @ b.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [torch.full((3, 4), 1 / 3), torch.full((3, 4), 1e5).bfloat16().float(), torch.ones(3, 4).bfloat16()],
    ids=["needs float32", "too large", "bfloat16"],
)
def test_a_weight_that_half_precision_does_not_hold_is_not_packed(weight: torch.Tensor) -> None:
    frozen = packed(weight)
    x = torch.ones(2, 4, dtype=weight.dtype)
    assert frozen.packed is None
    torch.testing.assert_close(frozen.product(x), x @ weight.t())
    torch.testing.assert_close(frozen.back(torch.ones(2, 3, dtype=weight.dtype)), x[:, :3] @ weight)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_label_loss_and_its_gradient_are_cross_entropys(dtype: torch.dtype, pack: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(50_000, 16, generator=rng).bfloat16().to(dtype)
    hidden = torch.randn(5, 16, generator=rng).to(dtype)
    labels = torch.tensor([7, 0, 49_999, 7, 123])
    hidden[0] = 8 * weight[7] / weight[7].norm()  # one label that is all but certain
    x = hidden.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(x @ weight.double().t(), labels)
    y = hidden.clone().requires_grad_()
    head = packed(weight) if pack else FrozenWeight(weight)
    loss = LabelLoss.apply(y, head, labels)  # type: ignore[no-untyped-call]
    off = 2e-5 if dtype == torch.float32 else 0.02  # of the greatest value
    assert loss.item() == pytest.approx(wanted.item(), rel=off)
    ours, theirs = torch.autograd.grad(3 * loss, y)[0], torch.autograd.grad(3 * wanted, x)[0]
    assert (ours - theirs).abs().max() < off * theirs.abs().max()


def test_weights_are_bit_identical_and_the_answer_changes(
    engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    prompt = JOBS[0].examples[0][0]
    plain = engine.generate([Request(prompt)], Sampling(max_tokens=8))[0][0]
    for mode in ("exact", "activated"):
        settings = LoraSettings(mode=mode, learning_rate=1e-2)  # type: ignore[arg-type]
        adapter = train(engine, JOBS[:1], settings)[0][0]
        adapted = engine.generate([Request(prompt, adapter=adapter)], Sampling(max_tokens=8))[0][0]
        assert adapted.log_probs != plain.log_probs
    after = engine.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert engine.generate([Request(prompt)], Sampling(max_tokens=8))[0][0] == plain
    assert not list(tmp_path.iterdir())  # nothing is written to disk


@pytest.mark.parametrize("steps", [1, 3, 33, 34, 200])
def test_no_step_runs_at_learning_rate_zero(steps: int) -> None:
    rates = [schedule(i, steps, LoraSettings()) for i in range(steps)]
    assert min(rates) > 0 and max(rates) == pytest.approx(1e-4)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_rates_used_are_the_schedule(engine: TorchEngine) -> None:
    result = train(engine, JOBS[:1], LoraSettings())[0][1]
    assert result.learning_rates == pytest.approx((1e-4, 0.75e-4, 0.25e-4))


def test_a_diverged_job_leaves_the_others_alone(engine: TorchEngine) -> None:
    settings = LoraSettings(learning_rate=1e-3)
    broken = Job(JOBS[1].examples, seed=99)
    real, fresh = engine.lora.fresh, engine.lora.fresh

    def poisoned(settings: LoraSettings, seed: int, device: torch.device) -> Any:
        adapter = real(settings, seed, device)
        if seed != 99:
            return adapter
        return dataclasses.replace(adapter, b=tuple(torch.full_like(b, torch.inf) for b in adapter.b))

    engine.lora.fresh = poisoned  # type: ignore[method-assign]
    try:
        fitted = fit(engine, [JOBS[0], broken, JOBS[2]], settings, bank=3)
        with pytest.raises(Diverged):
            train(engine, [broken], settings)
    finally:
        engine.lora.fresh = fresh  # type: ignore[method-assign]
    assert fitted[1] is None
    assert fitted[0] is not None and fitted[2] is not None
    assert fitted[0][1].losses == pytest.approx(train(engine, [JOBS[0]], settings)[0][1].losses, abs=1e-5)


def test_jobs_of_unequal_size_are_refused_but_fitted(engine: TorchEngine) -> None:
    two = Job((*JOBS[0].examples, *JOBS[1].examples), seed=7)
    with pytest.raises(ValueError, match="same number"):
        train(engine, [JOBS[0], two], LoraSettings())
    fitted = fit(engine, [JOBS[0], two], LoraSettings(), bank=2)
    assert [len(f[1].losses) for f in fitted if f] == [3, 6]
