"""Has the programs of `make bench` take turns on the same samples, and keeps what they took.

Each runs in a process of its own, so that it has its own peak memory; the one that waits sleeps. All read the
same prompts, write the same example and start from the same adapter, so their losses and answers can be
compared, and are. A process that has just started works through a sample of the fixture first, which is not
measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from study.bench.programs import ROWS
from study.run.provenance import commit
from ttsi.types import LoraSettings

VLLM = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "python"
LONG = 1500  # tokens of a prompt above which the programs don't share the memory
ROUNDED = 24  # samples of which a run in bfloat16 counts the answers that differ
TOGETHER = "together"
Say = Callable[[str], None]


class Wanted(NamedTuple):
    """Samples of a benchmark, and the first how many of them the usual loop and `exact` run too.

    A long prompt takes them minutes: there `exact` is left out.
    """

    benchmark: str
    n: int
    paired: int

    @classmethod
    def read(cls, text: str) -> Wanted:
        """`sealtool=8/3`: eight samples, three of them paired."""
        name, _, counts = text.partition("=")
        n, _, paired = counts.partition("/")
        return cls(name, int(n), int(paired or n))


class Worker:
    """A program in a process of its own, started when it is first asked something.

    first: what it is asked before that, every time it is started, so that what is measured runs warm.
    """

    def __init__(self, name: str, model: str, dtype: str) -> None:
        python = str(VLLM) if name == "vllm" else sys.executable
        self.command = [python, "-m", "study.bench", "--worker", name, "--model", model, "--dtypes", dtype]
        self.process: subprocess.Popen[str] | None = None
        self.first: dict[str, Any] = {}
        self.warmed: Any = None  # what it answered to that

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def __call__(self, do: str, **asked: Any) -> Any:
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True)
            if self.first:
                self.warmed = self(**self.first)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do} | asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process stopped (exit code {self.process.wait()}); its message is above")
        return json.loads(answer)

    def pause(self) -> None:
        """Ends the process; the next question starts it again."""
        if self.process is not None and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def measure(
    model: str,
    dtype: str,
    wanted: Sequence[Wanted],
    questions: int,
    run: dict[str, Any],
    say: Say,
    keep: Callable[[], None],
) -> None:
    """Adds to `run` what it lacks of the measurements in a precision: no text, only seconds and counts.

    questions: how many of the first benchmark's make the whole run. `keep` is called after each sample.
    """
    run |= {"commit": commit(), "rows": run.get("rows", []), "checks": run.get("checks", [])}
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(Worker(n, model, dtype)) for n in ("ours", "theirs"))
        ours.first = {"do": "warm_up"}
        machine = ours("machine")
        run["machine"] = run.get("machine", machine)
        theirs.first = {"do": "sample", "texts": ours.warmed, "base": True}
        for name, n, paired in wanted:
            ids = ours("list", name=name)
            taken = [check["sample"] for check in run["checks"] if check["benchmark"] == name]
            left = ids[ids.index(taken[-1]) + 1 :] if taken else ids
            while left and len(taken) < n:
                sample = left.pop(0)
                begun = ours("begin", sample=sample)
                if not begun:
                    continue  # certain, or no example could be read: nothing to compare
                done = _take_turns(ours, theirs, sample, begun, len(taken), len(taken) < paired)
                run["rows"] += _rows(name, sample, begun, done, run["machine"])
                run["checks"].append({"benchmark": name, "sample": sample} | _checks(begun, done))
                taken.append(sample)
                keep()
                seconds = (f"{p} {d['stages']['t']['seconds']:.1f} s" for p, d in done.items())
                say(f"{name} {len(taken)}/{n}, T: {', '.join(seconds)}")
            if name == wanted[0].benchmark and taken and TOGETHER not in run:
                run[TOGETHER] = found = ours("together", samples=taken[:ROWS])
                run["rows"] += _batch(name, TOGETHER, "activated", found)
                say(f"{found['n']} samples together")
                run["run"] = found = ours("questions", samples=ids[:questions])
                run["rows"] += _batch(name, "run", "selective", found)
                say(f"a run of {found['n']} questions")
                keep()
        run["machine"]["flops"] = max(run["machine"]["flops"], machine["flops"], ours("machine")["flops"])
    for batch in ("run", TOGETHER):
        run.get(batch, {}).pop("stages", None)


def _take_turns(
    ours: Worker, theirs: Worker, sample: str, begun: dict[str, Any], turn: int, paired: bool
) -> dict[str, dict[str, Any]]:
    """What each program did with a sample; who goes first changes from sample to sample.

    A long prompt takes the usual loop more than 20 GB: there ours goes first, each leaves the memory to the
    other, and the usual loop starts without its warm-up, beside whose leavings 24 GB were too few.
    """
    long, texts = begun["tokens"]["prompt"] > LONG, begun.pop("texts")
    turns = {"activated": lambda: ours("adapt", sample=sample, mode="activated")}
    if paired and not long:
        turns["exact"] = lambda: ours("adapt", sample=sample, mode="exact")
    if paired:
        turns["usual"] = lambda: theirs("sample", texts=texts, base=not turn and not long)
    done, names = {}, list(turns)
    if long:
        theirs.pause()
        theirs.first = {}
    for name in names if long else [*names[turn % len(names) :], *names[: turn % len(names)]]:
        if long and name == "usual":
            ours.pause()
        done[name] = turns[name]()
    if long:
        theirs.pause()
    return done


# --- what is kept ---------------------------------------------------------------------------------------


def _rows(
    benchmark: str, sample: str, begun: Mapping[str, Any], done: Mapping[str, Any], machine: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row per program and stage of a sample; our programs have the stages before T in common."""
    out = []
    for program, stages in _by_program(begun["stages"], {p: d["stages"] for p, d in done.items()}).items():
        work = _work(machine, begun["tokens"], program)
        for stage, took in stages.items():
            row = {"benchmark": benchmark, "sample": sample, "n": 1, "program": program, "stage": stage}
            out.append(row | took | {"prompt_tokens": begun["tokens"]["prompt"], "flops": work.get(stage)})
    return out


