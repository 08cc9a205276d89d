"""What a table's comparisons say in words: how a run differs from the paper's, and what an interval shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from study.analysis import paper
from study.analysis.look import label, model_label, rows_of, spread


def setting(row: Mapping[str, Any]) -> str:
    """How a row's run differs from the paper's, in words separated by '; '."""
    differs = [model_label(row["model"])] if row["model"] != paper.MODEL else []
    differs += [f"{row['mode']} adapters"] if row["mode"] == "activated" else []
    differs += [f"tools {row['tool_order']}"]
    differs += [f"{row['seeds']} of {paper.SEEDS} seeds"] if row["seeds"] != paper.SEEDS else []
    n, theirs = row["n"], paper.N.get(row["benchmark"])
    if theirs not in (None, n):
        differs += [f"{n} of the paper's {theirs} {label(row['benchmark'])} samples"]
    return "; ".join([*differs, *(["API-Bank's public copy"] if row["benchmark"] == "apibank" else [])])


def settings_note(table: pd.DataFrame) -> str:
    """One sentence that names each difference to the paper's run once; empty if no row has any."""
    # Each difference once: most rows share theirs.
    parts = dict.fromkeys(part for row in table["setting"].dropna() for part in str(row).split("; ") if part)
    return f"Among what differs from the paper's run: {'; '.join(parts)}." if parts else ""


def power_note(table: pd.DataFrame, names: Iterable[str], prefix: str = "") -> str:
    """One sentence with n, discordant counts and the smallest difference detectable at 80 % power.

    `names`: what each row's comparison is called. Empty without a comparison.
    """
    parts = []
    for name, r in zip(names, rows_of(table), strict=True):
        pairs, gained, lost, least = (r[prefix + c] for c in ("pairs", "gained", "lost", "detectable"))
        if pd.notna(pairs):
            found = "none" if pd.isna(least) else f"{least:.1f} points"
            parts.append(f"{name}: n = {pairs}, {gained + lost} discordant, {found}")
    return f"Smallest difference detectable at 80 % power: {'; '.join(parts)}." if parts else ""


def against(row: Mapping[str, Any], other: str, prefix: str = "") -> str:
    """A row's paired difference in words: the numbers, and whether they show a gain, a loss, or nothing.

    Holm's p counts where the comparison is one of a family; an interval off 0 with p ≥ 0.05 shows nothing.
    """
    low, high, least, p, adjusted, pairs, gained, lost = (
        row[prefix + c]
        for c in ("difference_low", "difference_high", "detectable", "p", "p_holm", "pairs", "gained", "lost")
    )
    p, of = (p, "p") if pd.isna(adjusted) else (adjusted, "Holm's p")
    limit = "no difference" if pd.isna(least) else f"only {least:.0f} points or more"
    shows = f"no difference shown, in either direction ({limit} would be found 8 times in 10)"
    if p < 0.05 and (low > 0 or high < 0):
        shows = "a gain" if low > 0 else "a loss"
    shown = spread(row, f"{prefix}difference", sign="+")
    return f"{shown} points to {other}, n = {pairs}, {gained} gained, {lost} lost, {of} = {p:.3g}: {shows}."
