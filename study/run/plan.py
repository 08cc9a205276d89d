"""What a run would do and how long it would take. Loads no model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from study.analysis.tables import paper
from study.data import pools
from study.run import arms
from study.run.arms import ARMS
from study.run.stages import StoredStages
from ttsi.types import Query

if TYPE_CHECKING:
    from study.run.study import Study

RATES = {
    "answer": 8.0,
    "answer votes": 10.0,
    "votes": 20.0,
    "score": 1.0,
    "whole": 8.0,
    "example": 10.0,
    "teacher answer": 8.0,
    "teacher example": 36.0,
    "shown": 8.0,
    "adapted activated": 13.0,
    "adapted exact": 42.0,
    "shared activated": 10.0,
    "shared exact": 12.0,
    "fit activated": 3.8,
    "fit exact": 12.0,
}
"""Seconds per sample and stage with the 0.5B model, float32, 2 cores without bfloat16 instructions, prompts
like SealTool's; for `fit` per training sample and epoch, for the teacher's stages with the 1.5B model. From a
run of profile `cpu` that shared the machine; `shared exact` and `fit exact` are not measured."""
GPU_RATES = {
    "answer": paper.SECONDS["answer"],
    "answer votes": 5 * paper.SECONDS["answer"],
    "votes": 10 * paper.SECONDS["answer"],
    "score": paper.SECONDS["h"],
    "whole": 5 * paper.SECONDS["answer"],
    "example": paper.SECONDS["g"],
    "teacher answer": paper.SECONDS["answer"],
    "teacher example": paper.SECONDS["g"],
    "shown": paper.SECONDS["answer"],
    "adapted exact": paper.SECONDS["t"] + paper.SECONDS["answer"],
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
_UNCERTAIN = 0.6
_OWN = {"tt_si", "tt_si_all", "tt_si_certain", "random_subset", "self_consistency"}
"""Arms whose adapters are trained on the sample's own example: what one of them has done the others have."""


@dataclass
class _Need:
    """A stage: the samples it is for, those it has, seconds for each.

    before: so many of them are planned elsewhere. once: one adapter for them all.
    """

    rate: float
    before: int = 0
    shares: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    once: bool = False

    def samples(self, total: int, uncertain: float) -> float:
        if self.once:
            return 1
        if "all" in self.shares or {"uncertain", "certain"} <= self.shares:
            return total
        return uncertain if "uncertain" in self.shares else total - uncertain


def plan(study: Study) -> str:
    """Stages × samples × seeds of a study and its variants, with minutes and disk, as text."""
    p, lines, seconds = study.profile, [], 0.0
    planned: dict[tuple[str, str, int, str], int] = {}  # what a variant has in common with others counts once
    for part in (study, *map(study.variant, p.variants)):
        if part.variant_name:
            lines.append(f"  variant {part.variant_name}")
        for benchmark in part.profile.benchmarks:
            for seed in part.profile.seeds:
                queries = [s.query for s in part.samples(benchmark, seed)]
                if not queries:
                    lines.append(
                        f"  {benchmark}: missing. {part.missing.get(benchmark, 'no sample asked for')}"
                    )
                    continue
                total, uncertain, needs = _needs(part, benchmark, seed, queries, planned)
                for stage, need in needs.items():
                    asked = max(0, need.samples(total, uncertain) - need.before)
                    stored = min(max(0, len(need.stored) - need.before), asked)
                    cost = (asked - stored) * need.rate
                    seconds += cost
                    what = f"{benchmark} seed {seed} {stage}"
                    lines.append(
                        f"  {what:48s} {asked:5.0f} samples, {stored:5.0f} stored, "
                        f"about {cost / 60:5.1f} min to compute"
                    )
                lines += [f"  {b}: {a} {why}" for (b, a), why in part.lacking.items() if b == benchmark]
    models = dict.fromkeys([p.model, *(v.model for v in map(p.variant, p.variants))])
    if isinstance(p.teacher, str):
        models[p.teacher] = None
    disk = sum(_DISK_GB.get(m, 1.5) for m in models)
    text = "\n".join(lines)
    time = f"{seconds / 60:.0f} minutes"
    if p.engine == "vllm":
        time = f"{seconds / 3600:.0f} GPU-hours (at the paper's rates on an A40, one sample at a time)"
    counts = ", ".join(f"{b} {'all' if n is None else n}" for b, n in p.benchmarks.items())
    return (
        f"Plan of profile {p.name}: engine {p.engine}, model {p.model} ({study.dtype}), "
        f"teacher {p.teacher_name or 'none'}, arms {', '.join(p.arm_names)}, samples: {counts}, "
        f"seeds {p.seeds}\n"
        f"{text}\n"
        f"Estimated {time} after set-up and download; results: {study.store.path}\n"
        f"Disk: about {disk:.1f} GB for the models and their cache, "
        f"{shutil.disk_usage('.').free / 1e9:.0f} GB free"
    )


