"""The README's own code runs as it stands, but for a smaller model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from study.data import sources

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_on_own_tools_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    assert code.count("qwen2.5-coder-0.5b") == 1
    try:
        sources.model_dir("smollm2-135m")
    except sources.Unavailable as error:
        pytest.skip(str(error))
    names: dict[str, object] = {}
    # Whatever the margin, the path is walked; a small model's failures aren't drawn again.
    for ours, test in {
        "qwen2.5-coder-0.5b": "smollm2-135m",
        "< 0.95": "<= 1",
        "PAPER_SAMPLING)": "PAPER_SAMPLING, retries=0)",
    }.items():
        assert ours in code
        code = code.replace(ours, test)
    exec(code, names)
    assert capsys.readouterr().out.strip()
    assert names["written"] is not None


def test_every_file_that_the_readme_names_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
