"""What `make bench` measures and says: every query charged in full, arithmetic, what programs agree on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from study.analysis import costs, look
from study.bench import driver, reasons, report

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {
    "decoder": 100,
    "last_block": 20,
    "head": 50,
    "attention": 0,
    "flops": 1e3,
    "threads": 2,
    "device": "cpu",
}
TOKENS = {"prompt": 12, "prefix": 8, "example": 11, "turn": 7, "labels": 2}


def stages(tokens: int = 0, drafted: int = 0, accepted: int = 0, **seconds: float) -> dict[str, Any]:
    counted = {"peak_mb": 1024.0, "decoded_tokens": tokens, "drafted": drafted, "accepted": accepted}
    return {k.replace("_after", ", drafted from base"): {"seconds": v} | counted for k, v in seconds.items()}


def sample(t_exact: float, t_activated: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sample whose usual T takes 6 seconds, and all of whose usual loop 14."""
    begun = {
        "tokens": TOKENS,
        "stages": stages(prefix=1.0, h=0.1) | stages(10, 8, 5, base=1.0) | stages(20, g=1.0),
        "scores": [[-1.0]],
        "base": "a",
        "question": "q",
    }

    def ours(t: float, *answer: int) -> dict[str, Any]:
        told = stages(*answer, t=t, answer=1.0, answer_after=0.5)
        return {"stages": told, "losses": [1.0, 0.5], "texts": ["a", "a"]}

    usual = stages(h=1, g=2, t=6, merge=1, save=0.5, reload=0.5, answer=2, restore=1)
    done = {
        "exact": ours(t_exact, 10, 4, 2),
        "activated": ours(t_activated, 12, 10, 9),
        "usual": {"stages": usual, "scores": [[-1.25, 9]], "base": "a", "losses": [1, 0.75], "written": " q",
                  "text": "b"},
    }  # fmt: skip
    return begun, done


@pytest.fixture
def found() -> dict[str, Any]:
    run: dict[str, Any] = {"machine": MACHINE, "commit": "abc", "rows": [], "checks": []}
    for i, (begun, done) in enumerate((sample(2.0, 0.5), sample(4.0, 1.0))):
        run["rows"] += driver._rows("sealtool", f"sealtool-{i}", begun, done, MACHINE)
        run["checks"].append(driver._checks(begun, done))
    batch = {
        "n": 2,
        "stages": stages(prefix=2.0, base=1.0, h=0.1, g=1.0, t=1.5, answer=0.6, answer_after=0.5),
    }
    whole = {
        "n": 4,
        "stages": stages(40, **{"one by one": 8.0}) | stages(40, prefix=4.0, base=2.0, selective=3.0),
    }
    run["rows"] += driver._batch("sealtool", "together", "activated", batch)
    run["rows"] += driver._batch("sealtool", "run", "selective", whole)
    run["together"] = {"n": 2, "equal": 2}
    run["run"] = {"n": 4, "equal": 3, "uncertain": 2, "adapted": 1, "refused": 1}
    return {"model": "m", "seconds": 90.0, "runs": {"float32": run}}


def headline(found: dict[str, Any], what: str) -> Any:
    return costs.headlines(report.rows(found)).set_index("what").loc[what]


def test_every_query_is_charged_with_all_that_it_needs(found: dict[str, Any]) -> None:
    table = report.rows(found)
    for program, way, seconds in (
        ("usual", "usual", 14), ("exact", "uncertain", 5.1), ("activated", "uncertain", 3.6),
        ("selective", "selective", 4), ("activated", "base", 2), ("activated", "certain", 2.1),
    ):  # fmt: skip
        assert costs.charged(table, costs.Charged(program, way)).iloc[0] == pytest.approx(seconds), (
            program,
            way,
        )
    together = costs.Charged("activated", "uncertain", costs.TOGETHER)
    assert costs.charged(table, together).item() == pytest.approx(5.2 / 2)
    assert costs.needs("uncertain", apart=False) == ["base", "h", "g", "t", "answer"]
    assert costs.needs("selective", apart=False) == ["base", "g", "t", "answer"]


def test_what_lacks_a_stage_has_no_price(found: dict[str, Any]) -> None:
    table = report.rows(found)
    table = table[(table["sample"] != "sealtool-0") | (table["stage"] != "g")]
    assert costs.charged(table, costs.Charged("activated", "uncertain")).index.tolist() == [
        ("sealtool", "sealtool-1")
    ]


