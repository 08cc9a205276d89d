"""One SQLite file that keeps every stage result, so that nothing is computed twice.

A row is one stage's result for one sample under exactly the settings that affect it. Arms, thresholds and
tables are selections over rows; verdicts are recomputed from the stored replies.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "error"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (
    id INTEGER PRIMARY KEY, started TEXT NOT NULL, source TEXT NOT NULL, context TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS settings (hash TEXT PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS result (
    stage TEXT NOT NULL, settings TEXT NOT NULL REFERENCES settings(hash),
    benchmark TEXT NOT NULL, sample TEXT NOT NULL, seed INTEGER NOT NULL,
    status TEXT NOT NULL, value TEXT NOT NULL, seconds REAL NOT NULL, batch INTEGER NOT NULL,
    run INTEGER NOT NULL REFERENCES run(id),
    PRIMARY KEY (stage, settings, benchmark, sample, seed)) WITHOUT ROWID;
"""


class StoreError(Exception):
    """The store can't be read or written; the message says which file and why."""


@dataclass(frozen=True)
class Row:
    """One stage result (JSON). `seconds`: this sample's share of its batch of `batch` rows."""

    sample: str
    status: Status
    value: str
    seconds: float
    batch: int
    source: str = "computed"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A short name of settings: the same for the same content, whatever the order of keys."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The store of one results folder. Safe for several processes: SQLite's write-ahead log and locks.

    context: versions, commit and machine of this run; kept beside every row it writes.
    """

    def __init__(
        self, path: Path, context: Mapping[str, Any] | None = None, source: str = "computed"
    ) -> None:
        self.path = path
        self._context = json.dumps(dict(context or {}), sort_keys=True)
        self._source = source
        self._run: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the store {path}: {error}") from error

    def close(self) -> None:
        """Closes the file; what was put before is safe."""
        self._db.close()

    def get(
        self, stage: str, settings: Mapping[str, Any], benchmark: str, seed: int, samples: Iterable[str]
    ) -> dict[str, Row]:
        """Stored results by sample id; samples without one are left out."""
        wanted = set(samples)
        query = """SELECT sample, status, value, seconds, batch, source FROM result JOIN run ON run.id = run
                   WHERE stage = ? AND settings = ? AND benchmark = ? AND seed = ?"""
        try:
            with closing(self._db.execute(query, (stage, settings_hash(settings), benchmark, seed))) as rows:
                return {r[0]: Row(*r) for r in rows if r[0] in wanted}
        except sqlite3.Error as error:
            raise StoreError(f"cannot read the store {self.path}: {error}") from error

    def put(
        self, stage: str, settings: Mapping[str, Any], benchmark: str, seed: int, rows: Iterable[Row]
    ) -> None:
        """Keeps the rows in one transaction. A result that is there already stays; an error gives way."""
        name = settings_hash(settings)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            if self._run is None:
                started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                values = (started, self._source, self._context)
                cursor = self._db.execute(
                    "INSERT INTO run (started, source, context) VALUES (?, ?, ?)", values
                )
                self._run = cursor.lastrowid
            text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
            self._db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, text))
            self._db.executemany(
                """INSERT INTO result VALUES (?,?,?,?,?,?,?,?,?,?)
                   ON CONFLICT DO UPDATE SET status=excluded.status, value=excluded.value,
                   seconds=excluded.seconds, batch=excluded.batch, run=excluded.run
                   WHERE result.status = 'error'""",
                [
                    (stage, name, benchmark, r.sample, seed, r.status, r.value, r.seconds, r.batch, self._run)
                    for r in rows
                ],
            )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._run = None
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise StoreError(f"cannot write to the store {self.path}: {error}") from error
