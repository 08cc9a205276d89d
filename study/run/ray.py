"""A study computed by the actors of a Ray cluster, one engine each; the driver alone writes to the store.

An actor runs the study's own code on whole groups of samples, over a store of its own that holds what the
driver's knows of them, and sends back the new rows as JSON. Groups, order and seeds are those of a run in one
process, and so are the records, apart from timings; in the last digits they depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import socket
import sqlite3
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from study.data import benchmarks
from study.data.downloads import say
from study.data.models import model_hash
from study.data.sources import Unavailable
from study.run.arms import ARMS
from study.run.config import Profile
from study.run.store import Row, Store
from ttsi.engines.base import EngineError
from ttsi.types import Query

if TYPE_CHECKING:
    from study.run.study import Study

Step = tuple[Any, ...]
"""What is done with samples: a study's `Selection`, SCORES or EMBEDDINGS."""
SCORES: Step = ("scores",)
EMBEDDINGS: Step = ("embeddings",)
_Rows = tuple[str, dict[str, Any], str, int, list[tuple[Any, ...]]]
"""Rows as they travel: (stage, settings, benchmark, seed, fields of each `Row`)."""
RETRIES = 2
"""So often samples whose actor died are tried again together; then each alone, once."""

_BY_GROUP = {"self_consistency", "teacher", "tt_d"}
"""Arms that run after the others but ask nothing across groups."""
_APART = {"generic", "sft", "sft_ood", "teacher", "tt_d"}
"""Arms that no other arm of those that run last has results in common with: in any order, or at once."""
_PATIENCE = 60.0  # seconds without an answer after which is told what the run waits for


def _perform(study: Study, step: Step, queries: Sequence[Query], seed: int, compute: bool) -> bool:
    """Whether a step's results for the queries were stored; with `compute` they are now."""
    benchmark = queries[0].benchmark
    if step == SCORES:
        return study.play_scores(queries, benchmark, seed, compute)
    if step == EMBEDDINGS:
        return study.play_embeddings(queries, benchmark, seed, compute)
    arm, mode, inference, size = step
    return study.play((arm, mode, inference, size), queries, benchmark, seed, compute)


# --- in an actor ----------------------------------------------------------------------------------------


class _Outbox(Store):
    """An actor's store for one task: what the driver knows goes in, what is new comes out.

    lost: samples that nothing more is computed for.
    """

    def __init__(self, path: Path, known: Iterable[_Rows], lost: Sequence[str]) -> None:
        super().__init__(path)
        self.lost = set(lost)
        self.new: list[_Rows] = []
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
        self.new.append((stage, dict(settings), benchmark, seed, [_fields(row) for row in put]))


def _fields(row: Row) -> tuple[Any, ...]:
    return row.sample, row.status, row.value, row.seconds, row.batch


class Worker:
    """An actor: one machine's model, and the study's code around it. Tasks and answers are JSON."""

    def __init__(self, number: int, profile: str) -> None:
        from study.run.study import Study

        self.number = number
        folder = tempfile.TemporaryDirectory(prefix="ttsi-")  # gone with the process that made it, or sooner
        with folder, closing(Store(Path(folder.name) / "store.sqlite")) as nothing:
            self.study = Study(Profile.model_validate_json(profile), store=nothing)
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
        from study.run.study import Study

        asked = json.loads(task)
        text = asked["profile"]
        if text not in self._studies:
            self._studies[text] = Study(Profile.model_validate_json(text), of=self.study)
        study = self._studies[text]
        step, seed, wanted = tuple(asked["step"]), asked["seed"], set(asked["samples"])
        samples = study.samples(asked["benchmark"], seed)
        if not samples:
            raise Unavailable(f"on a machine of the Ray cluster: {study.missing[asked['benchmark']]}")
        if _sources(study.profile, asked["benchmark"], step[0]) != asked["sources"]:
            raise ValueError("a machine of the Ray cluster has other model files, or data, of the same name")
        with tempfile.TemporaryDirectory(prefix="ttsi-") as folder:
            outbox = _Outbox(Path(folder) / "store.sqlite", asked["known"], asked["lost"])
            with closing(outbox):
                study.store = outbox
                _perform(study, step, [s.query for s in samples if s.id in wanted], seed, True)
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


def _sources(profile: Profile, benchmark: str, arm: str) -> list[str]:
    """Hashes of the models and data that a task needs."""
    models = [profile.model]
    if arm in ("tt_d", "teacher") and isinstance(profile.teacher, str):
        models.append(profile.teacher)
    return [*map(model_hash, models), benchmarks.fingerprint(benchmark)]


