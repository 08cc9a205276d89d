"""The README's own code runs as it stands, but for a smaller model; its numbers are the tables'."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from study.analysis import statistics
from study.data import sources

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


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


# --- what the README says of the runs -------------------------------------------------------------------

NUMBER = r"[-+]?\d+(?:\.\d+)?"
QUOTED = re.compile(rf"(?<![\w.,])({NUMBER})(?: %| points)? \[({NUMBER}), ({NUMBER})\]")
TELLING = ["README.md", "docs/findings.md", "docs/method.md", "docs/hypotheses.md"]


def told(path: Path) -> list[tuple[str, ...]]:
    """Every "value [low, high]" of a text, without signs of plus."""
    text = " ".join(path.read_text().split()).replace("−", "-")
    return [tuple(x.removeprefix("+") for x in quote) for quote in QUOTED.findall(text)]


@cache
def estimates() -> npt.NDArray[np.float64]:
    """Every estimate with its interval in the tables, (estimates, 3): as it stands and in hundredths."""
    found = [np.array(told(ROOT / "figures" / "bench.md"), float)]
    for path in sorted((ROOT / "figures" / "full").glob("*.csv")):
        table = pd.read_csv(path)
        for low in [str(c) for c in table if str(c).endswith("low")]:
            stem = low.removesuffix("low")
            for value in {stem.rstrip("_"), f"{stem}share", stem or "accuracy"} & {*table}:
                found.append(table[[value, low, f"{stem}high"]].to_numpy(float))
    rows = np.concatenate(found)
    return np.concatenate([rows, 100 * rows])


EARLIER = {("9.4", "5.7", "13.5"): ("sealtool", "constrained", 192)}
"""What was written down of a benchmark's first samples; its tables have more by now. An arm against base."""


def as_it_stood(benchmark: str, arm: str, n: int) -> tuple[str, ...]:
    """That difference in points and its interval, of the records."""
    rows = pd.read_parquet(ROOT / "results" / "full" / "records.parquet")
    rows = rows[(rows["benchmark"] == benchmark) & (rows["variant"] == "")].query("inference == 'direct'")
    base, other = (rows[rows["arm"] == a].set_index("sample")["correct"].astype(float) for a in ("base", arm))
    first = statistics.paired(base[:n], other.reindex(base.index[:n])).difference
    return tuple(f"{100 * x:.1f}" for x in (first.value, first.low, first.high))


@pytest.mark.parametrize("name", TELLING)
def test_every_interval_that_is_told_stands_in_a_table(name: str) -> None:
    quotes = told(ROOT / name)
    assert quotes
    for quote in quotes:
        if quote in EARLIER:
            assert as_it_stood(*EARLIER[quote]) == quote
            continue
        unit = 10.0 ** -len(quote[0].partition(".")[2])
        near = np.abs(estimates() - np.array(quote, float)) <= 0.5 * unit + 1e-6
        assert near.all(axis=1).any(), quote
