"""The program of `make bench` that runs ttsi: the stages of `ttsi.stages`, each timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from study.bench.programs import PAPERS, ROWS, SELECTIVE, Clock, find, replies, samples_of
from study.data.judge import judge
from study.data.models import model_dir
from ttsi import algorithm, estimator, prompts
from ttsi.method import Method
from ttsi.seeds import seed_for
from ttsi.stages import Done, Replies, Stages, Who
from ttsi.types import LoraSettings, Query, Synthesis

OTHER = "element by element, and between operations"
KINDS = {
    "products with weights": ("linear_dynamic_fp16", "aten::mm", "aten::addmm"),
    "adapters": ("aten::bmm", "aten::baddbmm"),
    "attention": ("scaled_dot_product", "flash_attention", "aten::_softmax"),
    "optimizer": ("Optimizer", "_fused_adam", "_foreach"),
    OTHER: (),
}
"""Kinds of operations in T, by what their names contain."""


class Kept(Stages):
    """Stages that keep base answers, as a run's store does: each is given once, and drafted from."""

    def __init__(self, engine: Any, method: Method) -> None:
        super().__init__(engine, method)
        self.known: dict[str, Done[Replies]] = {}

    def answer(self, queries: Sequence[Query], who: Who = "self", block: int = 0) -> dict[str, Done[Replies]]:
        self.known |= super().answer([q for q in queries if q.id not in self.known], who, block)
        return {q.id: self.known[q.id] for q in queries}

    def answered(self, query: Query) -> tuple[int, ...]:
        done = self.known.get(query.id)
        return done.value[0].tokens if done and done.value else ()


