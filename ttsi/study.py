"""What to run, and running it: samples through arms, batch by batch, every stage result kept.

`Study` is all a notebook needs: `run` computes what is missing, `records` selects.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
from pydantic import TypeAdapter
from tqdm import tqdm

from ttsi import __version__, arms, benchmarks, estimator, prompts, sources, synthesizer
from ttsi.arms import ADAPTING, ARMS, Adapted, Done, Mode, Outcome, Setting
from ttsi.calls import judge
from ttsi.config import Profile, load_profile
from ttsi.engines.base import EngineError, Request, native_dtype
from ttsi.seeds import seed_for
from ttsi.store import Row, Store
from ttsi.types import (
    Example,
    Generation,
    LoraSettings,
    Query,
    Sample,
    Sampling,
    Scored,
    Synthesis,
    Uncertainty,
    Verdict,
)

if TYPE_CHECKING:
    from ttsi.engines.torch import TorchEngine

T = TypeVar("T")
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "scikit-learn", "papermill")

# Seconds per sample and stage: 0.5B, float32, 2 cores, SealTool-sized prompts; other models in proportion.
_GUESS = {"answer": 5.0, "score": 2.0, "example": 5.0, "adapted": 9.0}
_GUESS_UNCERTAIN = 0.6
_RELATIVE_COST = {"tiny": 0.01, "smollm2-135m": 0.3, "qwen2.5-coder-1.5b": 3.0}
_DISK_GB = {"tiny": 0.01, "smollm2-135m": 0.5, "qwen2.5-coder-0.5b": 2.5, "qwen2.5-coder-1.5b": 5.5}


class Study:
    """One profile's run: its samples, its store, its model (loaded when first needed)."""

    def __init__(self, profile: Profile | str, **overrides: Any) -> None:
        self.profile = load_profile(profile, **overrides) if isinstance(profile, str) else profile
        self.dtype = native_dtype() if self.profile.dtype == "auto" else self.profile.dtype
        self.store = Store(sources.runs_dir() / self.profile.name / "store.sqlite", self.context)
        self.missing: dict[str, str] = {}
        self._samples: dict[tuple[str, int], list[Sample]] = {}

    # --- what is studied --------------------------------------------------------------------------------

    def samples(self, benchmark: str, seed: int) -> list[Sample]:
        """The benchmark's samples under a run seed; empty, and named in `missing`, where it can't be had."""
        key = (benchmark, seed)
        if key not in self._samples:
            p = self.profile
            try:
                self._samples[key] = benchmarks.load(
                    benchmark,
                    p.benchmarks.get(benchmark),
                    tool_order=p.tool_order,
                    seed=seed,
                    keep_components=p.keep_components,
                )
            except sources.Unavailable as error:
                self.missing[benchmark] = str(error)
                self._samples[key] = []
        return self._samples[key]

    def fetch(self) -> None:
        """Brings what the run needs onto this machine.

        Raises Unavailable, naming every missing thing with the ways to get it, if the model or all
        benchmarks are missing; a run goes on without some of the benchmarks.
        """
        model = {} if self.profile.model == "tiny" else sources.fetch([self.profile.model])
        left = [b for b in self.profile.benchmarks for seed in self.profile.seeds if self.samples(b, seed)]
        if model or not left:
            raise sources.Unavailable("\n".join([*model.values(), *self.missing.values()]))

    @cached_property
    def engine(self) -> TorchEngine:
        """The model, loaded on first use."""
        from ttsi.engines.torch import TorchEngine

        p = self.profile
        return TorchEngine(_model_dir(p.model), name=p.model, dtype=self.dtype, threads=p.threads)

    @cached_property
    def context(self) -> dict[str, Any]:
        """What a reader needs to know to trust or repeat a row: versions, commit, machine."""
        versions = {"ttsi": __version__, "python": platform.python_version()}
        for package in _PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not installed"
        return {
            "versions": versions,
            "commit": _commit(),
            "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
            "model": self.profile.model,
            "dtype": self.dtype,
        }

    def header(self) -> str:
        """Versions, model and run as one Markdown paragraph, for the top of a notebook."""
        c, p = self.context, self.profile
        versions = ", ".join(f"{k} {v}" for k, v in c["versions"].items())
        counts = ", ".join(f"{b} {'all' if n is None else n}" for b, n in p.benchmarks.items())
        return (
            f"**Run** `{p.name}` · model `{p.model}` ({_model_hash(p.model)[:12]}, {self.dtype}) · "
            f"samples: {counts} · seeds {p.seeds} · tools {p.tool_order} · τ = {p.tau} · "
            f"commit `{c['commit']}`  \n"
            f"**Machine** {c['machine']} · {versions}"
        )

    # --- running ----------------------------------------------------------------------------------------

    def run(self, arms: Sequence[str] | None = None, benchmarks: Sequence[str] | None = None) -> None:
        """Computes what the arms still lack, batch by batch; a killed run goes on where it stopped."""
        for benchmark in benchmarks or self.profile.benchmarks:
            for seed in self.profile.seeds:
                for arm, mode, inference in self._selections(arms, benchmark):
                    self._outcomes(arm, mode, inference, benchmark, seed, compute=True)

    def score(self, benchmarks: Sequence[str] | None = None) -> None:
        """Computes the base answers and H's scores that are missing, and nothing else."""
        for benchmark in benchmarks or self.profile.benchmarks:
            for seed in self.profile.seeds:
                self._outcomes("base", None, "direct", benchmark, seed, compute=True)
                queries = [s.query for s in self.samples(benchmark, seed)]
                if not queries:
                    continue
                stages = StoredStages(self, benchmark, seed, "direct", compute=True)
                groups = [
                    queries[i : i + self.profile.batch] for i in range(0, len(queries), self.profile.batch)
                ]
                known = stages.stored_scores(queries)
                for group in tqdm(groups, desc=f"{benchmark} scores", unit="batch", disable=known):
                    stages.score(group)

    def _selections(self, names: Sequence[str] | None, benchmark: str) -> list[tuple[str, Mode | None, str]]:
        chosen: list[tuple[str, Mode | None, str]] = []
        for arm in names or self.profile.arms:
            if arm not in ARMS:
                raise ValueError(f"no arm {arm!r}; there are {', '.join(ARMS)}")
            modes: Sequence[Mode | None] = self.profile.modes_of(benchmark) if arm in ADAPTING else [None]
            chosen += [(arm, m, i) for m in modes for i in self.profile.inference]
        return chosen

    def _outcomes(
        self, arm: str, mode: Mode | None, inference: str, benchmark: str, seed: int, compute: bool
    ) -> list[Outcome]:
        queries = [s.query for s in self.samples(benchmark, seed)]
        setting = Setting(self.profile.tau, mode or "exact")
        size = self.profile.batch
        groups = [queries[i : i + size] for i in range(0, len(queries), size)]
        stages = StoredStages(self, benchmark, seed, inference, compute)
        out: list[Outcome] = []
        label = " ".join(filter(None, [benchmark, arm, mode, inference if inference != "direct" else ""]))
        missing = compute and any(not stages.complete(ARMS[arm], g, setting) for g in groups)
        for group in tqdm(groups, desc=label, unit="batch", disable=not missing):
            out += ARMS[arm](stages, group, setting)
        return out

    # --- reading ----------------------------------------------------------------------------------------

    def records(self, arms: Sequence[str] | None = None) -> pd.DataFrame:
        """One judged row per benchmark, sample, seed, arm, mode and inference of what is stored.

        status "error": the machine failed; the row has no verdict and is never scored.
        """
        rows = []
        for benchmark in self.profile.benchmarks:
            for seed in self.profile.seeds:
                samples = {s.id: s for s in self.samples(benchmark, seed)}
                for arm, mode, inference in self._selections(arms, benchmark):
                    for outcome in self._outcomes(arm, mode, inference, benchmark, seed, compute=False):
                        if outcome.error != _NOT_RUN:
                            row = self._record(samples[outcome.id], outcome, inference)
                            rows.append({"seed": seed, "arm": arm, "mode": mode or "none", **row})
        return pd.DataFrame(rows, columns=None if rows else _COLUMNS)

    def _record(self, sample: Sample, outcome: Outcome, inference: str) -> dict[str, Any]:
        p = self.profile
        row: dict[str, Any] = {
            "profile": p.name,
            "benchmark": sample.benchmark,
            "sample": sample.id,
            "cluster": sample.cluster,
            "inference": inference,
            "model": p.model,
            "dtype": self.dtype,
            "tool_order": p.tool_order,
            "n_tools": len(sample.tools),
            "flags": ",".join(sorted(sample.flags)),
            "status": "error" if outcome.error else "ok",
            "error": outcome.error,
            "margin": outcome.margin,
            "tau": p.tau,
            "uncertain": outcome.uncertain,
            "adapted": outcome.adapted,
            "diverged": outcome.diverged,
            "source": outcome.source,
            "correct": None,
            "code": "",
            "form": "",
            "reply": "",
            "tokens_answer": 0,
            "tokens_h": outcome.tokens_h,
            "tokens_t": outcome.fit.tokens if outcome.fit else 0,
            **{f"seconds_{k}": outcome.seconds.get(k, 0.0) for k in ("h", "g", "t", "answer")},
            **_example_columns(outcome.synthesis if outcome.uncertain else None),
        }
        if not outcome.error:
            reply = outcome.replies[0] if inference == "direct" else arms.majority(outcome.replies)
            verdict = self._judge(reply.text, sample)
            row |= {
                "correct": verdict.correct,
                "code": verdict.code,
                "form": verdict.form,
                "reply": reply.text,
            }
            row["tokens_answer"] = sum(len(r.tokens) for r in outcome.replies)
        return row

    def _judge(self, reply: str, sample: Sample) -> Verdict:
        p = self.profile
        return judge(reply, sample, rule=p.judge, accept=p.accept, strict_types=p.strict_types)

    def scores(self) -> pd.DataFrame:
        """One row per benchmark, sample and seed: H's margin beside whether the base answer is right."""
        rows = []
        for benchmark in self.profile.benchmarks:
            for seed in self.profile.seeds:
                samples = self.samples(benchmark, seed)
                if not samples:
                    continue
                stages = StoredStages(self, benchmark, seed, "direct", compute=False)
                scored = stages.score([s.query for s in samples])
                answers = stages.answer([s.query for s in samples])
                for sample in samples:
                    u, a = scored[sample.id].value, answers[sample.id].value
                    if u is None or a is None:
                        continue
                    rows.append(
                        {
                            "benchmark": benchmark,
                            "sample": sample.id,
                            "cluster": sample.cluster,
                            "seed": seed,
                            "n_tools": len(sample.tools),
                            "margin": u.margin,
                            "log_probs": list(u.log_probs),
                            "base_correct": self._judge(a[0].text, sample).correct,
                        }
                    )
        return pd.DataFrame(rows, columns=None if rows else _SCORE_COLUMNS)

    def examples(self, benchmark: str, seed: int = 0) -> dict[str, Synthesis]:
        """The synthetic examples stored for a benchmark, by sample id."""
        queries = [s.query for s in self.samples(benchmark, seed)]
        if not queries:
            return {}
        done = StoredStages(self, benchmark, seed, "direct", compute=False).synthesize(queries)
        return {i: d.value for i, d in done.items() if d.value is not None}

    # --- planning ---------------------------------------------------------------------------------------

    def plan(self) -> str:
        """What a run would do: samples, what is in the store, estimated minutes and disk. Loads no model."""
        p, lines, seconds = self.profile, [], 0.0
        for benchmark in p.benchmarks:
            for seed in p.seeds:
                queries = [s.query for s in self.samples(benchmark, seed)]
                if benchmark in self.missing:
                    lines.append(f"  {benchmark}: missing. {self.missing[benchmark]}")
                    continue
                for stage, need in self._needs(benchmark, seed, queries).items():
                    todo = (need["samples"] - need["stored"]) * _RELATIVE_COST.get(p.model, 1.0)
                    seconds += todo * need["rate"]
                    lines.append(
                        f"  {benchmark} seed {seed} {stage:18s} {need['samples']:5.0f} samples, "
                        f"{need['stored']:5.0f} stored, about {todo * need['rate'] / 60:5.1f} min to compute"
                    )
        text = "\n".join(lines)
        return (
            f"Plan of profile {p.name}: model {p.model} ({self.dtype}), arms {', '.join(p.arms)}\n{text}\n"
            f"Estimated {seconds / 60:.0f} minutes after set-up and download; results: {self.store.path}\n"
            f"Disk: about {_DISK_GB.get(p.model, 1.5):.1f} GB for the model and its cache, "
            f"{shutil.disk_usage('.').free / 1e9:.0f} GB free"
        )

    def _needs(self, benchmark: str, seed: int, queries: Sequence[Query]) -> dict[str, dict[str, float]]:
        stages = StoredStages(self, benchmark, seed, "direct", compute=False)
        total = len(queries)
        tools = sum(len(q.tools) for q in queries) / max(1, total)
        weight = max(1.0, tools / 5)
        answers, scores = stages.answer(queries), stages.score(queries)
        needs = {"answer": {"samples": total, "stored": _stored(answers), "rate": _GUESS["answer"] * weight}}
        if not ADAPTING & set(self.profile.arms):
            return needs
        known = [d.value.margin < self.profile.tau for d in scores.values() if d.value]
        uncertain = sum(known) + _GUESS_UNCERTAIN * (total - len(known))
        needs["score"] = {"samples": total, "stored": len(known), "rate": _GUESS["score"]}
        written = stages.synthesize(queries)
        needs["example"] = {"samples": uncertain, "stored": _stored(written), "rate": _GUESS["example"]}
        usable = {i: d.value for i, d in written.items() if d.value}
        for mode in self.profile.modes_of(benchmark):
            done = stages.adapt(queries, usable, mode)
            factor = weight * (2.0 if mode == "exact" else 1.0)
            rate = _GUESS["adapted"] * factor
            stored = _stored(done) + sum(v.failed for v in usable.values())
            needs[f"adapted {mode}"] = {"samples": uncertain, "stored": stored, "rate": rate}
        for need in needs.values():
            need["stored"] = min(need["stored"], need["samples"])
        return needs


