"""What a query would cost on a GPU: by arithmetic over a run's tokens, and as `make bench` measured it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from study.analysis import costs
from study.analysis.costs import Charged, Prices

# Layers, width, feed-forward width, width of keys (and of values), vocabulary: the models' config.json.
SHAPES = {
    "smollm2-135m": (30, 576, 1536, 192, 49_152),
    "qwen2.5-coder-0.5b": (24, 896, 4864, 128, 151_936),
    "qwen2.5-coder-1.5b": (28, 1536, 8960, 256, 151_936),
    "qwen2.5-1.5b": (28, 1536, 8960, 256, 151_936),
    "qwen2.5-7b": (28, 3584, 18_944, 512, 152_064),
}
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


def estimated(
    records: pd.DataFrame, gpu: Gpu, model: str, passes: int, sft_reads: int, share: float | None = None
) -> dict[str, Prices]:
    """Prices by mode from a run's tokens; none unless mode `exact` was run.

    `records`: one benchmark's direct answers of base and tt_si. `passes`: how often T reads an example
    (epochs times K); `sft_reads`: samples × epochs of SFT; `share`: of uncertain queries, None: this run's.

    The records count what is scored, written and trained on, but not how long a prompt is. A pass of T in
    mode `exact` reads a whole one with its reply, one in mode `activated` the user's turn with its reply;
    these stand for the prompts of the same samples. G's own turn is taken to be as long as that turn (as the
    prompt, where `activated` wasn't run). What comes before it is in the cache since the first pass; an
    `exact` adapter has no use for that cache and reads the prompt anew for its answer.
    """
    ours = records[records["arm"] == "tt_si"]
    each = ours[ours["adapted"].astype(bool)].groupby("mode")["tokens_t"].mean() / passes
    base = records.loc[records["arm"] == "base", "tokens_answer"].mean()
    if "exact" not in each or np.isnan(base):
        return {}
    prompt, turn = float(each["exact"]), float(each.get("activated", each["exact"]))
    plain = gpu.seconds(model, prompt, 0, float(base))
    sft = gpu.seconds(model, 0, prompt * sft_reads, 0)
    found = {}
    for mode, rows in ours[ours["mode"].isin(each.index)].groupby("mode", sort=False):
        unsure, trained = rows["uncertain"].astype(bool), rows["adapted"].astype(bool)
        again = (prompt if mode == "exact" else turn) * trained
        read = prompt + rows["tokens_h"] + turn * (rows["attempts"] * unsure) + again
        seconds = gpu.seconds(model, read, rows["tokens_t"], rows["tokens_g"] + rows["tokens_answer"])
        certain = seconds[~unsure].mean()
        if np.isnan(certain):
            certain = plain + gpu.seconds(model, float(rows["tokens_h"].mean()), 0, 0)
        known = float(unsure.mean()) if share is None else share
        prices = (plain, float(seconds[unsure].mean()), float(certain), known, sft)
        found[str(mode)] = Prices(str(mode), *prices, "arithmetic")
    return found


def measured(path: Path, benchmark: str, epochs: int, sft_reads: int, share: float) -> dict[str, Prices]:
    """Prices by mode from the rows of `make bench` (`path`: its CSV) whose `device` names a GPU.

    `epochs`: passes behind its seconds of T; `sft_reads`: samples × epochs of SFT; `share`: of uncertain
    queries. None without such rows, or if the share isn't known.
    """
    data = costs.bench_rows(path)
    if data.empty or np.isnan(share):
        return {}
    data = data[data["dtype"] == data["dtype"].iloc[-1]]  # where there are two, bfloat16
    on_gpu = data["device"].astype(str).str.startswith("cuda") & (data["benchmark"] == benchmark)
    found = {}
    for mode in ("exact", "activated"):
        rows = data[on_gpu & (data["program"] == mode)]
        ways = (Charged(mode, way) for way in ("base", "certain", "uncertain"))
        base, certain, alone = (float(costs.charged(rows, of).mean()) for of in ways)
        if np.isnan(alone):
            continue
        t = float(rows.loc[(rows["stage"] == "t") & (rows["n"] == 1), "seconds"].mean())
        prices = (base, alone, certain, share, t / epochs * sft_reads)
        found[mode] = Prices(mode, *prices, "make bench")
    return found


def seconds(by_mode: Mapping[str, Prices], arm: str, mode: str, queries: float) -> float:
    """Seconds of so many queries with an arm; nan without rates for it.

    SFT: its training once, then base answers, at the rates of mode `exact` where there are any.
    """
    own = by_mode.get(mode)
    if arm == "tt_si":
        return queries * own.tt_si if own else nan
    one = by_mode.get("exact") or next(iter(by_mode.values()), None)
    return queries * one.base + (one.sft if arm == "sft" else 0) if one else nan


def rounded(value: float) -> str:
    """The number to three digits, thousands apart; empty for nothing."""
    if pd.isna(value) or value == 0:
        return "" if pd.isna(value) else "0"
    digits = 2 - int(np.floor(np.log10(abs(value))))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def duration(hours: float) -> str:
    """A span of time to two digits, in the unit that suits it; empty for nothing."""
    for unit, size in (("y", 8766.0), ("d", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= size:
            value = hours / size
            return f"{value:,.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    return "" if pd.isna(hours) else f"{3600 * hours:.2g} s"
