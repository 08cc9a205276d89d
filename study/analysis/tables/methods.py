"""Arms side by side on one benchmark: the paper's Figures 2 (left) and 3, and any comparison of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from study.analysis.tables import paper
from study.analysis.tables.layout import (
    NOT_RUN,
    bracket,
    label,
    model_label,
    rows_of,
    signed,
    sort_rows,
    spread,
    text,
)
from study.analysis.tables.results import (
    DIFFERENCE,
    SCORED,
    SHARES,
    Answers,
    Key,
    answers,
    compare,
    difference_cells,
    power_note,
    select,
    setting,
    settings_note,
    verdict,
    with_holm,
)

METHODS = ("base", "icl_nearest", "icl_random", "tt_si_icl", "sft", "sft_ood", "tt_si", "tt_si_and_icl",
           "tt_d", "teacher", "oracle")  # fmt: skip
METHOD_COLUMNS = [
    "benchmark", "arm", "inference", "mode", "pool_n", *SCORED, *SHARES, *DIFFERENCE,
    *(f"tt_si_{c}" for c in DIFFERENCE), "paper", "paper_difference", "model", "tool_order", "setting",
    "note",
]  # fmt: skip
WHOLE = ["n", "computed", "loaded", "errors", "seeds", "pairs", "gained", "lost", "pool_n"]
WHOLE += [f"tt_si_{c}" for c in ("pairs", "gained", "lost")]


def benchmark_of(benchmarks: Sequence[str]) -> str:
    """The benchmark that single-benchmark questions are asked on: SealTool where there, else the first."""
    return "sealtool" if "sealtool" in benchmarks else next(iter(benchmarks))


def methods_table(
    records: pd.DataFrame, benchmark: str = "sealtool", lacking: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Figure 2, left: one row per way of learning × mode on one benchmark, direct answers.

    `difference` is to base, `tt_si_difference` to tt_si in the same mode, both on the same samples.
    `p_holm`: Holm over the rows' comparisons with base other than tt_si's; `tt_si_p_holm` over those
    with tt_si. `pool_n`: training samples behind an adapter shared by all questions. sft_ood: its
    largest pool only. Columns else as in Table 1. Arms that are not there say so in `note`: `lacking` is
    arm → why it cannot be had here.
    """
    mine = select(records, variant="", benchmark=benchmark, inference="direct")
    found = {k: a for k, a in answers(mine).items() if k.arm in METHODS}
    largest = max((k.pool_n for k in found if k.arm == "sft_ood"), default=0)
    found = {k: a for k, a in found.items() if k.arm != "sft_ood" or k.pool_n == largest}
    base = next((a for k, a in found.items() if k.arm == "base"), None)
    rows = []
    for key, result in found.items():
        ours = next((a for k, a in found.items() if k.arm == "tt_si" and k.mode == key.mode), None)
        if (
            key.arm not in ("base", "tt_si") and ours is None
        ):  # an arm without training has no mode of its own
            ours = next((a for k, a in found.items() if k.arm == "tt_si"), None)
        cells = result.cells()
        cells |= difference_cells(None if key.arm == "base" else compare(base, result))
        cells |= difference_cells(None if key.arm in ("base", "tt_si") else compare(ours, result), "tt_si_")
        rows.append(key.cells() | cells | {"setting": setting(key, cells)} | _paper(key.benchmark, key.arm))
    there, why = {k.arm for k in found}, lacking or {}
    rows += [
        {
            "benchmark": benchmark,
            "inference": "direct",
            "arm": arm,
            "note": why.get(arm, NOT_RUN),
            **_paper(benchmark, arm),
        }
        for arm in METHODS
        if arm not in there
    ]
    table = sort_rows(pd.DataFrame(rows, columns=METHOD_COLUMNS))
    of_family = table["p"].notna() & (table["arm"] != "tt_si")
    table = with_holm(table, table.loc[of_family, "p"].to_dict())
    table = with_holm(table, table["tt_si_p"].dropna().to_dict(), "tt_si_p_holm")
    return table.astype(dict.fromkeys(WHOLE, "Int64"))


def _paper(benchmark: str, arm: str) -> dict[str, Any]:
    """The paper's accuracy of an arm and its difference to base, which it gives for SealTool only."""
    if benchmark != "sealtool" or arm not in paper.METHODS:
        return {}
    cells = {"paper": paper.METHODS[arm]}
    return cells if arm == "base" else cells | {"paper_difference": cells["paper"] - paper.METHODS["base"]}


