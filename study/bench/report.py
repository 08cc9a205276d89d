"""What `make bench` measured, as figures/bench.{md,csv,png,pdf}; no model, only what bench.json holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.analysis import costs, look
from study.analysis.costs import WAYS, needs
from study.analysis.figures import save_figure, style
from study.analysis.statistics import wilson
from study.bench.reasons import reasons

_DOMAINS = {"nexusraven:virustotal": "VirusTotal"}
AGREE = {
    "base": "base answers of the usual loop and ours equal in {} samples",
    "written": "synthetic examples read the same from both programs in {}",
    "usual_is_exact": "adapted answers, usual loop = exact in {}",
    "exact_is_activated": "adapted answers, exact = activated in {} (two modes: not the same adapter)",
    "same_draft": "adapted answers the same drafted from the example and from the base answer in {}",
    "scores": "scores of H differ by at most {} nats per token",
    "losses": "losses of exact and the usual loop differ by at most {} nats",
}


def rows(found: Mapping[str, Any]) -> pd.DataFrame:
    """One row per precision, sample (or batch, or run), program and stage, as `costs.BENCH` has it."""
    parts = []
    for dtype, run in found["runs"].items():
        part = pd.DataFrame(run["rows"]).reindex(columns=costs.BENCH).astype({"flops": float})
        rate = part["flops"] / part["seconds"] / run["machine"]["flops"]
        parts.append(part.assign(dtype=dtype, device=run["machine"]["device"], reached=rate))
    return pd.concat(parts, ignore_index=True)


def named(benchmark: str) -> str:
    return _DOMAINS.get(benchmark, look.label(benchmark))


def shown_headlines(table: pd.DataFrame) -> pd.DataFrame:
    """The headlines for reading: a row each, a column per precision."""
    out: dict[str, dict[str, str]] = {}
    for r in look.rows_of(table):
        cells = out.setdefault(
            r["what"], {"what": r["what"], "at least / at most": f"{r['sense']} {r['bar']:g}"}
        )
        cells[r["dtype"]] = (
            f"{look.spread(r, 'measured', 2)} (n = {r['n']}): {r['result']}" if r["n"] else r["result"]
        )
        cells[f"limit, {r['dtype']}"] = look.bracket(r["limit"], np.nan, np.nan, 2)
        cells["whose"] = " · ".join(filter(None, (cells.get("whose"), _whose(r))))
    return pd.DataFrame(list(out.values()))


def _whose(r: Mapping[str, Any]) -> str:
    """Whether a row stands where arithmetic puts it, or there is something to be won."""
    if pd.isna(r["limit"]) or not r["n"]:
        return "ours" if r["n"] else ""
    near = r["measured"] / r["limit"] if r["sense"] == "≥" else r["limit"] / r["measured"]
    if r["limit"] < r["bar"] if r["sense"] == "≥" else r["limit"] > r["bar"]:
        return f"floor: more than arithmetic allows ({100 * near:.0f} % of it reached)"
    return (
        f"floor ({100 * near:.0f} % of it reached)"
        if near > 0.9
        else f"ours ({100 * near:.0f} % of the limit)"
    )


def floors(table: pd.DataFrame) -> pd.DataFrame:
    """T alone, by precision and benchmark: what arithmetic allows of the usual loop over a mode, and reached.

    T of `activated` stands on the pass over the prompt, which is not in it: a share, no headline.
    """
    t = table[table["stage"] == "t"]
    out = []
    for (dtype, benchmark), group in t.groupby(["dtype", "benchmark"], sort=False):
        by = {p: g.set_index("sample") for p, g in group.groupby("program")}
        for mode in (m for m in ("exact", "activated") if m in by and "usual" in by):
            allowed = costs.ratio(by["usual"]["flops"], by[mode]["flops"])
            took = costs.ratio(by["usual"]["seconds"], by[mode]["seconds"])
            both = [100 * by[p]["reached"].mean() for p in ("usual", mode)]
            out.append({
                "precision": dtype, "benchmark": named(str(benchmark)), "T of": f"usual loop / {mode}",
                "n": str(took.n), "arithmetic allows": look.bracket(allowed.value, np.nan, np.nan, 2),
                "measured": look.bracket(took.value, took.low, took.high, 2),
                "share of the machine's rate, usual / ours": f"{both[0]:.0f} % / {both[1]:.0f} %",
            })  # fmt: skip
    return pd.DataFrame(out)


def stages(table: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds per stage and program, all charged, and the peak memory, for reading."""
    means = costs.by_stage(table)
    peaks = table.groupby(["dtype", "benchmark", "program"])["peak_mb"].max() / 1024
    keys = pd.MultiIndex.from_frame(means[["dtype", "benchmark", "program"]])
    numbers = means.drop(columns=["dtype", "benchmark", "program", "n"]).map(lambda x: look.text(x))
    means["benchmark"] = means["benchmark"].map(named)
    return means[["dtype", "benchmark", "program", "n"]].assign(
        **numbers, **{"peak, GB": peaks[keys].to_numpy()}
    )