_NOT_RUN = "not run"
_COLUMNS = [
    "benchmark",
    "sample",
    "cluster",
    "seed",
    "arm",
    "inference",
    "mode",
    "correct",
    "status",
    "source",
]
_SCORE_COLUMNS = ["benchmark", "sample", "cluster", "seed", "n_tools", "margin", "log_probs", "base_correct"]
_REPLIES = TypeAdapter(tuple[Generation, ...])
_SCORED = TypeAdapter(tuple[Scored, ...])
_SYNTHESIS = TypeAdapter(Synthesis)
_ADAPTED = TypeAdapter(Adapted)


class StoredStages:
    """The stages of one benchmark and seed: read from the store, computed and kept where missing.

    With `compute=False` what is missing is a `Done` without value, marked "not run".
    """

    def __init__(self, study: Study, benchmark: str, seed: int, inference: str, compute: bool) -> None:
        self.study, self.benchmark, self.seed, self.compute = study, benchmark, seed, compute
        self.profile = study.profile
        self.inference = inference
        self._missed = False

    def complete(self, arm: Callable[..., list[Outcome]], queries: Sequence[Query], setting: Setting) -> bool:
        """Whether the arm's results for these queries are all stored; computes nothing."""
        probe = StoredStages(self.study, self.benchmark, self.seed, self.inference, compute=False)
        arm(probe, queries, setting)
        return not probe._missed

    def stored_scores(self, queries: Sequence[Query]) -> bool:
        """Whether H's scores of these queries are all stored."""
        probe = StoredStages(self.study, self.benchmark, self.seed, self.inference, compute=False)
        return all(d.value for d in probe.score(queries).values())

    # --- the four stages --------------------------------------------------------------------------------

    def answer(self, queries: Sequence[Query]) -> dict[str, Done[tuple[Generation, ...]]]:
        sampling = self._sampling(self.inference)

        def compute(batch: Sequence[Query]) -> list[tuple[Generation, ...]]:
            requests = [Request(prompts.act(q), self._seed(q, "answer"), lookup=True) for q in batch]
            return [tuple(r) for r in self.study.engine.generate(requests, sampling)]

        settings = self._settings(sampling=asdict(sampling))
        return self._stage("answer", settings, queries, _REPLIES, compute)

    def score(self, queries: Sequence[Query]) -> dict[str, Done[Uncertainty]]:
        p = self.profile

        def compute(batch: Sequence[Query]) -> list[tuple[Scored, ...]]:
            return [tuple(r) for r in estimator.score(self.study.engine, batch)]

        scored = self._stage("score", self._settings(opening=prompts.OPENING), queries, _SCORED, compute)
        tools = {q.id: q.tools for q in queries}
        out: dict[str, Done[Uncertainty]] = {}
        for i, d in scored.items():
            value, error = None, d.error
            if d.value is not None:
                try:
                    value = estimator.uncertainty(d.value, tools[i], p.candidate, p.normalise)
                except ValueError as problem:
                    error = str(problem)
            out[i] = Done(value, error, d.seconds, d.source)
        return out

    def synthesize(self, queries: Sequence[Query]) -> dict[str, Done[Synthesis]]:
        p = self.profile
        parts = []
        for index in range(p.k):

            def compute(batch: Sequence[Query], index: int = index) -> list[Synthesis]:
                return synthesizer.synthesize(
                    self.study.engine,
                    batch,
                    lambda sample, attempt: seed_for(self.seed, self.benchmark, sample, "example", attempt),
                    p.synthesis_sampling,
                    first=index,
                    retries=p.retries,
                    validate=p.validate_examples,
                    novelty=p.novelty,
                )

            parts.append(self._stage("example", self._writing(index), queries, _SYNTHESIS, compute))
        return {q.id: _join([part[q.id] for part in parts]) for q in queries}

    def adapt(
        self, queries: Sequence[Query], examples: Mapping[str, Synthesis], mode: Mode
    ) -> dict[str, Done[Adapted]]:
        lora = self.profile.lora(mode)
        sampling = self._sampling(self.inference)
        written = {i: s for i, s in examples.items() if not s.failed}
        queries = [q for q in queries if q.id in written]

        def compute(batch: Sequence[Query]) -> list[Adapted]:
            return self._adapt(batch, written, lora, sampling)

        settings = self._settings(
            lora=asdict(lora),
            sampling=asdict(sampling),
            examples=[self._writing(i) for i in range(self.profile.k)],
        )
        return self._stage("adapted", settings, queries, _ADAPTED, compute)

    def _adapt(
        self, batch: Sequence[Query], written: Mapping[str, Synthesis], lora: LoraSettings, sampling: Sampling
    ) -> list[Adapted]:
        from ttsi import trainer

        engine = self.study.engine
        drafts = self.answer(batch) if self.inference == "direct" else {}
        began = time.perf_counter()
        fitted = trainer.fit(
            engine,
            [trainer.job(q.tools, written[q.id].examples, self._seed(q, "adapter")) for q in batch],
            lora,
            bank=self.profile.bank,
        )
        seconds_t = (time.perf_counter() - began) / len(batch)
        began = time.perf_counter()
        able = [i for i, f in enumerate(fitted) if f is not None]
        requests = []
        for i in able:
            known = drafts[batch[i].id].value if batch[i].id in drafts else None
            adapter = fitted[i][0]  # type: ignore[index]
            requests.append(
                Request(
                    prompts.act(batch[i]),
                    self._seed(batch[i], "answer"),
                    adapter=adapter,
                    draft=known[0].tokens if known else (),
                    lookup=True,
                )
            )
        replies = dict(zip(able, engine.generate(requests, sampling), strict=True)) if able else {}
        seconds = (time.perf_counter() - began) / max(1, len(able))
        return [
            Adapted(f[1] if f else None, tuple(replies.get(i, ())), seconds_t, seconds if f else 0.0)
            for i, f in enumerate(fitted)
        ]

    # --- remembering ------------------------------------------------------------------------------------

    def _stage(
        self,
        stage: str,
        settings: Mapping[str, Any],
        queries: Sequence[Query],
        kind: TypeAdapter[T],
        compute: Callable[[Sequence[Query]], list[T]],
    ) -> dict[str, Done[T]]:
        store, key = self.study.store, (stage, settings, self.benchmark, self.seed)
        rows = store.get(*key, [q.id for q in queries])
        open_queries = [q for q in queries if q.id not in rows or (self.compute and _passing(rows[q.id]))]
        if open_queries and self.compute:
            # A group that was cut is computed whole: in bfloat16 the shape of a batch can turn a near-tie.
            # The store keeps the rows it has. G and T come in groups that the threshold forms anyway.
            batch = queries if stage in ("answer", "score") else open_queries
            store.put(*key, _computed(batch, compute, kind))
            rows = store.get(*key, [q.id for q in queries])
        self._missed |= bool(open_queries)
        out: dict[str, Done[T]] = {}
        for query in queries:
            row = rows.get(query.id)
            if row is None:
                out[query.id] = Done(None, _NOT_RUN)
            elif row.status == "error":
                out[query.id] = Done(None, row.value, row.seconds, row.source)
            else:
                out[query.id] = Done(kind.validate_json(row.value), "", row.seconds, row.source)
        return out

    def _seed(self, query: Query, stage: str) -> int:
        return seed_for(self.seed, self.benchmark, query.id, stage)

    def _sampling(self, inference: str) -> Sampling:
        return self.profile.direct_sampling if inference == "direct" else self.profile.vote_sampling

    def _settings(self, **more: Any) -> dict[str, Any]:
        p = self.profile
        return {
            "model": _model_hash(p.model),
            "dtype": self.study.dtype,
            "data": _fingerprint(self.benchmark),
            "tool_order": p.tool_order,
            "keep_components": p.keep_components,
            "prompts": prompts.version(),
            **more,
        }

    def _writing(self, index: int) -> dict[str, Any]:
        p = self.profile
        return self._settings(
            writer="self",
            index=index,
            sampling=asdict(p.synthesis_sampling),
            retries=p.retries,
            validate=p.validate_examples,
            novelty=p.novelty,
        )


