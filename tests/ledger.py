"""The fault suite's own report: one row per promise, written by the tests that keep it.

    python tests/ledger.py docs     docs/reliability.md anew from docs/reliability.json

A test opens its row with what is promised and closes it with what it saw; a row that stays open says that
the promise was not kept. Rows reach the file when TTSI_LEDGER names its folder (`make test-faults`).
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

OPEN = "**not kept: the test failed**"
_HEAD = """\
# Reliability

Long runs die, and model output and downloaded files are not to be trusted. This page says what happens then.
Its tables are written by the suites themselves: `make test-faults` (real processes, killed and starved) and
`make test-soak` (hundreds of adaptations in one process); no number below was typed. What needs no process of
its own is part of `make test`: hostile replies, schemas and data, damaged downloads, the leakage guard.

## What is promised

- **Store.** One transaction per batch. Every row has a checksum of itself, its key and its run, and opening
  checks all of them: a changed row is named on stderr, never used, and computed again by the next run. A file
  whose structure is damaged is refused in one line that names it.
- **Models and data.** Every file is fetched against a pinned SHA-256 or git blob id and checked again in
  every process that reads it. What is wrong in the cache is named, removed and fetched again; what is wrong
  in a folder of the user's is named and refused. Weights are safetensors or GGUF; nothing is unpickled, and
  no model brings code of its own.
- **Failures of the machine** (out of memory, an endpoint that is down, a prompt beyond the context window)
  are kept apart from wrong answers, are never scored, and are tried again by the next run, except what is
  too long.
- **Determinism.** The same settings, seed, batch shape and threads give byte-identical records apart from
  timings, whatever interrupted the run. Every row of the store says the size of the batch that made it.
  Across batch shapes, in float32: the same text and verdict, scores within 0.001 nats.
- **Numbers.** A loss that is not finite ends the training of that sample: the base model answers and the row
  is marked `diverged`. A score that is not finite is an error of that sample, never a margin.

"""


@dataclass
class Row:
    """One promise: what was done, how many times, what was to happen and what did."""

    test: str
    fault: str
    promised: str
    suite: str
    tries: int = 0
    seen: str = OPEN


_ROWS: list[Row] = []


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], Row]]:
    """Opens this test's row: `row = ledger(fault, promised)`, then set `row.tries` and `row.seen`."""
    suite = Path(str(request.path)).parent.name

    def open_row(fault: str, promised: str) -> Row:
        row = Row(request.node.nodeid.rpartition("/")[2], fault, promised, suite)
        _ROWS.append(row)
        return row

    yield open_row
    _write()


def _write() -> None:
    """Merges the rows so far into the report, if one is to be written; workers take turns."""
    if not (_ROWS and (folder := os.environ.get("TTSI_LEDGER"))):
        return
    path = Path(folder) / "reliability.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        kept = json.loads(file.read() or '{"machine": {}, "rows": []}')
        new = {row.test: asdict(row) for row in _ROWS}
        old = {row["test"]: row for row in kept["rows"]}
        kept["machine"] |= dict.fromkeys({row.suite for row in _ROWS}, machine())
        kept["rows"] = list((old | new).values())
        file.truncate(0)
        file.write(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        path.with_suffix(".md").write_text(page(kept))


def machine() -> str:
    """Where the suite ran."""
    python = f"Python {platform.python_version()}"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {python}"


def page(kept: dict[str, object]) -> str:
    """The Markdown page of a report."""
    parts = [_HEAD]
    for suite, title in (("faults", "Faults"), ("soak", "Soak")):
        rows = [r for r in kept["rows"] if r["suite"] == suite]  # type: ignore[attr-defined, index]
        if not rows:
            continue
        parts.append(f"## {title}\n\n`make test-{suite}` on {kept['machine'][suite]}.\n\n")  # type: ignore[index]
        parts.append("| fault | tries | promised | seen |\n| --- | --- | --- | --- |\n")
        parts += [f"| {r['fault']} | {r['tries']} | {r['promised']} | {r['seen']} |\n" for r in rows]
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    report = Path(sys.argv[1]) / "reliability.json"
    report.with_suffix(".md").write_text(page(json.loads(report.read_text())))