def drafts(table: pd.DataFrame) -> pd.DataFrame:
    """What guessing ahead gains: a row per precision, benchmark and kind of reply, each decoded alone.

    Tokens per pass: the geometric mean over samples with its interval; decoding token by token has 1.
    """
    kinds = {
        ("activated", "base"): "base answer, guessed from the prompt",
        ("activated", "g"): "synthetic example, from the prompt",
        ("exact", "answer"): "adapted answer (exact), from the example and the prompt",
        ("activated", "answer"): "adapted answer (activated), from the example and the prompt",
        ("selective", "answer"): "adapted answer (selective), from the base answer and the prompt",
    }
    out = []
    for (dtype, benchmark), group in costs.alone(table).groupby(["dtype", "benchmark"], sort=False):
        for (program, stage), kind in kinds.items():
            part = group[(group["program"] == program) & (group["stage"] == stage)]
            if part.empty:
                continue
            tokens, drafted, accepted = (part[c].sum() for c in ("decoded_tokens", "drafted", "accepted"))
            each = costs.ratio(part["decoded_tokens"], part["decoded_tokens"] - part["accepted"])
            row = {"precision": dtype, "benchmark": named(str(benchmark)), "reply": kind, "n": str(len(part))}
            row |= {"tokens": f"{tokens:.0f}", "guessed": f"{drafted:.0f}"}
            row["came true"] = f"{accepted:.0f} ({100 * accepted / drafted:.0f} %)" if drafted else "0"
            out.append(row | {"tokens per pass": look.bracket(each.value, each.low, each.high, 2)})
    return pd.DataFrame(out)


def shares(table: pd.DataFrame) -> list[str]:
    """What an uncertain sample's seconds are spent on, in sentences."""
    lines = []
    for r in look.rows_of(costs.by_stage(table)):
        if r["program"] in ("activated", "selective"):
            spent = {s: 100 * r[s] / r["charged"] for s in needs(WAYS[r["program"]])}
            parts = ", ".join(f"{s} {share:.0f} %" for s, share in spent.items())
            lines.append(
                f"{named(r['benchmark'])}, {r['dtype']}, {r['program']}: of {r['charged']:.1f} s {parts}."
            )
    return lines


def agreement(found: Mapping[str, Any]) -> list[str]:
    """What the programs agree on, in sentences with counts; where nothing was compared, nothing."""
    lines = []
    for dtype, run in found["runs"].items():
        for name, text in AGREE.items():
            if seen := [c[name] for c in run["checks"] if name in c]:
                count = f"{sum(seen)} of {len(seen)}" if isinstance(seen[0], bool) else f"{max(seen):.1e}"
                lines.append(f"{dtype}: {text.format(count)}.")
        batch, asked = run.get("together"), run.get("run")
        if batch and asked:
            lines.append(
                f"{dtype}: base answers equal alone and in one batch: {batch['equal']} of {batch['n']}; and "
                f"in flight in a run: {asked['equal']} of {asked['n']}. Of that run's questions "
                f"{asked['uncertain']} were uncertain (likelihood below ½), {asked['adapted']} answered by "
                f"an adapter, {asked['refused']} kept the base answer as the likelier one."
            )
    return [*lines, rounding(found.get("rounding"))]


def rounding(counted: Mapping[str, Any] | None) -> str:
    """How often an answer depends on its batch in bfloat16."""
    said = "In bfloat16, of base answers decoded alone and eight together, without drafts,"
    if not counted:
        return f"{said} how many differ: not measured (make bench ARGS=--bfloat16)."
    n, found = counted["n"], [wilson(counted[k], counted["n"]) for k in ("differ", "verdicts")]
    answers, verdicts = (f"{look.bracket(100 * x.value, 100 * x.low, 100 * x.high, 0)} %" for x in found)
    return (
        f"{said} {counted['differ']} of {n} differ ({answers}); of their verdicts {counted['verdicts']} "
        f"({verdicts}), at commit `{counted['commit']}`."
    )


