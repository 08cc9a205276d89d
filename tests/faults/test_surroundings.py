"""What surrounds a run: another run, a read-only folder, no home, no network, a wrong clock, Ctrl-C."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import scripted
from conftest import ROOT, SCRIPTED, SHORT
from ledger import Row
from test_disk import last_words, wanted

from study.data.models import model_dir
from study.run.study import Study

__all__ = ["wanted"]

NOTEBOOK = [sys.executable, "-m", "study.notebooks", "run", "02", "--profile", "smoke", *SHORT]
STUDY = f"from study.run.study import Study; s = Study('smoke', n=8, **{scripted.ARMS}); s.fetch(); s.run()"


def test_two_runs_on_one_store(tmp_path: Path, wanted: bytes, ledger: Callable[..., Row]) -> None:
    row = ledger("two runs on one store at once", "both finish with the undisturbed run's records")
    for i in range(5):
        place = tmp_path / str(i)
        done = subprocess.run([*SCRIPTED[:-1], "two", str(place)], capture_output=True, text=True)
        assert done.returncode == 0, [(p.read_text())[-500:] for p in place.rglob("stderr.log")]
        assert [(place / n / "records.json").read_bytes() for n in "01"] == [wanted, wanted]
        one, other = (set(scripted.asked(place / n)) for n in "01")
        assert one and other, "both were at work"
        assert scripted.stored(place)
        row.tries += 1
    row.seen = "as promised"


def test_the_results_folder_is_read_only(
    mounted: Callable[..., Path], tmp_path: Path, environment: dict[str, str], ledger: Callable[..., Row]
) -> None:
    row = ledger(
        "the results folder is read-only, empty or with a store", "one line that names it, exit code 1"
    )
    runs = mounted(tmp_path / "runs")
    command = [sys.executable, "-m", "study.notebooks", "reproduce", "--profile", "smoke"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert [str(runs) in line for line in last_words(done)] == [True]
    finished = tmp_path / "finished"
    subprocess.run([*SCRIPTED, str(finished)], check=True, stderr=subprocess.DEVNULL)
    (finished / "asked.log").unlink()
    mounted(finished)
    done = subprocess.run([*SCRIPTED, str(tmp_path), str(finished)], capture_output=True, text=True)
    # A complete store needs nothing written; where SQLite can't read it so, one line says why.
    assert done.returncode == 0 or [str(finished) in line for line in last_words(done)] == [True]
    row.tries, row.seen = 2, "as promised"


def test_a_complete_cache_may_be_read_only(
    mounted: Callable[..., Path], tmp_path: Path, environment: dict[str, str], ledger: Callable[..., Row]
) -> None:
    row = ledger("the cache is complete and read-only, and there is no home", "the run doesn't notice")
    good = model_dir("tiny")
    shutil.copytree(good, tmp_path / "cache" / "models" / good.name)
    environment |= {"TTSI_CACHE": str(mounted(tmp_path / "cache")), "HOME": "/proc/none"}
    subprocess.run([sys.executable, "-c", STUDY], check=True, env=environment, stderr=subprocess.DEVNULL)
    row.tries, row.seen = 1, "as promised"


def test_there_is_no_home(environment: dict[str, str], ledger: Callable[..., Row]) -> None:
    row = ledger(
        "the home folder is missing and can't be made",
        "notebooks run all the same; where it is needed (no TTSI_CACHE), one line says so",
    )
    environment |= {"HOME": "/proc/none", "TTSI_CACHE": str(model_dir("tiny").parents[1])}
    for name in ("XDG_CACHE_HOME", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        environment.pop(name, None)
    done = subprocess.run(NOTEBOOK, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    environment.pop("TTSI_CACHE")
    command = [sys.executable, "-m", "study.data.sources", "fetch", "smollm2-135m"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert ["TTSI_CACHE" in line for line in last_words(done)] == [True]
    row.tries, row.seen = 2, "as promised"


def test_there_is_no_network(tmp_path: Path, environment: dict[str, str], ledger: Callable[..., Row]) -> None:
    row = ledger(
        "no network at all (a network namespace of its own)",
        "what is cached runs; each thing that is missing is named in one line with the ways to get it",
    )
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a network namespace")
    offline = ["unshare", "-n", sys.executable]
    subprocess.run([*offline, "-c", STUDY], check=True, env=environment, stderr=subprocess.DEVNULL)
    environment |= {"TTSI_CACHE": str(tmp_path / "empty"), "TTSI_DATA": str(tmp_path)}
    command = [*offline, "-m", "study.data.sources", "fetch", "bfcl", "smollm2-135m"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert ["To get it" in line for line in last_words(done)] == [True, True]
    assert time.monotonic() - began < 60
    row.tries, row.seen = 2, "as promised"


def test_the_clock_is_set_back(tmp_path: Path, wanted: bytes, ledger: Callable[..., Row]) -> None:
    row = ledger(
        "the clock ten years back between a killed run and its resume, and again during the resume",
        "records byte-identical to the undisturbed run's; no negative duration",
    )
    child = subprocess.Popen([*SCRIPTED, str(tmp_path)], stderr=subprocess.DEVNULL)
    while len(scripted.asked(tmp_path)) < 60:
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert len(scripted.stored(tmp_path)) > 10
    program = """import runpy, sys, time
