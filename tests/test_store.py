"""The store keeps what it was given, once, and says so plainly when it can't."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from study.run.store import Row, Store, StoreError, settings_hash

SETTINGS = {"model": "m", "tau": 1}


def put(store: Store, *rows: Row) -> None:
    store.put("answer", SETTINGS, "b", 0, rows)


def test_rows_come_back_and_other_settings_do_not(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    put(store, Row("b-1", "ok", '"x"', 1.5, 8), Row("b-2", "ok", '"y"', 1.5, 8))
    assert store.get("answer", SETTINGS, "b", 0, ["b-1", "b-3"]) == {"b-1": Row("b-1", "ok", '"x"', 1.5, 8)}
    assert store.get("answer", {**SETTINGS, "tau": 2}, "b", 0, ["b-1"]) == {}
    assert store.get("answer", SETTINGS, "b", 1, ["b-1"]) == {}
    assert Store(tmp_path / "s.sqlite").get("answer", SETTINGS, "b", 0, ["b-2"])["b-2"].value == '"y"'


def test_the_first_result_stays_and_an_error_gives_way(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    put(store, Row("b-1", "ok", "1", 0, 1), Row("b-2", "error", "out of memory", 0, 1))
    put(store, Row("b-1", "ok", "2", 0, 1), Row("b-2", "ok", "3", 0, 1))
    rows = store.get("answer", SETTINGS, "b", 0, ["b-1", "b-2"])
    assert rows["b-1"].value == "1" and rows["b-2"] == Row("b-2", "ok", "3", 0, 1)


def test_rows_of_another_context_say_so(tmp_path: Path) -> None:
    """One open file, one run row per context, and everyone reads everyone's rows."""
    store = Store(tmp_path / "s.sqlite", {"model": "m"})
    put(store, Row("b-1", "ok", "1", 0, 1))
    other = store.under({"model": "n"})
    assert other is store.under({"model": "n"}) and store is store.under({"model": "m"})
    put(other, Row("b-2", "ok", "2", 0, 1), Row("b-1", "ok", "3", 0, 1))
    put(store, Row("b-3", "ok", "3", 0, 1))
    rows = Store(tmp_path / "s.sqlite").get("answer", SETTINGS, "b", 0, ["b-1", "b-2", "b-3"])
    assert {i: r.value for i, r in rows.items()} == {"b-1": "1", "b-2": "2", "b-3": "3"}
    query = "SELECT sample, json_extract(context, '$.model') FROM result JOIN run ON run.id = result.run"
    with sqlite3.connect(tmp_path / "s.sqlite") as db:
        assert dict(db.execute(query)) == {"b-1": "m", "b-2": "n", "b-3": "m"}