def methods_view(table: pd.DataFrame) -> pd.DataFrame:
    """Arms for reading: accuracy, differences to base and to tt_si, gained / lost, p, the paper's number."""

    def difference(r: Mapping[str, Any], prefix: str) -> str:
        shown = spread(r, f"{prefix}difference", sign="+")
        if not shown or pd.isna(r[f"{prefix}gained"]):
            return shown
        return f"{shown}, +{r[f'{prefix}gained']} −{r[f'{prefix}lost']}"

    def row(r: Mapping[str, Any]) -> dict[str, str]:
        there = pd.notna(r["accuracy"])
        return {
            "arm": arm_name(r),
            "mode": text(r["mode"]),
            "n": text(r["n"]),
            "accuracy %": bracket(r["accuracy"], r["low"], r["high"]) if there else text(r["note"]),
            "− base, points": difference(r, ""),
            "p, Holm": p_text(r["p"], r["p_holm"]),
            "− tt_si, points": difference(r, "tt_si_"),
            "p, Holm (tt_si)": p_text(r["tt_si_p"], r["tt_si_p_holm"]),
            "paper %": f"{r['paper']:.2f}" if pd.notna(r["paper"]) else "",
            "errors": text(r["errors"]),
            "computed / loaded": f"{r['computed']} / {r['loaded']}" if pd.notna(r["computed"]) else "",
        }

    return pd.DataFrame([row(r) for r in rows_of(table)])


def p_text(p: float, adjusted: float) -> str:
    """The p value with Holm's beside it, where it is part of a family."""
    if pd.isna(p):
        return ""
    return f"{p:.3g}" if pd.isna(adjusted) else f"{p:.3g}, {adjusted:.3g}"


def arm_name(row: Mapping[str, Any]) -> str:
    """The arm, with the size of its training pool where it has one."""
    pool = row.get("pool_n")
    if pool is None or pd.isna(pool) or not pool:
        return str(row["arm"])
    return f"{row['arm']} ({pool} sample{'s' if pool > 1 else ''})"


def methods_caption(table: pd.DataFrame) -> str:
    """n, discordant counts, detectable difference and what differs from the paper's run."""
    reading = (
        f"{label(table['benchmark'].iloc[0])}, direct answers. Accuracy in %, 95 % Wilson interval; "
        "differences on the same samples in points, paired 95 % interval (Bonett–Price; bootstrap from n ≥ "
        "50 "
        "with ≥ 10 discordant), samples gained and lost; p: exact McNemar (several seeds: sign flips), Holm "
        "over the rows other than tt_si − base. The paper's text gives 66.38 for tt_si_icl, its figure "
        "68.36; "
        "whether its one shot was near or random is open; its oracle is arXiv v1's."
    )
    rows = rows_of(table)
    power = power_note(rows, lambda r: " ".join([arm_name(r), text(r["mode"]).replace("none", "")]).strip())
    return "\n\n".join(filter(None, [reading, power, settings_note(table)]))


def methods_reading(table: pd.DataFrame) -> str:
    """One Markdown line per arm: its difference to base and to tt_si, and what the intervals show."""
    lines = []
    for r in rows_of(table[table["difference"].notna()]):
        mode = "" if r["mode"] == "none" else f", {r['mode']}"
        line = f"- **{arm_name(r)}**{mode}: " + _against(r, "", "base")
        if pd.notna(r["tt_si_difference"]):
            line += " " + _against(r, "tt_si_", "tt_si")
        if pd.notna(r["paper_difference"]):
            line += f" The paper's, to base: {signed(r['paper_difference'])}."
        lines.append(line)
    return "\n".join(lines) or "Nothing was compared with base in this run."


def _against(r: Mapping[str, Any], prefix: str, other: str) -> str:
    shown = spread(r, f"{prefix}difference", sign="+")
    adjusted = r[f"{prefix}p_holm"]
    p, of = (r[f"{prefix}p"], "p") if pd.isna(adjusted) else (adjusted, "Holm's p")
    low, high, least = (r[f"{prefix}{c}"] for c in ("difference_low", "difference_high", "detectable"))
    says = verdict(low, high, least, p)
    return f"{shown} points to {other} (n = {r[f'{prefix}pairs']}, {of} = {p:.3g}): {says}."


SIZE_COLUMNS = [
    "model", "arm", "mode", "variant", "benchmark", *SCORED, *SHARES, *DIFFERENCE, "paper",
    "paper_difference", "tool_order", "setting", "note",
]  # fmt: skip


