"""What `make bench` measured, as a table of bars, a table of stages and two figures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from bench import FULL
from scipy import stats

from study.analysis import tables
from study.analysis.figures import save_figure, style
from study.analysis.statistics import Estimate, wilson
from study.analysis.tables.layout import bracket
from study.data import sources
from ttsi.types import LoraSettings

PROGRAMS = ("usual", "exact", "activated")
STAGES = ("prefix", "base", "H", "G", "T", "merge", "save", "reload", "answer", "restore")
COUNTED = ("seconds", "peak_mb", "decoded_tokens", "drafted", "accepted")
_COLOURS = {"usual": "#7f7f7f", "exact": "#d98b3a", "activated": "#2b6ca3"}


def rows(found: Mapping[str, Any]) -> pd.DataFrame:
    """One row per sample, program and stage: seconds, peak memory (MB), floating-point operations needed.

    For what was decoded, its tokens, those that were guessed ahead, and those of them that came true.
    """
    out = []
    for number, s in enumerate(found["samples"], 1):
        begin, machine = s["begin"], found["machine"]
        work = _work(machine, begin["tokens"], s["exact"]["tokens"], s["activated"]["tokens"])
        for program in PROGRAMS:
            measured = _stages(s, program)
            for stage in STAGES:
                if stage in measured:
                    out.append(
                        {
                            "benchmark": s["benchmark"],
                            "sample": s["sample"],
                            "number": number,
                            "program": program,
                            "stage": stage,
                            **{column: measured[stage].get(column, math.nan) for column in COUNTED},
                            "prompt_tokens": begin["tokens"]["prompt"],
                            "flops": work.get((program, stage), math.nan),
                        }
                    )
    return pd.DataFrame(out)


def _stages(s: Mapping[str, Any], program: str) -> dict[str, Mapping[str, float]]:
    """What a program's stages took on a sample; `exact` and `activated` share those before T."""
    own: dict[str, Mapping[str, float]] = s[program]["stages"]
    return own if program == "usual" else s["begin"]["stages"] | own


def _work(
    machine: Mapping[str, float], begun: Mapping[str, int], *adapted: Mapping[str, int]
) -> dict[tuple[str, str], float]:
    """Floating-point operations that a stage cannot do without.

    Two per weight and token forward, as many again backward (the weights themselves need no gradient);
    attention over what stands before; the output head and the last layer's feed-forward block on label
    positions only (the usual loop has both on all). Decoding is left out: it is bound by reading the
    weights, not by arithmetic.
    """

    def forward(new: int, before: int, head: int) -> float:
        attention = machine["attention"] * (new * before + new * new / 2)
        layers = machine["decoder"] * new - machine["last_block"] * (new - head)
        return 2 * layers + attention + 2 * machine["head"] * head

    exact, activated = adapted
    epochs, prefix = LoraSettings().epochs, begun["prefix"]
    tail = activated["T"]
    return {
        ("exact", "prefix"): forward(prefix, 0, 0),
        ("activated", "prefix"): forward(prefix, 0, 0),
        ("exact", "T"): 2 * epochs * forward(exact["T"] - 1, 0, exact["labels"]),
        ("activated", "T"): 2 * epochs * forward(tail - 1, prefix, activated["labels"]),
        ("usual", "T"): 2 * epochs * forward(exact["T"], 0, exact["T"]),
    }


def ratio(pairs: Iterable[tuple[float, float]]) -> tuple[float, float, float, int]:
    """Geometric mean of first / second over samples, with its 95 % interval (t, on logarithms) and n."""
    logs = np.array([math.log(a / b) for a, b in pairs])
    n = len(logs)
    if n == 0:
        return math.nan, math.nan, math.nan, 0
    half = float(stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    middle = float(logs.mean())
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half), n


Total = Callable[[Mapping[str, Any]], float]