class Ours:
    """ttsi's engine under `ttsi.stages`."""

    def __init__(self, model: str, dtype: str) -> None:
        from ttsi.engines.torch import TorchEngine

        self.engine = TorchEngine(model_dir(model), dtype=dtype)
        self.papers = Stages(self.engine, PAPERS)
        self.begun: dict[str, tuple[Query, Synthesis, Kept]] = {}

    def list(self, name: str) -> list[str]:
        """The ids of a benchmark's samples, or of one domain's: `nexusraven:virustotal`."""
        found = samples_of(name.partition(":")[0]).values()
        return [s.id for s in found if ":" not in name or s.cluster == name]

    def warm_up(self) -> Any:
        """Every stage once, on a sample of the fixture; the texts that the usual loop needs for the same."""
        for sample in self.list("fixture"):
            if "texts" in (begun := self.begin(sample, tau=2.0)):  # no margin is above 1
                for mode in ("exact", "activated"):
                    self.adapt(sample, mode)
                return begun["texts"]
        raise RuntimeError("no example of the fixture's could be read")

    def begin(self, sample: str, tau: float = PAPERS.tau) -> dict[str, Any]:
        """H, base answer and G from a cold prefix, and the texts that the usual loop needs; {} if certain."""
        query, engine, clock = find(sample).query, self.engine, Clock(self.engine)
        stages, code = Kept(engine, replace(PAPERS, tau=tau)), engine.encode(prompts.act(query))
        engine.prefixes.clear()
        with clock("prefix"):
            engine.prefix(code.ids[: code.prefix])
        with clock("h"):
            certainty = stages.certainty([query])
        if not algorithm.uncertain(stages, [query], certainty):
            return {}
        with clock("base"):
            base = _only(stages.answer([query]))
        with clock("g"):
            written = _only(stages.synthesize([query]))
        if not written.examples:
            return {}
        self.begun[sample] = query, written, stages
        prompt, said = stages.taught(stages.lesson(query, written))[0]
        example, bare, whole = (
            engine.chat.render(prompt),
            engine.encode(prompt),
            engine.encode(prompt, reply=said),
        )
        return {
            "tokens": {
                "prompt": len(code.ids),
                "prefix": code.prefix,
                "example": len(whole.ids),
                "turn": bare.turn,
                "labels": len(whole.ids) - len(bare.ids),
            },
            "stages": clock.stages,
            "scores": [list(s.log_probs) for s in estimator.score(engine, [query])[0]],
            "base": base[0].text,
            "question": written.examples[0].question,
            "texts": {
                "prompt": engine.chat.render(prompts.act(query)),
                "opening": PAPERS.opening,
                "continuations": [estimator.continuation(t.name) for t in query.tools],
                "write": engine.chat.render(prompts.synthesis(query)) + prompts.QUESTION,
                "example": example,
                "reply": engine.chat.render(prompt, reply=said)[len(example) :],
                "seed": seed_for(PAPERS.seed, query.benchmark, query.id, "adapter"),
            },
        }

    def adapt(self, sample: str, mode: Any) -> dict[str, Any]:
        """T and the answer, drafted from the example; then, for selective TT-SI, from the base answer."""
        query, written, kept = self.begun[sample]
        clock, lessons = Clock(self.engine), {query.id: kept.lesson(query, written)}
        with clock("t"):
            trained = _only(self.papers.under(lora=LoraSettings(mode=mode)).train([query], lessons))
        if trained.fit is None:
            raise RuntimeError(f"{sample}: training diverged")
        adapters, fit = {query.id: trained.adapter}, trained.fit
        with clock("answer"):
            answer = _only(self.papers.reply([query], adapters, lessons))
        with clock("answer, drafted from base"):
            again = _only(kept.reply([query], adapters, lessons))
        texts = [answer[0].text, again[0].text]
        return {"texts": texts, "losses": fit.losses, "stages": clock.stages}

    def together(self, samples: Sequence[str]) -> dict[str, Any]:
        """The samples in one batch, by both rules: every stage once for all."""
        for sample in set(samples) - self.begun.keys():  # another process measured them
            self.begin(sample)
        queries, clock = [self.begun[s][0] for s in samples], Clock(self.engine)
        stages = Kept(self.engine, replace(PAPERS, lora=LoraSettings(mode="activated")))
        self._cold(queries, clock)
        with clock("base"):
            stages.answer(queries)
        with clock("h"):
            stages.score(queries)
        with clock("g"):
            written = stages.synthesize(queries)
        taught = [q for q in queries if (w := written[q.id].value) and w.examples]
        lessons = {q.id: stages.lesson(q, _only({q.id: written[q.id]})) for q in taught}
        with clock("t"):
            trained = stages.train(taught, lessons)
        adapters = {i: d.value.adapter for i, d in trained.items() if d.value and d.value.fit}
        able = [q for q in taught if q.id in adapters]
        with clock("answer"):
            self.papers.reply(able, adapters, lessons)
        with clock("answer, drafted from base"):
            stages.reply(able, adapters, lessons)
        equal = sum(self.begun[q.id][2].answered(q) == stages.answered(q) for q in queries)
        return {"n": len(queries), "adapted": len(able), "equal": equal, "stages": clock.stages}

    def questions(self, samples: Sequence[str]) -> dict[str, Any]:
        """A whole run: base answers one by one and in flight, then what selective TT-SI does after them."""
        queries, clock = [find(s).query for s in samples], Clock(self.engine)
        stages = Kept(self.engine, SELECTIVE)
        self._cold(queries, clock)
        with clock("one by one"):
            alone = {q.id: _only(self.papers.answer([q]))[0].tokens for q in queries}
        self.engine.rows = ROWS
        size = len(queries) if self.engine.dtype.itemsize == 4 else ROWS  # in bfloat16 groups wait for all
        with clock("base"):
            for i in range(0, len(queries), size):
                stages.answer(queries[i : i + size])
        with clock("selective"):
            done = algorithm.self_improve(stages, queries)
        self.engine.rows = None
        counted = {k: sum(getattr(o, k) for o in done) for k in ("uncertain", "adapted", "refused")}
        equal = sum(stages.answered(q) == alone[q.id] for q in queries)
        return {"n": len(queries), "equal": equal, "stages": clock.stages} | counted

    def watched(self, sample: str) -> dict[str, float]:
        """Seconds of T in `exact` by kind of operation, under torch's profiler; {} if the sample is certain.

        The profiler takes time itself: shares to find reasons with, no speeds.
        """
        from torch.profiler import ProfilerActivity, profile

        if not self.begin(sample):
            return {}
        query, written, kept = self.begun[sample]
        papers, kinds = self.papers.under(lora=LoraSettings(mode="exact")), dict.fromkeys(KINDS, 0.0)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            papers.train([query], {query.id: kept.lesson(query, written)})
        for event in seen.key_averages():
            names = (kind for kind, words in KINDS.items() if any(w in event.key for w in words))
            kinds[next(names, OTHER)] += event.self_cpu_time_total / 1e6
        return kinds

    def flight(self, samples: Sequence[str]) -> dict[str, Any]:
        """Base answers one by one and in flight: seconds and passes, each from a warm prefix."""
        queries, clock = [find(s).query for s in samples], Clock(self.engine)
        self._cold(queries, clock)
        for name, size, rows in (("one by one", 1, None), ("in flight", len(queries), ROWS)):
            self.engine.rows = rows
            with clock(name):
                for i in range(0, len(queries), size):
                    self.papers.answer(queries[i : i + size])
        self.engine.rows = None
        return {name: stage for name, stage in clock.stages.items() if name != "prefix"}

    def _cold(self, queries: Sequence[Query], clock: Clock) -> None:
        codes = [self.engine.encode(prompts.act(q)) for q in queries]
        self.engine.prefixes.clear()
        with clock("prefix"):
            for code in codes:
                self.engine.prefix(code.ids[: code.prefix])

    def replies(self, samples: Sequence[str]) -> dict[str, Any]:
        """What `replies` says, and the same without guesses at what comes next."""
        found = replies(self.engine, samples, self.engine.prefixes.clear)
        self.engine.drafts = False
        plain = replies(self.engine, samples, self.engine.prefixes.clear, ways=("together",))
        self.engine.drafts = True
        return found | {"together, drafts off": plain["together"]}

    def rounding(self, samples: Sequence[str]) -> dict[str, Any]:
        """How often base answers and verdicts depend on the batch they are decoded in, eight at a time."""
        self.engine.drafts = False
        found = [find(s) for s in samples]
        ways = [
            [
                r
                for i in range(0, len(found), size)
                for r in map(_first, self.papers.answer([s.query for s in found[i : i + size]]).values())
            ]
            for size in (1, ROWS)
        ]
        self.engine.drafts = True
        right = [[judge(r.text, s).correct for r, s in zip(way, found, strict=True)] for way in ways]
        return {
            "n": len(found),
            "differ": sum(a.text != b.text for a, b in zip(*ways, strict=True)),
            "verdicts": sum(a != b for a, b in zip(*right, strict=True)),
        }

    def machine(self) -> dict[str, Any]:
        """Rate of matrix products (FLOP/s, best of several shapes) and the model's size."""
        import torch

        engine, config, best = self.engine, self.engine.model.config, 0.0
        frozen = max((layer.weight for layer in engine.lora.layers), key=lambda f: f.weight.numel())
        weight = frozen.weight
        for rows in (128, 512, 1024):
            x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
            ways = (lambda x=x: x @ weight.t(), lambda x=x: weight @ x.t(), lambda x=x: frozen.product(x))
            for product in ways:
                for _ in range(5):
                    began = time.perf_counter()
                    product()[0, 0].item()  # a GPU is waited for
                    best = max(best, 2 * rows * weight.numel() / (time.perf_counter() - began))
        block = f"layers.{config.num_hidden_layers - 1}.mlp."
        sizes = {n: x.base.weight.numel() for n, x in zip(engine.lora.names, engine.lora.layers, strict=True)}
        return {
            "flops": best,
            "device": str(engine.device),
            "threads": torch.get_num_threads(),
            "decoder": sum(sizes.values()),
            "last_block": sum(size for name, size in sizes.items() if name.startswith(block)),
            "head": engine._head.weight.numel(),
            "attention": 4 * config.num_hidden_layers * config.hidden_size,
        }


def _only(done: dict[str, Done[Any]]) -> Any:
    """The one result; a failure of the machine's is raised."""
    (one,) = done.values()
    if one.value is None:
        raise RuntimeError(one.error)
    return one.value


def _first(done: Done[Replies]) -> Any:
    return _only({"": done})[0]
