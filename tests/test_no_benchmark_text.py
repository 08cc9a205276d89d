"""No committed file carries a benchmark's own text: licences differ, and one is non-commercial."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from study.data import benchmarks, sources

ROOT = Path(__file__).resolve().parent.parent
RUN = 8  # so many words in a row are a quotation
OURS = ["sealtool", "sealtool_train", "apibank", "nexusraven", "toolalpaca"]  # BFCL may be quoted


def quotations(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def committed() -> list[Path]:
    try:
        out = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in out.decode().split("\0") if name]


def forbidden(name: str) -> set[tuple[str, ...]]:
    """The runs of words of a benchmark's own text; skips the test where the benchmark can't be had."""
    try:
        samples = benchmarks.load(name)
    except sources.Unavailable as error:
        pytest.skip(str(error))
    texts = {m.content for s in samples for m in s.messages}
    texts |= {t.description for s in samples for t in s.tools}
    runs = {run for text in texts for run in quotations(text)}
    assert len(runs) > 500
    # The search finds what it looks for.
    longest = max(texts, key=len)
    assert quotations(f"see: {longest}") & runs
    return runs


@pytest.mark.parametrize("name", OURS)
def test_no_committed_file_quotes_a_benchmark(name: str) -> None:
    runs = forbidden(name)
    for path in committed():
        if path.suffix in {".png", ".pdf", ".parquet"} or not path.exists():
            continue
        found = quotations(path.read_text(errors="replace")) & runs
        assert not found, f"{path.relative_to(ROOT)} quotes {name}: {len(found)} runs of {RUN} words"