def _needs(
    study: Study,
    benchmark: str,
    seed: int,
    queries: Sequence[Query],
    planned: dict[tuple[str, str, int, str], int],
) -> tuple[int, float, dict[str, _Need]]:
    """(samples, how many of them are uncertain as far as is known, stages in the order they run)."""
    p = study.profile
    total = len(queries)
    scored = StoredStages(study, benchmark, seed, "direct", compute=False).score(queries)
    known = [d.value.margin < p.tau for d in scored.values() if d.value]
    uncertain = sum(known) + _UNCERTAIN * (total - len(known))
    weight = max(1.0, sum(len(q.tools) for q in queries) / total / 5)
    needs: dict[str, _Need] = {}

    def add(name: str, label: str, share: str, stages: StoredStages, units: float = 1.0) -> None:
        model = 1.0 if label.startswith("teacher") else _RELATIVE_COST.get(p.model, 1.0)
        if label.startswith("teacher") and isinstance(p.teacher, str):
            model = _RELATIVE_COST.get(p.teacher, 1.0) / _RELATIVE_COST["qwen2.5-coder-1.5b"]
        rates = RATES
        if p.engine == "vllm":  # of a model three times as large
            rates, model = GPU_RATES, model if label.startswith("teacher") else model / 3
        rate = rates[label.replace("+shown", "")] * model * weight * units
        stage = label.replace("answer votes", "answer")
        learnt = (
            sorted(stages.settings.get("example", set())) if stage.startswith(("adapted", "shown")) else []
        )
        keys = {(name, benchmark, seed, "".join([k, *learnt])) for k in stages.settings.get(stage, set())}
        if name not in needs:
            if not (new := {k for k in keys if planned.get(k, 0) < total}):
                return
            before = max(planned.get(k, 0) for k in new)
            needs[name] = _Need(rate * len(new), before, once=share == "once")
            planned.update(dict.fromkeys(new, total))
        need = needs[name]
        need.shares.add(share)
        need.stored |= stages.stored(stage)
        if label.startswith(("adapted", "shown")):  # what G failed at needs no more
            written = stages.stored("example") | stages.stored("teacher example")
            need.stored |= written - stages.asked.get(label, set())

    for arm, mode, inference, size in study.selections(None, benchmark, seed):
        stages = StoredStages(study, benchmark, seed, inference, False, arm)
        setting = study.setting(mode, seed, size)
        arms.play(arm, stages, queries, setting, {s.id: s for s in study.samples(benchmark, seed)})
        for stage, share in ARMS[arm].needs:
            label = f"{stage} {mode}" if stage.startswith(("adapted", "shared", "fit")) else stage
            units = _trained_on(study, arm, benchmark, seed, size, uncertain) if share == "once" else 1.0
            name = label
            if label == "answer" and inference != "direct":
                name = label = "answer votes"
            elif stage in ("adapted", "shown", "shared", "fit") and arm not in _OWN:
                name = f"{label} ({arm}{f' {size}' if size else ''})"
            elif inference != "direct":
                continue  # had from the same adapters
            add(name, label, share, stages, units)
    if not study.profile.arms_of(benchmark):  # H alone is asked for
        stages = StoredStages(study, benchmark, seed, "direct", compute=False)
        stages.answer(queries)
        stages.score(queries)
        add("answer", "answer", "all", stages)
        add("score", "score", "all", stages)
    for extra in p.estimators_of(benchmark):
        votes = extra == "votes"
        stages = StoredStages(study, benchmark, seed, "majority" if votes else "direct", compute=False)
        (stages.answer if votes else stages.whole)(queries)
        add("answer votes" if votes else extra, "answer votes" if votes else extra, "all", stages)
    return total, uncertain, needs


def _trained_on(study: Study, arm: str, benchmark: str, seed: int, size: int, uncertain: float) -> float:
    """Steps of the adapter that an arm shares: training samples × epochs."""
    p = study.profile
    if arm in ("generic", "amortised"):
        return p.epochs * (1 if arm == "generic" else uncertain)
    kind, calls = ("in", p.sft_calls) if arm == "sft" else ("out", "all")
    pool = len(pools.load(benchmark, kind, calls, seed))  # type: ignore[arg-type]
    return (p.sft_epochs or p.epochs) * min(pool, size or p.sft_samples or pool)
