"""`make bench`: the usual loop, `exact` and `activated` on the same samples in one run, interleaved.

Two programs run in processes of their own (so that each has its own peak memory) and take turns sample by
sample; the one that waits sleeps. Both read the same prompts, write the same example and start from the same
adapter, so their losses and answers can be compared, and are. Synthesis is greedy here, with the paper's
repetition penalty: a drawn example would differ between programs, and so would its time. A process that has
just started works through a sample of the fixture first, which is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from study.analysis import tables
from study.data import benchmarks, sources
from study.run.provenance import commit
from ttsi.engines.base import native_dtype
from ttsi.types import PAPER_SAMPLING, LoraSettings, Sample, Sampling

WRITE = Sampling(repetition_penalty=PAPER_SAMPLING.repetition_penalty, max_tokens=256)
ANSWER = Sampling()
MODES = ("exact", "activated")
SEED, TAU = 0, 0.95
VLLM = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"
LONG = 1500  # tokens of a prompt above which the programs don't share the memory
FULL = 48  # tokens of each reply, whatever it says, where decoding is timed with no row ever missing
ROUNDED = 24  # samples of which a run in bfloat16 counts the answers that differ


@cache
def _samples(benchmark: str) -> dict[str, Sample]:
    return {s.id: s for s in benchmarks.load(benchmark)}


def find(sample: str) -> Sample:
    """A sample by its id, whatever benchmark it is of."""
    return _samples(sample.partition("-")[0])[sample]


# --- the workers -----------------------------------------------------------------------------------------


class Clock:
    """Per stage: seconds, the peak resident memory (MB) while it ran, and what an engine counted."""

    def __init__(self, counters: Any = None) -> None:
        self.counters = counters
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        _reset_peak()
        before = dict(vars(self.counters)) if self.counters else {}
        began = time.perf_counter()
        yield
        found = {"seconds": time.perf_counter() - began, "peak_mb": _peak_mb()}
        if before:
            done = {k: v - before[k] for k, v in vars(self.counters).items()}
            found |= {k: done[k] for k in ("decoded_tokens", "drafted", "accepted")}
        self.stages[name] = found


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


class Ours:
    """The worker that runs ttsi's engine."""

    def __init__(self, model: str, dtype: str) -> None:
        from ttsi.engines.torch import TorchEngine

        self.engine = TorchEngine(sources.model_dir(model), dtype=dtype)
        self.work: dict[str, Any] = {}

    def list(self, name: str) -> dict[str, Any]:
        """The ids of a benchmark's samples, or of one domain's: `nexusraven:virustotal`."""
        domain = name if ":" in name else ""
        found = _samples(name.partition(":")[0]).values()
        return {"ids": [s.id for s in found if not domain or s.cluster == domain]}

    def warm_up(self) -> dict[str, Any]:
        """Every stage once, on a sample of the fixture; the texts that the usual loop needs for the same."""
        for sample in self.list("fixture")["ids"]:
            begun = self.begin(sample, tau=2.0)  # no margin is above 1
            if "texts" in begun:
                for mode in MODES:
                    self.adapt(sample, mode)
                return begun["texts"]
        raise RuntimeError("no example of the fixture's could be read")

    def begin(self, sample: str, tau: float) -> dict[str, Any]:
        """H, base answer and G from a cold prefix, and the texts that the usual loop needs; {} if certain."""
        from ttsi import estimator, prompts, synthesizer
        from ttsi.calls import format_calls
        from ttsi.engines.base import Request

        query, engine, clock = find(sample).query, self.engine, Clock(self.engine.counters)
        prompt = prompts.act(query)
        code = engine.encode(prompt)
        engine.prefixes.clear()
        with clock.stage("prefix"):
            engine.prefix(code.ids[: code.prefix])
        with clock.stage("H"):
            scored = estimator.score(engine, [query])[0]
            margin = estimator.uncertainty(scored, query.tools).margin
        if margin >= tau:
            return {}
        with clock.stage("base"):
            base = engine.generate([Request(prompt, lookup=True)], ANSWER)[0][0]
        out: dict[str, Any] = {
            "margin": margin,
            "tokens": {"prompt": len(code.ids), "prefix": code.prefix, "base": len(base.tokens)},
            "scores": [list(s.log_probs) for s in scored],
            "base": base.text,
        }
        with clock.stage("G"):
            written = synthesizer.synthesize(engine, [query], lambda *_: 0, WRITE, retries=0)[0]
        out["tokens"]["G"] = written.tokens
        out["examples"] = [e.question for e in written.examples]
        if written.examples:
            e = written.examples[0]
            example, reply = prompts.example(query.tools, e.question), format_calls(e.calls)
            bare = engine.chat.render(example)
            self.work[sample] = (query, written.examples, reply)
            out["texts"] = {
                "prompt": engine.chat.render(prompt),
                "opening": prompts.OPENING,
                "continuations": [estimator.continuation(t.name) for t in query.tools],
                "write": engine.chat.render(prompts.synthesis(query)) + prompts.QUESTION,
                "example": bare,
                "reply": engine.chat.render(example, reply=reply)[len(bare) :],
            }
        return out | {"stages": clock.stages}

    def adapt(self, sample: str, mode: str) -> dict[str, Any]:
        """T and the answer. The draft is the example's own answer: a live query has no base answer yet."""
        from ttsi import prompts, trainer
        from ttsi.engines.base import Request

        (query, examples, reply), engine = self.work[sample], self.engine
        clock = Clock(engine.counters)
        with clock.stage("T"):
            fitted = trainer.fit(engine, [trainer.job(query.tools, examples, SEED)], LoraSettings(mode=mode))[
                0
            ]
        if fitted is None:
            raise RuntimeError(f"{sample}: training diverged")
        adapter, fit = fitted
        draft = engine.tokens(reply)
        with clock.stage("answer"):
            request = Request(prompts.act(query), adapter=adapter, draft=draft, lookup=True)
            answer = engine.generate([request], ANSWER)[0][0]
        tokens = {"T": fit.tokens // len(fit.losses), "labels": fit.label_tokens // len(fit.losses)}
        return {
            "text": answer.text,
            "losses": fit.losses,
            "tokens": tokens | {"answer": len(answer.tokens)},
            "stages": clock.stages,
        }

    def batch(self, samples: Sequence[str]) -> dict[str, Any]:
        """The samples together: base answers, TT-SI, and decoding alone, one by one and all."""
        from ttsi import estimator, prompts, synthesizer, trainer
        from ttsi.engines.base import Request

        engine, clock = self.engine, Clock()
        for sample in set(samples) - set(self.work):  # another process measured them
            self.begin(sample, TAU)
        queries = [self.work[s][0] for s in samples]
        codes = [engine.encode(prompts.act(q)) for q in queries]

        def cold() -> None:
            engine.prefixes.clear()
            for code in codes:
                engine.prefix(code.ids[: code.prefix])

        plain = [Request(prompts.act(q), lookup=True) for q in queries]
        with clock.stage("prefix"):
            cold()
        one: list[Any] = []
        with clock.stage("one by one"):
            one = [engine.generate([r], ANSWER)[0][0] for r in plain]
        with clock.stage("base"):
            many = [r[0] for r in engine.generate(plain, ANSWER)]
        with clock.stage("H"):
            estimator.score(engine, queries)
        with clock.stage("G"):
            written = synthesizer.synthesize(engine, queries, lambda *_: 0, WRITE, retries=0)
        usable = [(q, w.examples) for q, w in zip(queries, written, strict=True) if w.examples]
        with clock.stage("T"):
            jobs = [trainer.job(q.tools, e, SEED) for q, e in usable]
            fitted = [f for f in trainer.fit(engine, jobs, LoraSettings(mode="activated")) if f]
        drafts = [engine.tokens(self.work[q.id][2]) for q, _ in usable]
        with clock.stage("answer"):
            engine.generate(
                [
                    Request(prompts.act(q), adapter=a, draft=d, lookup=True)
                    for (q, _), (a, _), d in zip(usable, fitted, drafts, strict=True)
                ],
                ANSWER,
            )
        # Decoding alone, without guesses at what comes next: one by one and together.
        engine.drafts = False
        with clock.stage("plain one by one"):
            alone = [engine.generate([r], ANSWER)[0][0] for r in plain]
        with clock.stage("plain together"):
            together = [r[0] for r in engine.generate(plain, ANSWER)]
        # And with all rows there from the first token to the last.
        stops, engine.chat.stop_ids = engine.chat.stop_ids, frozenset()
        try:
            with clock.stage("full one by one"):
                long = [engine.generate([r], replace(ANSWER, max_tokens=FULL))[0][0] for r in plain]
            with clock.stage("full together"):
                long_together = [r[0] for r in engine.generate(plain, replace(ANSWER, max_tokens=FULL))]
        finally:
            engine.chat.stop_ids = stops
        engine.drafts = True
        texts = [[g.tokens for g in group] for group in (one, many, alone, together)]
        return {
            "n": len(queries),
            "tokens": [len(r.tokens) for r in many],
            "adapted": len(usable),
            "equal": sum(len(set(row)) == 1 for row in zip(*texts, strict=True)),
            "equal_full": sum(a.tokens == b.tokens for a, b in zip(long, long_together, strict=True)),
            "stages": clock.stages,
        }

    def replies(self, samples: Sequence[str]) -> dict[str, Any]:
        """What `replies` says, and the same without guesses at what comes next."""
        engine = self.engine
        found = replies(engine, samples, engine.prefixes.clear)
        engine.drafts = False
        plain = replies(engine, samples, engine.prefixes.clear, ways=("together",))
        engine.drafts = True
        return found | {"together, drafts off": plain["together"]}

    def rounding(self, samples: Sequence[str]) -> dict[str, Any]:
        """How often base answers and verdicts depend on the batch they are decoded in, eight at a time."""
        from study.data.judge import judge
        from ttsi import prompts
        from ttsi.engines.base import Request

        engine = self.engine
        found = [find(s) for s in samples]
        requests = [Request(prompts.act(s.query)) for s in found]
        engine.drafts = False
        alone = [engine.generate([r], ANSWER)[0][0] for r in requests]
        together = [
            reply[0]
            for i in range(0, len(found), 8)
            for reply in engine.generate(requests[i : i + 8], ANSWER)
        ]
        engine.drafts = True
        verdicts = [
            [judge(reply.text, s).correct for s, reply in zip(found, way, strict=True)]
            for way in (alone, together)
        ]
        return {
            "dtype": str(engine.dtype).removeprefix("torch."),
            "n": len(found),
            "differ": sum(a.text != b.text for a, b in zip(alone, together, strict=True)),
            "verdicts": sum(a != b for a, b in zip(*verdicts, strict=True)),
        }

    def machine(self) -> dict[str, Any]:
        """Rate of matrix products (FLOP/s, best of several shapes) and the model's size."""
        import torch

        engine, config, best = self.engine, self.engine.model.config, 0.0
        frozen = max((layer.weight for layer in engine.lora.layers), key=lambda f: f.weight.numel())
        weight = frozen.weight
        for rows in (128, 512, 1024):
            x = torch.randn(rows, weight.shape[1], dtype=weight.dtype)
            ways = (lambda x=x: x @ weight.t(), lambda x=x: weight @ x.t(), lambda x=x: frozen.product(x))
            for product in ways:
                for _ in range(5):
                    began = time.perf_counter()
                    product()
                    best = max(best, 2 * rows * weight.numel() / (time.perf_counter() - began))
        return {
            "flops": best,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "decoder": sum(layer.base.weight.numel() for layer in engine.lora.layers),
            "last_block": sum(
                layer.base.weight.numel()
                for name, layer in zip(engine.lora.names, engine.lora.layers, strict=True)
                if name.startswith(f"layers.{config.num_hidden_layers - 1}.mlp.")
            ),
            "head": engine._head.weight.numel(),
            "attention": 4 * config.num_hidden_layers * config.hidden_size,
        }


def replies(
    engine: Any,
    samples: Sequence[str],
    cold: Callable[[], object],
    ways: Sequence[str] = ("one by one", "together", "together, an adapter each (exact)"),
) -> dict[str, Any]:
    """Base answers, had in several ways: their tokens, and seconds from a cold prefix cache.

    An adapter each: a fresh one, which leaves the text as it is.
    """
    from ttsi import prompts
    from ttsi.engines.base import Request

    plain = [Request(prompts.act(find(s).query), lookup=True) for s in samples]
    fresh = [engine.lora.fresh(LoraSettings(), i, engine.device) for i in range(len(plain))]
    asked = {
        "one by one": [[r] for r in plain],
        "together": [plain],
        "together, an adapter each (exact)": [
            [replace(r, adapter=a) for r, a in zip(plain, fresh, strict=True)]
        ],
    }
    found: dict[str, Any] = {}
    for way in ways:
        cold()
        began = time.perf_counter()
        texts = [reply[0].tokens for group in asked[way] for reply in engine.generate(group, ANSWER)]
        found[way] = {"seconds": time.perf_counter() - began, "tokens": texts}
    return found


class Theirs:
    """The worker that runs the usual loop."""

    def __init__(self, model: str, dtype: str) -> None:
        from usual_loop import UsualLoop

        self.loop = UsualLoop(sources.model_dir(model), dtype)

    def sample(self, texts: dict[str, Any], base: bool) -> dict[str, Any]:
        """The whole loop on one sample, with the base answer first if asked for."""
        loop = self.loop
        loop.seconds = {}
        _reset_peak()
        answer = loop.answer(texts["prompt"], ANSWER.max_tokens) if base else None
        scores = loop.score(texts["prompt"], texts["opening"], texts["continuations"])
        written = loop.write(texts["write"], WRITE.max_tokens, WRITE.repetition_penalty)
        settings = {k: getattr(LoraSettings(), k) for k in LoraSettings.__dataclass_fields__}
        text, losses = loop.adapt_and_answer(
            texts["example"], texts["reply"], texts["prompt"], ANSWER.max_tokens, settings, SEED
        )
        return {
            "base": answer,
            "scores": scores,
            "written": written,
            "text": text,
            "losses": losses,
            "stages": {k: {"seconds": s, "peak_mb": _peak_mb()} for k, s in loop.seconds.items()},
        }


def serve(worker: Any) -> None:
    """Answers one JSON request per line, until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and their processes print must not pass for an answer
    for line in sys.stdin:
        asked = json.loads(line)
        out.write(json.dumps(getattr(worker, asked.pop("do"))(**asked)) + "\n")
        out.flush()


# --- the driver ------------------------------------------------------------------------------------------


class Worker:
    """A program in a process of its own, started when it is first asked something.

    first: what it is asked before that, every time it is started, so that what is measured runs warm.
    """

    def __init__(self, name: str, model: str, dtype: str) -> None:
        self.command = [sys.executable, __file__, "--worker", name, "--model", model, "--dtype", dtype]
        if name == "vllm":
            self.command[:2] = [str(VLLM), str(Path(__file__).with_name("vllm_worker.py"))]
        self.process: subprocess.Popen[str] | None = None
        self.first: dict[str, Any] = {}
        self.warmed: Any = None  # what it answered to that

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def __call__(self, do: str, **asked: Any) -> Any:
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True)
            if self.first:
                self.warmed = self(**self.first)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do} | asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process stopped (exit code {self.process.wait()}); its message is above")
        return json.loads(answer)

    def pause(self) -> None:
        """Ends the process; the next question starts it again."""
        if self.process is not None and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def measure(
    model: str,
    dtype: str,
    wanted: dict[str, int],
    found: dict[str, Any],
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Adds to `found` what it lacks of a run's measurements; `keep` gets what there is after each sample."""
    code = commit()
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(Worker(n, model, dtype)) for n in ("ours", "theirs"))
        ours.first = {"do": "warm_up"}
        found["machine"] = _faster(found.get("machine"), ours("machine"))
        theirs.first = {"do": "sample", "texts": ours.warmed, "base": True}
        for name, n in wanted.items():
            ids = ours("list", name=name)["ids"]
            taken = [row for row in found["samples"] if row["benchmark"] == name]
            if taken:
                del ids[: ids.index(taken[-1]["sample"]) + 1]
            while ids and len(taken) < n:
                sample = ids.pop(0)
                begun = ours("begin", sample=sample, tau=TAU)
                if "texts" not in begun:
                    continue  # certain, or no example could be read: nothing to compare
                row = {"benchmark": name, "sample": sample, "begin": begun, "commit": code}
                _take_turns(ours, theirs, row, begun.pop("texts"), len(taken))
                taken.append(row)
                found["samples"].append(row)
                keep(found)
                seconds = ", ".join(
                    f"{p} {row[p]['stages']['T']['seconds']:.1f} s" for p in (*MODES, "usual")
                )
                say(f"{name} {len(taken)}/{n}, T: {seconds}")
            if name == next(iter(wanted)):
                together = [row["sample"] for row in taken][:8]
                if not found["batch"]:
                    found["batch"] = ours("batch", samples=together)
                    keep(found)
                    say(f"{len(together)} samples together")
        found["machine"] = _faster(found["machine"], ours("machine"))


