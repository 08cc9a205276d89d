"""`make bench`: measures what there is to measure, keeps it in figures/bench.json and writes the report.

What a run measured is kept after each sample: `--go-on` measures what it lacks. The file holds no text.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from study.analysis import look
from study.bench import driver, ours, programs
from study.data import sources
from study.data.models import TINY
from ttsi.engines.base import native_dtype

PROGRAMS = {"ours": ours.Ours, "theirs": programs.Theirs, "vllm": programs.Served}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m study.bench")
    native = list(dict.fromkeys(["float32", native_dtype()]))
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--dtypes", nargs="*", default=native, help="by default what this machine multiplies")
    parser.add_argument("--samples", nargs="*", type=driver.Wanted.read, metavar="NAME=N/PAIRED",
                        default=[*map(driver.Wanted.read, ("sealtool=8/3", "nexusraven:virustotal=2/1"))],
                        help="uncertain samples, and how many of them the usual loop runs too")  # fmt: skip
    parser.add_argument("--questions", type=int, default=12, help="of the first benchmark, as a whole run")
    parser.add_argument("--go-on", action="store_true", help="measure only what the last run lacks")
    parser.add_argument("--report", action="store_true", help="of what has been measured")
    parser.add_argument("--bfloat16", action="store_true", help="count only how often bfloat16 rounds apart")
    parser.add_argument("--vllm", action="store_true", help="only torch beside vLLM, on the same prompts")
    parser.add_argument("--spent", action="store_true", help="only where T of exact and passes in flight go")
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return programs.serve(PROGRAMS[asked.worker](asked.model, asked.dtypes[0]))
    if asked.vllm and not driver.VLLM.exists():
        parser.error("vLLM is not installed here: make test-vllm does that")
    path = look.figures_dir() / "bench.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    aside = (
        asked.bfloat16 or asked.vllm or asked.spent
    )  # runs of their own, kept when the programs are measured anew
    if (asked.report or asked.go_on) and not known:
        parser.error(f"{path} is not there: nothing has been measured yet")
    if known and known["model"] != asked.model and (asked.go_on or aside):
        parser.error(f"{path} was measured with {known['model']}")
    found: dict[str, Any] = {"model": asked.model, "seconds": 0.0, "runs": {}}
    if asked.report or asked.go_on or aside:
        found = known or found
    elif known and known["model"] == asked.model:
        found |= {k: known[k] for k in ("rounding", "engines", "spent") if k in known}
    began = time.monotonic() - found["seconds"]

    def keep() -> None:
        if not aside:
            found["seconds"] = time.monotonic() - began
        look.write(path, json.dumps(found).encode())

    if not asked.report:
        if asked.model != TINY:
            sources.fetch([asked.model])
        names = [w.benchmark for w in asked.samples]
        if asked.bfloat16:
            found["rounding"] = driver.rounding(asked.model, names)
        if asked.vllm:
            found["engines"] = driver.engines(asked.model, "float32", names[0])
        if asked.spent:
            found["spent"] = driver.spent(asked.model, "float32", asked.samples[0], asked.questions)
        for at, dtype in enumerate([] if aside else asked.dtypes):
            run = found["runs"].setdefault(dtype, {})
            # The usual loop takes most of the half hour: of a later precision it runs one sample.
            wanted = [w._replace(paired=min(w.paired, 1)) if at else w for w in asked.samples]
            driver.measure(asked.model, dtype, wanted, asked.questions, run, driver.stopwatch(), keep)
        keep()
    from study.bench.report import report  # draws: the programs do without

    if not any(run.get("rows") for run in found["runs"].values()):
        print("make bench has measured no samples yet: no report")
        return
    print(report(found))


if __name__ == "__main__":
    main()