real, start, gmtime = time.time, time.monotonic(), time.gmtime
time.time = lambda: real() - 10 * 365 * 86400 * (1 + (time.monotonic() - start > 0.5))
time.gmtime = lambda *s: gmtime(*(s or (time.time(),)))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    subprocess.run(
        [sys.executable, "-c", program, *SCRIPTED[1:], str(tmp_path)], check=True, stderr=subprocess.DEVNULL
    )
    assert (tmp_path / "records.json").read_bytes() == wanted
    with sqlite3.connect(tmp_path / "smoke" / "store.sqlite") as db:
        first, second = (row[0] for row in db.execute("SELECT started FROM run ORDER BY id"))
        assert second < first
        assert db.execute("SELECT min(seconds) FROM result").fetchone()[0] >= 0
    row.tries, row.seen = 1, "as promised"


def test_ctrl_c(tmp_path: Path, environment: dict[str, str], ledger: Callable[..., Row]) -> None:
    row = ledger(
        "Ctrl-C at a random moment of `make notebook N=02`, then the same again",
        "exit code 130, one line, no traceback, no notebook left half done; the resume as if undisturbed",
    )
    tables = []
    stopped = 0
    for i in range(4):
        folder = tmp_path / str(i)
        env = environment | {"TTSI_RUNS": str(folder / "runs"), "TTSI_FIGURES": str(folder / "figures")}
        if i:  # the first run is left alone
            process = subprocess.Popen(
                NOTEBOOK, cwd=ROOT, env=env, text=True, start_new_session=True, stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                # A shell's background jobs ignore Ctrl-C, and hand that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
            while process.poll() is None and not (folder / "runs" / "smoke" / "store.sqlite").exists():
                time.sleep(0.05)
            time.sleep(random.Random(i).uniform(0, 4))
            os.killpg(process.pid, signal.SIGINT)
            words = process.communicate(timeout=60)[1]
            if process.returncode:
                stopped += 1
                assert process.returncode == 130, words[-2000:]
                assert "interrupted; what was computed is stored" in words
                assert "Traceback" not in words
                assert not list(folder.rglob("*.ipynb"))
        done = subprocess.run(NOTEBOOK, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        table = (folder / "figures" / "smoke-changed" / "table1_main.csv").read_text()
        tables.append(table)
        row.tries += bool(i)
    assert stopped and len(set(tables)) == 1
    row.seen = f"{stopped} of {row.tries} stopped so; Table 1 the same bytes after every one"


def test_batches_of_other_shapes(
    tmp_path: Path, ledger: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ledger(
        "the same run in batches of another size (torch, float32)",
        "the same texts and verdicts, log-probabilities within 0.001 nats; every row says its batch's size",
    )
    texts: list[str] = []
    log_probs: list[list[float]] = []
    for size in (8, 1, 3, 5):
        monkeypatch.setenv("TTSI_RUNS", str(tmp_path / str(size)))
        study = Study("smoke", n=16, mode="activated", batch=size, dtype="float32", **scripted.ARMS)
        study.run()
        texts.append(study.records()[["sample", "arm", "reply", "correct", "code", "adapted"]].to_json())
        log_probs.append([x for row in study.scores().log_probs for x in row])
        with sqlite3.connect(study.store.path) as db:
            batches = {b for (b,) in db.execute("SELECT batch FROM result WHERE stage = 'answer'")}
        assert batches == {min(size, 16 - at) for at in range(0, 16, size)}
    assert len(set(texts)) == 1
    worst = max(abs(a - b) for other in log_probs[1:] for a, b in zip(log_probs[0], other, strict=True))
    row.tries = len(texts) - 1
    assert worst < 1e-3
    row.seen = f"all texts and verdicts the same, largest difference {worst:.1e} nats"