def _by_program(begun: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stages by program. Selective TT-SI is `activated` but for the answer, and asks nothing of H."""
    out = {}
    for program, stages in own.items():
        mine = dict(stages) if program == "usual" else {**begun, **stages}
        drafted = mine.pop("answer, drafted from base", None)
        out[program] = mine
        if program == "activated":
            out["selective"] = {k: v for k, v in mine.items() if k != "h"} | {"answer": drafted}
    return out


def _batch(benchmark: str, sample: str, program: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of what was timed once for `n` samples."""
    by_program = _by_program({}, {program: found["stages"]})
    return [
        {"benchmark": benchmark, "sample": sample, "n": found["n"], "program": p, "stage": stage} | took
        for p, stages in by_program.items()
        for stage, took in stages.items()
    ]


def _work(machine: Mapping[str, float], tokens: Mapping[str, int], program: str) -> dict[str, float]:
    """Floating-point operations that a stage cannot do without.

    Two per weight and token forward, as many again backward (the weights themselves need no gradient);
    attention over what stands before; the output head and the last layer's feed-forward block on label
    positions only (the usual loop has both on all). Decoding is left out: it is bound by reading the
    weights, not by arithmetic.
    """

    def forward(new: int, before: int, head: int) -> float:
        attention = machine["attention"] * (new * before + new * new / 2)
        layers = machine["decoder"] * new - machine["last_block"] * (new - head)
        return 2 * layers + attention + 2 * machine["head"] * head

    steps, example, labels = 2 * LoraSettings().epochs, tokens["example"], tokens["labels"]
    if program == "usual":
        return {"t": steps * forward(example, 0, example)}
    before = 0 if program == "exact" else tokens["turn"]
    t = steps * forward(example - 1 - before, before, labels)
    return {"prefix": forward(tokens["prefix"], 0, 0), "t": t}


def _checks(begun: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """What the programs agree on: yes or no, or how far apart (nats); nothing where one did not run."""

    def off(first: Sequence[float], second: Sequence[float]) -> float:
        return max(abs(a - b) for a, b in zip(first, second, strict=False))

    usual, exact, activated = (done.get(p) for p in ("usual", "exact", "activated"))
    found: dict[str, Any] = {"same_draft": len(set(activated["texts"])) == 1} if activated else {}
    if usual:
        pairs = zip(begun["scores"], usual["scores"], strict=True)
        found["scores"] = max(off(a, b) for a, b in pairs)  # the usual loop scores on, to the arguments
        found["written"] = usual["written"].strip().startswith(begun["question"])
        found |= {"base": usual["base"] == begun["base"]} if usual["base"] is not None else {}
    if usual and exact:
        found["losses"] = off(usual["losses"], exact["losses"])
        found["usual_is_exact"] = usual["text"] == exact["texts"][0]
    if exact and activated:
        found["exact_is_activated"] = exact["texts"][0] == activated["texts"][0]
    return found


# --- runs of their own ----------------------------------------------------------------------------------


def rounding(model: str, names: Sequence[str]) -> dict[str, Any]:
    """How many answers differ between one at a time and eight together in bfloat16, native here or not."""
    with Worker("ours", model, "bfloat16") as worker:
        ids = list(chain(*(worker("list", name=name) for name in names)))
        return worker("rounding", samples=ids[:ROUNDED]) | {"model": model, "commit": commit()}


def engines(model: str, dtype: str, name: str) -> dict[str, Any]:
    """Torch and vLLM on the same prompts, one after the other, each alone on the machine.

    Of the replies only their lengths are kept, and how many are torch's to the token.
    """
    with Worker("ours", model, dtype) as ours:
        ours.first = {"do": "warm_up"}
        samples = ours("list", name=name)[:ROWS]
        torch = ours("replies", samples=samples)
    with Worker("vllm", model, dtype) as vllm:
        served = vllm("replies", samples=samples)
    want, version = torch["one by one"]["tokens"], served.pop("version")
    ways = [
        {
            "replies": way,
            "engine": engine,
            "n": len(want),
            "per_second": sum(map(len, had["tokens"])) / had["seconds"],
            "equal": sum(a == b for a, b in zip(had["tokens"], want, strict=True)),
        }
        for engine, found in (("torch", torch), ("vLLM", served))
        for way, had in found.items()
    ]
    return {"model": model, "dtype": dtype, "commit": commit(), "version": version, "ways": ways}


def spent(model: str, dtype: str, wanted: Wanted, questions: int) -> dict[str, Any]:
    """Where T of `exact` spends its seconds, by kind of operation, and passes one by one and in flight."""
    with Worker("ours", model, dtype) as ours:
        ours.first = {"do": "warm_up"}
        ids, kinds, done = ours("list", name=wanted.benchmark), dict[str, float](), 0
        for sample in ids:
            if done < wanted.paired and (found := ours("watched", sample=sample)):
                kinds = {k: kinds.get(k, 0.0) + found.get(k, 0.0) for k in kinds | found}
                done += 1
        flight = ours("flight", samples=ids[:questions])
        threads = ours("machine")["threads"]
    told = {"model": model, "dtype": dtype, "commit": commit(), "threads": threads}
    return told | {"n": done, "questions": len(ids[:questions]), "kinds": kinds, "flight": flight}


def stopwatch() -> Say:
    """Says things with the seconds since it was made."""
    began = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)
