"""What the fault tests share: the report they write, the local web server, folders that can be filled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ledger import ledger

# Two files are called conftest here; `test_sources` wants the class of the one above.
_spec = importlib.util.spec_from_file_location("conftest_above", Path(__file__).parent.parent / "conftest.py")
assert _spec and _spec.loader
_above = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_above)
Site = _above.Site

__all__ = ["Site", "ledger"]

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["arms=['base', 'tt_si']", "mode=activated", "n=12"]
"""Parameters that make a notebook's run short."""
SCRIPTED = [sys.executable, str(Path(__file__).with_name("scripted.py")), "run"]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of its own: `mounted("tmpfs", size=…)`, or a folder read-only: `mounted(folder)`.

    Skips where this user may not mount.
    """
    places: list[Path] = []

    def mount(what: str | Path, size: int = 0) -> Path:
        place = what if isinstance(what, Path) else tmp_path / f"mounted-{len(places)}"
        place.mkdir(exist_ok=True)
        commands = [["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]]
        if isinstance(what, Path):
            bound = ["mount", "--bind", str(place), str(place)]
            commands = [bound, ["mount", "-o", "remount,ro,bind", str(place)]]
        for i, command in enumerate(commands):
            if subprocess.run(command, capture_output=True).returncode:
                if i:
                    subprocess.run(["umount", str(place)], check=True)
                pytest.skip("this user may not mount a file system")
        places.append(place)
        return place

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment of a process of the test's own: results under its folder, models from the usual cache."""
    return {
        **os.environ,
        "TTSI_RUNS": str(tmp_path / "runs"),
        "TTSI_FIGURES": str(tmp_path / "figures"),
        "OMP_NUM_THREADS": "1",
    }
