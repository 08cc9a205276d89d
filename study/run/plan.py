"""What a run would do and how long it would take: the same arms, over stages that compute nothing."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter

from study.analysis import paper
from study.run import arms
from study.run.arms import SCORES, Step
from study.run.config import Profile
from study.run.stages import Remembered
from study.run.store import settings_hash
from study.run.study import Study
from ttsi import estimator
from ttsi.stages import NOT_RUN, Adapted, Done, Fitted, Lesson
from ttsi.types import Example, Fit, Generation, Query, Synthesis, Uncertainty

T = TypeVar("T")

RATES = {
    "answer": 8.0,
    "answer votes": 10.0,
    "votes": 10.0,
    "score": 1.0,
    "whole": 8.0,
    "example": 10.0,
    "teacher answer": 8.0,
    "teacher example": 36.0,
    "shown": 8.0,
    "probe": 8.0,
    "adapted activated": 13.0,
    "adapted votes activated": 10.0,
    "adapted exact": 42.0,
    "adapted votes exact": 12.0,
    "shared activated": 10.0,
    "shared exact": 12.0,
    "fit activated": 3.8,
    "fit exact": 12.0,
}
"""Seconds per sample and stage with the 0.5B model, float32, 2 cores without bfloat16 instructions, prompts
like SealTool's; for `fit` per training sample and epoch, for the teacher's stages with the 1.5B model. From a
run that shared the machine; `shared exact` and `fit exact` are not measured."""
GPU_RATES = {
    "answer": paper.SECONDS["answer"],
    "answer votes": 5 * paper.SECONDS["answer"],
    "votes": 5 * paper.SECONDS["answer"],
    "score": paper.SECONDS["h"],
    "whole": 5 * paper.SECONDS["answer"],
    "example": paper.SECONDS["g"],
    "teacher answer": paper.SECONDS["answer"],
    "teacher example": paper.SECONDS["g"],
    "shown": paper.SECONDS["answer"],
    "probe": paper.SECONDS["answer"],
    "adapted exact": paper.SECONDS["t"] + paper.SECONDS["answer"],
    "adapted votes exact": 5 * paper.SECONDS["answer"],
    "shared exact": paper.SECONDS["answer"],
    "fit exact": paper.SFT_SECONDS / paper.SFT_SAMPLES / 3,
}
"""The same with a 1.5B model on one A40, one sample at a time: the paper's runtime table. Batches are faster;
by how much has not been measured."""
_RELATIVE_COST = {
    "tiny": 0.01,
    "smollm2-135m": 0.3,
    "qwen2.5-coder-1.5b": 3.0,
    "qwen2.5-1.5b": 3.0,
    "qwen2.5-7b": 14.0,
}
_DISK_GB = {
    "tiny": 0.01,
    "smollm2-135m": 0.5,
    "qwen2.5-coder-0.5b": 2.5,
    "qwen2.5-coder-1.5b": 5.5,
    "qwen2.5-1.5b": 3.1,
    "qwen2.5-7b": 15.2,
}
_GUESSED = (0.0, 1.0, 0.0, 1.0, 0.0)
"""Margins of questions that H was not asked yet: three in five are uncertain."""
_FIT = Fit((), (), 9, 1)
_REPLY = Generation("", (0,), (0.0,), True)
_STAND_INS: dict[str, Any] = {
    "answer": (_REPLY,),
    "shown": (_REPLY,),
    "probe": (_REPLY,),
    "example": Synthesis((Example("", (), 0.0),)),
    "adapted": Adapted(_FIT, (_REPLY,), 0.0, 0.0),
    "shared": Adapted(None, (_REPLY,), 0.0, 0.0),
    "fit": Fitted(_FIT, 0.0),
}
"""What is taken for the result of a stage that wasn't run: that it went well, so that what follows counts."""


@dataclass
class Line:
    """A stage as far as an arm is the first to ask for it: samples asked for and stored, seconds lacking."""

    asked: int = 0
    stored: int = 0
    seconds: float = 0.0

    def add(self, other: Line) -> None:
        """Counts another one's as well."""
        self.asked, self.stored = self.asked + other.asked, self.stored + other.stored
        self.seconds += other.seconds

    def text(self, name: str, unit: str) -> str:
        """The line of a plan."""
        return (
            f"  {name:48s} {self.asked:5.0f} {unit}, {self.stored:5.0f} stored, "
            f"about {self.seconds / 60:5.1f} min to compute"
        )


