"""What a run would do and how long it would take. Loads no model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ttsi import arms, pools
from ttsi.arms import ARMS
from ttsi.stages import StoredStages
from ttsi.types import Query

if TYPE_CHECKING:
    from ttsi.study import Study

RATES = {
    "answer": 5.0,
    "answer votes": 20.0,
    "votes": 40.0,
    "score": 2.0,
    "whole": 15.0,
    "example": 5.0,
    "teacher answer": 15.0,
    "teacher example": 15.0,
    "shown": 6.0,
    "adapted activated": 9.0,
    "adapted exact": 18.0,
    "shared activated": 5.0,
    "shared exact": 8.0,
    "fit activated": 1.5,
    "fit exact": 4.0,
}
"""Seconds per sample and stage with the 0.5B model, float32, 2 cores, SealTool-sized prompts; for `fit` per
training sample and epoch, for the teacher's stages with the 1.5B model."""
_RELATIVE_COST = {"tiny": 0.01, "smollm2-135m": 0.3, "qwen2.5-coder-1.5b": 3.0}
_DISK_GB = {"tiny": 0.01, "smollm2-135m": 0.5, "qwen2.5-coder-0.5b": 2.5, "qwen2.5-coder-1.5b": 5.5}
_UNCERTAIN = 0.6
_OWN = {"tt_si", "tt_si_all", "tt_si_certain", "random_subset", "self_consistency"}
"""Arms whose adapters are trained on the sample's own example: what one of them has done the others have."""


@dataclass
class _Need:
    """A stage: the samples it is for, those it has, seconds for each. `once`: one adapter for them all."""

    rate: float
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
    planned: set[tuple[str, str, int, str]] = set()  # what a variant has in common with others counts once
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
                    asked = need.samples(total, uncertain)
                    stored = min(len(need.stored), asked)
                    cost = (asked - stored) * need.rate
                    seconds += cost
                    lines.append(
                        f"  {benchmark} seed {seed} {stage:32s} {asked:5.0f} samples, {stored:5.0f} stored, "
                        f"about {cost / 60:5.1f} min to compute"
                    )
                lines += [f"  {b}: {a} {why}" for (b, a), why in part.lacking.items() if b == benchmark]
    models = dict.fromkeys([p.model, *(v.model for v in map(p.variant, p.variants))])
    if isinstance(p.teacher, str):
        models[p.teacher] = None
    disk = sum(_DISK_GB.get(m, 1.5) for m in models)
    text = "\n".join(lines)
    return (
        f"Plan of profile {p.name}: model {p.model} ({study.dtype}), arms {', '.join(p.arm_names)}\n{text}\n"
        f"Estimated {seconds / 60:.0f} minutes after set-up and download; results: {study.store.path}\n"
        f"Disk: about {disk:.1f} GB for the models and their cache, "
        f"{shutil.disk_usage('.').free / 1e9:.0f} GB free"
    )


def _needs(
    study: Study,
    benchmark: str,
    seed: int,
    queries: Sequence[Query],
    planned: set[tuple[str, str, int, str]],
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
        rate = RATES[label.replace("+shown", "")] * model * weight * units
        stage = label.replace("answer votes", "answer")
        learnt = (
            sorted(stages.settings.get("example", set())) if stage.startswith(("adapted", "shown")) else []
        )
        keys = {(name, benchmark, seed, "".join([k, *learnt])) for k in stages.settings.get(stage, set())}
        if name not in needs:
            if not (new := keys - planned):
                return
            needs[name] = _Need(rate * len(new), once=share == "once")
            planned.update(new)
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