def _of(program: str, *stages: str) -> Total:
    """Seconds that a program spends on the named stages of a sample."""

    def total(s: Mapping[str, Any]) -> float:
        measured = _stages(s, program)
        return sum(measured[x]["seconds"] for x in stages)

    return total


def bars(found: Mapping[str, Any]) -> pd.DataFrame:
    """The ratios that were promised, one row each: measured, with interval and n, and whether they hold."""
    seal = [s for s in found["samples"] if s["benchmark"] == "sealtool"]
    virus = [s for s in found["samples"] if s["benchmark"].startswith("nexusraven")]
    loop = ("H", "G", "T", "merge", "save", "reload", "answer", "restore")
    lean = ("prefix", "H", "G", "T", "answer")
    base = _of("activated", "prefix", "base")
    saving = ("T", "merge", "save", "reload")
    asked: list[tuple[str, Sequence[Any], Total, Total, str, float]] = [
        ("T, usual loop / exact", seal, _of("usual", *saving), _of("exact", "T"), "≥", 3),
        ("… training alone, without merge, save, reload", seal, _of("usual", "T"), _of("exact", "T"), "≥", 3),
        ("T, usual loop / activated", seal, _of("usual", *saving), _of("activated", "T"), "≥", 12),
        ("… training alone", seal, _of("usual", "T"), _of("activated", "T"), "≥", 12),
        (
            "T, usual loop / activated, VirusTotal",
            virus,
            _of("usual", *saving),
            _of("activated", "T"),
            "≥",
            40,
        ),
        ("… training alone", virus, _of("usual", "T"), _of("activated", "T"), "≥", 40),
        (
            "uncertain sample, usual loop / activated",
            seal,
            _of("usual", *loop),
            _of("activated", *lean),
            "≥",
            5,
        ),
        (
            "… without merge, save, reload, restore",
            seal,
            _of("usual", "H", "G", "T", "answer"),
            _of("activated", *lean),
            "≥",
            5,
        ),
        (
            "uncertain sample, activated / base answer (prefix pass in the base answer)",
            seal,
            _of("activated", *lean[1:]),
            base,
            "≤",
            2.5,
        ),
        ("… prefix pass in both", seal, _of("activated", *lean), base, "≤", 2.5),
        ("H without the prefix pass / base answer", seal, _of("activated", "H"), base, "≤", 0.10),
    ]
    out = []
    for what, samples, first, second, sense, bar in asked:
        value, low, high, n = ratio((first(s), second(s)) for s in samples)
        out.append((what, n, value, low, high, sense, bar))
    batch = found["batch"]
    for what, sense, bar, top, bottom in (
        (
            "8 together, activated / base answers (prefix pass in the base answers)",
            "≤",
            2.0,
            ("H", "G", "T", "answer"),
            ("prefix", "base"),
        ),
        ("… prefix pass in both", "≤", 2.0, ("prefix", "H", "G", "T", "answer"), ("prefix", "base")),
        ("tokens per second, 8 together / one by one, drafts on", "≥", 3.0, ("one by one",), ("base",)),
        ("… drafts off", "≥", 3.0, ("plain one by one",), ("plain together",)),
        (f"… drafts off, {FULL} tokens of every reply", "≥", 3.0, ("full one by one",), ("full together",)),
    ):
        took = [sum(batch["stages"][x]["seconds"] for x in side) if batch else 1.0 for side in (top, bottom)]
        out.append((what, batch.get("n", 0), took[0] / took[1], math.nan, math.nan, sense, bar))
    tries, growth = _soak()
    soak = f"resident memory after {tries} adaptations / after 10 (SmolLM2, make test-soak)"
    out.append((soak, int(tries > 0), growth, math.nan, math.nan, "≤", 1.02))
    table = pd.DataFrame(out, columns=["what", "n", "ratio", "low", "high", "sense", "bar"])
    holds = np.where(table.sense == "≥", table.ratio >= table.bar, table.ratio <= table.bar)
    table["result"] = np.where(table.n == 0, "not measured", np.where(holds, "pass", "falls short"))
    return table