@dataclass
class Ledger:
    """Lines by stage and arm. counted: results that stand in a line already, of whatever variant."""

    lines: dict[str, Line] = field(default_factory=lambda: defaultdict(Line))
    counted: set[tuple[Any, ...]] = field(default_factory=set)


class DryRun(Remembered):
    """Stages that compute nothing: what is missing is counted, and something plausible stands in for it.

    rate: seconds for a result, by its label.
    """

    ledger: Ledger
    arm: str
    rate: Callable[[str], float]
    steps = 1
    """Training steps of the adapter that is shared next."""

    def score(self, queries: Sequence[Query]) -> dict[str, Done[Uncertainty]]:
        known = super().score(queries)
        order = {s.id: i for i, s in enumerate(self.study.samples(self.benchmark, self.method.seed))}
        guesses = [Done(Uncertainty(margin, ())) for margin in _GUESSED]
        return {i: d if d.value else guesses[order[i] % len(guesses)] for i, d in known.items()}

    def likelihood(self, reply: Generation) -> float:
        """Of a reply that wasn't given yet none; of others near enough, without a tokenizer."""
        return 0.0 if reply is _REPLY else estimator.likelihood(reply.log_probs)

    def share(
        self, queries: Sequence[Query], lesson: Lesson, epochs: int | None = None
    ) -> tuple[Done[Fitted], dict[str, Done[Adapted]]]:
        self.steps = (epochs or self.method.lora.epochs) * lesson.count
        return super().share(queries, lesson, epochs)

    def kept(
        self,
        stage: str,
        key: Mapping[str, Any],
        queries: Sequence[Query],
        kind: TypeAdapter[T],
        compute: Any,
        names: Mapping[str, Any] | None = None,
        label: str = "",
        **more: bool,
    ) -> dict[str, Done[T]]:
        before, self.lacking = self.lacking, set()
        found = super().kept(stage, key, queries, kind, None, names, label, **more)
        lacked, self.lacking = self.lacking, self.lacking | before
        label, name = label or stage, settings_hash(key)
        line = self.ledger.lines[f"{label} ({self.arm})"]
        for q in queries:
            result = (stage, name, repr(names[q.id]) if names else "", self.benchmark, self.method.seed, q.id)
            if result in self.ledger.counted:
                continue
            self.ledger.counted.add(result)
            line.asked += 1
            line.stored += q.id not in lacked
            line.seconds += (q.id in lacked) * self.rate(label) * (self.steps if stage == "fit" else 1)
        stand_in: Done[T] = Done(_STAND_INS.get(stage), NOT_RUN if stage not in _STAND_INS else "")
        return {i: d if d.value is not None else stand_in for i, d in found.items()}


def estimate(study: Study) -> str:
    """The plan in one line, for what runs a part of it: at most so long. Loads no model."""
    _, seconds = _lacking(study, set(study.profile.benchmarks))
    return (
        f"Estimated {_time(study.profile, seconds)} at most: all that profile {study.profile.name} still "
        f"lacks under these parameters, of which a notebook may want a part; results: {study.store.path}"
    )


def _time(p: Profile, seconds: float) -> str:
    if p.engine == "vllm":
        return f"{seconds / 3600:.0f} GPU-hours (at the paper's rates on an A40, one sample at a time)"
    return f"{seconds / 60:.0f} minutes"


