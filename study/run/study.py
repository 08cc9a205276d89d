"""What to run, and running it: samples through arms, every stage result kept.

`open_study` is all a notebook needs: `run` computes what is missing, `records` and its like select.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd
from tqdm import tqdm

from study.data import benchmarks, pools, sources
from study.data.models import TINY, model_dir, model_hash
from study.run import arms, frames, results
from study.run import plan as planning
from study.run.arms import ARMS
from study.run.config import Profile, load_profile
from study.run.outcomes import Mode, Outcome, Setting
from study.run.stages import StoredStages
from study.run.store import Store
from ttsi import __version__
from ttsi.engines.base import native_dtype
from ttsi.types import Query, Sample, Synthesis

if TYPE_CHECKING:
    from study.run.ray import RayExecutor
    from study.run.results import Results

Selection = tuple[str, Mode | None, str, int]
"""What is run of an arm: (arm, mode, inference, size of its pool or 0)."""
_LIVE: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_KEPT: dict[tuple[Any, ...], Any] = {}
"""Models that this process's studies have loaded, and those that later ones take over."""
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "scikit-learn", "papermill")


def open_study(profile: str, source: str | Path | None = None, **overrides: Any) -> Study | Results:
    """A study to run, or with `source` (a folder of committed results) one to read: no model, no data files.

    Both answer `records`, `scores`, `examples_frame`, `embeddings_frame`, `header` and `variant` alike; on
    results `run` and `score` do nothing. Raises ValueError for unknown settings or a folder without results.
    """
    if source:
        return results.Results.under(Path(source), overrides)
    return Study(profile, **overrides)