def _soak() -> tuple[int, float]:
    """How many adaptations `make test-soak` counted last, and what memory grew by from the tenth on."""
    path = Path(__file__).resolve().parent.parent / "docs" / "reliability.json"
    for row in json.loads(path.read_text())["rows"]:
        if "smollm2" in row["test"] and (
            found := re.search(r"(\d+) MB after 10, (\d+) MB at the end", row["seen"])
        ):
            return row["tries"], int(found[2]) / int(found[1])
    return 0, math.nan


def engines(compared: Mapping[str, Any] | None) -> pd.DataFrame:
    """Tokens per second of torch and vLLM on the same prompts, reading them included, from cold caches.

    equal: replies that are torch's to the token, had one by one. One row per way and engine.
    """
    ways = ("one by one", "together", "together, drafts off", "together, an adapter each (exact)")
    out = []
    for way in ways:
        for engine, shown in (("torch", "torch"), ("vllm", "vLLM")):
            row = {"replies": way, "engine": shown, "n": "", "tokens per second": "not measured", "equal": ""}
            if compared and way in compared[engine]:
                done, want = compared[engine][way], compared["torch"]["one by one"]["tokens"]
                same = sum(a == b for a, b in zip(done["tokens"], want, strict=True))
                row |= {
                    "n": str(len(want)),
                    "tokens per second": f"{sum(map(len, done['tokens'])) / done['seconds']:.1f}",
                    "equal": f"{same} of {len(want)}",
                }
            if engine == "torch" or way != "together, drafts off":  # vLLM guesses nothing here
                out.append(row)
    return pd.DataFrame(out)


def agreement(found: Mapping[str, Any]) -> list[str]:
    """What the programs agree on, in sentences with counts."""
    samples = found["samples"]
    n = len(samples)

    def count(same: Callable[[Mapping[str, Any]], bool]) -> str:
        return f"{sum(map(same, samples))} of {n}"

    def off(key: str, first: str, second: str) -> float:
        return max(abs(a - b) for s in samples for a, b in zip(s[first][key], s[second][key], strict=True))

    scores = max(
        abs(a - b)
        for s in samples
        for x, y in zip(s["begin"]["scores"], s["usual"]["scores"], strict=True)
        for a, b in zip(x, y[: len(x)], strict=True)  # the usual loop scores on, to the arguments' opening
    )
    with_base = [s for s in samples if s["usual"]["base"] is not None]
    equal_base = sum(s["begin"]["base"] == s["usual"]["base"] for s in with_base)
    texts, full, batched = (found["batch"].get(k, 0) for k in ("equal", "equal_full", "n"))
    return [
        f"Base answers equal in {equal_base} of {len(with_base)} samples.",
        f"Scores of H differ by at most {scores:.1e} nats per token.",
        "Synthetic examples are written from the same text by both programs; equal in "
        f"{count(lambda s: s['usual']['written'].strip().startswith(s['begin']['examples'][0]))} samples.",
        f"Losses of `exact` and the usual loop differ by at most {off('losses', 'exact', 'usual'):.1e} nats "
        "(in float32 the library's own sum over a large vocabulary is off by so much).",
        "Adapted answers: usual loop = exact in "
        f"{count(lambda s: s['usual']['text'] == s['exact']['text'])}, "
        f"exact = activated in {count(lambda s: s['exact']['text'] == s['activated']['text'])} samples "
        "(two training modes: not the same adapter).",
        f"Replies equal alone and in a batch of {batched}, with drafts and without: {texts} of {batched}; "
        f"{FULL} tokens of each, whatever they say: {full} of {batched}.",
        _rounding(found.get("bfloat16")),
    ]


