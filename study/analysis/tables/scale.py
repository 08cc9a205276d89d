"""What it would cost at scale: hours and wall time of many queries on many GPUs, from rates of one.

Four sources of rates stand side by side and are never mixed: this machine's seconds, the paper's seconds on
its GPU, arithmetic over this run's tokens, and a GPU's seconds from `make bench` once there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from study.analysis.tables import paper
from study.analysis.tables.cost import PAPER_PRICES, Prices, table_cost
from study.analysis.tables.layout import NOT_RUN, label, model_label
from study.analysis.tables.results import select
from study.data import sources
from ttsi.types import LoraSettings

# Layers, width, feed-forward width, width of keys (and of values), vocabulary: the models' config.json.
SHAPES = {
    "smollm2-135m": (30, 576, 1536, 192, 49_152),
    "qwen2.5-coder-0.5b": (24, 896, 4864, 128, 151_936),
    "qwen2.5-coder-1.5b": (28, 1536, 8960, 256, 151_936),
    "qwen2.5-1.5b": (28, 1536, 8960, 256, 151_936),
    "qwen2.5-7b": (28, 3584, 18_944, 512, 152_064),
}
METHODS = {
    ("base", "none"): "base",
    ("sft", "none"): "SFT",
    ("tt_si", "exact"): "TT-SI exact",
    ("tt_si", "activated"): "TT-SI activated",
}
# Source of rates → the columns of its hours on one device and of its wall time on several.
HOURS = {
    "machine": ("machine_hours", "machine_wall_hours"),
    "paper": ("paper_gpu_hours", "paper_wall_hours"),
    "estimate": ("estimate_gpu_hours", "estimate_wall_hours"),
    "gpu": ("measured_gpu_hours", "measured_gpu_wall_hours"),
}
SCALE_COLUMNS = [
    "benchmark", "queries", "gpus", "arm", "mode", *(c for pair in HOURS.values() for c in pair), "note",
]  # fmt: skip
NOT_MEASURED = "not measured"
Tokens = TypeVar("Tokens", float, "pd.Series[Any]")


@dataclass(frozen=True)
class Gpu:
    """A GPU on paper. `flops`: its peak (FLOP/s, dense bf16 matrix products).

    `reading`, `decoding`: share of that peak, above 0 and up to 1, while prompts are read or trained on, and
    while replies are written. Raises ValueError for what can't be.
    """

    name: str
    flops: float
    reading: float
    decoding: float

    def __post_init__(self) -> None:
        if not self.flops > 0 or not 0 < self.reading <= 1 or not 0 < self.decoding <= 1:
            raise ValueError(f"{self}: a peak is above 0, a utilisation above 0 and at most 1")

    def seconds(self, model: str, read: Tokens, trained: Tokens, decoded: Tokens) -> Tokens:
        """Seconds for so many tokens: two operations per weight and token, twice that where it is trained on.

        A frozen weight needs no gradient, so the way back costs what the way forward does. The output head
        counts for decoded tokens only; attention over earlier tokens is left out.
        """
        decoder, head = weights(model)
        arithmetic = 2 * decoder * read + 4 * decoder * trained
        return arithmetic / (self.flops * self.reading) + 2 * (decoder + head) * decoded / (
            self.flops * self.decoding
        )


def weights(model: str) -> tuple[int, int]:
    """(weights of the decoder's matrices, of the output head). Raises ValueError for an unknown model."""
    if model not in SHAPES:
        raise ValueError(f"the shape of model {model!r} isn't known here; known: {', '.join(SHAPES)}")
    layers, width, inner, keys, vocabulary = SHAPES[model]
    return layers * (2 * width**2 + 2 * width * keys + 3 * width * inner), width * vocabulary


@dataclass(frozen=True)
class Rates:
    """What one query costs, by source (a key of `HOURS`) and training mode; a source without rates is empty.

    `ran`: the model of this run, whose seconds and tokens they are; `model`: the one whose arithmetic the
    estimate counts. `missing`: why a source has no rates.
    """

    benchmark: str
    ran: str
    gpu: Gpu
    model: str
    by: Mapping[str, Mapping[str, Prices]]
    missing: Mapping[str, str]


def scale_rates(
    records: pd.DataFrame,
    every: Sequence[Prices],
    benchmark: str,
    gpu: Gpu,
    model: str,
    passes: int,
    sft_passes: int,
    sft_samples: int = paper.SFT_SAMPLES,
    share: float | None = None,
    bench: Path | None = None,
) -> Rates:
    """The four sources' prices of a query.

    `every`: `prices` of the same records. `passes`, `sft_passes`: how often T and SFT read a training sample
    (epochs, for T times K). `model`: whose arithmetic the estimate counts. `share`: of uncertain queries;
    None: this run's. `bench`: default figures/bench.csv; its rows count whose `device` names a GPU.
    """
    machine = {p.name: p for p in every if p is not PAPER_PRICES}
    if not machine:
        cost = table_cost(records)
        base = cost[(cost["benchmark"] == benchmark) & (cost["stage"] == "base")]["seconds"].mean()
        machine = {} if np.isnan(base) else {"none": Prices("none", float(base), nan, nan, nan, nan, NOT_RUN)}
    estimate = _estimate(records, benchmark, gpu, model, passes, sft_passes * sft_samples, share)
    known = share if share is not None else next((p.share for p in machine.values()), nan)
    measured = _measured(
        bench or sources.figures_dir() / "bench.csv", benchmark, sft_passes * sft_samples, known
    )
    by = {"machine": machine, "paper": {"exact": PAPER_PRICES}, "estimate": estimate, "gpu": measured}
    why = {
        "machine": NOT_RUN,
        "estimate": "mode exact, whose training reads whole prompts, was " + NOT_RUN,
        "gpu": NOT_MEASURED,
    }
    names = select(records, variant="", benchmark=benchmark, arm="base")
    ran = str(names["model"].iloc[0]) if len(names) else ""
    return Rates(benchmark, ran, gpu, model, by, {k: w for k, w in why.items() if not by[k]})


def _estimate(
    records: pd.DataFrame,
    benchmark: str,
    gpu: Gpu,
    model: str,
    passes: int,
    sft_reads: int,
    share: float | None,
) -> dict[str, Prices]:
    """Prices by mode from this run's tokens; none unless mode `exact` was run.

    The records count what is scored, written and trained on, but not how long a prompt is. A pass of T in
    mode `exact` reads a whole one with its reply, one in mode `activated` the user's turn with its reply;
    these stand for the prompts of the same samples. G's own turn is taken to be as long as that turn (as the
    prompt, where `activated` wasn't run). What comes before it is in the cache since the first pass; an
    `exact` adapter has no use for that cache and reads the prompt anew for its answer.
    """
    mine = select(records, variant="", inference="direct", benchmark=benchmark, status="ok")
    ours = mine[mine["arm"] == "tt_si"] if len(mine) else mine
    adapted = ours[ours["adapted"].astype(bool)] if len(ours) else ours
    each = (adapted.groupby("mode")["tokens_t"].mean() / passes).to_dict() if len(adapted) else {}
    base = mine[mine["arm"] == "base"]["tokens_answer"].mean() if len(mine) else nan
    if "exact" not in each or np.isnan(base):
        return {}
    prompt, turn = float(each["exact"]), float(each.get("activated", each["exact"]))
    plain = gpu.seconds(model, prompt, 0, float(base))
    found = {}
    for mode, rows in ours[ours["mode"].isin(list(each))].groupby("mode", sort=False):
        unsure, trained = rows["uncertain"].astype(bool), rows["adapted"].astype(bool)
        again = (prompt if mode == "exact" else turn) * trained
        read = prompt + rows["tokens_h"] + turn * (rows["attempts"] * unsure) + again
        seconds = gpu.seconds(model, read, rows["tokens_t"], rows["tokens_g"] + rows["tokens_answer"])
        certain = seconds[~unsure].mean()
        if np.isnan(certain):
            certain = plain + gpu.seconds(model, float(rows["tokens_h"].mean()), 0, 0)
        known = float(unsure.mean()) if share is None else share
        sft = gpu.seconds(model, 0, prompt * sft_reads, 0)
        found[str(mode)] = Prices(
            str(mode), plain, float(seconds[unsure].mean()), float(certain), known, sft, "arithmetic"
        )
    return found


def _measured(path: Path, benchmark: str, sft_reads: int, share: float) -> dict[str, Prices]:
    """Prices by mode from the bench's rows of a GPU; none where there is none."""
    data = pd.read_csv(path) if path.exists() else pd.DataFrame()
    if "device" not in data or np.isnan(share):
        return {}
    on_gpu = data["device"].astype(str).str.startswith("cuda") & (data["benchmark"] == benchmark)
    found = {}
    for mode in ("exact", "activated"):
        rows = data[on_gpu & (data["program"] == mode)]
        at = rows.pivot_table(index="sample", columns="stage", values="seconds").mean()
        if not {"prefix", "base", "H", "G", "T", "answer"} <= set(at.index):
            continue
        sft = float(at["T"]) / LoraSettings().epochs * sft_reads
        alone = float(at[["prefix", "H", "G", "T", "answer"]].sum())
        base = float(at["prefix"] + at["base"])
        found[mode] = Prices(mode, base, alone, base + float(at["H"]), share, sft, "make bench")
    return found


def table_scale(rates: Rates, queries: Sequence[int], gpus: Sequence[int]) -> pd.DataFrame:
    """Hours by queries × number of GPUs × method; columns `SCALE_COLUMNS`.

    `…_hours`: on one device; `…_wall_hours`: the same divided by `gpus`, as if nothing were lost in sharing
    (of `machine`: by as many machines). SFT: its training once, then base answers, at the rates of mode
    `exact` where that was run. A source without rates for a method has no number there; `note` says why.
    """
    rows = []
    for q in queries:
        for n in gpus:
            for arm, mode in METHODS:
                row: dict[str, Any] = {"benchmark": rates.benchmark, "queries": q, "gpus": n}
                row |= {"arm": arm, "mode": mode}
                for source, (one, wall) in HOURS.items():
                    row[one] = _seconds(rates.by[source], arm, mode, q) / 3600
                    row[wall] = row[one] / n
                row["note"] = NOT_RUN if np.isnan(row["machine_hours"]) else ""
                rows.append(row)
    return pd.DataFrame(rows, columns=SCALE_COLUMNS)


def _seconds(by_mode: Mapping[str, Prices], arm: str, mode: str, queries: float) -> float:
    own = by_mode.get(mode)
    if arm == "tt_si":
        return queries * own.tt_si if own else nan
    one = by_mode.get("exact") or next(iter(by_mode.values()), None)
    if one is None:
        return nan
    return queries * one.base + (one.sft if arm == "sft" else 0)


def scale_view(table: pd.DataFrame) -> pd.DataFrame:
    """The table for reading: a line per number of queries and method, wall times by number of GPUs."""
    rows = []
    gpus = list(dict.fromkeys(table["gpus"]))
    many = " / ".join(f"{n:,}" for n in gpus)
    for (q, arm, mode), group in table.groupby(["queries", "arm", "mode"], sort=False):
        first = group.iloc[0]

        def walls(column: str, group: pd.DataFrame = group) -> str:
            return " / ".join(map(duration, group[column])) if group[column].notna().all() else ""

        rows.append({
            "queries": f"{q:,}",
            "method": METHODS[str(arm), str(mode)],
            "this machine, machine-hours": rounded(first["machine_hours"]) or first["note"],
            "the paper's seconds, GPU-hours": rounded(first["paper_gpu_hours"]) or "not in the paper",
            "estimate, GPU-hours": rounded(first["estimate_gpu_hours"]),
            "measured GPU, GPU-hours": rounded(first["measured_gpu_hours"]) or NOT_MEASURED,
            f"wall time on {many} GPUs, by the paper's": walls("paper_wall_hours"),
            "by the estimate": walls("estimate_wall_hours"),
        })  # fmt: skip
    return pd.DataFrame(rows)


def rounded(value: float) -> str:
    """The number to three digits, thousands apart; empty for nothing."""
    if pd.isna(value) or value == 0:
        return "" if pd.isna(value) else "0"
    digits = 2 - int(np.floor(np.log10(abs(value))))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def duration(hours: float) -> str:
    """A span of time to two digits, in the unit that suits it."""
    for unit, size in (("y", 8766.0), ("d", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= size:
            value = hours / size
            return f"{value:,.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    return f"{3600 * hours:.2g} s"


def scale_caption(rates: Rates, sft_samples: int = paper.SFT_SAMPLES) -> str:
    """Where each source's rates come from, and what is assumed."""
    gpu, one = rates.gpu, next(iter(rates.by["machine"].values()), None)
    machine = rates.missing.get("machine", f"mean seconds per query of this run, {model_label(rates.ran)}")
    if one and rates.by["estimate"]:
        machine += f", {100 * one.share:.0f} % of the queries uncertain (also in the estimate)"
    sft = rates.by["machine"].get("exact", one)
    trained = f" (this machine: {sft.basis})" if sft and not np.isnan(sft.sft) else ""
    estimate = rates.missing.get(
        "estimate",
        f"this run's tokens × 2 operations per weight of {model_label(rates.model)} (4 where trained on) / "
        f"({gpu.flops / 1e12:g} TFLOP/s × {gpu.reading:g} reading and training, × {gpu.decoding:g} decoding)",
    )
    return (
        f"{label(rates.benchmark)}. This machine: {machine}. Paper: its seconds on one A40 "
        f"({100 * PAPER_PRICES.share:.0f} % uncertain; mode exact only). Estimate for one {gpu.name}: "
        f"{estimate}. Measured GPU: {rates.missing.get('gpu', 'make bench')}. SFT: trained once on "
        f"{sft_samples:,} samples{trained}, then base answers. Assumed: queries like these, enough of them "
        "at once to fill every GPU, and sharing that costs nothing: n GPUs take an n-th of the time, in "
        "training SFT too. Loading models, idle time and failures are left out. No interval: arithmetic on "
        "means."
    )


def scale_reading(rates: Rates) -> str:
    """One Markdown line per source: what a query costs with each method, in seconds and in base answers."""
    named = {
        "machine": "This machine, measured",
        "paper": "The paper's A40, as published",
        "estimate": f"{rates.gpu.name}, estimated",
        "gpu": "A GPU, measured by make bench",
    }
    lines = []
    for source, name in named.items():
        by_mode = rates.by[source]
        if source in rates.missing:
            lines.append(f"- **{name}**: {rates.missing[source]}.")
            continue
        one = by_mode.get("exact") or next(iter(by_mode.values()))
        parts = [f"base {rounded(one.base)} s per query"]
        parts += [
            f"TT-SI {m} {rounded(p.tt_si)} s ({p.tt_si / p.base:.1f} times base)"
            for m, p in by_mode.items()
            if not np.isnan(p.tt_si)
        ]
        lines.append(f"- **{name}**: {', '.join(parts)}.")
    floor = rates.by["estimate"].get("exact")
    if floor and (rates.model, rates.gpu.name) == (paper.MODEL, "A40"):
        times = PAPER_PRICES.tt_si / floor.tt_si
        lines.append(
            f"- For the same GPU and model the paper's seconds are {times:.0f} times the estimate's (a base "
            f"answer's {PAPER_PRICES.base / floor.base:.0f} times), on prompts of its own; most of its extra "
            "time went into merging adapters and saving files. The estimate is a floor: what arithmetic "
            "allows, not what any program here was seen to do."
        )
    return "\n".join(lines)


def scale_lines(rates: Rates, queries: Sequence[int], points: int = 61) -> pd.DataFrame:
    """What the figure draws, long form: hours on one device by source, method and queries."""
    grid = np.geomspace(min(queries), max(queries), points)
    rows = [
        {"benchmark": rates.benchmark, "source": source, "arm": arm, "mode": mode, "queries": q,
         "hours": _seconds(rates.by[source], arm, mode, q) / 3600}
        for source in HOURS for arm, mode in METHODS for q in grid
    ]  # fmt: skip
    columns = ["benchmark", "source", "arm", "mode", "queries", "hours"]
    return pd.DataFrame(rows, columns=columns).dropna(subset=["hours"], ignore_index=True)
