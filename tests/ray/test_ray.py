"""A study on a Ray cluster: the records of a run in one process, whatever dies on the way."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from stores import rows_in

from study.data import sources
from study.run.study import Study

TINY: dict[str, Any] = {"n": 12, "batch": 4, "inference": ["direct", "majority"], "threads": 1}
"""Three groups of four samples, through every arm."""
METHOD = ["base", "tt_si"]
DRIVER = f"""
import sys
from study.run.study import Study
try:
    Study("smoke", executor="ray", actors=2, **{TINY}).run()
except KeyboardInterrupt:
    sys.exit(130)
"""


def _installed() -> bool:
    with contextlib.suppress(ImportError):  # this folder's own name is enough for `import ray`
        return importlib.util.find_spec("ray.exceptions") is not None
    return False


needs_ray = pytest.mark.skipif(not _installed(), reason="Ray is not installed: make ray")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for a run's results, and a cluster that no other process has a part in."""
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    return tmp_path


@pytest.fixture
def on_ray(runs: Path) -> Iterator[Callable[..., Study]]:
    """Makes studies that two actors compute, `on_ray(profile, …)`; afterwards nothing of them is left."""
    made: list[Study] = []

    def make(profile: str, **overrides: Any) -> Study:
        made.append(Study(profile, executor="ray", **{"actors": 2, **overrides}))
        return made[-1]

    yield make
    for study in made:
        if study.executor:
            study.executor.close()
    assert not actors()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A finished run of profile smoke in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSI_RUNS", str(tmp_path_factory.mktemp("local")))
        return everything(Study("smoke", **TINY))


def everything(study: Study) -> Study:
    """The study, with all computed that a profile can ask for."""
    study.run()
    study.score()
    study.embed()
    study.variant("k2").run()
    return study


def lines(table: pd.DataFrame) -> list[str]:
    """A frame as JSON, one line per row, less its timings."""
    kept = table[[c for c in table.columns if not c.startswith("seconds")]]
    return str(kept.to_json(orient="records", lines=True, double_precision=15)).splitlines()


def rows(folder: Path) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Every stored row by key, less its timings; the size of the batch it was computed in is part of it."""
    with closing(sqlite3.connect(folder / "smoke" / "store.sqlite")) as db:
        found = db.execute(
            "SELECT stage, settings, benchmark, sample, seed, status, batch, value FROM result"
        )
        return {row[:5]: (*row[5:7], _untimed(json.loads(row[7]))) for row in found}


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if not k.startswith("seconds")}
    return value


def actors(of: int | None = None) -> list[psutil.Process]:
    """The actors' processes below a process, by default this one."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "Worker" in (process.cmdline() or [""])[0]:
                found.append(process)
    return found


def meanwhile(store: Path, some: int, do: Callable[[], None]) -> threading.Thread:
    """A thread that does something once so many rows are stored; join it to know that it did."""

    def wait() -> None:
        while rows_in(store) < some:
            time.sleep(0.05)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@needs_ray
def test_the_same_as_in_one_process(local: Study, on_ray: Callable[..., Study], runs: Path) -> None:
    study = everything(on_ray("smoke", **TINY))
    assert lines(study.records()) == lines(local.records())
    assert set(study.records().arm) == set(study.profile.arm_names)
    assert lines(study.variant("k2").records()) == lines(local.variant("k2").records())
    assert lines(study.scores()) == lines(local.scores())
    assert lines(study.examples_frame()) == lines(local.examples_frame())
    assert lines(study.embeddings_frame()) == lines(local.embeddings_frame())
    assert rows(runs) == rows(local.store.path.parent.parent)
    with closing(sqlite3.connect(study.store.path)) as db:
        contexts = [json.loads(c) for (c,) in db.execute("SELECT context FROM run")]
    assert contexts and all(c["machine"] == study.context["machine"] for c in contexts)