def _rounding(counted: Mapping[str, Any] | None) -> str:
    """How often an answer depends on its batch in bfloat16."""
    if not counted:
        return "In bfloat16, answers that depend on their batch: not measured (make bench ARGS=--bfloat16)."
    answers, verdicts = (wilson(counted[k], counted["n"]) for k in ("differ", "verdicts"))
    return (
        f"In bfloat16 (commit `{counted['commit']}`), of base answers decoded alone and eight together, "
        f"without drafts, {counted['differ']} of {counted['n']} differ ({_percent(answers)}); of their "
        f"verdicts {counted['verdicts']} ({_percent(verdicts)})."
    )


def _percent(share: Estimate) -> str:
    return f"{bracket(100 * share.value, 100 * share.low, 100 * share.high, 0)} %"


def drafts(table: pd.DataFrame) -> pd.DataFrame:
    """What guessing ahead gains: a row per benchmark and kind of reply, each decoded alone.

    Tokens per pass: the geometric mean over samples with its interval; decoding token by token has 1.
    """
    kinds = {
        ("activated", "base"): "base answer, guessed from the prompt",
        ("activated", "G"): "synthetic example, from the prompt",
        ("exact", "answer"): "adapted answer (exact), from the example and the prompt",
        ("activated", "answer"): "adapted answer (activated), from the example and the prompt",
    }
    out = []
    for benchmark in dict.fromkeys(table.benchmark):
        for (program, stage), kind in kinds.items():
            part = table[(table.benchmark == benchmark) & (table.program == program) & (table.stage == stage)]
            tokens, drafted, accepted = (part[c].sum() for c in ("decoded_tokens", "drafted", "accepted"))
            each = ratio(zip(part.decoded_tokens, part.decoded_tokens - part.accepted, strict=True))
            out.append(
                {
                    "benchmark": benchmark,
                    "reply": kind,
                    "n": len(part),
                    "tokens": f"{tokens:.0f}",
                    "guessed": f"{drafted:.0f}",
                    "came true": f"{accepted:.0f} ({100 * accepted / drafted:.0f} %)" if drafted else "0",
                    "tokens per pass": bracket(*each[:3], 2),
                }
            )
    return pd.DataFrame(out)


def floor(table: pd.DataFrame, found: Mapping[str, Any]) -> str:
    """What arithmetic and lengths alone allow of the bars, and how near each program comes to it."""
    t = table[table.stage == "T"]
    lines = []
    for benchmark, group in t.groupby("benchmark", sort=False):
        flops = group.pivot_table(index="sample", columns="program", values="flops")
        reached = group.groupby("program").reached.mean()
        for mode in ("exact", "activated"):
            allowed = np.exp(np.log(flops["usual"] / flops[mode]).mean())
            lines.append(
                f"- {benchmark}: T of the usual loop needs {allowed:.2f} times the arithmetic of `{mode}`: "
                "the ratio to expect where both reach the same share of the machine's rate. They reach "
                f"{100 * reached['usual']:.0f} % and {100 * reached[mode]:.0f} %."
            )
    for benchmark, group in table[(table.program == "activated") & (table.stage != "base")].groupby(
        "benchmark", sort=False
    ):
        spent = group.groupby("stage").seconds.sum() / group.seconds.sum()
        lines.append(
            f"- {benchmark}: of an uncertain sample's seconds with `activated`, {100 * spent['T']:.0f} % are "
            f"T, {100 * spent['prefix']:.0f} % the pass over its prompt and "
            f"{100 * (spent['G'] + spent['answer']):.0f} % G and the answer: decoding, which reads all "
            "weights for every few tokens."
        )
    if lengths := found["batch"].get("tokens"):
        lines.append(
            f"- {len(lengths)} together: the replies have {sum(lengths)} tokens, the longest {max(lengths)}. "
            "With a token a pass, decoding them together takes as many passes as the longest has tokens: at "
            f"most {sum(lengths) / max(lengths):.2f} times as fast as one by one, if a pass over "
            f"{len(lengths)} rows cost no more than one over a single row."
        )
    return "\n".join(lines)


