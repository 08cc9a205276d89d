"""A full disk ends a run with one line; what was stored can be read; with room again, the run goes on."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scripted
from conftest import ROOT, SCRIPTED, SHORT
from ledger import Row
from test_sources import World, world

from study.data.cache import damage

__all__ = ["world"]

KB = 1 << 10
READ = "import sys; from pathlib import Path; from study.run.store import Store; Store(Path(sys.argv[1]))"


def scripted_run(folder: Path, runs: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return subprocess.run(
        [*SCRIPTED, str(folder), str(runs)], capture_output=True, text=True, preexec_fn=limited
    )


def last_words(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr that are no progress bar."""
    lines = [line.rpartition("\r")[2] for line in done.stderr.split("\n")]
    return [line for line in lines if line.strip() and "%|" not in line]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The records of an undisturbed scripted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert scripted_run(folder, folder).returncode == 0
    return (folder / "records.json").read_bytes()


def test_the_disk_is_full_while_the_store_is_written(
    mounted: Callable[..., Path], tmp_path: Path, wanted: bytes, ledger: Callable[..., Row]
) -> None:
    row = ledger(
        "disk full while the store is written (a small tmpfs)",
        "one line that names the store, exit code 1, the store readable, the resume ends as if undisturbed",
    )
    kept = []
    for free in (8, 48, 100, 160, 220, 280, 340, 400):
        disk = mounted("tmpfs", size=2048 * KB)
        with (disk / "filler").open("wb") as filler:
            filler.write(b"x" * (2048 - free) * KB)
        done = scripted_run(tmp_path, disk)
        assert done.returncode == 1, f"{free} KB were enough"
        words = last_words(done)
        assert len(words) == 1 and "store" in words[0], words
        if store := next(disk.rglob("store.sqlite"), None):
            if (rows := len(scripted.stored_at(store.parent, tmp_path / f"copy-{free}"))) and not kept:
                assert subprocess.run([sys.executable, "-c", READ, str(store)]).returncode == 0
            kept.append(rows)
        (disk / "filler").unlink()
        assert scripted_run(tmp_path, disk).returncode == 0
        assert (tmp_path / "records.json").read_bytes() == wanted
        row.tries += 1
    rows_kept = f"{min(kept)} to {max(kept)} rows stored"
    row.seen = f"{row.tries} runs ended so, with {rows_kept}; all resumed to the same records"


def test_a_file_may_grow_no_further_while_the_store_is_written(
    tmp_path: Path, wanted: bytes, ledger: Callable[..., Row]
) -> None:
    row = ledger(
        "a file may grow no further (RLIMIT_FSIZE) while the store is written",
        "one line that names the store, exit code 1, the resume ends as if undisturbed",
    )
    for i, limit in enumerate((1, 20, 60, 100)):
        runs = tmp_path / f"runs-{i}"
        done = scripted_run(tmp_path, runs, limit * KB)
        assert done.returncode == 1
        words = last_words(done)
        assert len(words) == 1 and "store" in words[0], words
        assert scripted_run(tmp_path, runs).returncode == 0
        assert (tmp_path / "records.json").read_bytes() == wanted
        row.tries += 1
    row.seen = f"{row.tries} runs ended so; all resumed to the same records"


def test_the_disk_is_full_while_the_cache_is_written(world: World, ledger: Callable[..., Row]) -> None:
    row = ledger(
        "a file may grow no further (RLIMIT_FSIZE) while a model is fetched and dequantised",
        "one line that names the model, exit code 1, nothing half done is ever used; then the fetch goes on",
    )
    where = []
    for limit in (1, 40, 70, 101, 102):
        program = world.program()
        program[2] = (
            f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit * 1000}, -1))\n" + program[2]
        )
        done = subprocess.run(program, capture_output=True, text=True)
        where.append(last_words(done)[-1])
        assert done.returncode == 1, limit
        assert "Traceback" not in done.stderr and "tiny" in where[-1]
        assert damage(world.folder, world.model.hash)
        row.tries += 1
    done = subprocess.run(world.program(), capture_output=True, text=True)
    assert done.returncode == 0
    assert damage(world.folder, world.model.hash) is None
    row.seen = f"{row.tries} fetches ended so, {len(set(where))} different moments; the next one succeeded"


def test_the_disk_is_full_while_figures_are_written(
    mounted: Callable[..., Path], tmp_path: Path, environment: dict[str, str], ledger: Callable[..., Row]
) -> None:
    row = ledger(
        "disk full while tables and figures are written (a small tmpfs), `make notebook N=02`",
        "exit code 1, the last line says why, no half-written file; with room again the same run succeeds",
    )
    disk = mounted("tmpfs", size=1024 * KB)
    (disk / "filler").write_bytes(b"x" * 1016 * KB)
    command = [sys.executable, "-m", "study.notebooks", "run", "02", "--profile", "smoke", *SHORT]
    environment |= {"TTSI_FIGURES": str(disk / "figures")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "No space left" in last_words(done)[-1]
    left = [p for p in disk.rglob("*") if p.is_file() and p.name != "filler"]
    assert not [p for p in left if p.name.startswith(".") or p.stat().st_size == 0]
    assert not [p for p in left if p.suffix == ".png"]
    assert not list(tmp_path.rglob("02_*.ipynb"))
    (disk / "filler").unlink()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (disk / "figures" / "smoke-changed" / "table1_main.csv").stat().st_size > 0
    row.tries = 1
    row.seen = "as promised"