def plan(study: Study, details: bool = False) -> str:
    """What a study and its variants lack, with minutes and disk. Loads no model.

    A line for each benchmark and each variant; with `details` one for each stage and the arm that asks first.
    """
    p = study.profile
    lines, seconds = _lacking(study, details=details)
    models = dict.fromkeys([p.model, *(v.model for v in map(p.variant, p.variants))])
    if isinstance(p.teacher, str):
        models[p.teacher] = None
    disk = sum(_DISK_GB.get(m, 1.5) for m in models)
    text = "\n".join(lines)
    counts = ", ".join(f"{b} {'all' if n is None else n}" for b, n in p.benchmarks.items())
    return (
        f"Plan of profile {p.name}: engine {p.engine}, model {p.model} ({study.dtype}), "
        f"teacher {p.teacher_name or 'none'}, arms {', '.join(p.arm_names)}, samples: {counts}, "
        f"seeds {p.seeds}\n"
        f"{text}\n"
        f"Estimated {_time(p, seconds)} after set-up and download; results: {study.store.path}\n"
        f"Disk: about {disk:.1f} GB for the models and their cache, "
        f"{shutil.disk_usage('.').free / 1e9:.0f} GB free"
    )


def _lacking(
    study: Study, only: Container[str] | None = None, details: bool = True
) -> tuple[list[str], float]:
    """A line for each stage of a study and its variants, and its seconds in all; `only` of benchmarks.

    Without details a line for each benchmark, and one for each variant.
    """
    lines, seconds = list[str](), 0.0
    counted: set[tuple[Any, ...]] = set()  # what a variant has in common with others counts once
    for part in (study, *map(study.variant, study.profile.variants)):
        whole = Line()
        if part.variant_name and details:
            lines.append(f"  variant {part.variant_name}")
        for benchmark in (b for b in part.profile.benchmarks if only is None or b in only):
            for seed in part.profile.seeds:
                if not part.samples(benchmark, seed):
                    why = part.missing.get(benchmark, "no sample asked for")
                    lines.append(f"  {benchmark}: missing. {why}")
                    continue
                here = Line()
                for what, line in _dry_run(part, benchmark, seed, counted).items():
                    here.add(line)
                    if details:
                        lines.append(line.text(f"{benchmark} seed {seed} {what}", "samples"))
                if not (details or part.variant_name):
                    lines.append(here.text(f"{benchmark} seed {seed}", "results"))
                whole.add(here)
                lines += [f"  {b}: {a} {why}" for (b, a), why in part.lacking.items() if b == benchmark]
        if part.variant_name and not details:
            lines.append(whole.text(f"variant {part.variant_name}", "results"))
        seconds += whole.seconds
    return list(dict.fromkeys(lines)) if not details else lines, seconds


def _dry_run(study: Study, benchmark: str, seed: int, counted: set[tuple[Any, ...]]) -> dict[str, Line]:
    """What a benchmark's arms and estimators ask for, by stage and the arm that asks first."""
    ledger, queries = Ledger(counted=counted), [s.query for s in study.samples(benchmark, seed)]

    def dry(step: Step, name: str) -> DryRun:
        stages = DryRun(study, benchmark, seed, study.stages(benchmark, seed, step).method)
        stages.ledger, stages.arm, stages.rate = ledger, name, _rates(study, queries)
        return stages

    for phase in arms.phases(list(study.selections(None, benchmark, seed))):
        for step in (s for steps, _ in phase for s in steps):
            name = f"{step.arm} {step.size}" if step.size else step.arm
            arms.play(step.arm, dry(step, name), queries, study.about(benchmark, seed, step))
    if study.profile.estimators_of(benchmark) or not study.profile.arms_of(benchmark):
        study.ask_scores(dry(SCORES, "estimators"), queries)
    return {what: line for what, line in ledger.lines.items() if line.asked}


def _rates(study: Study, queries: Sequence[Query]) -> Callable[[str], float]:
    """Seconds for a result, by its label, of these queries on a machine like that of the rates."""
    p, weight = study.profile, max(1.0, sum(len(q.tools) for q in queries) / len(queries) / 5)

    def rate(label: str) -> float:
        model = _RELATIVE_COST.get(p.model, 1.0)
        if label.startswith("teacher"):
            model = 1.0
            if isinstance(p.teacher, str):
                model = _RELATIVE_COST.get(p.teacher, 1.0) / _RELATIVE_COST["qwen2.5-coder-1.5b"]
        elif p.engine == "vllm":  # whose rates are those of a model three times as large
            model /= 3
        stage = label.replace("+shown", "").split(" name")[0]
        return (GPU_RATES if p.engine == "vllm" else RATES)[stage] * model * weight

    return rate