@needs_ray
def test_a_finished_run_starts_no_cluster(
    on_ray: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Study("smoke", **TINY)
    done.run(["base"])
    study = on_ray("smoke", **TINY)
    monkeypatch.setattr(type(study.executor), "_connect", lambda _: pytest.fail("a cluster was started"))
    study.run(["base"])
    assert len(study.records(["base"])) == 2 * TINY["n"]


@needs_ray
def test_an_actor_is_killed(
    local: Study, on_ray: Callable[..., Study], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = on_ray("smoke", **TINY)
    killed: list[int] = []

    def kill() -> None:
        victim = actors()[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)

    killing = meanwhile(study.store.path, 20, kill)
    study.run()  # every arm: two of them can be over before the kill
    killing.join(1)
    assert killed
    assert "an actor died" in capsys.readouterr().err
    assert lines(study.records()) == lines(local.records())


@needs_ray
@pytest.mark.parametrize(("by", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_the_driver_is_killed_or_interrupted(
    local: Study, on_ray: Callable[..., Study], runs: Path, by: signal.Signals, code: int
) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], start_new_session=True)
    store = runs / "smoke" / "store.sqlite"
    while driver.poll() is None and rows_in(store) < 20:
        time.sleep(0.1)
    started = psutil.Process(driver.pid).children(recursive=True)
    assert actors(driver.pid)
    os.killpg(driver.pid, by) if by == signal.SIGINT else driver.send_signal(by)
    assert driver.wait(120) == code
    _, left = psutil.wait_procs(started, timeout=120)
    assert not left
    before = rows_in(store)
    study = on_ray("smoke", **TINY)
    study.run()
    assert 20 <= before < rows_in(store)
    assert lines(study.records()) == lines(local.records())


@needs_ray
def test_a_sample_that_kills_its_actors_is_an_error_and_no_more(
    local: Study, on_ray: Callable[..., Study], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    study = on_ray("smoke", **TINY)
    arms = [*METHOD, "donor", "sft"]
    victim = study.samples("fixture", 0)[5]
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": path, "DEADLY_QUESTION": victim.query.question}
    ray.init(
        include_dashboard=False,
        logging_level="error",
        runtime_env={"env_vars": environment, "worker_process_setup_hook": "deadly.install"},
    )
    try:
        study.run(METHOD)
        study.run(arms)
    finally:
        study.executor.close()  # type: ignore[union-attr]
        ray.shutdown()
    got, wanted = study.records(METHOD), local.records(METHOD)
    lost = got[got["sample"] == victim.id]
    assert len(lost) and (lost.status == "error").all() and lost.error.str.contains("actors").all()
    assert lost.correct.isna().all()
    rest = got[got["sample"] != victim.id]
    assert (rest.status == "ok").all()
    same = ["sample", "arm", "mode", "inference", "reply", "code", "correct", "adapted", "tokens_t"]
    assert lines(rest[same]) == lines(wanted[wanted["sample"] != victim.id][same])
    # What needs all samples at once goes on without the one that is lost.
    donors = study.records(["donor"])
    assert set(donors[donors.status == "error"]["sample"]) == {victim.id}
    # The next run tries it again.
    again = on_ray("smoke", **TINY)
    again.run(arms)
    found = again.records(METHOD)
    # Its group was answered without it: in the last digits a product depends on how many rows it has.
    assert np.allclose(found["likelihood"], wanted["likelihood"], rtol=1e-4, equal_nan=True)
    assert lines(found.drop(columns="likelihood")) == lines(wanted.drop(columns="likelihood"))


@needs_ray
def test_a_machine_of_a_cluster_dies(
    local: Study, on_ray: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = str(Path(sys.executable).with_name("ray"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as the README has it
    subprocess.run([command, "get-auth-token", "--generate"], check=True, capture_output=True)
    ray = [command, "start", "--block", "--num-cpus=1"]
    node = ["--include-dashboard=false", "--disable-usage-stats", f"--port={port}", "--head"]
    machines = []
    try:
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        machines.append(subprocess.Popen([*ray, *node], **quiet))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        _until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        machines.append(subprocess.Popen([*ray, f"--address=127.0.0.1:{port}"], **quiet))
        _until(lambda: _machines(port) == 2)
        study = on_ray("smoke", **TINY, actors=None)
        killing = meanwhile(study.store.path, 20, lambda: _end(machines[1]))
        study.run(METHOD)
        killing.join(1)
        assert machines[1].poll() is not None
        assert lines(study.records(METHOD)) == lines(local.records(METHOD))
        study.executor.close()  # type: ignore[union-attr]
    finally:
        for machine in reversed(machines):
            _end(machine)


def _until(done: Callable[[], bool], seconds: float = 120) -> None:
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds
        time.sleep(0.2)


def _machines(port: int) -> int:
    import ray

    ray.init(address=f"127.0.0.1:{port}", logging_level="error")
    try:
        return sum(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()


def _end(machine: subprocess.Popen[bytes]) -> None:
    """Ends a machine's `ray start` and all it started."""
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(machine.pid).children(recursive=True)
        for process in [*below, psutil.Process(machine.pid)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
    machine.wait()


@needs_ray
def test_the_same_with_a_real_model(
    on_ray: Callable[..., Study], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        sources.model_dir("smollm2-135m")
        sources.bfcl_file("live_multiple", answers=False)
    except sources.Unavailable as error:
        pytest.skip(str(error))
    asked: dict[str, Any] = {
        "model": "smollm2-135m", "teacher": "smollm2-135m", "benchmarks": {"bfcl": 4}, "batch": 2,
        "modes": {"default": ["activated", "exact"]}, "inference": ["direct"], "threads": 1,
        "arms": [*METHOD, "oracle"], "variants": {}, "estimators": {}, "epochs": 1, "retries": 1,
    }  # fmt: skip
    study = on_ray("smoke", **asked)
    study.run()
    monkeypatch.setenv("TTSI_RUNS", str(runs / "local"))
    alone = Study("smoke", **asked)
    alone.run()
    got = study.records()
    assert lines(got) == lines(alone.records())
    assert len(got) == 16 and (got.status == "ok").all()
    assert got[got.arm == "oracle"].adapted.any()  # of its own, SmolLM2 seldom writes an example


def test_without_ray_a_run_says_how_to_get_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(sources.Unavailable) as caught:
        Study("smoke", executor="ray", **TINY).run(["base"])
    (said,) = str(caught.value).splitlines()
    assert "not installed" in said and "make ray" in said and "requirements-ray.lock" in said


@needs_ray
def test_a_cluster_that_is_not_there_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(sources.Unavailable, match=r"127\.0\.0\.1:1"):
        Study("smoke", executor="ray", **TINY).run(["base"])
