"""The store keeps what it was given, once, and says so plainly when it can't."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from ttsi.store import Row, Store, StoreError, settings_hash

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