def test_a_store_says_which_machine_made_what(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite", {"machine": "two cores"})
    put(store, Row("b-1", "ok", "1", 0, 1))
    store.put("adapted", {"lora": {"mode": "exact"}}, "b", 0, [Row("b-1", "ok", "1", 0, 1)])
    other = store.under({"machine": "one core"})
    other.put(
        "adapted", {"lora": {"mode": "exact"}}, "b", 0, [Row(i, "ok", "2", 0, 1) for i in ("b-1", "b-2")]
    )
    put(store.under({"model": "of an old run"}), Row("b-2", "ok", "1", 0, 1))
    assert store.machines() == {"two cores": {"answer", "adapted exact"}, "one core": {"adapted exact"}}


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    with pytest.raises(StoreError, match=r"s\.sqlite"):
        put(store, Row("b-1", "ok", "1", 0, 1), Row("b-2", None, "1", 0, 1))  # type: ignore[arg-type]
    assert store.get("answer", SETTINGS, "b", 0, ["b-1", "b-2"]) == {}
    put(store, Row("b-1", "ok", "1", 0, 1))  # and the store goes on
    assert "b-1" in store.get("answer", SETTINGS, "b", 0, ["b-1"])


def test_order_of_keys_is_no_setting() -> None:
    assert settings_hash({"a": 1, "b": [1, 2]}) == settings_hash({"b": [1, 2], "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.write_text("this is not a database, and long enough to be looked at as one" * 20)
    with pytest.raises(StoreError, match=r"s\.sqlite"):
        Store(path)


def test_two_stores_on_one_file_do_not_hurt_each_other(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "s.sqlite"), Store(tmp_path / "s.sqlite")
    for i in range(20):
        put(one, Row(f"b-{i}", "ok", "1", 0, 1))
        put(two, Row(f"b-{i}", "ok", "2", 0, 1))
    assert {r.value for r in one.get("answer", SETTINGS, "b", 0, [f"b-{i}" for i in range(20)]).values()} == {
        "1"
    }
    with sqlite3.connect(tmp_path / "s.sqlite") as db:
        assert db.execute("SELECT count(*) FROM result").fetchone() == (20,)


# --- damage -------------------------------------------------------------------------------------------------


def filled(path: Path) -> Store:
    store = Store(path)
    put(store, *(Row(f"b-{i}", "ok", f'"{i}"' * 400, 1.5, 8) for i in range(40)))
    return store


def read(path: Path) -> dict[str, Row]:
    return Store(path).get("answer", SETTINGS, "b", 0, [f"b-{i}" for i in range(40)])


def test_a_flipped_bit_is_named_and_never_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.sqlite"
    filled(path).close()
    whole, want, named = path.read_bytes(), read(path), 0
    refusals: list[str] = []
    for i in range(60):
        data = bytearray(whole)
        data[random.Random(i).randrange(len(data))] ^= 1 << i % 8
        path.write_bytes(data)
        capsys.readouterr()
        try:
            found = read(path)
        except StoreError as error:
            refusals.append(str(error))
            continue
        assert found.items() <= want.items()
        if len(found) < len(want):
            named += 1
            assert f"{path}: the stored answer of b sample" in capsys.readouterr().err
    assert named > 5
    assert all("s.sqlite" in said and "\n" not in said for said in refusals)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE result SET value = '7' WHERE sample = 'b-3'",
        "UPDATE result SET seconds = 2 WHERE sample = 'b-3'",
        "UPDATE result SET status = 'error' WHERE sample = 'b-3'",
        "UPDATE result SET value = CAST(x'ff' AS TEXT) WHERE sample = 'b-3'",
        "UPDATE result SET run = 9 WHERE sample = 'b-3'",
        "UPDATE result SET checksum = '' WHERE sample = 'b-3'",
    ],
)
def test_a_changed_row_gives_way_to_a_new_one(
    tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.sqlite"
    filled(path).close()
    with sqlite3.connect(path) as db:
        assert db.execute(change).rowcount == 1
    store = Store(path)
    assert "b-3 (seed 0) is damaged: not used, computed again" in capsys.readouterr().err
    assert "b-3" not in store.get("answer", SETTINGS, "b", 0, ["b-3"])
    assert capsys.readouterr().err == "", "it is named once"
    put(store, Row("b-3", "ok", "8", 0, 1), Row("b-4", "ok", "8", 0, 1))
    rows = store.get("answer", SETTINGS, "b", 0, ["b-3", "b-4"])
    assert rows["b-3"].value == "8" and rows["b-4"].value == '"4"' * 400


def test_what_a_run_says_of_itself_belongs_to_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = Store(path, {"machine": "this one"})
    put(store, Row("b-1", "ok", "1", 0, 1))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE run SET context = replace(context, 'this', 'that')")
    assert Store(path).get("answer", SETTINGS, "b", 0, ["b-1"]) == {}


def test_a_store_of_another_form_is_refused(tmp_path: Path) -> None:
    """One from before checksums, say: named, not taken over unchecked."""
    path = tmp_path / "s.sqlite"
    filled(path).close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE result DROP COLUMN checksum")
    with pytest.raises(StoreError, match=r"s\.sqlite: no such column: checksum"):
        Store(path)


def test_a_file_whose_structure_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    filled(path).close()
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(StoreError, match=r"s\.sqlite"):
        Store(path)
