"""Base against Agent on forty questions over twelve tools, written for the purpose: right calls, cost.

    python examples/home.py --model qwen2.5-coder-1.5b

Prints the table that docs/your-own.md shows, and keeps it in figures/home/. Each question is asked once: the
model's own answer is what the agent starts from, so both are timed on the same answer.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import pandas as pd

from study.analysis import look
from study.analysis.statistics import Estimate, paired, wilson
from study.data.benchmarks import to_sample
from study.data.judge import judge
from study.data.models import model_dir
from ttsi import Agent

WRITTEN = Path(__file__).resolve().with_name("home.json")


def rows_of(model: str) -> pd.DataFrame:
    """One row per question: whether base and agent called rightly, why the agent's answer stands, seconds."""
    written = json.loads(WRITTEN.read_text())
    agent = Agent(model_dir(model), written["tools"], required=True, dtype="float32")
    agent.call("Hello", tau=0)  # what comes first pays for the tools' prefix and for memory
    rows = []
    for number, asked in enumerate(written["questions"]):
        record = {"query": asked["query"], "tools": written["tools"], "answers": [asked["call"]]}
        sample = to_sample(record, "home", number)
        began = time.perf_counter()
        live = agent.open(asked["query"])
        before = live.before
        base = time.perf_counter() - began
        answer = live.answer()
        rows.append({
            "model": model, "question": number, "why": answer.why, "likelihood": answer.likelihood,
            "base": judge(before.text, sample).correct, "agent": judge(answer.text, sample).correct,
            "seconds_base": base, "seconds_agent": time.perf_counter() - began,
        })  # fmt: skip
        print(f"{number + 1}/40 {asked['query']!r}: {answer.why!r}", flush=True)
    return pd.DataFrame(rows)


def line(model: str, rows: pd.DataFrame) -> dict[str, str]:
    """The table's row for a model."""
    both, certain = paired(rows["base"], rows["agent"]), rows[rows["why"] == "certain"]
    right = {arm: wilson(int(rows[arm].sum()), len(rows)) for arm in ("base", "agent")}
    ratio = certain["seconds_agent"].sum() / certain["seconds_base"].sum() if len(certain) else float("nan")
    return {
        "model": look.model_label(model),
        "n": str(len(rows)),
        **{f"{arm} right, %": shown(share) for arm, share in right.items()},
        "agent − base, points": shown(both.difference, "+"),
        "gained / lost": f"{both.gained} / {both.lost}",
        "asked to adapt": str(len(rows) - len(certain)),
        "adapted": str((rows["why"] == "adapted").sum()),
        "seconds, base": f"{rows['seconds_base'].mean():.1f}",
        "agent / base": f"{rows['seconds_agent'].sum() / rows['seconds_base'].sum():.2f}",
        "agent / base where certain": f"{ratio:.2f}",
    }


def shown(estimate: Estimate, sign: str = "") -> str:
    """In per cent, with its interval."""
    return look.bracket(100 * estimate.value, 100 * estimate.low, 100 * estimate.high, 1, sign)


def main() -> None:
    """Asks all questions and prints the table."""
    os.environ.setdefault(
        "TTSI_CACHE", str(WRITTEN.parent.parent / ".cache")
    )  # the project's, as make has it
    parser = argparse.ArgumentParser(description="Base against Agent on forty questions over twelve tools.")
    parser.add_argument("--model", action="append", help="a name, or a model's folder; may be given again")
    lines = []
    for model in parser.parse_args().model or ["qwen2.5-coder-0.5b"]:
        rows = rows_of(model)
        look.write(look.figures_dir() / "home" / f"{Path(model).name}.csv", look.csv_bytes(rows))
        lines.append(line(model, rows))
    note = "One question at a time on one machine, what all questions share read before: compare ratios only."
    print(look.save_table(pd.DataFrame(lines), "table_home", "home", note))


if __name__ == "__main__":
    main()