def stages(table: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds per stage and program, peak memory, and the share of the machine's arithmetic reached."""
    out = []
    for (benchmark, program), group in table.groupby(["benchmark", "program"], sort=False):
        row: dict[str, Any] = {"benchmark": benchmark, "program": program, "n": group["sample"].nunique()}
        for stage in STAGES:
            part = group[group.stage == stage].seconds
            row[stage] = f"{part.mean():.1f}" if len(part) else ""
        row["peak, GB"] = f"{group.peak_mb.max() / 1024:.1f}"
        row["T: share of peak FLOP/s"] = f"{100 * (group[group.stage == 'T'].reached.mean()):.0f} %"
        out.append(row)
    return pd.DataFrame(out)


def _minutes(found: Mapping[str, Any]) -> str:
    """How long the run took, and how much of that each program's stages did."""

    def spent(stages: Iterable[Mapping[str, Any]]) -> float:
        return sum(stage["seconds"] for of in stages for stage in of.values()) / 60

    parts = {p: spent(s[p]["stages"] for s in found["samples"]) for p in PROGRAMS}
    parts["what exact and activated share"] = spent(s["begin"]["stages"] for s in found["samples"])
    if found["batch"]:
        parts["samples together"] = spent([found["batch"]["stages"]])
    total = found["seconds"] / 60
    parts["loading, warm-ups, samples without an example"] = total - sum(parts.values())
    return f"{total:.0f} minutes ({', '.join(f'{name} {value:.1f}' for name, value in parts.items())})"


def _commits(found: Mapping[str, Any]) -> str:
    """Which code measured what, as far as a run has kept it."""
    known = {(r["benchmark"], r.get("commit")): None for r in found["samples"]}
    return "".join(
        f"{benchmark} measured {f'at commit `{c}`' if c else 'in an earlier run, by earlier code'}. "
        for benchmark, c in known
    )


def report(found: Mapping[str, Any]) -> None:
    """Writes figures/bench.{csv,md,png,pdf} and figures/bench_scaling.*, and prints the table of bars."""
    table = rows(found)
    table["reached"] = table.flops / table.seconds / found["machine"]["flops"]
    promised = bars(found)
    shown = pd.DataFrame(
        {
            "what": promised.what,
            "n": promised.n,
            "measured": [bracket(r.ratio, r.low, r.high, 2) if r.n else "" for r in promised.itertuples()],
            "bar": [f"{r.sense} {r.bar:g}" for r in promised.itertuples()],
            "result": promised.result,
        }
    )
    machine = found["machine"]
    text = [
        f"{found['model']}, {machine['dtype']}, {machine['threads']} threads; matrix products at "
        f"{machine['flops'] / 1e9:.0f} GFLOP/s; {_minutes(found)}. "
        "Ratios are geometric means over samples with 95 % t intervals, of programs that took turns on "
        "each; 'together' rows are of one batch of n samples, timed once, without an interval. T of the "
        "usual loop: training, merge, save, reload, unless a row says training alone. "
        f"Passing is the mean's, whatever the interval. {_commits(found)}A GPU: not measured.",
        tables.markdown(shown),
        floor(table, found),
        "Seconds per uncertain sample whose first greedy example could be read (means). `usual` computes "
        "each prompt anew in every stage (its `base` holds that pass, ttsi's stands apart as `prefix`) and "
        "decodes token by token; ttsi guesses ahead: its base answer and example are drafted from the "
        "prompt, its adapted answer from the example too. Its activated T stands on the prefix pass, which "
        "is not in it. H, G and `base` of `exact` and `activated` are one measurement. Peaks are of "
        "processes: what `exact` has freed may still be in `activated`'s where it went first. Each process "
        "has worked through a short sample before the first one here, but for the usual loop's on long "
        "prompts, where the memory was too small for both.",
        tables.markdown(stages(table)),
        "Drafted decoding: tokens of the replies that were guessed before they were computed, and how many "
        "of the guesses came true. A guess that doesn't leaves the text as it is.",
        tables.markdown(drafts(table)),
        "\n".join(f"- {line}" for line in agreement(found)),
        _engines_caption(found.get("engines")),
        tables.markdown(engines(found.get("engines"))),
    ]
    folder = sources.figures_dir()
    tables.write(folder / "bench.md", ("\n\n".join(text) + "\n").encode())
    save_figure(_stages_figure(table), table, "bench", "")
    save_figure(_scaling_figure(table), table, "bench_scaling", "")
    print("\n\n".join(text))


def _engines_caption(compared: Mapping[str, Any] | None) -> str:
    said = (
        "Base answers by torch and vLLM, reading the prompts included, from cold prefix caches; torch "
        "guesses ahead unless a row says otherwise. A GPU: not measured."
    )
    if not compared:
        return f"{said} Not measured yet: make test-vllm installs vLLM, make bench ARGS=--vllm measures."
    version = compared["vllm"]["version"]
    return f"{said} {version}, {compared['dtype']}, in a run of its own at commit `{compared['commit']}`."


def _stages_figure(table: pd.DataFrame) -> Any:
    names = list(dict.fromkeys(table.benchmark))
    with style():
        figure, axes = plt.subplots(1, len(names), figsize=(max(5.0, 3.6 * len(names)), 2.4), squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            group = table[(table.benchmark == name) & (table.stage != "base")]
            means = group.groupby(["program", "stage"]).seconds.mean()
            shown = [stage for stage in STAGES if stage in means.index.get_level_values("stage")]
            shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.95, len(shown)))
            left = pd.Series(0.0, index=list(reversed(PROGRAMS)))
            for stage, shade in zip(shown, shades, strict=True):
                widths = pd.Series([float(means.get((p, stage), 0.0)) for p in left.index], index=left.index)
                axis.barh(range(len(left)), widths, left=left, color=shade, edgecolor="white", linewidth=0.4,
                          label=stage)  # fmt: skip
                left += widths
            for height, seconds in enumerate(left):
                axis.text(seconds, height, f" {seconds:.0f} s", va="center", fontsize=8)
            axis.set_yticks(range(len(left)), left.index)
            n = group["sample"].nunique()
            axis.set_title(
                f"{tables.label(name.split(':')[0])}{' (VirusTotal)' if ':' in name else ''}, n = {n}"
            )
            axis.set_xlabel("seconds per uncertain sample, mean")
            axis.margins(x=0.15)
        figure.tight_layout(rect=(0, 0.1, 1, 1))
        keys = axes[0][0].get_legend_handles_labels()
        figure.legend(*keys, loc="lower center", ncols=len(keys[1]), frameon=False, fontsize=7,
                      columnspacing=1, handlelength=1)  # fmt: skip
    return figure


def _scaling_figure(table: pd.DataFrame) -> Any:
    with style():
        figure, axes = plt.subplots(2, 2, figsize=(7, 4.6))
        whole = table[table.stage != "base"].groupby(["program", "number", "prompt_tokens"], as_index=False)
        sums = whole.agg(seconds=("seconds", "sum"), peak=("peak_mb", "max"))
        for program in PROGRAMS:
            part = sums[sums.program == program]
            for column, x in enumerate(("number", "prompt_tokens")):
                ordered = part.sort_values(x)
                for row, y in enumerate(("seconds", "peak")):
                    values = ordered[y] / (1024 if y == "peak" else 1)
                    axes[row][column].plot(ordered[x], values, "o-" if x == "number" else "o", ms=4,
                                           color=_COLOURS[program], label=program)  # fmt: skip
        axes[0][0].set_ylabel("seconds per uncertain sample")
        axes[1][0].set_ylabel("peak memory, GB")
        for axis in axes.flat:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axes[1][0].set_xlabel("number of the sample in the run")
        axes[1][1].set_xlabel("tokens of the prompt")
        axes[0][0].legend(frameon=False)
        figure.tight_layout()
    return figure