def _computed(
    queries: Sequence[Query], compute: Callable[[Sequence[Query]], list[T]], kind: TypeAdapter[T]
) -> list[Row]:
    """A batch's rows. If the machine fails on the batch, each sample is tried alone; what fails then is
    an error row: kept apart, never scored, tried again by the next run."""
    began = time.perf_counter()
    try:
        values = compute(queries)
    except EngineError as error:
        if len(queries) > 1:
            return [row for q in queries for row in _computed([q], compute, kind)]
        return [Row(queries[0].id, "error", f"{type(error).__name__}: {error}", 0.0, 1)]
    seconds = (time.perf_counter() - began) / len(queries)
    return [
        Row(q.id, "ok", kind.dump_json(v).decode(), seconds, len(queries))
        for q, v in zip(queries, values, strict=True)
    ]


def _passing(row: Row) -> bool:
    """Whether a row is a failure that may pass: tried again by the next run. What is too long stays so."""
    return row.status == "error" and not row.value.startswith("TooLong")


def _join(parts: Sequence[Done[Synthesis]]) -> Done[Synthesis]:
    """The examples of all indices as one synthesis; the first failure of the machine, if any."""
    bad = next((d for d in parts if d.value is None), None)
    if bad is not None:
        return bad
    values = [d.value for d in parts if d.value is not None]
    joined = Synthesis(
        tuple(e for v in values for e in v.examples),
        tuple(f for v in values for f in v.failures),
        sum(v.prompt_tokens for v in values),
        sum(v.tokens for v in values),
    )
    loaded = any(d.source == "loaded" for d in parts)
    return Done(joined, "", sum(d.seconds for d in parts), "loaded" if loaded else "computed")


def _example_columns(synthesis: Synthesis | None) -> dict[str, Any]:
    examples: tuple[Example, ...] = synthesis.examples if synthesis else ()
    count = len(examples)
    return {
        "synthesis_failed": synthesis is not None and synthesis.failed,
        "attempts": len(synthesis.failures) + count if synthesis else 0,
        "copy_ratio": sum(e.copy_ratio for e in examples) / count if count else float("nan"),
        "schema_valid": float(all(not e.schema_errors for e in examples)) if count else float("nan"),
        "tokens_g": synthesis.tokens if synthesis else 0,
    }


def _stored(done: Mapping[str, Done[Any]]) -> int:
    return sum(d.value is not None for d in done.values())


@cache
def _fingerprint(benchmark: str) -> str:
    return benchmarks.fingerprint(benchmark)


def _model_dir(name: str) -> Path:
    if name == "tiny":
        from ttsi.engines import tiny

        return tiny.model_dir()
    return sources.model_dir(name)


def _model_hash(name: str) -> str:
    if name == "tiny":
        from ttsi.engines import tiny

        return tiny.source_hash()
    return sources.model_hash(name)


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    for line in cpu.read_text().splitlines() if cpu.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
