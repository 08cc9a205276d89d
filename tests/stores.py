"""What tests ask of a store that is being written."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def rows_in(store: Path) -> int:
    """Number of rows in a store that another process, or thread, is writing."""
    try:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT count(*) FROM result").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
