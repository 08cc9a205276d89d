"""Killed at any moment, a run goes on where it stopped: nothing lost, nothing twice, nothing different."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import scripted
from ledger import Row
from stores import rows_in

from study.run.study import Study

KILLS, TORCH_KILLS = 50, 5


def test_killed_at_random_moments_of_a_scripted_run(tmp_path: Path, ledger: Callable[..., Row]) -> None:
    row = ledger(
        "kill −9 at a random moment of a run (scripted engine), then a resume",
        "records byte-identical to the undisturbed run's, no stored row lost or computed twice",
    )
    command = [sys.executable, scripted.__file__, "kills", str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["different"] == report["lost"] == report["twice"] == []
    assert report["killed"] == KILLS
    few, many = report["rows at the kill"]
    assert few < many
    row.tries = report["killed"] + report["finished before"]
    row.seen = (
        f"{report['killed']} killed with {few} to {many} rows stored, {report['finished before']} done "
        f"before; all {report['records']} records the same after every one, none lost, none twice"
    )


def test_killed_at_random_moments_of_a_run_with_the_tiny_model(
    tmp_path: Path, ledger: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ledger(
        "kill −9 at a random moment of a run (torch, tiny model), then a resume",
        "records byte-identical to the undisturbed run's",
    )
    asked = {**scripted.ARMS, "mode": "activated"}
    program = f"from study.run.study import Study; Study('smoke', **{asked}).run()"
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "undisturbed"))
    undisturbed = Study("smoke", **asked)
    assert undisturbed.engine
    began = time.monotonic()
    undisturbed.run()
    duration = time.monotonic() - began
    wanted, killed = scripted.comparable(undisturbed), []
    for i in range(TORCH_KILLS):
        folder = tmp_path / f"kill-{i}"
        monkeypatch.setenv("TTSI_RUNS", str(folder))
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        while process.poll() is None and not rows_in(folder / "smoke" / "store.sqlite"):
            time.sleep(0.05)
        time.sleep(random.Random(i).uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed.append(len(scripted.stored(folder)))
        resumed = Study("smoke", **asked)
        resumed.run()
        assert scripted.comparable(resumed) == wanted
        assert not resumed.records().duplicated(["sample", "arm", "mode"]).any()
    assert killed
    row.tries = TORCH_KILLS
    rows = wanted.count("\n")
    row.seen = (
        f"{len(killed)} killed with {min(killed)} to {max(killed)} rows stored; all {rows} records the same"
    )
