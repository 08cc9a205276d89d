"""A study computed by the actors of a Ray cluster, one engine each; the driver alone writes to the store.

An actor does the study's own work on whole groups of samples, over a store of its own that holds what the
driver's knows of them, and sends back the new rows as JSON. Groups, order and seeds are those of a run in one
process, and so are the records, apart from timings; in the last digits they depend on the number of threads.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import socket
import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from tqdm import tqdm

from study.data.downloads import say
from study.data.sources import Unavailable
from study.run.actors import Rows, Worker, code_hash, fields, sources_of
from study.run.arms import Work
from study.run.store import Row, Store
from ttsi.engines.base import EngineError

RETRIES = 2
"""So often samples whose actor died are tried again together; then each alone, once."""
_PATIENCE = 60.0  # seconds without an answer after which is told what the run waits for


@dataclass
class _Task:
    """A piece of work, the run whose phase it is in, and how often an actor died with it."""

    work: Work
    run: _Run
    deaths: int = 0


@dataclass
class _Run:
    """One benchmark's phases: what is common to two phases is computed in the first."""

    phases: Iterator[list[Work]]
    open: int = 0


class _Lost:
    """The engine of samples that were given up: whatever is still missing of them becomes an error row."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> NoReturn:
        raise EngineError(self._why)


class RayExecutor:
    """Runs a study and its variants on a Ray cluster: `RAY_ADDRESS`, this machine's `ray start`, or its own.

    Actors are started with the first work and kept until the process ends; Ray starts one that died again.
    Its samples are redone; those that take their actors with them again and again end as errors of the
    machine. Raises Unavailable where Ray isn't installed or its cluster can't be reached, EngineError where
    no actor stays alive, and what the study's code raises in an actor.
    """

    def __init__(self, study: Any) -> None:
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
        self._running: dict[Any, tuple[Any, _Task | None]] = {}  # answer → actor, and what it is about
        self._connected = False

    def compute(self, study: Any, runs: Iterable[Iterable[list[Work]]]) -> None:
        """Has all phases of all runs done. Whatever ends it early ends the actors too."""
        self._of = study
        self._queue: deque[_Task] = deque()
        self._lost: set[tuple[str, str]] = set()
        self._deaths = 0
        self._bar = tqdm(total=0, desc="ray", unit="batch", delay=1)
        try:
            for phases in runs:
                self._advance(_Run(iter(phases)))
            for actor in self._idle() if self._queue else ():
                self._ask(actor)  # an actor may have died since the last run, with nobody's samples
            while self._queue or any(task for _, task in self._running.values()):
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

    def close(self) -> None:
        """Ends the actors, and the cluster if it is this process's own."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        self._running.clear()
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    # --- tasks ------------------------------------------------------------------------------------------

    def _advance(self, run: _Run) -> None:
        """Queues the next phase of a run that has something to do."""
        if phase := next(filter(None, run.phases), None):
            run.open = len(phase)
            self._queue.extend(_Task(work, run) for work in phase)
            self._bar.total += len(phase)
            self._bar.refresh()

    def _finish(self, task: _Task) -> None:
        self._bar.update()
        task.run.open -= 1
        if not task.run.open:
            self._advance(task.run)

    def _send(self, actor: Any, task: _Task) -> None:
        """Gives an actor a task, less the samples that are lost."""
        work, study = task.work, self._of
        lost = [i for i in work.samples if (work.benchmark, i) in self._lost]
        if lost and not work.whole:
            self._give_up(replace(work, samples=tuple(lost)))
            work = replace(work, samples=tuple(i for i in work.samples if i not in lost))
        if not work.samples:
            return self._finish(task)
        profile = study.profile.model_copy(update={"dtype": study.dtype})
        known = [*work.samples, "*"] if work.whole else work.samples  # "*": adapters for many samples
        message = {
            "profile": profile.model_dump_json(),
            "work": vars(work),
            "lost": lost,
            "sources": sources_of(profile, work),
            "known": _known(study.store, work.benchmark, work.seed, known),
        }
        self._running[actor.work.remote(json.dumps(message))] = actor, task

    def _receive(self, answer: Any) -> None:
        actor, task = self._running.pop(answer)
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
            return self._died(actor, task, error)
        if task is None:
            self._actors[actor] = reply
            return
        self._deaths = 0
        self._keep(self._actors[actor], json.loads(reply))
        if task.work.whole and any((task.work.benchmark, i) in self._lost for i in task.work.samples):
            self._give_up(task.work)
        self._finish(task)

    def _keep(self, context: str, parts: Iterable[Rows]) -> None:
        """Puts an actor's rows into the store, with what they were computed by."""
        own = {k: self._of.context[k] for k in ("model", "dtype")}
        store = self._of.store.under(json.loads(context) | own)
        for stage, settings, benchmark, seed, rows in parts:
            store.put(stage, settings, benchmark, seed, [Row(*row) for row in rows])

    def _died(self, actor: Any, task: _Task | None, error: Exception) -> None:
        """Samples whose actor died are queued again, then each alone, then given up."""
        self._deaths += 1
        why = " ".join(str(error).split())
        if self._deaths > max(10, 3 * len(self._actors)):
            raise EngineError(f"{self._deaths} actors died in a row, the last of this: {why}")
        self._ask(actor)  # which waits until Ray has started it again
        if task is None:
            return say(f"an actor could not be started: {why}")
        task.deaths += 1
        work = task.work
        what = f"{work.steps[0].arm} of {len(work.samples)} {work.benchmark} sample(s)"
        if task.deaths <= RETRIES:
            say(f"an actor died with {what}: another one does them ({why})")
            self._queue.appendleft(task)
        elif len(work.samples) > 1 and not work.whole:
            say(f"{task.deaths} actors died with {what}: each sample alone ({why})")
            alone = [_Task(replace(work, samples=(i,)), task.run, task.deaths) for i in work.samples]
            task.run.open += len(alone) - 1
            self._bar.total += len(alone) - 1
            self._queue.extendleft(reversed(alone))
        else:
            say(f"{task.deaths} actors died with {what}: given up, an error of the machine ({why})")
            if not work.whole:
                self._lost.update((work.benchmark, i) for i in work.samples)
            self._give_up(work)
            self._finish(task)

    def _give_up(self, work: Work) -> None:
        """Makes errors of what is still missing of some work, just as an engine that fails does."""
        lost: Any = type(self._of)(self._of.profile, of=self._of)
        lost.engine = lost.teacher_engine = _Lost("the actors that computed this died, one after the other")
        lost.do(work)

    # --- actors -----------------------------------------------------------------------------------------

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
        at_work = sum(task is not None for _, task in self._running.values())
        for _ in range(min(wanted, len(self._queue) + at_work) - len(self._actors)):
            make = self._ray.remote(Worker).options(
                num_cpus=cores, num_gpus=min(1, gpus), max_restarts=-1, scheduling_strategy="SPREAD"
            )
            number = len(self._actors) + 1
            self._ask(make.remote(number, type(self.study), self._profile.model_dump_json()))

    def _ask(self, actor: Any) -> None:
        """Asks an actor what its rows carry; until it answers it gets no work."""
        self._actors[actor] = ""
        versions = json.dumps(self.study.context["versions"])
        asked = actor.context.options(max_task_retries=-1)  # by Ray, as often as it starts the actor again
        self._running[asked.remote(code_hash(), versions)] = actor, None

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


def _answers(address: str) -> None:
    """Nothing; raises OSError or ValueError where nobody listens: Ray itself would wait for very long."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()


def _known(store: Store, benchmark: str, seed: int, samples: Sequence[str]) -> list[Rows]:
    """What is stored of some samples, damaged rows left out."""
    asked = (
        "SELECT DISTINCT r.stage, s.json FROM result r JOIN settings s ON s.hash = r.settings "
        "WHERE r.benchmark = ? AND r.seed = ?"
    )
    with closing(sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)) as db:
        kinds = db.execute(asked, (benchmark, seed)).fetchall()
    out: list[Rows] = []
    for stage, text in kinds:
        settings = json.loads(text)
        if rows := store.get(stage, settings, benchmark, seed, samples):
            out.append((stage, settings, benchmark, seed, [fields(row) for row in rows.values()]))
    return out