def engines(compared: Mapping[str, Any] | None) -> str:
    """Tokens per second of torch and vLLM on the same prompts, with a caption."""
    said = (
        "Base answers by torch and vLLM, reading the prompts included, from cold prefix caches; torch "
        "guesses ahead unless a row says otherwise; equal: to torch's, had one by one."
    )
    if not compared:
        return f"{said} Not measured: make test-vllm installs vLLM, make bench ARGS=--vllm measures."
    ways = look.markdown(pd.DataFrame(compared["ways"]).astype({"n": str, "equal": str}))
    return f"{said} {compared['version']}, {compared['dtype']}, at commit `{compared['commit']}`.\n\n{ways}"


def _about(found: Mapping[str, Any]) -> str:
    runs = (
        f"{dtype} at commit `{run['commit']}` on {run['machine']['device']}, {run['machine']['threads']} "
        f"threads, matrix products at {run['machine']['flops'] / 1e9:.0f} GFLOP/s"
        for dtype, run in found["runs"].items()
    )
    lost = "".join(f" Not measured: {d}." for d in ("float32", "bfloat16") if d not in found["runs"])
    return f"{found['model']}: {'; '.join(runs)}. {found['seconds'] / 60:.0f} minutes.{lost}"


def report(found: Mapping[str, Any]) -> str:
    """Writes figures/bench.{csv,md,png,pdf}; what bench.md says."""
    table = rows(found)
    text = [
        f"{_about(found)} Every query is charged with all that it needs, the pass over its prompt too. "
        "Ratios are geometric means over samples on which the programs took turns, with 95 % t intervals; "
        "what was timed once, for several together or a whole run, has none. Limit: the same if our passes "
        "over prompts and T ran at the machine's full matrix rate. Rows near it stand on the floor of "
        "arithmetic, the others are ours to win. In bfloat16, where a batch's shape can turn a near-tie, "
        "eight are decoded together and wait for the last instead of flying.",
        look.markdown(shown_headlines(costs.headlines(table))),
        "Why a row falls short:",
        _list(reasons(found, table)),
        "T alone: training only, without the usual loop's merge, save and reload. What arithmetic allows is "
        "the ratio to expect where both reach the same share of the machine's rate. T of activated stands on "
        "the pass over the prompt, which is not in it: a share of a query, not what one costs.",
        look.markdown(t_alone) if len(t_alone := floors(table)) else "Not measured: no sample was paired.",
        "Seconds per uncertain sample whose first greedy example could be read (means). Charged: all that it "
        "needs, the base answer only where the rule wants one. `usual` reads the prompt anew in every stage "
        "and decodes token by token; ttsi's pass over it is `prefix`. `selective` is `activated` with the "
        "answer drafted from the base answer, and asks nothing of H. Peaks are of processes.",
        look.markdown(stages(table)),
        _list(shares(table)),
        "Drafted decoding: tokens of the replies that were guessed before they were computed, and how many "
        "of the guesses came true. A guess that doesn't leaves the text as it is.",
        look.markdown(drafts(table)),
        _list(agreement(found)),
        engines(found.get("engines")),
    ]
    whole = "\n\n".join(part.strip() for part in text) + "\n"
    look.write(look.figures_dir() / "bench.md", whole.encode())
    save_figure(figure(table), table, "bench", "")
    return whole


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def figure(table: pd.DataFrame) -> Figure:
    """Seconds of an uncertain sample by stage, a panel per precision and benchmark, a bar per program."""
    means = costs.by_stage(table)
    panels = list(means.groupby(["dtype", "benchmark"], sort=False))
    order = [s for s in means.columns[4:-1] if means[s].notna().any()]
    shades = dict(zip(order, plt.get_cmap("viridis")(np.linspace(0.1, 0.95, len(order))), strict=True))
    with style():
        drawn, axes = plt.subplots(1, len(panels), figsize=(max(5.0, 3.4 * len(panels)), 2.6), squeeze=False)
        for axis, ((dtype, benchmark), group) in zip(axes[0], panels, strict=True):
            programs = look.rows_of(group)[::-1]
            for height, r in enumerate(programs):
                left = 0.0
                for stage in needs(WAYS[r["program"]]):
                    axis.barh(
                        height, r[stage], left=left, color=shades[stage], ec="white", lw=0.4, label=stage
                    )
                    left += r[stage]
                axis.text(left, height, f" {left:.0f} s", va="center", fontsize=8)
            axis.set_yticks(range(len(programs)), [f"{r['program']} (n = {r['n']})" for r in programs])
            axis.set_title(f"{named(str(benchmark))}, {dtype}")
            axis.set_xlabel("seconds per uncertain sample, mean")
            axis.margins(x=0.15)
        drawn.tight_layout(rect=(0, 0.1, 1, 1))
        keys = {
            name: handle
            for axis in axes[0]
            for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(keys.values(), keys.keys(), loc="lower center", ncols=len(keys), fontsize=7,
                     columnspacing=1, handlelength=1)  # fmt: skip
    return drawn