def sizes_table(
    records: pd.DataFrame, benchmark: str = "sealtool", models: Sequence[str] = ()
) -> pd.DataFrame:
    """Figure 3: base and tt_si of every model size, on the samples that all of them answered, direct.

    `models`: those wanted, small to large; one without records has a row that says so. The paper's
    two models have rows of their own, without n. Only runs in the profile's own tool order are here.
    """
    mine = select(records, benchmark=benchmark, inference="direct")
    mine = mine[mine["arm"].isin(["base", "tt_si"])] if len(mine) else mine
    mine = _per_model(mine)
    found = answers(mine)
    there = list(dict.fromkeys([*models, *(k.model for k in found)]))
    shared = _shared_samples(found)
    rows: list[dict[str, Any]] = []
    for model in there:
        kept = {
            k: Answers(a.rows[a.rows["sample"].isin(shared)]) for k, a in found.items() if k.model == model
        }
        base = next((a for k, a in kept.items() if k.arm == "base"), None)
        for key, result in kept.items():
            cells = result.cells() | difference_cells(compare(base, result) if key.arm != "base" else None)
            rows.append(key.cells() | cells | {"setting": setting(key, cells)})
        if not kept:
            rows.append({"model": model, "benchmark": benchmark, "note": NOT_RUN})
    if benchmark == "sealtool":
        for model, (before, after) in paper.SIZES.items():
            row = {"model": model, "benchmark": benchmark, "mode": "exact", "note": "the paper's"}
            rows.append(row | {"arm": "base", "paper": before, "mode": "none"})
            rows.append(row | {"arm": "tt_si", "paper": after, "paper_difference": after - before})
    table = pd.DataFrame(rows, columns=SIZE_COLUMNS)
    return table.astype(dict.fromkeys([c for c in WHOLE if c in table], "Int64"))


def _per_model(records: pd.DataFrame) -> pd.DataFrame:
    """One run per model: the profile's own where it has one, else the first variant with the same tools."""
    if records.empty or "variant" not in records:
        return records
    kept = []
    order = select(records, variant="")["tool_order"]
    for _, rows in records.groupby("model", sort=False):
        if len(order):
            rows = rows[rows["tool_order"] == order.iloc[0]]
        if len(rows):
            variants = rows["variant"].fillna("")
            kept.append(rows[variants == ("" if (variants == "").any() else variants.iloc[0])])
    return pd.concat(kept) if kept else records.iloc[:0]


def _shared_samples(found: Mapping[Key, Answers]) -> set[str]:
    sets = [set(a.correct.index) for a in found.values() if len(a.correct)]
    return set.intersection(*sets) if sets else set()


def size_view(table: pd.DataFrame) -> pd.DataFrame:
    """Model sizes for reading, the paper's below ours."""
    rows = []
    for r in rows_of(table):
        ours = pd.notna(r["accuracy"])
        rows.append({
            "model": model_label(r["model"]),
            "arm": text(r["arm"]),
            "mode": text(r["mode"]),
            "n": text(r["n"]),
            "accuracy %": bracket(r["accuracy"], r["low"], r["high"])
            if ours
            else (f"{r['paper']:.2f}" if pd.notna(r["paper"]) else ""),
            "− base, points": spread(r, "difference", sign="+")
            or ("" if pd.isna(r["paper_difference"]) else signed(r["paper_difference"])),
            "gained / lost": f"{r['gained']} / {r['lost']}" if pd.notna(r["gained"]) else "",
            "p": "" if pd.isna(r["p"]) else f"{r['p']:.3g}",
            "uncertain %": text(r["uncertain"]),
            "note": text(r["note"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def size_caption(table: pd.DataFrame) -> str:
    """n, discordant counts, detectable difference and what differs from the paper's run."""
    reading = (
        "Every model answers the same samples (those all of them answered), so the sizes can be compared. "
        "Accuracy: 95 % Wilson interval; difference to the same model's base: paired 95 % interval."
    )
    power = power_note(rows_of(table), lambda r: f"{r['model']} {r['arm']}, {r['mode']}")
    return "\n\n".join(filter(None, [reading, power, settings_note(table)]))


def size_reading(table: pd.DataFrame) -> str:
    """One Markdown line per model and mode; last what more than one size shows, or that there is only one."""
    lines = []
    ours = table[table["difference"].notna()]
    for r in rows_of(ours):
        shown = spread(r, "difference", sign="+")
        lines.append(
            f"- **{model_label(r['model'])}**, {r['mode']}: tt_si − base {shown} points, n = {r['pairs']}, "
            f"{r['gained']} gained, {r['lost']} lost, p = {r['p']:.3g}: "
            f"{verdict(r['difference_low'], r['difference_high'], r['detectable'], r['p'])}."
        )
    absent = table.loc[table["note"] == NOT_RUN, "model"]
    lines += [f"- **{model_label(m)}**: {NOT_RUN}." for m in absent]
    if ours["model"].nunique() < 2:
        lines.append("- One size alone says nothing about how the gain changes with size.")
    return "\n".join(lines)
