"""A run without a model: an engine that says what its prompt and seed decide, slowly enough to be killed.

    python scripted.py kills FOLDER N     N runs killed at random moments and resumed; a report as JSON
    python scripted.py two FOLDER         two runs at once on one store; their records in FOLDER/0 and /1
    python scripted.py run FOLDER [RUNS]  one run, its store in RUNS; its records as FOLDER/records.json

Everything else is the study's own: samples, prompts, stages, arms, store. What the engine was asked is
written to FOLDER/asked.log, one line per row of a batch, before it answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ttsi
from study.data.sources import Unavailable
from study.run.store import StoreError
from study.run.study import Study
from ttsi import prompts
from ttsi.engines.base import EngineError, Prompt, Request
from ttsi.types import Fit, Generation, LoraSettings, Sampling, Scored

ARMS: dict[str, Any] = {"arms": ["base", "tt_si"], "inference": ["direct"]}
"""What is run here: every stage of the method, and nothing twice over."""
PAUSE = 0.02  # seconds a call takes


def number(*parts: object) -> int:
    """What decides a reply: the same for the same parts, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])


def name_of(prompt: Prompt) -> str:
    """A short name of a prompt."""
    return f"{number(prompt):012x}"


class Scripted:
    """An engine whose replies follow from prompt, seed and adapter; some hold no call or no example."""

    name = "scripted"

    def __init__(self, log: Path, pause: float = PAUSE) -> None:
        self.log, self.pause = log, pause

    def _asked(self, stage: str, asked: Sequence[Prompt]) -> None:
        with self.log.open("a") as file:
            file.write("".join(f"{stage} {name_of(p)}\n" for p in asked))
        time.sleep(self.pause)

    def score(
        self,
        prompts: Sequence[Prompt],
        opening: str,
        continuations: Sequence[Sequence[str]],
        upto: Any = None,
    ) -> list[list[Scored]]:
        self._asked("score", prompts)
        return [
            [Scored(c, (-(number(p, c) % 12000) / 1000,), (len(c),)) for c in texts]
            for p, texts in zip(prompts, continuations, strict=True)
        ]

    def tokens(self, text: str) -> tuple[int, ...]:
        return ()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        for stage in ("example", "adapted", "answer"):
            if asked := [r.prompt for r in requests if _stage(r) == stage]:
                self._asked(stage, asked)
        return [[self._reply(r, i) for i in range(sampling.n)] for r in requests]

    def _reply(self, request: Request, index: int) -> Generation:
        n = number(request.prompt, request.seed, request.adapter, index)
        lines = request.prompt.system.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
        tool = json.loads(lines[n % len(lines)])
        arguments = dict.fromkeys(tool["parameters"].get("properties", {}), f"value {n % 7}")
        text = json.dumps([{"name": tool["name"], "arguments": arguments}])
        if _stage(request) == "example":
            text = f"Question: question {n}\nAnswer: {text if n % 3 else '[{'}"
        else:
            text = f"<tool_call>{text}</tool_call>" if n % 5 else "I can't."
        tokens = tuple(text.encode())
        return Generation(text, tokens, (-0.5,) * len(tokens), True, len(request.prompt.system))


def _stage(request: Request) -> str:
    return "example" if request.opening else "answer" if request.adapter is None else "adapted"


class Job(NamedTuple):
    """The real one's fields, without torch."""

    examples: tuple[Any, ...]
    seed: int


def trainer() -> types.ModuleType:
    """What stands in for `ttsi.trainer`, which needs torch: an adapter is a number; some jobs diverge."""
    module = types.ModuleType("ttsi.trainer")

    def fit(
        engine: Scripted, jobs: Sequence[Any], settings: LoraSettings, bank: int | None = None
    ) -> list[tuple[int, Fit] | None]:
        time.sleep(engine.pause)
        made = [number(settings.mode, j) for j in jobs]
        return [(n, Fit((2.0, 1.0), (1e-4, 1e-4), n % 90, 9)) if n % 6 else None for n in made]

    vars(module).update(Job=Job, fit=fit)
    return module


def study(folder: Path, runs: Path | None = None) -> Study:
    """A study of profile smoke in `folder` whose engine is scripted; it needs no model and no torch."""
    ttsi.trainer = sys.modules["ttsi.trainer"] = trainer()  # type: ignore[attr-defined]
    os.environ["TTSI_RUNS"] = str(runs or folder)
    made = Study("smoke", model="smollm2-135m", **ARMS)
    made.engine = Scripted(folder / "asked.log")
    return made


def comparable(made: Study) -> str:
    """The records as JSON lines, less the timings: what has to be the same, byte for byte."""
    rows = made.records()
    rows = rows[[c for c in rows.columns if not c.startswith("seconds")]]
    return rows.to_json(orient="records", lines=True, double_precision=15)


