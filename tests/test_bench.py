"""What `make bench` says of what it measured: ratios, arithmetic, guesses that came true."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bench_report

MACHINE = {"decoder": 100, "last_block": 20, "head": 50, "attention": 0, "flops": 1e3}
TOKENS = {"prompt": 12, "prefix": 8}


def stage(seconds: float, tokens: int = 0, drafted: int = 0, accepted: int = 0) -> dict[str, float]:
    counted = {"decoded_tokens": tokens, "drafted": drafted, "accepted": accepted}
    return {"seconds": seconds, "peak_mb": 1.0} | counted


def sample(number: int, exact: float, activated: float) -> dict[str, Any]:
    """A sample whose usual T takes 6 seconds, 8 with merge, save and reload."""

    def mode(t: float, tokens: int, answer: dict[str, float]) -> dict[str, Any]:
        return {
            "stages": {"T": stage(t), "answer": answer},
            "tokens": {"T": tokens, "labels": 2},
            "losses": [1.0, 0.5],
            "text": "a",
        }

    usual = {"H": 1.0, "G": 2.0, "T": 6.0, "merge": 1.0, "save": 0.5, "reload": 0.5, "answer": 2.0}
    return {
        "benchmark": "sealtool",
        "sample": f"sealtool-{number}",
        "begin": {
            "tokens": TOKENS,
            "stages": {
                "prefix": stage(1.0),
                "H": stage(0.1),
                "base": stage(1.0, 10, 8, 5),
                "G": stage(1.0, 20),
            },
            "scores": [[-1.0]],
            "base": "a",
            "examples": ["q"],
        },
        "exact": mode(exact, 10, stage(1.0, 10, 4, 2)),
        "activated": mode(activated, 4, stage(1.0, 12, 10, 9)),
        "usual": {
            "stages": {k: {"seconds": v, "peak_mb": 2.0} for k, v in (usual | {"restore": 1.0}).items()},
            "scores": [[-1.25]],
            "base": None if number else "a",
            "losses": [1.0, 0.75],
            "written": " q",
            "text": "b" if number else "a",
        },
    }


@pytest.fixture
def found() -> dict[str, Any]:
    batch = {"plain one by one": 8.0, "plain together": 2.0, "full one by one": 9.0, "full together": 4.5}
    rest = dict.fromkeys(("one by one", "prefix", "base", "H", "G", "T", "answer"), 1.0)
    return {
        "machine": MACHINE,
        "seconds": 90.0,
        "samples": [sample(0, 2.0, 0.5), sample(1, 4.0, 1.0)],
        "batch": {
            "n": 2,
            "tokens": [4, 2],
            "equal": 2,
            "equal_full": 1,
            "stages": {k: {"seconds": v} for k, v in (batch | rest).items()},
        },
    }


def test_ratios_are_geometric_means_held_against_their_bars(found: dict[str, Any]) -> None:
    table = bench_report.bars(found).set_index("what")
    t = table.loc["T, usual loop / exact"]
    assert t.ratio == pytest.approx((8 / 2 * 8 / 4) ** 0.5) and t.n == 2
    assert t.low < t.ratio < t.high
    assert t.result == "falls short"  # 2.83 of 3
    assert table.loc["T, usual loop / activated"].ratio == pytest.approx((16 * 8) ** 0.5)
    whole = table.loc["uncertain sample, usual loop / activated"]
    assert whole.ratio == pytest.approx((14 / 3.6 * 14 / 4.1) ** 0.5)
    assert table.loc["… drafts off"].ratio == pytest.approx(4) and table.loc["… drafts off"].result == "pass"
    assert table.loc["… drafts off"].n == 2, "samples of the one batch"
    assert table.loc["… drafts off, 48 tokens of every reply"].result == "falls short"
    assert table.loc["T, usual loop / activated, VirusTotal"].result == "not measured"


def test_arithmetic_leaves_out_what_nobody_reads(found: dict[str, Any]) -> None:
    rows = bench_report.rows(found)
    flops = rows[rows["sample"] == "sealtool-0"].set_index(["program", "stage"]).flops
    # 3 epochs, forward and backward, 2 operations per weight: layers, last block and head by token.
    assert flops["usual", "T"] == 6 * 2 * (100 * 10 + 50 * 10)
    assert flops["exact", "T"] == 6 * 2 * (80 * 9 + 20 * 2 + 50 * 2)
    assert flops["activated", "T"] == 6 * 2 * (80 * 3 + 20 * 2 + 50 * 2)
    assert flops["exact", "prefix"] == 2 * 80 * 8


def test_guesses_are_counted_per_kind_of_reply(found: dict[str, Any]) -> None:
    table = bench_report.drafts(bench_report.rows(found)).set_index("reply")
    base, example, exact, activated = (table.iloc[i] for i in range(4))
    assert (base["tokens"], base["guessed"], base["came true"]) == ("20", "16", "10 (62 %)")
    assert base["tokens per pass"].startswith("2.00")
    assert (example["came true"], example["tokens per pass"][:4]) == ("0", "1.00")
    assert exact["tokens per pass"].startswith("1.25") and activated["tokens per pass"].startswith("4.00")


def test_agreement_counts_what_differs(found: dict[str, Any]) -> None:
    said = "\n".join(bench_report.agreement(found))
    assert "Base answers equal in 1 of 1" in said
    assert "differ by at most 2.5e-01 nats per token" in said and "at most 2.5e-01 nats (" in said
    assert "usual loop = exact in 1 of 2" in said
    assert "drafts and without: 2 of 2; 48 tokens of each, whatever they say: 1 of 2" in said
    assert "In bfloat16, answers that depend on their batch: not measured" in said
    found["bfloat16"] = {"n": 24, "differ": 6, "verdicts": 0, "commit": "abc"}
    said = "\n".join(bench_report.agreement(found))
    assert "6 of 24 differ (25 [12, 45] %); of their verdicts 0 (0 [0, 14] %)" in said


def test_what_has_not_run_is_not_measured(found: dict[str, Any]) -> None:
    found["batch"] = {}
    table = bench_report.bars(found).set_index("what")
    together = table[
        [what.startswith(("8 together", "tokens per second", "… drafts")) for what in table.index]
    ]
    assert len(together) == 4 and set(together.result) == {"not measured"}
    assert set(bench_report.engines(None)["tokens per second"]) == {"not measured"}
    assert "make bench ARGS=--vllm" in bench_report._engines_caption(None)


def test_minutes_of_a_run_are_told_apart(found: dict[str, Any]) -> None:
    # Of 90 seconds: 2 × 14, 3 + 5, 1.5 + 2, 2 × 3.1, 30.5, and the rest.
    said = bench_report._minutes(found)
    assert said.startswith("2 minutes (usual 0.5, exact 0.1, activated 0.1, ")
    assert "share 0.1, samples together 0.5, loading, warm-ups, samples without an example 0.2)" in said


def test_engines_are_set_beside_each_other_way_by_way() -> None:
    def way(seconds: float, *tokens: list[int]) -> dict[str, Any]:
        return {"seconds": seconds, "tokens": tokens}

    torch = {"one by one": way(2.0, [1, 2], [3]), "together": way(1.0, [1, 2], [3])}
    vllm = {"one by one": way(6.0, [1, 2], [3]), "together": way(2.0, [1, 9, 9], [3]), "version": "vllm 1"}
    compared = {"torch": torch, "vllm": vllm, "dtype": "float32", "commit": "abc"}
    table = bench_report.engines(compared).set_index(["replies", "engine"])
    assert table.loc[("one by one", "torch"), "tokens per second"] == "1.5"
    assert table.loc[("together", "vLLM"), "tokens per second"] == "2.0"
    assert list(table.equal[:4]) == ["2 of 2", "2 of 2", "2 of 2", "1 of 2"]
    assert ("together, drafts off", "vLLM") not in table.index
    assert table.loc[("together, drafts off", "torch"), "tokens per second"] == "not measured"
    assert "vllm 1, float32, in a run of its own at commit `abc`" in bench_report._engines_caption(compared)