def test_headlines_are_geometric_means_held_against_what_was_promised(found: dict[str, Any]) -> None:
    whole = headline(found, "uncertain sample, usual loop / activated, SealTool")
    each = 14 / 3.6, 14 / 4.1
    assert whole["measured"] == pytest.approx((each[0] * each[1]) ** 0.5) and whole["n"] == 2
    assert whole["measured_low"] < whole["measured"] < whole["measured_high"]
    assert whole["result"] == "falls short"
    batch = headline(found, "… 8 together / usual loop one at a time")
    assert batch["measured"] == pytest.approx(whole["measured"] * (3.6 + 4.1) / 5.2)
    base = headline(found, "uncertain sample, activated / base answer, one at a time")
    assert base["measured"] == pytest.approx((3.6 / 2 * 4.1 / 2) ** 0.5) and base["result"] == "falls short"
    run = headline(found, "SealTool run, selective / base, seconds per question")
    assert run["measured"] == pytest.approx(9 / 6) and run["result"] == "reached"
    flight = headline(found, "tokens per second, 8 rows in flight / one by one")
    assert flight["measured"] == pytest.approx(4) and flight["n"] == 4 and flight["result"] == "reached"
    assert headline(found, "… VirusTotal")["result"] == "not measured"


def test_arithmetic_leaves_out_what_nobody_reads(found: dict[str, Any]) -> None:
    table = report.rows(found)
    flops = table[table["sample"] == "sealtool-0"].set_index(["program", "stage"])["flops"]
    # 3 epochs, forward and backward, 2 operations per weight: layers, last block and head by token.
    assert flops["usual", "t"] == 6 * 2 * (100 * 11 + 50 * 11)
    assert flops["exact", "t"] == 6 * 2 * (80 * 10 + 20 * 2 + 50 * 2)
    assert flops["activated", "t"] == flops["selective", "t"] == 6 * 2 * (80 * 3 + 20 * 2 + 50 * 2)
    assert flops["exact", "prefix"] == 2 * 80 * 8
    exact = headline(found, "exact, share of the machine's matrix rate in T, %")
    assert exact["measured"] == pytest.approx(100 * flops["exact", "t"] / 1e3 * (1 / 2 + 1 / 4) / 2)
    # At the full rate the prefix pass takes 1.28 s and T of activated 4.56.
    limit = headline(found, "uncertain sample, usual loop / activated, SealTool")["limit"]
    assert limit == pytest.approx(14 / (1.28 + 0.1 + 1 + 4.56 + 1))


def test_guesses_are_counted_per_kind_of_reply(found: dict[str, Any]) -> None:
    table = report.drafts(report.rows(found))
    base, example, exact, activated, _ = (table.iloc[i] for i in range(5))
    assert (base["tokens"], base["guessed"], base["came true"]) == ("20", "16", "10 (62 %)")
    assert base["tokens per pass"].startswith("2.00")
    assert (example["came true"], example["tokens per pass"][:4]) == ("0", "1.00")
    assert exact["tokens per pass"].startswith("1.25") and activated["tokens per pass"].startswith("4.00")


def test_agreement_counts_what_differs(found: dict[str, Any]) -> None:
    said = "\n".join(report.agreement(found))
    assert "base answers of the usual loop and ours equal in 2 of 2" in said
    assert "differ by at most 2.5e-01 nats per token" in said and "at most 2.5e-01 nats." in said
    assert "usual loop = exact in 0 of 2" in said and "exact = activated in 2 of 2" in said
    assert "in one batch: 2 of 2; and in flight in a run: 3 of 4" in said
    assert "without drafts, how many differ: not measured" in said
    found["rounding"] = {"n": 24, "differ": 6, "verdicts": 0, "commit": "abc"}
    said = "\n".join(report.agreement(found))
    assert "6 of 24 differ (25 [12, 45] %); of their verdicts 0 (0 [0, 14] %)" in said


def test_why_a_row_falls_short(found: dict[str, Any]) -> None:
    table = report.rows(found)
    whole, _, _, base, *_ = costs.HEADLINES
    enough, reached, n = reasons.needed(table, whole._replace(bar=3.0))
    # Prefix and T: 1.28 and 4.56 s at the full rate, where they took 1.5 and 2.0; all the rest takes 2.1 s.
    assert enough == pytest.approx(5.84 / (14 / 3 - 2.1), rel=0.01) and n == 2
    assert reached == pytest.approx(2 * 5.84 / (1.5 + 2.0), rel=0.01)
    none = float("inf")
    assert reasons.needed(table, whole._replace(bar=7.0))[0] == none, "the rest alone takes 14 / 6.7"
    assert reasons.needed(table, base._replace(bar=1.5))[0] == none, "without T it is 3.1 / 2"
    assert reasons.needed(table, base._replace(bar=2.0))[0] == pytest.approx(4.56 / (4 - 3.1), rel=0.01)
    said = "\n".join(reasons.reasons(found, table))
    assert "usual loop / activated, SealTool: passes over prompts and T run at" in said
    assert "make bench ARGS=--spent" in said and "a selective run" not in said, "that row reaches its bar"
    table.loc[(table["sample"] == costs.RUN) & (table["stage"] == "selective"), "seconds"] = 6.0
    said = "\n".join(reasons.reasons(found, table))
    assert "2 of 4 questions are uncertain and take 3.0 s more each, 2.0 base answers of 1.5 s" in said
    kinds, flight = {"a": 3.0, "b": 1.0}, {"one by one": {"passes": 10, "seconds": 0.5}}
    told = {"kinds": kinds, "flight": flight, "n": 2, "questions": 4, "dtype": "float32", "threads": 2}
    assert "commit `abc`): a 75 %, b 25 %." in reasons.spent(told | {"commit": "abc"})[0]
    assert "one by one 10 passes of 50 ms" in reasons.spent(told | {"commit": "abc"})[1]


