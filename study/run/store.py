"""One SQLite file that keeps every stage result, so that nothing is computed twice.

A row is one stage's result for one sample under exactly the settings that affect it. Arms, thresholds and
tables are selections over rows; verdicts are recomputed from the stored replies. Every row carries a checksum
of itself and of the run it came from: a row that a failing disk has changed is named, never used, and
computed again by the next run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from study.data.downloads import say

Status = Literal["ok", "error"]

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS run (
    id INTEGER PRIMARY KEY, started TEXT NOT NULL, source TEXT NOT NULL, context TEXT NOT NULL)""",
    "CREATE TABLE IF NOT EXISTS settings (hash TEXT PRIMARY KEY, json TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS result (
    stage TEXT NOT NULL, settings TEXT NOT NULL REFERENCES settings(hash),
    benchmark TEXT NOT NULL, sample TEXT NOT NULL, seed INTEGER NOT NULL,
    status TEXT NOT NULL, value TEXT NOT NULL, seconds REAL NOT NULL, batch INTEGER NOT NULL,
    run INTEGER NOT NULL REFERENCES run(id), checksum TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (stage, settings, benchmark, sample, seed)) WITHOUT ROWID""",
)
_FIELDS = "stage, settings, benchmark, sample, seed, status, value, seconds, batch, run, checksum"
_KEY = "stage = ? AND settings = ? AND benchmark = ? AND sample = ? AND seed = ?"
_MACHINES = """SELECT DISTINCT r.stage,
    CASE WHEN json_valid(s.json) THEN json_extract(s.json, '$.lora.mode') END,
    CASE WHEN json_valid(run.context) THEN json_extract(run.context, '$.machine') END
    FROM result r JOIN run ON run.id = r.run JOIN settings s ON s.hash = r.settings"""


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


def _checksum(*fields: object) -> str:
    """What tells whether a row is as it was written: SHA-256 of its fields, shortened."""
    return hashlib.sha256(json.dumps(fields, default=repr).encode()).hexdigest()[:16]


class Store:
    """The store of one results folder. Safe for several processes: SQLite's write-ahead log and locks.

    context: versions, commit and machine of this run; kept beside every row it writes. Opening checks the
    whole file: a damaged row is named on stderr, a file whose structure is damaged raises StoreError.
    """

    def __init__(
        self, path: Path, context: Mapping[str, Any] | None = None, source: str = "computed"
    ) -> None:
        self.path = path
        self._context = json.dumps(dict(context or {}), sort_keys=True)
        self._source = source
        self._run: int | None = None
        self._told: set[tuple[Any, ...]] = set()
        self._others: dict[str, Store] = {self._context: self}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            # A damaged text must reach the checksum, not fail in decoding.
            self._db.text_factory = lambda data: data.decode("utf-8", "replace")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            for statement in _SCHEMA:
                self._db.execute(statement)
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            self._sound("", ())
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the store {path}: {error}") from error
        if found != "ok":
            raise StoreError(
                f"the store {path} is damaged ({' '.join(found.split())}): restore a copy, or move it away "
                "and the next run starts a new one"
            )

    def under(self, context: Mapping[str, Any]) -> Store:
        """This store, open once, for rows that another context made: another model's, say."""
        text = json.dumps(dict(context), sort_keys=True)
        if text not in self._others:
            self._others[text] = other = copy.copy(self)
            other._context, other._run = text, None
        return self._others[text]

    def machines(self) -> dict[str, set[str]]:
        """Machine → stages that it has results of, a training stage with its mode ("adapted exact")."""
        found: dict[str, set[str]] = {}
        try:
            rows = self._db.execute(_MACHINES).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"cannot read the store {self.path}: {error}") from error
        for stage, mode, machine in rows:
            if machine:
                found.setdefault(machine, set()).add(f"{stage} {mode}" if mode else stage)
        return found

    def close(self) -> None:
        """Closes the file; what was put before is safe."""
        self._db.close()

    def get(
        self, stage: str, settings: Mapping[str, Any], benchmark: str, seed: int, samples: Iterable[str]
    ) -> dict[str, Row]:
        """Stored results by sample id; samples without one are left out, and so are damaged rows."""
        wanted = tuple(dict.fromkeys(samples))
        where = "WHERE stage = ? AND settings = ? AND benchmark = ? AND seed = ? AND sample IN"
        where += f" ({','.join('?' * len(wanted))})"
        try:
            rows = self._sound(where, (stage, settings_hash(settings), benchmark, seed, *wanted))
        except sqlite3.Error as error:
            raise StoreError(f"cannot read the store {self.path}: {error}") from error
        return {row.sample: row for row in rows}

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
                self._run, self._origin = cursor.lastrowid, _checksum(*values)
            text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
            self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, text))
            for row in rows:
                key = (stage, name, benchmark, row.sample, seed)
                kept = self._sound(f"WHERE {_KEY}", key)
                if kept and kept[0].status != "error":
                    continue
                fields = (*key, row.status, row.value, float(row.seconds), row.batch, self._run)
                self._db.execute(
                    f"INSERT OR REPLACE INTO result ({_FIELDS}) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                    (*fields, _checksum(*fields, self._origin)),
                )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._run = None
            # Where the disk is full, SQLite may have rolled back already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise StoreError(f"cannot write to the store {self.path}: {error}") from error

    def _origins(self) -> dict[int, tuple[str, str]]:
        """Source and checksum of every run."""
        runs = self._db.execute("SELECT id, started, source, context FROM run")
        return {i: (source, _checksum(started, source, context)) for i, started, source, context in runs}

    def _sound(self, where: str, values: tuple[Any, ...]) -> list[Row]:
        """The rows that are as they were written; each of the others is named once."""
        origins, sound = self._origins(), []
        with closing(self._db.execute(f"SELECT {_FIELDS} FROM result {where}", values)) as rows:
            for *fields, checksum in rows:
                stage, _, benchmark, sample, seed, status, value, seconds, batch, run = fields
                source, origin = origins.get(run, ("", ""))
                if checksum == _checksum(*fields, origin):
                    sound.append(Row(sample, status, value, seconds, batch, source))
                elif (key := (stage, benchmark, sample, seed)) not in self._told:
                    self._told.add(key)
                    say(
                        f"{self.path}: the stored {stage} of {benchmark} sample {sample} (seed {seed}) is "
                        "damaged: not used, computed again by the next run"
                    )
        return sound