def rounding(model: str, names: Sequence[str]) -> dict[str, Any]:
    """How many answers differ between one at a time and eight together in bfloat16, native here or not."""
    with Worker("ours", model, "bfloat16") as worker:
        ids = [i for name in names for i in worker("list", name=name)["ids"]]
        return worker("rounding", samples=ids[:ROUNDED]) | {"model": model, "commit": commit()}


def engines(model: str, dtype: str, name: str) -> dict[str, Any]:
    """Torch and vLLM on the same prompts, one after the other, each alone on the machine."""
    found: dict[str, Any] = {"model": model, "dtype": dtype, "commit": commit()}
    with Worker("ours", model, dtype) as ours:
        ours.first = {"do": "warm_up"}
        samples = ours("list", name=name)["ids"][:8]
        found["torch"] = ours("replies", samples=samples)
    with Worker("vllm", model, dtype) as vllm:
        found["vllm"] = vllm("replies", samples=samples)
    return found


def _faster(known: dict[str, Any] | None, machine: dict[str, Any]) -> dict[str, Any]:
    return machine | {"flops": max(machine["flops"], known["flops"])} if known else machine


def _take_turns(ours: Worker, theirs: Worker, row: dict[str, Any], texts: dict[str, Any], turn: int) -> None:
    """Runs the three programs on a sample; who goes first changes from sample to sample.

    A long prompt takes the usual loop more than 20 GB: there ours goes first, each leaves the memory to the
    other, and the usual loop starts without its warm-up, beside whose leavings 24 GB were too few; and
    `activated` goes before `exact`, whose freed memory would count as the other's peak.
    """
    long = row["begin"]["tokens"]["prompt"] > LONG
    if long:
        theirs.pause()
        theirs.first = {}
    turns: list[Callable[[], None]] = [
        lambda: row.update(activated=ours("adapt", sample=row["sample"], mode="activated")),
        lambda: row.update(exact=ours("adapt", sample=row["sample"], mode="exact")),
        lambda: row.update(usual=theirs("sample", texts=texts, base=not long)),
    ]
    for i in range(len(turns)):
        if long and i == len(turns) - 1:
            ours.pause()
        turns[i if long else (i + turn) % len(turns)]()
    if long:
        theirs.pause()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--dtype", default=native_dtype())
    parser.add_argument("--samples", nargs="*", default=["sealtool=8", "nexusraven:virustotal=2"])
    parser.add_argument("--go-on", action="store_true", help="measure only what the last run lacks")
    parser.add_argument("--report", action="store_true", help="of what a run that was cut has measured")
    parser.add_argument("--bfloat16", action="store_true", help="count only how often bfloat16 rounds apart")
    parser.add_argument("--vllm", action="store_true", help="only torch beside vLLM, on the same prompts")
    parser.add_argument("--worker", choices=["ours", "theirs"])
    asked = parser.parse_args()
    if asked.worker:
        serve({"ours": Ours, "theirs": Theirs}[asked.worker](asked.model, asked.dtype))
        return
    if asked.vllm and not VLLM.exists():
        parser.error("vLLM is not installed here: make test-vllm does that")
    path = sources.runs_dir() / "bench.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Any] = {"model": asked.model, "samples": [], "batch": {}, "seconds": 0.0}
    aside = asked.bfloat16 or asked.vllm  # runs of their own, kept when the programs are measured anew
    if asked.report or asked.go_on or aside:
        if not known and not aside:
            parser.error(f"{path} is not there: nothing has been measured yet")
        if known and known["model"] != asked.model:
            parser.error(f"{path} was measured with {known['model']}")
        found = known or found
    elif known and known["model"] == asked.model:
        found |= {k: known[k] for k in ("bfloat16", "engines") if k in known}
    if not asked.report:
        sources.fetch([asked.model])
    names = [s.partition("=")[0] for s in asked.samples]
    if aside:
        if asked.bfloat16:
            found["bfloat16"] = rounding(asked.model, names)
        if asked.vllm:
            found["engines"] = engines(asked.model, asked.dtype, names[0])
        tables.write(path, json.dumps(found).encode())
    elif not asked.report:
        if asked.go_on and found["machine"]["dtype"] != asked.dtype:
            parser.error(f"{path} was measured in {found['machine']['dtype']}")
        began = time.monotonic() - found["seconds"]

        def keep(found: dict[str, Any]) -> None:
            tables.write(path, json.dumps(found | {"seconds": time.monotonic() - began}).encode())

        measure(
            asked.model,
            asked.dtype,
            {k: int(v) for k, v in (s.split("=") for s in asked.samples)},
            found,
            say=lambda text: print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True),
            keep=keep,
        )
        found["seconds"] = time.monotonic() - began
        keep(found)
    from bench_report import report

    if not found["samples"]:
        print("make bench has measured no samples yet: no report")
        return
    report(found)


if __name__ == "__main__":
    main()