class Study:
    """One profile's run: its samples, its store, its models (loaded when first needed)."""

    def __init__(
        self, profile: Profile | str, *, of: Study | None = None, store: Store | None = None, **overrides: Any
    ) -> None:
        self.profile = load_profile(profile, **overrides) if isinstance(profile, str) else profile
        self.dtype = native_dtype() if self.profile.dtype == "auto" else self.profile.dtype
        self.variant_name = ""
        self._of = of
        if store is None:
            # A variant's rows are its own model's, whoever opened the file.
            store = of.store.under(self.context) if of else Store(self.folder / "store.sqlite", self.context)
        self.store: Store = store
        self.missing: dict[str, str] = {}
        self.lacking: dict[tuple[str, str], str] = {}
        """(benchmark, arm) → why it can't be run there, e.g. no training split."""
        self._samples: dict[tuple[str, int], list[Sample]] = {}

    @property
    def folder(self) -> Path:
        """Where this run's store and adapters lie."""
        return sources.runs_dir() / self.profile.name

    # --- what is studied --------------------------------------------------------------------------------

    def variant(self, name: str) -> Study:
        """The run beside this one under the profile's variant settings; store and models are shared."""
        study = Study(self.profile.variant(name), of=self)
        study.variant_name = name
        return study

    def everything(self) -> Study:
        """This run as if it were asked for all samples of its benchmarks; store and models are shared."""
        whole = dict.fromkeys(self.profile.benchmarks)
        return Study(self.profile.model_copy(update={"benchmarks": whole}), of=self)

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

        Raises Unavailable, naming every missing thing with the ways to get it, if a model or all benchmarks
        are missing; a run goes on without some of the benchmarks, and without a training pool.
        """
        wanted = [self.profile, *map(self.profile.variant, self.profile.variants)]
        models = {p.model for p in wanted}
        for p in wanted:
            if isinstance(p.teacher, str) and {"tt_d", "teacher"} & set(p.arm_names):
                models.add(p.teacher)
        lacking = sources.fetch(sorted(models - {TINY}))
        left = [b for b in self.profile.benchmarks for seed in self.profile.seeds if self.samples(b, seed)]
        if lacking or not left:
            raise sources.Unavailable("\n".join([*lacking.values(), *self.missing.values()]))

    @cached_property
    def engine(self) -> Any:
        """The model, loaded on first use; a variant of the same model uses its study's."""
        ours = (self.profile.model, self.dtype, self.profile.engine)
        if self._of and ours == (self._of.profile.model, self._of.dtype, self._of.profile.engine):
            return self._of.engine
        return self._load(self.profile.model)

    @cached_property
    def teacher_engine(self) -> Any:
        """Who writes TT-D's examples, loaded on first use; `release` lets it go."""
        teacher = self.profile.teacher
        if teacher is None:
            raise ValueError(f"profile {self.profile.name} names no teacher, which tt_d and teacher need")
        if isinstance(teacher, dict):
            from ttsi.engines.openai import OpenAIEngine

            return OpenAIEngine.from_settings(teacher)
        return self.engine if teacher == self.profile.model else self._load(teacher)

    def _load(self, model: str) -> Any:
        p = self.profile
        rank = max(s.rank for s in (p, *map(p.variant, p.variants)))
        key = (p.engine, model_dir(model), self.dtype, p.threads, p.gpu_memory_utilization, rank)
        _LIVE[key] = engine = _KEPT.get(key) or self._started(model, rank)
        return engine

    def _started(self, model: str, rank: int) -> Any:
        p = self.profile
        if p.engine == "torch":
            from ttsi.engines.torch import TorchEngine

            return TorchEngine(model_dir(model), name=model, dtype=self.dtype, threads=p.threads)
        try:
            from ttsi.engines.vllm import VllmEngine
        except ImportError as error:
            raise ValueError(
                "engine vllm needs vLLM, which is not in this environment: `make test-vllm` makes one, "
                f"and `make reproduce PROFILE={p.name} PY=.venv-vllm/bin/python` runs in it"
            ) from error
        return VllmEngine(
            model_dir(model),
            name=model,
            dtype=self.dtype,
            gpu_memory_utilization=p.gpu_memory_utilization,
            rank=rank,
            threads=p.threads,
        )

    @cached_property
    def executor(self) -> RayExecutor | None:
        """Who computes in place of this process; None = nobody. A variant's is its study's."""
        if self._of:
            return self._of.executor
        if self.profile.executor == "local":
            return None
        from study.run.ray import RayExecutor

        return RayExecutor(self)

    def release(self) -> None:
        """Lets go of the teacher's memory, and for a variant with a model of its own of that model's."""
        self.__dict__.pop("teacher_engine", None)
        if self._of and self.profile.model != self._of.profile.model:
            self.__dict__.pop("engine", None)
        gc.collect()

    @cached_property
    def context(self) -> dict[str, Any]:
        """What a reader needs to know to trust or repeat a row: versions, commit, machine."""
        if self._of:
            return {**self._of.context, "model": self.profile.model, "dtype": self.dtype}
        versions = {"ttsi": __version__, "python": platform.python_version()}
        packages = list(_PACKAGES)
        if self.profile.engine == "vllm":  # each of its builds has a name of its own
            packages += importlib.metadata.packages_distributions().get("vllm", ["vllm"])
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not installed"
        return {
            "versions": versions,
            "commit": commit(),
            "machine": f"{_processor()}, {os.cpu_count()} cores{_threads(self.profile)}, {platform.system()}",
            "model": self.profile.model,
            "dtype": self.dtype,
        }

    def header(self) -> str:
        """Versions, model and run as one Markdown paragraph, for the top of a notebook."""
        c, p = self.context, self.profile
        versions = ", ".join(f"{k} {v}" for k, v in c["versions"].items())
        counts = ", ".join(f"{b} {'all' if n is None else n}" for b, n in p.benchmarks.items())
        heat = p.answer_temperature
        others = {m: stages for m, stages in self.store.machines().items() if m != c["machine"]}
        apart = "".join(f" · {', '.join(sorted(stages))}: {m}" for m, stages in sorted(others.items()))
        return (
            f"**Run** `{p.name}` · model `{p.model}` ({model_hash(p.model)[:12]}, {self.dtype}) · "
            f"teacher `{p.teacher_name if p.teacher else 'none'}` · "
            f"samples: {counts} · seeds {p.seeds} · tools {p.tool_order} · τ = {p.tau} · K = {p.k} · "
            f"{p.epochs} epochs · SFT {p.sft_epochs or p.epochs} · "
            f"{f'answers at temperature {heat}' if heat else 'greedy answers'} · "
            f"commit `{c['commit']}`  \n"
            f"**Machine** {c['machine']}{apart} · {versions}"
        )

    # --- running ----------------------------------------------------------------------------------------

    def run(self, arms: Sequence[str] | None = None, benchmarks: Sequence[str] | None = None) -> None:
        """Computes what the arms still lack; a killed run goes on where it stopped.

        arms: those of the profile's to run, by default all of them. Group by group the arms are run that
        need nothing but the group, so that they share what the engine keeps of its prompts; then the others.
        """
        self._check(arms)
        if self.executor:
            return self.executor.run(self, arms, benchmarks)
        try:
            for benchmark in benchmarks or self.profile.benchmarks:
                for seed in self.profile.seeds:
                    chosen = list(self.selections(arms, benchmark, seed))
                    self._run_groups([c for c in chosen if not ARMS[c[0]].whole], benchmark, seed)
                    queries = [s.query for s in self.samples(benchmark, seed)]
                    for selection in chosen:
                        if ARMS[selection[0]].whole:
                            self.play(selection, queries, benchmark, seed, True)
        finally:
            self.release()

    def _run_groups(self, chosen: Sequence[Selection], benchmark: str, seed: int) -> None:
        queries = [s.query for s in self.samples(benchmark, seed)]
        todo = [c for c in chosen if not self.play(c, queries, benchmark, seed, False)]
        size = self.profile.batch
        groups = [queries[i : i + size] for i in range(0, len(queries), size)]
        label = f"{benchmark} {' '.join(dict.fromkeys(c[0] for c in todo))}"
        for group in tqdm(groups, desc=label, unit="batch", disable=not todo):
            for selection in todo:
                self.play(selection, group, benchmark, seed, True)

    def play(
        self, chosen: Selection, queries: Sequence[Query], benchmark: str, seed: int, compute: bool
    ) -> bool:
        """Whether all of an arm's results for the queries were stored; with `compute` they are now."""
        return self._played(chosen, queries, benchmark, seed, compute)[1]

    def _played(
        self, chosen: Selection, queries: Sequence[Query], benchmark: str, seed: int, compute: bool
    ) -> tuple[list[Outcome], bool]:
        arm, mode, inference, size = chosen
        stages = StoredStages(self, benchmark, seed, inference, compute, arm)
        setting = self.setting(mode, seed, size)
        return arms.play(arm, stages, queries, setting, self._by_id(benchmark, seed)), stages.complete

    def score(self, benchmarks: Sequence[str] | None = None) -> None:
        """Computes what the estimators lack: base answers, H's scores, and what the profile asks beyond."""
        if self.executor:
            return self.executor.score(self, benchmarks)
        for benchmark, seed, queries, stages in self._each(benchmarks):
            done = self.play_scores(queries, benchmark, seed, False)
            groups = stages.groups(queries)
            for group in tqdm(groups, desc=f"{benchmark} scores", unit="batch", disable=done):
                self.play_scores(group, benchmark, seed, True)

    def play_scores(self, queries: Sequence[Query], benchmark: str, seed: int, compute: bool) -> bool:
        """Like `play`, for what `score` computes."""
        wanted = self.profile.estimators_of(benchmark)
        direct, voted = (StoredStages(self, benchmark, seed, i, compute) for i in ("direct", "majority"))
        direct.answer(queries)
        direct.score(queries)
        if "whole" in wanted:
            direct.scored(queries, "name+opening")
            direct.whole(queries)
        if "votes" in wanted:
            voted.answer(queries)
        return direct.complete and voted.complete

    def embed(self, benchmarks: Sequence[str] | None = None) -> None:
        """Computes where the questions, and those written after them, lie in the model's hidden states."""
        if self.executor:
            return self.executor.embed(self, benchmarks)
        for benchmark, seed, queries, _ in self._each(benchmarks):
            self.play_embeddings(queries, benchmark, seed, True)

    def play_embeddings(self, queries: Sequence[Query], benchmark: str, seed: int, compute: bool) -> bool:
        """Like `play`, for what `embed` computes."""
        stages = StoredStages(self, benchmark, seed, "direct", compute)
        stages.embeddings(queries, synthetic=False)
        kept = self.examples(benchmark, seed)
        written = [q for q in queries if q.id in kept and not kept[q.id].failed]
        stages.embeddings(written, synthetic=True)
        return stages.complete

    def _check(self, names: Sequence[str] | None) -> None:
        for arm in [*(names or []), *self.profile.arm_names]:
            if arm not in ARMS:
                raise ValueError(f"no arm {arm!r}; there are {', '.join(ARMS)}")

    def selections(self, names: Sequence[str] | None, benchmark: str, seed: int) -> Iterator[Selection]:
        """What can be run, in the order in which it runs."""
        self._check(names)
        p = self.profile
        own = [a for a in p.arms_of(benchmark) if names is None or a in names]
        for arm in (a for a in ARMS if a in own):
            about = ARMS[arm]
            if (why := self._obstacle(arm, benchmark, seed)) is not None:
                self.lacking[benchmark, arm] = why
                continue
            modes = p.modes_of(benchmark) if arm == "tt_si" else p.modes_of(benchmark)[:1]
            for mode in modes if about.trains else [None]:
                for inference in p.inference if about.voted else ["direct"]:
                    for size in p.ood_sizes if arm == "sft_ood" else [0]:
                        yield arm, mode, inference, size

    def _obstacle(self, arm: str, benchmark: str, seed: int) -> str | None:
        """Why an arm can't be run on a benchmark; None = it can."""
        if arm in ("tt_d", "teacher") and self.profile.teacher is None:
            return "the profile names no teacher"
        kind = ARMS[arm].pool
        if kind is None or not self.samples(benchmark, seed):
            return None
        try:
            pools.load(benchmark, kind, self.profile.sft_calls if kind == "in" else "all", seed)
        except pools.NoPool as reason:
            return str(reason).partition(": ")[2]
        except sources.Unavailable as reason:
            return str(reason)
        return None

    def setting(self, mode: Mode | None, seed: int, size: int) -> Setting:
        """What an arm of this run may vary."""
        p = self.profile
        return Setting(
            p.tau, mode or "exact", seed, p.sft_samples, p.sft_calls, p.sft_epochs, size or 1, p.max_votes
        )

    def _by_id(self, benchmark: str, seed: int) -> dict[str, Sample]:
        return {s.id: s for s in self.samples(benchmark, seed)}

    # --- reading ----------------------------------------------------------------------------------------

    def records(self, arms: Sequence[str] | None = None) -> pd.DataFrame:
        """One judged row per benchmark, sample, seed, arm, mode and inference of what is stored.

        status "error": the machine failed; the row has no verdict and is never scored.
        Columns: `frames.RECORDS`.
        """
        rows = []
        for benchmark in self.profile.benchmarks:
            for seed in self.profile.seeds:
                samples = self._by_id(benchmark, seed)
                queries = [s.query for s in samples.values()]
                for chosen in self.selections(arms, benchmark, seed):
                    done, _ = self._played(chosen, queries, benchmark, seed, False)
                    done = self._ran(chosen[0], done)
                    rows += [frames.record(self, samples[o.id], o, *chosen[:3], seed) for o in done]
        return frames.outcomes_frame(rows, frames.RECORDS)

    def _ran(self, arm: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes of an arm as far as it was run: whole groups, or all samples, or none.

        Of a run that was cut, what is known first are the samples that nothing had to be computed for: to
        count those alone would be to count the certain ones.
        """
        size = len(outcomes) if ARMS[arm].whole else self.profile.batch
        groups = [outcomes[i : i + size] for i in range(0, len(outcomes), max(1, size))]
        return [o for group in groups if all(map(frames.known, group)) for o in group]

    def scores(self) -> pd.DataFrame:
        """One row per benchmark, sample and seed: what H and its rivals say. Columns: `frames.SCORES`."""
        rows = [r for b, seed, *_ in self._each() for r in frames.scores(self, b, seed)]
        return frames.outcomes_frame(rows, frames.SCORES)

    def examples_frame(self) -> pd.DataFrame:
        """One row per synthetic example, without its text. Columns: `frames.EXAMPLES`."""
        rows = [r for b, seed, *_ in self._each() for r in frames.examples(self, b, seed)]
        return frames.outcomes_frame(rows, frames.EXAMPLES)

    def embeddings_frame(self, compute: bool = True) -> pd.DataFrame:
        """One row per question, asked or written: principal components of the model's hidden states.

        kind: "seed" or "synthetic". compute: embeds first what isn't yet.
        """
        if compute:
            self.embed()
        vectors: list[tuple[dict[str, Any], np.ndarray]] = []
        for benchmark, seed, queries, stages in self._each():
            for kind in ("seed", "synthetic"):
                found = stages.embeddings(queries, synthetic=kind == "synthetic")
                for i, done in found.items():
                    key = {"variant": self.variant_name, "benchmark": benchmark, "sample": i, "seed": seed}
                    vectors += [
                        ({**key, "kind": kind, "index": n}, v) for n, v in enumerate(done.value or ())
                    ]
        return frames.embeddings_frame(vectors)

    def samples_frame(self) -> pd.DataFrame:
        """One row per sample of what is studied: counts and flags, no text. Columns: `frames.SAMPLES`."""
        rows = [
            frames.sample_row(self, sample, seed, original)
            for benchmark in self.profile.benchmarks
            for seed in self.profile.seeds
            for sample, original in frames.with_original_order(self, benchmark, seed)
        ]
        return frames.outcomes_frame(rows, frames.SAMPLES)

    def examples(self, benchmark: str, seed: int = 0) -> dict[str, Synthesis]:
        """The synthetic examples stored for a benchmark, by sample id."""
        queries = [s.query for s in self.samples(benchmark, seed)]
        if not queries:
            return {}
        done = StoredStages(self, benchmark, seed, "direct", compute=False).synthesize(queries)
        return {i: d.value for i, d in done.items() if d.value is not None}

    def _each(
        self, benchmarks: Sequence[str] | None = None
    ) -> Iterator[tuple[str, int, list[Query], StoredStages]]:
        """Every benchmark and seed that can be had, with its queries and stages, which compute nothing."""
        for benchmark in benchmarks or self.profile.benchmarks:
            for seed in self.profile.seeds:
                if queries := [s.query for s in self.samples(benchmark, seed)]:
                    yield benchmark, seed, queries, StoredStages(self, benchmark, seed, "direct", False)

    def export(self, folder: str | Path) -> Path:
        """The folder, now holding this run and its variants, ready to be committed: see `results`."""
        return results.export(self, Path(folder))

    def plan(self) -> str:
        """What a run would do: samples, what is in the store, estimated minutes and disk. Loads no model."""
        return planning.plan(self)


def keep_models() -> None:
    """Has later studies of this process use the models that are loaded now, with what they know of prompts.

    For notebooks that run one after the other in one kernel: what comes first in each is then not charged
    with loading a model and with passes over prompts that it has read before.
    """
    _KEPT.update(_LIVE)


def commit() -> str:
    """This code's commit, `-dirty` where what computes differs from it; figures it replaces don't count."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    ask = partial(subprocess.run, capture_output=True, text=True, timeout=10)
    try:
        name = ask([*git, "describe", "--always", "--abbrev=12"], check=True).stdout.strip()
        code = ("ttsi", "study", "notebooks", "profiles")
        changed = ask([*git, "status", "--porcelain", "--", *code], check=True).stdout
        return f"{name}-dirty" if changed else name
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _threads(p: Profile) -> str:
    return f" ({p.threads} used)" if p.threads else ""


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    for line in cpu.read_text().splitlines() if cpu.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