# --- in the driver --------------------------------------------------------------------------------------


@dataclass
class _Task:
    """One step for some samples: a group's, or all, where the arm needs them (`whole`)."""

    step: Step
    samples: tuple[str, ...]
    whole: bool = False
    deaths: int = 0


@dataclass
class _Line:
    """Steps for the same samples, one after the other, by one actor if it lives: it keeps their prompts."""

    study: Study
    benchmark: str
    seed: int
    tasks: deque[_Task]
    chain: _Chain

    def queries(self, samples: Iterable[str]) -> list[Query]:
        wanted = set(samples)
        return [s.query for s in self.study.samples(self.benchmark, self.seed) if s.id in wanted]


@dataclass
class _Chain:
    """Lines that may run at once, wave after wave: what is common to two waves is computed in the first."""

    waves: Iterator[list[_Line]]
    open: int = 0


class _Lost:
    """The engine of samples that were given up: whatever is still missing of them becomes an error row."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> NoReturn:
        raise EngineError(self._why)


class RayExecutor:
    """Runs a study and its variants on a Ray cluster: `RAY_ADDRESS`, this machine's `ray start`, or its own.

    Actors are started with the first work and kept until the process ends. An actor that dies has its samples
    redone by another; samples that take their actors with them again and again end as errors of the machine.
    Raises Unavailable where Ray isn't installed or its cluster can't be reached, EngineError where no actor
    stays alive, and what the study's code raises in an actor.
    """

    def __init__(self, study: Study) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(256 << 20))  # rows are small
        try:
            ray: Any = importlib.import_module("ray")
            importlib.import_module("ray.exceptions")
        except ImportError as error:
            raise Unavailable(
                "`executor: ray` needs Ray, which is not installed here: run `make ray`, or install it with "
                f"`pip install -r requirements-ray.lock` ({error})"
            ) from error
        self._ray = ray
        self.study = study
        # What an actor of another machine would choose for itself would be stored under another name.
        self._profile = study.profile.model_copy(update={"dtype": study.dtype})
        self._actors: dict[Any, str] = {}  # handle → context; "" until it is known
        self._running: dict[Any, tuple[Any, _Line | None]] = {}  # answer → actor, and what it is about
        self._hired = 0
        self._connected = False

    def run(self, study: Study, arms: Sequence[str] | None, benchmarks: Sequence[str] | None) -> None:
        """What `Study.run` does."""
        self._compute(
            self._chain(study, b, seed, self._arms(study, arms, b, seed))
            for b in benchmarks or study.profile.benchmarks
            for seed in study.profile.seeds
        )

    def score(self, study: Study, benchmarks: Sequence[str] | None) -> None:
        """What `Study.score` does."""
        self._each(study, benchmarks, SCORES)

    def embed(self, study: Study, benchmarks: Sequence[str] | None) -> None:
        """What `Study.embed` does."""
        self._each(study, benchmarks, EMBEDDINGS)

    def close(self) -> None:
        """Ends the actors, and the cluster if it is this process's own."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        self._running.clear()
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    # --- what is to be done -----------------------------------------------------------------------------

    def _each(self, study: Study, names: Sequence[str] | None, step: Step) -> None:
        self._compute(
            self._chain(study, b, seed, iter([([step], True)]))
            for b in names or study.profile.benchmarks
            for seed in study.profile.seeds
        )

    def _arms(
        self, study: Study, names: Sequence[str] | None, benchmark: str, seed: int
    ) -> Iterator[tuple[list[Step], bool]]:
        """(steps, whether they go by groups) of a run, in the order of one process where it matters."""
        chosen = list(study.selections(names, benchmark, seed))
        yield [c for c in chosen if not ARMS[c[0]].whole], True
        last = [c for c in chosen if ARMS[c[0]].whole]
        for c in sorted(last, key=lambda c: c[0] in _APART):
            yield [c], c[0] in _BY_GROUP

    def _chain(
        self, study: Study, benchmark: str, seed: int, work: Iterable[tuple[list[Step], bool]]
    ) -> _Chain:
        chain = _Chain(iter(()))
        chain.waves = self._waves(study, benchmark, seed, work, chain)
        return chain

    def _waves(
        self,
        study: Study,
        benchmark: str,
        seed: int,
        work: Iterable[tuple[list[Step], bool]],
        chain: _Chain,
    ) -> Iterator[list[_Line]]:
        """What isn't stored yet, as it is when its turn comes."""
        queries = [s.query for s in study.samples(benchmark, seed)]
        size = study.profile.batch
        apart: list[_Line] = []
        for steps, grouped in work:
            wave = []
            for i in range(0, len(queries), size if grouped else max(1, len(queries))):
                group = queries[i : i + size] if grouped else queries
                ids = tuple(q.id for q in group)
                lacking = [s for s in steps if not _perform(study, s, group, seed, False)]
                tasks = deque(_Task(s, ids, whole=not grouped) for s in lacking)
                if tasks:
                    wave.append(_Line(study, benchmark, seed, tasks, chain))
            if steps and steps[0][0] in _APART:
                apart += wave
            else:
                yield wave
        yield apart

    # --- doing it ---------------------------------------------------------------------------------------

    def _compute(self, chains: Iterable[_Chain]) -> None:
        """Has all lines of all chains done. Whatever ends it early ends the actors too."""
        self._queue: deque[_Line] = deque()
        self._lost: set[tuple[str, str]] = set()
        self._deaths = 0
        self._bar = tqdm(total=0, desc="ray", unit="batch", delay=1)
        try:
            for chain in chains:
                self._advance(chain)
            for actor in self._idle() if self._queue else ():
                self._ask(actor)  # an actor may have died since the last run, with nobody's samples
            while self._queue or any(line for _, line in self._running.values()):
                self._hire()
                for actor in self._idle():
                    if self._queue:
                        self._send(actor, self._queue.popleft())
                if not self._running:
                    continue
                done, _ = self._ray.wait(list(self._running), timeout=_PATIENCE)
                if not done and not any(self._actors.values()):
                    say("waiting for room on the Ray cluster")
                for answer in done:
                    self._receive(answer)
            for actor, context in self._actors.items():
                if context:
                    actor.release.remote()
        except BaseException:
            self.close()
            raise
        finally:
            self._bar.close()

    def _advance(self, chain: _Chain) -> None:
        """Queues the next wave of a chain that has something to do."""
        for wave in chain.waves:
            if wave:
                chain.open = len(wave)
                self._queue.extend(wave)
                self._bar.total += len(wave)
                self._bar.refresh()
                return

    def _idle(self) -> list[Any]:
        busy = [actor for actor, _ in self._running.values()]
        return [a for a, context in self._actors.items() if context and a not in busy]

    def _hire(self) -> None:
        """Starts as many actors as the cluster should have, and no more than there is work for."""
        if not self._queue:
            return
        if not self._ray.is_initialized():
            self._connect()
        cpus = [int(n["Resources"].get("CPU", 0)) for n in self._ray.nodes() if n["Alive"]]
        cpus = [n for n in cpus if n] or [1]
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        wanted = self._profile.actors or gpus or len(cpus)
        # A machine's cores are shared by the actors that it will have.
        cores = min(cpus) // math.ceil(wanted / len(cpus))
        cores = max(1, min(self._profile.threads or cores, min(cpus)))
        if gpus:
            cores = 1
        at_work = sum(line is not None for _, line in self._running.values())
        for _ in range(min(wanted, len(self._queue) + at_work) - len(self._actors)):
            self._hired += 1
            make = self._ray.remote(Worker).options(
                num_cpus=cores, num_gpus=min(1, gpus), max_restarts=0, scheduling_strategy="SPREAD"
            )
            actor = make.remote(self._hired, self._profile.model_dump_json())
            self._ask(actor)

    def _ask(self, actor: Any) -> None:
        """Asks an actor what its rows carry; until it answers it gets no work."""
        self._actors[actor] = ""
        versions = json.dumps(self.study.context["versions"])
        self._running[actor.context.remote(code_hash(), versions)] = actor, None

    def _connect(self) -> None:
        self._connected = True
        quiet = {"include_dashboard": False, "logging_level": "error", "log_to_driver": True}
        address = os.environ.get("RAY_ADDRESS", "local")
        # What `ray start` left may be gone, and on a busy machine Ray gives up starting after 30 seconds.
        tries = [None, "local", "local"] if address == "local" else [address]
        while tries:
            at = tries.pop(0)
            try:
                if address != "local":
                    _answers(address)
                self._ray.init(address=at, **quiet)
                return
            except Exception as error:  # Ray has no class for what may go wrong here
                if not tries:
                    where = f"no Ray cluster can be started, or found at RAY_ADDRESS={address}"
                    raise Unavailable(f"{where}: {' '.join(str(error).split())}") from error

    def _send(self, actor: Any, line: _Line) -> None:
        """Gives an actor the next task of a line that has one left for it; else the line is done."""
        while line.tasks:
            task = line.tasks[0]
            lost = [i for i in task.samples if (line.benchmark, i) in self._lost]
            asked = task.samples if task.whole else [i for i in task.samples if i not in lost]
            if lost and not task.whole:
                self._give_up(line, task, lost)
            if not asked:
                line.tasks.popleft()
                continue
            profile = line.study.profile.model_copy(update={"dtype": line.study.dtype})
            known = [*asked, "*"] if task.whole else asked  # "*": adapters for many samples
            message = {
                "profile": profile.model_dump_json(),
                "step": task.step,
                "benchmark": line.benchmark,
                "seed": line.seed,
                "samples": asked,
                "lost": lost,
                "sources": _sources(profile, line.benchmark, task.step[0]),
                "known": _known(line.study.store, line.benchmark, line.seed, known),
            }
            self._running[actor.work.remote(json.dumps(message))] = actor, line
            return
        self._bar.update()
        line.chain.open -= 1
        if not line.chain.open:
            self._advance(line.chain)

    def _receive(self, answer: Any) -> None:
        actor, line = self._running.pop(answer)
        failures = self._ray.exceptions
        try:
            reply = self._ray.get(answer)
        except failures.RayTaskError as error:
            raise error.cause from None  # what the study's code raised there
        except (
            failures.RayActorError,
            failures.ObjectLostError,
            failures.OutOfMemoryError,
            failures.WorkerCrashedError,
        ) as error:
            return self._died(actor, line, error)
        if line is None:
            self._actors[actor] = reply
            return
        self._deaths = 0
        task = line.tasks.popleft()
        self._keep(self._actors[actor], line, json.loads(reply))
        if task.whole and any((line.benchmark, i) in self._lost for i in task.samples):
            self._give_up(line, task, task.samples)
        self._send(actor, line)

    def _keep(self, context: str, line: _Line, parts: Iterable[_Rows]) -> None:
        """Puts an actor's rows into the store, with what they were computed by."""
        own = {k: line.study.context[k] for k in ("model", "dtype")}
        store = line.study.store.under(json.loads(context) | own)
        for stage, settings, benchmark, seed, rows in parts:
            store.put(stage, settings, benchmark, seed, [Row(*row) for row in rows])

    def _died(self, actor: Any, line: _Line | None, error: Exception) -> None:
        """Samples whose actor died are queued again, then each alone, then given up."""
        del self._actors[actor]
        self._ray.kill(actor)
        self._deaths += 1
        why = " ".join(str(error).split())
        if self._deaths > max(10, 3 * (len(self._actors) + 1)):
            raise EngineError(f"{self._deaths} actors died in a row, the last of this: {why}")
        if line is None:
            say(f"an actor could not be started: {why}")
            return
        task = line.tasks[0]
        task.deaths += 1
        what = f"{task.step[0]} of {len(task.samples)} {line.benchmark} sample(s)"
        if task.deaths <= RETRIES:
            say(f"an actor died with {what}: another one does them ({why})")
        elif len(task.samples) > 1 and not task.whole:
            say(f"{task.deaths} actors died with {what}: each sample alone ({why})")
            line.tasks.popleft()
            line.tasks.extendleft(_Task(task.step, (i,), deaths=task.deaths) for i in reversed(task.samples))
        else:
            say(f"{task.deaths} actors died with {what}: given up, an error of the machine ({why})")
            line.tasks.popleft()
            if not task.whole:
                self._lost.update((line.benchmark, i) for i in task.samples)
            self._give_up(line, task, task.samples)
        self._queue.appendleft(line)

    def _give_up(self, line: _Line, task: _Task, samples: Iterable[str]) -> None:
        """Makes errors of what is still missing of a step, just as an engine that fails does."""
        from study.run.study import Study

        lost: Any = Study(line.study.profile, of=line.study)
        lost.engine = lost.teacher_engine = _Lost("the actors that computed this died, one after the other")
        _perform(lost, task.step, line.queries(samples), line.seed, True)


def _answers(address: str) -> None:
    """Nothing; raises OSError or ValueError where nobody listens: Ray itself would wait for very long."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()


def _known(store: Store, benchmark: str, seed: int, samples: Sequence[str]) -> list[_Rows]:
    """What is stored of some samples, damaged rows left out."""
    asked = (
        "SELECT DISTINCT r.stage, s.json FROM result r JOIN settings s ON s.hash = r.settings "
        "WHERE r.benchmark = ? AND r.seed = ?"
    )
    with closing(sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)) as db:
        kinds = db.execute(asked, (benchmark, seed)).fetchall()
    out: list[_Rows] = []
    for stage, text in kinds:
        settings = json.loads(text)
        if rows := store.get(stage, settings, benchmark, seed, samples):
            out.append((stage, settings, benchmark, seed, [_fields(row) for row in rows.values()]))
    return out
