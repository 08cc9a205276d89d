"""docs/your-own.md: the Python blocks after the marker run as they stand, with the tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from study.run import arms

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "your-own.md").read_text()
MARK = "<!-- tested: tests/test_your_own.py runs the Python blocks from here on -->"
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT.partition(MARK)[2], re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_snippet_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    names: dict[str, Any] = {}
    before = dict(arms.ARMS)
    try:
        exec(BLOCKS[number].replace("qwen2.5-coder-0.5b", "tiny"), names)
    finally:
        arms.ARMS.clear()
        arms.ARMS.update(before)
    said = capsys.readouterr().out
    if "answer" in names:
        assert names["answer"].calls and names["answer"].why in said
    elif "scores" in names:
        assert "short answers" in said and "likelihood" in said
    else:
        assert "picky_icl" in said and "base" in said


def test_the_forty_questions_table_is_the_measured_one() -> None:
    measured = (Path(__file__).resolve().parent.parent / "figures" / "home" / "table_home.md").read_text()
    assert measured.strip().split("\n\n")[0] in TEXT


def test_there_are_snippets() -> None:
    assert len(BLOCKS) == 3


def test_the_teachers_line_is_a_profiles(tmp_path: Path) -> None:
    from study.run.config import load_profile

    (line,) = re.findall(r"```yaml\n(teacher: .*)\n```", TEXT)
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: tiny\nbenchmarks: [fixture]\narms: [tt_d]\n{line}\n")
    assert load_profile(str(path)).teacher_name == "my-model"
