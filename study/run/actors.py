"""What runs in an actor of a Ray cluster: the study's own work over a store of its own, sent back as JSON."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from study.data import benchmarks
from study.data.models import model_hash
from study.data.sources import Unavailable
from study.run.arms import ARMS, Step, Work
from study.run.config import Profile
from study.run.store import Row, Store

Rows = tuple[str, dict[str, Any], str, int, list[tuple[Any, ...]]]
"""Rows as they travel: (stage, settings, benchmark, seed, fields of each `Row`)."""


class Outbox(Store):
    """An actor's store for one task: what the driver knows goes in, what is new comes out.

    lost: samples that nothing more is computed for.
    """

    def __init__(self, path: Path, known: Iterable[Rows], lost: Sequence[str]) -> None:
        super().__init__(path)
        self.lost = set(lost)
        self.new: list[Rows] = []
        for stage, settings, benchmark, seed, rows in known:
            super().put(stage, settings, benchmark, seed, [Row(*row) for row in rows])

    def get(
        self, stage: str, settings: Mapping[str, Any], benchmark: str, seed: int, samples: Iterable[str]
    ) -> dict[str, Row]:
        wanted = list(samples)
        rows = super().get(stage, settings, benchmark, seed, wanted)
        for i in self.lost.intersection(wanted):
            if i not in rows or rows[i].status == "error":
                rows[i] = Row(i, "error", "TooLong: not tried again", 0.0, 1)  # what no stage tries to mend
        return rows

    def put(
        self, stage: str, settings: Mapping[str, Any], benchmark: str, seed: int, rows: Iterable[Row]
    ) -> None:
        put = list(rows)
        super().put(stage, settings, benchmark, seed, put)
        self.new.append((stage, dict(settings), benchmark, seed, [fields(row) for row in put]))


def fields(row: Row) -> tuple[Any, ...]:
    return row.sample, row.status, row.value, row.seconds, row.batch


class Worker:
    """An actor: one machine's model, and the study's code around it. Tasks and answers are JSON.

    make: the study's class.
    """

    def __init__(self, number: int, make: Any, profile: str) -> None:
        self.number, self.make = number, make
        folder = tempfile.TemporaryDirectory(prefix="ttsi-")  # gone with the process that made it, or sooner
        with folder, closing(Store(Path(folder.name) / "store.sqlite")) as nothing:
            self.study = make(Profile.model_validate_json(profile), store=nothing)
        self._studies = {profile: self.study}

    def __repr__(self) -> str:
        return f"actor {self.number}"

    def context(self, code: str, versions: str) -> str:
        """What this machine's rows carry. Raises ValueError where its code or packages are others."""
        context = self.study.context
        own, wanted = context["versions"], json.loads(versions)
        if other := [f"{k} {own.get(k)}, not {v}" for k, v in wanted.items() if own.get(k) != v]:
            raise ValueError(f"a machine of the Ray cluster has {'; '.join(other)}: install the same there")
        if code != code_hash():
            raise ValueError("a machine of the Ray cluster has another version of ttsi's code than this one")
        return json.dumps(context, sort_keys=True)

    def work(self, task: str) -> str:
        """The new rows of a task."""
        asked = json.loads(task)
        text = asked["profile"]
        if text not in self._studies:
            self._studies[text] = self.make(Profile.model_validate_json(text), of=self.study)
        study, wanted = self._studies[text], asked["work"]
        work = Work(**wanted | {"steps": tuple(Step(*s) for s in wanted["steps"])})
        if not study.samples(work.benchmark, work.seed):
            raise Unavailable(f"on a machine of the Ray cluster: {study.missing[work.benchmark]}")
        if sources_of(study.profile, work) != asked["sources"]:
            raise ValueError("a machine of the Ray cluster has other model files, or data, of the same name")
        with tempfile.TemporaryDirectory(prefix="ttsi-") as folder:
            outbox = Outbox(Path(folder) / "store.sqlite", asked["known"], asked["lost"])
            with closing(outbox):
                study.store = outbox
                study.do(work)
        return json.dumps(outbox.new)

    def release(self) -> None:
        """Lets go of what a run's end lets go of: the teacher, and models of variants."""
        for study in self._studies.values():
            study.release()


@cache
def code_hash() -> str:
    """A hash of both packages' files: whether two machines run the same code."""
    root, parts = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted([*(root / "ttsi").rglob("*"), *(root / "study").rglob("*")]):
        if path.suffix in (".py", ".json"):
            parts.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return parts.hexdigest()


def sources_of(profile: Profile, work: Work) -> list[str]:
    """Hashes of the models and data that a piece of work needs."""
    models = [profile.model]
    if isinstance(profile.teacher, str) and any(ARMS[s.arm].teacher for s in work.steps if s.arm in ARMS):
        models.append(profile.teacher)
    return [*map(model_hash, models), benchmarks.fingerprint(work.benchmark)]