def run(folder: Path, runs: Path | None = None) -> int:
    """Exit code of a run in `folder`: 0 done, 1 failed with one line, 130 interrupted."""
    try:
        made = study(folder, runs)
        made.run()
        records = comparable(made)
        made.store.close()
        (folder / "records.json").write_text(records)
    except (StoreError, Unavailable, EngineError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was computed is stored", file=sys.stderr)
        return 130
    return 0


def start(folder: Path, runs: Path | None = None) -> int:
    """Process id of a run in `folder`, forked so that it begins at once."""
    folder.mkdir(parents=True, exist_ok=True)
    if child := os.fork():
        return child
    code = 70
    try:
        with Path(folder / "stderr.log").open("a") as log:
            os.dup2(log.fileno(), 2)
            code = run(folder, runs)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a process, minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stored(folder: Path) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """The rows by key of the store in `folder`."""
    return stored_at(folder / "smoke", folder / "copy")


def stored_at(source: Path, copy: Path) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """The rows by key of the store in the folder `source`, read from a copy: reading it would change it."""
    shutil.rmtree(copy, ignore_errors=True)
    if not (source / "store.sqlite").exists():
        return {}
    shutil.copytree(source, copy)
    with sqlite3.connect(copy / "store.sqlite") as db:
        try:
            rows = db.execute(
                "SELECT stage, settings, benchmark, sample, seed, status, value, seconds FROM result"
            )
            found = rows.fetchall()
        except sqlite3.OperationalError:  # killed before the tables were made
            return {}
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    keyed = {row[:5]: row[5:] for row in found}
    assert len(keyed) == len(found)
    return keyed


def asked(folder: Path) -> list[tuple[str, str]]:
    """(stage, name of the prompt) of everything the engine was asked in `folder`."""
    log = folder / "asked.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(stage, name) for stage, name in map(str.split, lines)]


def prompts_of(made: Study) -> Mapping[tuple[str, str], str]:
    """Name of the prompt of every (stage, sample)."""
    out = {}
    for sample in made.samples("fixture", 0):
        act = name_of(prompts.act(sample.query))
        out |= {(stage, sample.id): act for stage in ("answer", "score", "adapted")}
        out["example", sample.id] = name_of(prompts.synthesis(sample.query))
    return out


def kills(folder: Path, count: int) -> dict[str, Any]:
    """What `count` killed and resumed runs left: how often they lost, repeated or changed anything.

    Runs that were done before their moment came are checked as well, and do not count.
    """
    began = time.monotonic()
    assert wait(start(folder / "undisturbed")) == 0
    duration = time.monotonic() - began
    wanted = (folder / "undisturbed" / "records.json").read_bytes()
    names = prompts_of(study(folder / "undisturbed"))
    report: dict[str, Any] = {"killed": 0, "finished before": 0, "different": [], "lost": [], "twice": []}
    rows_at_kill = []
    for i in range(2 * count):
        if report["killed"] == count:
            break
        place, moment = folder / f"kill-{i}", random.Random(i).uniform(0, duration)
        child = start(place)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        report["killed" if wait(child) == -signal.SIGKILL else "finished before"] += 1
        before = stored(place)
        rows_at_kill.append(len(before))
        (place / "asked.log").unlink(missing_ok=True)
        assert wait(start(place)) == 0, (place / "stderr.log").read_text()
        after, repeated = stored(place), set(asked(place))
        if (place / "records.json").read_bytes() != wanted:
            report["different"].append(i)
        if any(after.get(key) != row for key, row in before.items()):
            report["lost"].append(i)
        # A mode's adapted replies share their prompts: only a stage all of whose rows were there counts.
        done = {(k[0], k[3]) for k in before if k[0] != "adapted"}
        if any((stage, names[stage, sample]) in repeated for stage, sample in done):
            report["twice"].append(i)
        shutil.rmtree(place)
    report["rows at the kill"] = [min(rows_at_kill), max(rows_at_kill)]
    report["records"] = wanted.count(b"\n")
    report["seconds of a run"] = round(duration, 2)
    return report


def two(folder: Path) -> int:
    """The worse exit code of two runs at once, each in a folder of its own, with one store in `folder`."""
    children = [start(folder / str(i), folder) for i in range(2)]
    return max(abs(wait(child)) for child in children)


if __name__ == "__main__":
    command, to = sys.argv[1], Path(sys.argv[2])
    if command == "kills":
        print(json.dumps(kills(to, int(sys.argv[3]))))
    elif command == "two":
        sys.exit(two(to))
    else:
        to.mkdir(parents=True, exist_ok=True)
        sys.exit(run(to, *map(Path, sys.argv[3:])))
