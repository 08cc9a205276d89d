"""Whether committed results come out again: a random part of them, computed on this machine from nothing.

A seed puts each benchmark's samples in an order. Round by round every arm, of every model and variant, takes
its next few samples of that order, what trains after what doesn't: however few the minutes, they reach
everywhere before they go deep, and arms have samples, and so stages, in common.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from study.analysis.reproduction import Frames, conclusion, pair, problems
from study.data import sources
from study.data.downloads import say
from study.data.models import TINY, model_hash
from study.run import frames, provenance
from study.run.arms import ARMS, SCORES, Answers, Step
from study.run.config import Profile
from study.run.keys import identity
from study.run.results import STAGES, about
from study.run.store import Store, settings_hash
from study.run.study import Study
from ttsi.seeds import seed_for
from ttsi.types import Query, Sample

ROUNDS = (0, 1, 4)
"""Samples of a cell after the first rounds; from there on group by group."""
NEEDS_ALL = "needs all samples at once: only a whole run (FROM= empty) computes it"
_NOBODY: dict[str, Any] = {
    "context": {"machine": "", "dtype": ""}, "models": {}, "elsewhere": False, "why": {},
}  # fmt: skip
_STAGES = ("stage", "settings", "benchmark", "sample", "seed", "value")
_ROWS = """SELECT r.stage, s.json AS settings, r.benchmark, r.sample, r.seed, r.value
    FROM result r JOIN settings s ON s.hash = r.settings WHERE r.status = 'ok'"""


def read(folder: Path) -> Frames:
    """The frames of an exported, or of a recomputed, run. Raises ValueError if the folder holds none."""
    made = about(folder)
    whole = Profile.model_validate(made["profile"])
    names: dict[str, str] = {}
    elsewhere = False
    for p in (whole, *map(whole.variant, whole.variants)):
        if isinstance(p.teacher, dict):
            names[identity(p.teacher)] = p.teacher_name
        for model in {p.model, p.teacher} if not isinstance(p.teacher, dict) else {p.model}:
            try:
                names |= {model_hash(model): model} if model else {}
            except sources.Unavailable:  # a folder on the machine that ran it
                elsewhere = True
    stages = pd.read_parquet(folder / STAGES)
    given = {text: json.loads(text).get("model", "") for text in set(stages["settings"])}
    models = [names.get(given[text], given[text][:12]) for text in stages["settings"]]
    records, scores = (pd.read_parquet(folder / f"{name}.parquet") for name in ("records", "scores"))
    made |= {"models": names, "elsewhere": elsewhere}
    return Frames(records, scores, stages.assign(model=models), made)


def both(source: str | Path | None, recomputed: str | Path | None = None) -> tuple[Frames, Frames]:
    """A committed run, and what was recomputed of it: by this machine, or as it lies in another folder.

    Frames without rows stand for what isn't there.
    """
    if source is None:
        columns = frames.RECORDS, frames.SCORES, [*_STAGES, "model"]
        records, scores, stages = (pd.DataFrame(columns=list(of)) for of in columns)
        none = Frames(records, scores, stages, _NOBODY)
        return none, none
    committed = read(Path(source))
    folder = Path(recomputed or sources.runs_dir() / committed.about["profile"]["name"] / "recomputed")
    if (folder / "header.json").is_file():
        return committed, read(folder)
    records, scores, stages = (table.iloc[:0] for table in committed[:3])
    return committed, Frames(records, scores, stages, _NOBODY)


@dataclass(frozen=True)
class Cell:
    """One arm of a run (or H, as `SCORES`) on one benchmark, as far as it is committed.

    ids: its samples in the drawn order. seconds: what each took then; once: what came before the first.
    """

    benchmark: str
    seed: int
    step: Step
    ids: tuple[str, ...]
    seconds: float
    once: float = 0.0

    @property
    def trains(self) -> bool:
        """Whether it trains."""
        return self.step != SCORES and ARMS[self.step.arm].trains

    def rounds(self, batch: int) -> Iterator[tuple[str, ...]]:
        """Its samples, round by round."""
        for low, high in pairwise(
            [*(r for r in ROUNDS if r < batch), *range(batch, len(self.ids) + batch, batch)]
        ):
            if low < len(self.ids):
                yield self.ids[low:high]


class Part(Study):
    """A study whose samples come in a drawn order, so that any first few of them are a random part."""

    draw = 0

    def __init__(self, profile: Profile, **of: Any) -> None:
        super().__init__(profile, **of)
        self.loaded: dict[tuple[str, str], Any] = {}
        self.cells: list[Cell] = []

    def variant(self, name: str) -> Part:
        """The part of the run beside this one; store and models are shared."""
        part = Part(self.profile.variant(name), of=self)
        part.variant_name, part.draw, part.loaded = name, self.draw, self.loaded
        return part

    def samples(self, benchmark: str, seed: int) -> list[Sample]:
        """The benchmark's samples in the drawn order, which is the same for all arms and models."""
        if (benchmark, seed) not in self._samples:
            samples = super().samples(benchmark, seed)
            samples.sort(key=lambda s: seed_for(self.draw, benchmark, s.id, "reproduction"))
        return self._samples[benchmark, seed]

    def _load(self, model: str) -> Any:
        """A model, once for all parts: one's teacher may be another's own."""
        key = model, self.dtype
        if key not in self.loaded:
            self.loaded[key] = super()._load(model)
        return self.loaded[key]

    def plan(self, committed: Frames) -> dict[str, str]:
        """Sets `cells`, one for everything that is committed and can be recomputed in part; why others can't.

        The reasons stand under the name of a benchmark, an arm or "benchmark arm".
        """
        why = {}
        records, scores = (
            t[t["variant"] == self.variant_name] for t in (committed.records, committed.scores)
        )
        for benchmark, seed in self._pairs():
            rows, known = (t[(t["benchmark"] == benchmark) & (t["seed"] == seed)] for t in (records, scores))
            for step in self.selections(None, benchmark, seed):
                arm = ARMS[step.arm]
                is_it = (rows["arm"] == step.arm) & (rows["mode"] == (step.mode or "none"))
                is_it &= (rows["inference"] == step.inference) & (rows["status"] == "ok")
                mine = rows[is_it & (rows["pool_n"] == step.size)] if step.size else rows[is_it]
                if arm.mixed:
                    why[step.arm] = NEEDS_ALL
                elif len(mine):
                    each = mine[[f"seconds_{s}" for s in ("h", "g", "t", "answer")]].sum(axis=1).mean()
                    once = mine["seconds_fit"].fillna(0).max()
                    self.cells.append(
                        Cell(benchmark, seed, step, self._drawn(mine, benchmark, seed), each, once)
                    )
            if len(known):
                of = committed.stages[committed.stages["benchmark"] == benchmark].groupby("stage")["seconds"]
                each = of.mean().reindex(["answer", "score", "whole"]).sum()
                self.cells.append(Cell(benchmark, seed, SCORES, self._drawn(known, benchmark, seed), each))
        self.cells.sort(key=lambda cell: cell.seconds + cell.once)
        return why | self.missing | {f"{b} {arm}": reason for (b, arm), reason in self.lacking.items()}

    def _drawn(self, rows: pd.DataFrame, benchmark: str, seed: int) -> tuple[str, ...]:
        ids = set(rows["sample"])
        return tuple(s.id for s in self.samples(benchmark, seed) if s.id in ids)

    def compute(self, number: int, trains: bool, until: float) -> None:
        """A round of the cells that train, or don't, benchmark by benchmark, as far as there is time."""
        for where in dict.fromkeys((c.benchmark, c.seed) for c in self.cells):
            if (left := until - time.monotonic()) <= 0:
                break
            queries, due = {q.id: q for q in self._queries(*where)}, []
            for cell in (c for c in self.cells if (c.benchmark, c.seed) == where and c.trains == trains):
                ids = dict(enumerate(cell.rounds(self.profile.batch))).get(number, ())
                asked = [queries[i] for i in ids]
                if self.play(cell.step, asked, *where, False).lacking:
                    due.append((cell, asked, cell.seconds * len(ids) + cell.once * (number == 0)))
            if any(seconds < left for _, _, seconds in due):
                arms = " ".join(dict.fromkeys(c.step.arm for c, _, seconds in due if seconds < left))
                of = f"{self.profile.model} {self.variant_name}".strip()
                say(f"{left / 60:.1f} min left: {where[0]}, {of}, round {number + 1}: {arms}")
            for cell, asked, seconds in due:
                if until - time.monotonic() > seconds:
                    self.at_work = frozenset(q.id for q in asked)
                    self.play(cell.step, asked, *where, True)
            # An adapter lives until the arms of its samples are done.
            self.adapters.clear()
        self.at_work = None

    def frames(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of `records` and of `scores`, of the rounds that are complete.

        Of one that was cut, known are first those samples that nothing had to be computed for.
        """
        records, scores = [], []
        for cell in self.cells:
            samples = {s.id: s for s in self.samples(cell.benchmark, cell.seed)}
            if cell.step == SCORES:
                stages = self.stages(cell.benchmark, cell.seed)
                scores += frames.scores(self.run_rows, [samples[i] for i in cell.ids], stages)
                continue
            for ids in cell.rounds(self.profile.batch):
                queries: list[Query] = [samples[i].query for i in ids]
                done = self.play(cell.step, queries, cell.benchmark, cell.seed, False).outcomes
                if not all(map(frames.known, done)):
                    break
                rows = [frames.record(self.run_rows, samples[o.id], o, cell.step, cell.seed) for o in done]
                records += [row | {"settings": self._settings(cell)} for row in rows]
        return records, scores

    def _settings(self, cell: Cell) -> str:
        """What the replies are stored under, of an arm that neither trains nor draws any; else ""."""
        arm = ARMS[cell.step.arm]
        stages = self.stages(cell.benchmark, cell.seed, cell.step).under(**arm.under)
        if not isinstance(arm.whom, Answers) or arm.whom.priced or stages.method.answering.temperature:
            return ""
        key = stages.keys.answer(stages.method.answering, "teacher" if arm.teacher else "self")
        return json.dumps(key, sort_keys=True, ensure_ascii=False)


def recompute(source: Path, minutes: float, draw: int = 0) -> Path:
    """Folder of what this machine recomputed of the run in `source`, read by `read`.

    draw: the seed of the samples' order. Nothing of the committed run is used but which samples it has. What
    the same code, versions and machine recomputed before is gone on from; of changed code nothing is kept.
    Models and data that can't be had are named, and what needs them is left out.
    """
    committed = read(source)
    p = Profile.model_validate(committed.about["profile"] | {"dtype": committed.about["context"]["dtype"]})
    p = p.model_copy(update={"estimators": _estimators(committed.scores)})
    context = provenance.context(p, p.dtype)
    folder = sources.runs_dir() / p.name / "recomputed"
    home = folder / settings_hash(context)
    if context["commit"].endswith(("dirty", "unknown")):
        shutil.rmtree(home, ignore_errors=True)
    study = Part(p, store=Store(home / "store.sqlite", context))
    study.draw = draw
    parts = [study, *map(study.variant, p.variants)]
    why: dict[str, str] = {}
    for part in parts:
        why |= part.plan(committed)
    needed = {model for part in parts for cell in part.cells for model in _models(part, cell)}
    lacking = sources.fetch(sorted(needed - {TINY}))
    for part in parts:
        part.cells = [c for c in part.cells if not lacking.keys() & _models(part, c)]
    models = sorted({part.profile.model for part in parts})
    until = time.monotonic() + 60 * minutes
    for number in range(max((len(list(c.rounds(p.batch))) for part in parts for c in part.cells), default=0)):
        for trains in (False, True):
            for part in (part for model in models for part in parts if part.profile.model == model):
                part.compute(number, trains, until)
            models.reverse()  # the model that is at work goes on
    made = [part.frames() for part in parts]
    for name, columns, at in (("records", [*frames.RECORDS, "settings"], 0), ("scores", frames.SCORES, 1)):
        table = frames.outcomes_frame([row for of in made for row in of[at]], columns)
        table.to_parquet(folder / f"{name}.parquet")
    with closing(sqlite3.connect(f"file:{study.store.path}?mode=ro", uri=True)) as db:
        pd.read_sql_query(_ROWS, db).to_parquet(folder / STAGES)
    more = {"profile": p.model_dump(), "minutes": minutes, "draw": draw}
    says = {"context": context, "why": why | lacking, **more}
    (folder / "header.json").write_text(json.dumps(says, indent=1) + "\n")
    return folder


def doubts(source: Path, recomputed: Path) -> list[str]:
    """What numerics can't explain of the differences between two runs, told to the user; empty: nothing."""
    committed, here = both(source, recomputed)
    pairs = pair(committed, here)
    say(conclusion(pairs))
    found = problems(committed, here, pairs)
    for problem in found:
        say(f"WARNING: {source} DOES NOT COME OUT AGAIN: {problem}")
    return found


def _estimators(scores: pd.DataFrame) -> dict[str, list[str]]:
    """Which of the costlier estimators' needs are committed, by benchmark."""
    needs = {"votes": "votes", "whole": "log_probs_whole"}
    by = scores[scores["variant"] == ""].groupby("benchmark")
    return {str(b): [n for n, column in needs.items() if rows[column].notna().any()] for b, rows in by}


def _models(part: Part, cell: Cell) -> set[str]:
    """The models that a cell needs on this machine."""
    p, teacher = part.profile, cell.step != SCORES and ARMS[cell.step.arm].teacher
    return {p.model} | ({p.teacher} if teacher and isinstance(p.teacher, str) else set())
