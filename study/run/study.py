"""What to run, and running it: samples through arms, every stage result kept.

`open_study` is all a notebook needs: `run` computes what is missing, `records` and its like select.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from study.data import benchmarks, pools, sources
from study.data.models import TINY, model_dir
from study.run import arms, engines, provenance, results
from study.run.arms import ARMS, EMBEDDINGS, SCORES, Step, Work
from study.run.config import Profile, load_profile
from study.run.lessons import About
from study.run.reading import Reading
from study.run.stages import Remembered
from study.run.store import Store
from ttsi.algorithm import Outcome
from ttsi.engines.base import native_dtype
from ttsi.engines.chat import Chat
from ttsi.stages import Done, Trained
from ttsi.types import Query, Sample

if TYPE_CHECKING:
    from study.run.ray import RayExecutor
    from study.run.results import Results


class Played(NamedTuple):
    """What an arm came to, and the samples that something it asked for was lacking of ("*": of many)."""

    outcomes: list[Outcome]
    lacking: set[str]


def open_study(profile: str, source: str | Path | None = None, **overrides: Any) -> Study | Results:
    """A study to run, or with `source` (a folder of committed results) one to read: no model, no data files.

    Both answer `records`, `scores`, `examples_frame`, `embeddings_frame`, `header` and `variant` alike; on
    results `run` and `score` do nothing. A run that overrides change is filed under a name of its own, and
    leaves the profile's tables and figures alone: TTSI_NAME, or `<profile>-changed`. Raises ValueError for
    unknown settings, a folder without results, and one with the results of another profile.
    """
    opened: Study | Results
    if source:
        folder = sources.found(source)
        whole, opened = results.Results(folder).profile, results.Results.under(folder, overrides)
        if (asked := Path(profile).stem) != whole.name:
            raise ValueError(f"{source} holds results of {whole.name}, not {asked}: source=None runs {asked}")
    else:
        whole, opened = load_profile(profile), Study(profile, **overrides)
    changed = whole.name if opened.profile == whole else f"{whole.name}-changed"
    opened.profile = opened.profile.named(os.environ.get("TTSI_NAME") or changed)
    return opened


class Study(Reading):
    """One profile's run: its samples, its store, its models (loaded when first needed)."""

    def __init__(
        self, profile: Profile | str, *, of: Study | None = None, store: Store | None = None, **overrides: Any
    ) -> None:
        self.profile = load_profile(profile, **overrides) if isinstance(profile, str) else profile
        for name in self.profile.files.keys() & self.profile.benchmarks.keys():
            benchmarks.add(name, Path(self.profile.files[name]))
            if name in self.profile.pools:
                pools.add(name, Path(self.profile.pools[name]))
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
        self.adapters: dict[Any, Done[Trained]] = {}
        self.at_work: frozenset[str] | None = None
        self._samples: dict[tuple[str, int], list[Sample]] = {}

    @property
    def folder(self) -> Path:
        """Where this run's store and adapters lie."""
        return sources.runs_dir() / (self.profile.store or self.profile.name)

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
                    benchmark, p.benchmarks.get(benchmark), p.tool_order, seed, p.keep_components
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
            if isinstance(p.teacher, str) and any(ARMS[a].teacher for a in p.arm_names if a in ARMS):
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
    def chat(self) -> Chat:
        """The model's tokens and their text; its weights are not loaded for it."""
        if self._of and self.profile.model == self._of.profile.model:
            return self._of.chat
        from transformers import AutoTokenizer

        return Chat(AutoTokenizer.from_pretrained(model_dir(self.profile.model), trust_remote_code=False))

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
        return engines.load(self.profile, model, self.dtype)

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
        return provenance.context(self.profile, self.dtype)

    def header(self) -> str:
        """Versions, model and run as one Markdown paragraph, for the top of a notebook."""
        return provenance.header(self.profile, self.dtype, self.context, self.store.machines())

    # --- what is to be done -----------------------------------------------------------------------------

    def selections(self, names: Sequence[str] | None, benchmark: str, seed: int) -> Iterator[Step]:
        """What can be run, in the order of `ARMS`."""
        self._check(names)
        p = self.profile
        own = [a for a in p.arms_of(benchmark) if names is None or a in names]
        for name in (a for a in ARMS if a in own):
            if (why := self._obstacle(name, benchmark, seed)) is not None:
                self.lacking[benchmark, name] = why
                continue
            arm, modes = ARMS[name], p.modes_of(benchmark)
            for mode in (modes if arm.every_mode else modes[:1]) if arm.trains else [None]:
                for inference in p.inference if arm.voted else ["direct"]:
                    for size in p.ood_sizes if name == "sft_ood" else [0]:
                        yield Step(name, mode, inference, size)

    def _check(self, names: Sequence[str] | None) -> None:
        for arm in [*(names or []), *self.profile.arm_names]:
            if arm not in ARMS:
                raise ValueError(f"no arm {arm!r}; there are {', '.join(ARMS)}")

    def _obstacle(self, name: str, benchmark: str, seed: int) -> str | None:
        """Why an arm can't be run on a benchmark; None = it can."""
        if ARMS[name].teacher and self.profile.teacher is None:
            return "the profile names no teacher"
        kind = ARMS[name].pool
        if kind is None or not self.samples(benchmark, seed):
            return None
        try:
            pools.load(benchmark, kind, self.profile.sft_calls if kind == "in" else "all", seed)
        except pools.NoPool as reason:
            return str(reason).partition(": ")[2]
        except sources.Unavailable as reason:
            return str(reason)
        return None

    def phases(self, names: Sequence[str] | None, benchmark: str, seed: int) -> Iterator[list[Work]]:
        """What the arms still lack, phase by phase, as it is when a phase's turn comes."""
        for parts in arms.phases(list(self.selections(names, benchmark, seed))):
            yield [w for steps, whole in parts for w in self.work(steps, benchmark, seed, whole)]

    def work(self, steps: Sequence[Step], benchmark: str, seed: int, whole: bool = False) -> list[Work]:
        """What steps still lack, by the fixed groups of the permutation or as one."""
        queries = self._queries(benchmark, seed)
        left = {s: self.play(s, queries, benchmark, seed, False).lacking for s in steps}
        size = len(queries) if whole else self.profile.batch
        out = []
        for i in range(0, len(queries), max(1, size)):
            group = tuple(q.id for q in queries[i : i + size])
            lacked = tuple(s for s in steps if left[s].intersection(group) or (whole and left[s]))
            out += [Work(benchmark, seed, lacked, group, whole)] if lacked else []
        return out

    # --- doing it ---------------------------------------------------------------------------------------

    def run(self, arms: Sequence[str] | None = None, benchmarks: Sequence[str] | None = None) -> None:
        """Computes what the arms still lack; a killed run goes on where it stopped.

        arms: those of the profile's to run, by default all of them. Group by group the arms are run that
        need nothing but the group, so that they share its adapters and what the engine keeps of its prompts;
        then the others.
        """
        self._check(arms)
        try:
            self._compute(self.phases(arms, b, seed) for b, seed in self._pairs(benchmarks))
        finally:
            self.release()

    def score(self, benchmarks: Sequence[str] | None = None) -> None:
        """Computes what the estimators lack: base answers, H's scores, and what the profile asks beyond."""
        self._compute([self.work([SCORES], b, seed)] for b, seed in self._pairs(benchmarks))

    def embed(self, benchmarks: Sequence[str] | None = None) -> None:
        """Computes where the questions, and those written after them, lie in the model's hidden states."""
        self._compute([self.work([EMBEDDINGS], b, seed)] for b, seed in self._pairs(benchmarks))

    def _compute(self, runs: Iterable[Iterable[list[Work]]]) -> None:
        """Has phases of work done, those of each run one after the other."""
        if self.executor:
            return self.executor.compute(self, runs)
        for phases in runs:
            for phase in phases:
                steps = " ".join(dict.fromkeys(s.arm for w in phase for s in w.steps))
                for work in tqdm(
                    phase,
                    desc=f"{phase[0].benchmark} {steps}" if phase else "",
                    unit="batch",
                    disable=not phase,
                ):
                    self.do(work)

    def do(self, work: Work) -> None:
        """Computes what a piece of work lacks. The adapters of its samples live until its steps are done."""
        self.at_work = frozenset(work.samples)
        queries = [q for q in self._queries(work.benchmark, work.seed) if q.id in self.at_work]
        try:
            for step in work.steps:
                self.play(step, queries, work.benchmark, work.seed, True)
        finally:
            self.adapters.clear()
            self.at_work = None

    def play(
        self, step: tuple[Any, ...], queries: Sequence[Query], benchmark: str, seed: int, compute: bool
    ) -> Played:
        """What a step's results for the queries come to; with `compute` those that are missing are made."""
        step = Step(*step)
        stages = self.stages(benchmark, seed, step, compute)
        if step in (SCORES, EMBEDDINGS):
            if queries:
                self.ask_scores(stages, queries) if step == SCORES else self._embeddings(stages, queries)
            return Played([], stages.lacking)
        return Played(arms.play(step.arm, stages, queries, self.about(benchmark, seed, step)), stages.lacking)

    def stages(self, benchmark: str, seed: int, step: Step = SCORES, compute: bool = False) -> Remembered:
        """The stages of a benchmark as a step asks for them; by default they compute nothing."""
        method = self.profile.method(step.mode or "exact", voted=step.inference != "direct")
        return Remembered(self, benchmark, seed, method, compute)

    def about(self, benchmark: str, seed: int, step: Step) -> About:
        """What an arm of this run may learn from and spend."""
        p, samples = self.profile, {s.id: s for s in self.samples(benchmark, seed)}
        return About(p.sft_samples, p.sft_calls, p.sft_epochs, step.size or 1, p.max_votes, samples)

    def ask_scores(self, stages: Remembered, queries: Sequence[Query]) -> None:
        """Asks stages for what the profile's estimators need."""
        wanted = self.profile.estimators_of(stages.benchmark)
        stages.answer(queries)
        stages.score(queries)
        if "whole" in wanted:
            stages.scored(queries, "name+opening")
            stages.whole(queries)
        if "votes" in wanted:
            stages.under(answering=stages.voting).answer(queries)

    def _embeddings(self, stages: Remembered, queries: Sequence[Query]) -> None:
        stages.embed(queries)
        kept = self.examples(stages.benchmark, stages.method.seed)
        written = [q for q in queries if q.id in kept and not kept[q.id].failed]
        stages.embed(written, stages.written_questions)
