"""What was asked of paid endpoints and what they said, in one SQLite file: a cache and an account at once."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ttsi.engines.base import EngineError

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS request (
    id INTEGER PRIMARY KEY, sent TEXT NOT NULL, endpoint TEXT NOT NULL, outcome TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0)""",
    "CREATE TABLE IF NOT EXISTS reply (key TEXT PRIMARY KEY, value TEXT NOT NULL, request INTEGER NOT NULL)",
    "CREATE INDEX IF NOT EXISTS request_endpoint ON request (endpoint)",
)
_SENT = "sent"


class BudgetSpent(EngineError):
    """No request was sent, because the budget for this endpoint is spent. What was had before stays."""


@dataclass(frozen=True)
class Usage:
    """What an endpoint was asked for, over all runs that share the ledger.

    requests: all that were sent, repeated and failed ones included; `failed` of them brought no reply.
    cost: US dollars at the prices given; None where none are.
    """

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None


def default_ledger() -> Path:
    """What engines share unless told otherwise; in TTSI_CACHE, XDG_CACHE_HOME/ttsi or ~/.cache/ttsi."""
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (
        Path(os.environ.get("TTSI_CACHE") or Path(above, "ttsi")).expanduser().absolute() / "endpoints.sqlite"
    )


class Ledger:
    """Replies by the hash of their request, and one line per request sent. Holds no key and no prompt.

    Safe for several threads and processes. A request is entered before it is sent, so that one whose
    sender dies is counted all the same. What SQLite can't do raises EngineError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._failures():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            for statement in _SCHEMA:
                self._db.execute(statement)

    def close(self) -> None:
        """Closes the file; what was entered before is safe."""
        self._db.close()

    def replies(self, keys: Iterable[str]) -> dict[str, str]:
        """The stored replies by key; keys without one are left out."""
        found = {}
        with self._lock, self._failures():
            for key in keys:
                if row := self._db.execute("SELECT value FROM reply WHERE key = ?", (key,)).fetchone():
                    found[key] = str(row[0])
        return found

    def begin(self, endpoint: str, max_requests: int | None, max_tokens: int | None) -> int:
        """The number of a new request, entered as sent. Raises BudgetSpent, entering nothing."""
        with self._lock, self._failures(), self._transaction():
            used = self._usage(endpoint)
            tokens = used.prompt_tokens + used.completion_tokens
            if max_requests is not None and used.requests >= max_requests:
                raise BudgetSpent(f"the budget of {max_requests} requests is spent; raise it to go on")
            if max_tokens is not None and tokens >= max_tokens:
                raise BudgetSpent(
                    f"the budget of {max_tokens} tokens is spent ({tokens} used); raise it to go on"
                )
            cursor = self._db.execute(
                "INSERT INTO request (sent, endpoint, outcome) VALUES (?, ?, ?)",
                (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), endpoint, _SENT),
            )
            return int(cursor.lastrowid or 0)

    def settle(self, request: int, outcome: str, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Enters how a request ended and what it used."""
        with self._lock, self._failures():
            self._db.execute(
                "UPDATE request SET outcome = ?, prompt_tokens = ?, completion_tokens = ? WHERE id = ?",
                (outcome, prompt_tokens, completion_tokens, request),
            )

    def keep(self, key: str, value: str, request: int) -> None:
        """Keeps a reply; one that is there already gives way."""
        with self._lock, self._failures():
            self._db.execute("INSERT OR REPLACE INTO reply VALUES (?, ?, ?)", (key, value, request))

    def usage(self, endpoint: str) -> Usage:
        """What an endpoint was asked for so far, without its cost."""
        with self._lock, self._failures():
            return self._usage(endpoint)

    def _usage(self, endpoint: str) -> Usage:
        query = """SELECT count(*), count(*) FILTER (WHERE outcome <> 'ok'), ifnull(sum(prompt_tokens), 0),
                   ifnull(sum(completion_tokens), 0) FROM request WHERE endpoint = ?"""
        with closing(self._db.execute(query, (endpoint,))) as rows:
            return Usage(*rows.fetchone())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise EngineError(f"cannot use the ledger of requests {self.path}: {error}") from error