def test_engines_are_set_beside_each_other() -> None:
    way = {"replies": "together", "engine": "vLLM", "n": 2, "per_second": 1.25, "equal": 1}
    said = report.engines({"ways": [way], "version": "vllm 1", "dtype": "float32", "commit": "abc"})
    assert "vllm 1, float32, at commit `abc`" in said and "| together | vLLM | 2 | 1.2 | 1 |" in said
    assert "make bench ARGS=--vllm" in report.engines(None)


def test_a_program_may_be_paired_on_the_first_samples_only() -> None:
    assert driver.Wanted.read("sealtool=8/3") == ("sealtool", 8, 3)
    assert driver.Wanted.read("nexusraven:virustotal=2") == ("nexusraven:virustotal", 2, 2)


# --- a run of it ----------------------------------------------------------------------------------------


def bench(folder: Path, *given: str) -> str:
    command = [sys.executable, "-m", "study.bench", "--model", "tiny", "--dtypes", "float32", *given]
    places = os.environ | {"TTSI_FIGURES": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=places, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_it_runs_and_is_taken_up_again(tmp_path: Path) -> None:
    """The programs on a fixture sample, a batch, a run: same answers, every stage timed, no text kept."""
    wanted = ("--samples", "fixture=1/1", "--questions", "3")
    bench(tmp_path, *wanted)
    found = json.loads((tmp_path / "bench.json").read_text())
    run = found["runs"]["float32"]
    stages = {(r["program"], r["stage"]) for r in run["rows"] if r["n"] == 1}
    assert stages >= {(p, s) for p, way in costs.WAYS.items() for s in costs.needs(way)}
    (check,) = run["checks"]
    agreed = ("base", "written", "usual_is_exact", "same_draft")
    assert all(check[name] for name in agreed) and check["losses"] < 1e-4 and check["scores"] < 1e-4
    assert (run["together"]["equal"], run["run"]["equal"]) == (1, 3)
    assert set(found) == {"model", "seconds", "runs"} and set(run) == {
        "commit", "rows", "checks", "machine", "together", "run"
    }  # fmt: skip
    bench(tmp_path, *wanted, "--go-on")
    again = json.loads((tmp_path / "bench.json").read_text())["runs"]["float32"]
    assert again["rows"] == run["rows"]
    bench(tmp_path, *wanted, "--spent")
    spent = json.loads((tmp_path / "bench.json").read_text())["spent"]
    assert spent["n"] == 1 and spent["kinds"]["products with weights"] > 0
    flight = spent["flight"]
    assert flight["one by one"]["passes"] > flight["in flight"]["passes"] > 0
    bench(tmp_path, "--report")
    assert "| uncertain sample, usual loop / activated, SealTool |" in (tmp_path / "bench.md").read_text()


# --- what is committed ----------------------------------------------------------------------------------


def promised() -> pd.DataFrame:
    return costs.headlines(costs.bench_rows(ROOT / "figures" / "bench.csv"))


def cells(markdown: str) -> dict[str, list[str]]:
    """Rows of Markdown tables by their first cell."""
    lines = (re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("|"))
    return {row[0].strip(): [c.strip() for c in row] for row in lines}


def test_the_report_is_made_again_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path))
    report.report(json.loads((ROOT / "figures" / "bench.json").read_text()))
    for name in ("bench.md", "bench.csv"):
        assert (tmp_path / name).read_text() == (ROOT / "figures" / name).read_text(), name


def test_readme_notebook_and_report_quote_the_same_numbers() -> None:
    """The ratios in figures/bench.md, those that notebook 08 shows, and all that README quotes of them."""
    bench_md = cells((ROOT / "figures" / "bench.md").read_text())
    shown = nbformat.read(ROOT / "notebooks" / "08_cost.ipynb", 4).cells
    outputs = [o for c in shown if c["cell_type"] == "code" for o in c["outputs"] if "data" in o]
    said = [o["data"].get("text/markdown", "") for o in outputs]
    (notebook,) = (text for text in said if text.startswith("| what | precision |"))
    measured = [r for r in look.rows_of(promised()) if r["n"]]
    assert measured
    for r in measured:
        number = look.spread(r, "measured", 2)
        assert any(cell.startswith(f"{number} (n = {r['n']})") for cell in bench_md[r["what"]]), r["what"]
        assert re.search(rf"^\| {re.escape(r['what'])} \| {r['dtype']} \| {r['n']} \| {re.escape(number)} \|",
                         notebook, re.M), r["what"]  # fmt: skip
    readme = (ROOT / "README.md").read_text()
    (row,) = (line for line in readme.splitlines() if line.startswith("| What does it cost? |"))
    quoted = re.findall(r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", row)
    known = {look.spread(r, "measured", 2) for r in measured}
    assert len(quoted) >= 2 and set(quoted) <= known
