"""The walls of the house: who may import whom, and how long a file may be. Read from the syntax trees.

Every import counts, those inside functions and under TYPE_CHECKING too. What breaks a wall today is listed;
the lists only shrink: a new offence fails, and so does a listed one that is gone.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINES = 350
FLOORS = {
    "ttsi": 1,
    "study.analysis": 1,
    "study.data": 2,
    "study.run": 3,
    "study.playground": 3,
    "study.notebooks": 4,
    "study.site": 4,
    "study.bench": 4,
}

# Offences of today. Each list must shrink, to nothing in the end; nothing is to be added.
METHOD: set[tuple[str, str]] = set()
ANALYSIS: set[tuple[str, str]] = set()
CIRCLES: set[tuple[str, ...]] = set()
LONG: set[str] = set()


def modules() -> dict[str, Path]:
    """Every module of the method and the study, by its dotted name."""
    paths = [p for top in ("ttsi", "study") for p in (ROOT / top).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(package: str, source: str, known: Container[str]) -> Iterator[str]:
    """The known modules that a module of a package imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in found:  # the longest beginning that is a module: what follows it is a name inside
            while full and full not in known:
                full = full.rpartition(".")[0]
            if full:
                yield full


@cache
def graph() -> dict[str, set[str]]:
    """Module → the modules it imports."""
    known, out = modules(), {}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        out[name] = {i for i in imports(package, path.read_text(), known) if i != name}
    return out


def floor(module: str) -> int:
    """A module's floor; the package `study` itself has none and stands below all."""
    return next((n for room, n in FLOORS.items() if f"{module}.".startswith(f"{room}.")), 0)


def room(module: str) -> str:
    return next((room for room in FLOORS if f"{module}.".startswith(f"{room}.")), module)


def edges() -> set[tuple[str, str]]:
    return {(name, imported) for name, found in graph().items() for imported in found}


def test_the_graph_is_read() -> None:
    """Else the walls would stand around nothing."""
    known = modules()
    assert {room(m) for m in known} >= FLOORS.keys()
    assert ("study.run.stages", "study.run.memory") in edges()
    source = "def f():\n import ttsi.seeds\n from study.run import study as s, T\n from . import chat, base"
    found = {"ttsi.seeds", "study.run.study", "study.run", "ttsi.engines.chat", "ttsi.engines.base"}
    assert set(imports("ttsi.engines", source, known)) == found


def test_the_method_knows_nothing_of_the_study() -> None:
    assert {(a, b) for a, b in edges() if room(a) == "ttsi" and room(b) != "ttsi"} == METHOD


def test_analysis_knows_frames_only() -> None:
    """Neither the method nor the rest of the study: what it says about a run is in the run's frames."""
    assert {(a, b) for a, b in edges() if room(a) == "study.analysis" != room(b)} == ANALYSIS


def test_imports_run_downwards() -> None:
    upwards = {(a, b) for a, b in edges() if floor(b) > floor(a)}
    assert upwards - METHOD - ANALYSIS == set()


def test_nothing_imports_in_a_circle() -> None:
    """A circle: modules each of which leads to each other one, by whatever way."""
    beyond = {name: reached(name) for name in graph()}
    circles = {tuple(sorted(m for m in beyond[name] if name in beyond[m])) for name in beyond}
    assert circles - {()} == CIRCLES


def reached(name: str) -> set[str]:
    """The modules that importing one leads to."""
    imported, found, todo = graph(), set[str](), [name]
    while todo:
        new = imported[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_no_file_is_long() -> None:
    paths = [p for top in ("ttsi", "study", "tools") for p in (ROOT / top).rglob("*.py")]
    long = {str(p.relative_to(ROOT)) for p in paths if len(p.read_text().splitlines()) > LINES}
    assert long == LONG
