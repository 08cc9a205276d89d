"""What the gain is made of: control arms and variants paired against base and tt_si, and the error codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from study.analysis.tables.layout import NOT_RUN, bracket, label, rows_of, spread, text
from study.analysis.tables.methods import p_text
from study.analysis.tables.results import (
    DIFFERENCE,
    SCORED,
    SELECTING,
    SHARES,
    Answers,
    Key,
    answers,
    compare,
    difference_cells,
    power_note,
    select,
    verdict,
    with_holm,
)

# Control arm → what a tie with tt_si would mean.
CONTROL_ARMS = {
    "generic": "one fixed example for all: is it only the format?",
    "donor": "an example made for another sample, under its tools: must the example fit?",
    "random_subset": "as many samples, drawn at random: does H choose better than chance?",
    "tt_si_all": "every sample adapted: is H needed?",
    "tt_si_certain": "only the certain samples adapted: is H the right way round?",
    "amortised": "one adapter on all synthetic examples: must training be per sample?",
    "self_consistency": "votes for TT-SI's tokens, up to a cap: is it only more computing?",
    "tt_si_icl": "the example in the prompt, no training: is training needed?",
}
# Overridden setting of a variant → what it asks.
CONTROL_SETTINGS = {
    "tool_order": "does the order of the tools matter?",
    "accept": "how much is the form of the reply?",
    "answer_opening": "reply forced to begin with H's opening: is it only the format?",
    "seeds": "base against base under another shuffle of the tools: how large is noise?",
    "novelty": "copies of the seed question rejected: must the question be new?",
    "k": "how many examples?",
    "epochs": "how long to train?",
    "learning_rate": "how fast to train?",
}
AGAINST = ("base", "tt_si", "own")
COLUMNS = [
    "control", "asks", "benchmark", "arm", "inference", "mode", "variant", "pool_n", *SCORED, *SHARES,
    *(f"{a}_{c}" for a in AGAINST for c in DIFFERENCE), "model", "tool_order", "note",
]  # fmt: skip
WHOLE = ["n", "computed", "loaded", "errors", "seeds", "pool_n"]
WHOLE += [f"{a}_{c}" for a in AGAINST for c in ("pairs", "gained", "lost")]


def table_controls(
    records: pd.DataFrame,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    benchmark: str = "sealtool",
) -> pd.DataFrame:
    """One row per control × arm × mode on one benchmark, direct answers, in per cent and points.

    `variants`: name → the settings it overrides; those that change the model are another notebook's. Prefixes
    of a paired difference: `base_` to the profile's base, `tt_si_` to its tt_si in the same mode, `own_` a
    variant's tt_si to the variant's own base (the gain under that setting). Rows of another seed are paired
    sample by sample. `base_p_holm`, `tt_si_p_holm`: Holm over all controls of this table, arms that are no
    control (base and tt_si themselves) left out. What was not run has a row that says so.
    """
    settings = {n: dict(o) for n, o in (variants or {}).items() if "model" not in o}
    found = answers(select(records, benchmark=benchmark, inference="direct"))
    rows = []
    for key, result in found.items():
        if key.variant == "" and key.arm not in ("base", "tt_si", *CONTROL_ARMS):
            continue
        if key.variant and (key.variant not in settings or key.arm not in ("base", "tt_si")):
            continue
        rows.append(_row(key, result, found, settings))
    rows.sort(key=lambda r: (r["variant"] != "", _place(r, settings)))
    rows += _absent(rows, settings, benchmark)
    table = pd.DataFrame(rows, columns=COLUMNS)
    control = ~((table["variant"].astype(object).fillna("") == "") & table["arm"].isin(["base", "tt_si"]))
    for against in ("base", "tt_si"):
        # A base row under another setting is held against base alone.
        own = control & (table["arm"] != "base") if against == "tt_si" else control
        p = table.loc[own, f"{against}_p"].dropna()
        table = with_holm(table, p.to_dict(), f"{against}_p_holm")
    return table.astype(dict.fromkeys(WHOLE, "Int64"))


def _row(
    key: Key, result: Answers, found: Mapping[Key, Answers], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    reference = key.variant == "" and key.arm in ("base", "tt_si")
    overrides = settings.get(key.variant, {})
    name = ", ".join(f"{k} = {_short(v)}" for k, v in overrides.items() if k not in SELECTING)
    asks = next((CONTROL_SETTINGS[k] for k in CONTROL_SETTINGS if k in overrides), "")
    row: dict[str, Any] = {
        "control": name or key.variant or key.arm,
        "asks": "" if reference else asks or CONTROL_ARMS.get(key.arm, ""),
        **key.cells(),
        **result.cells(),
    }
    if key.arm == "self_consistency" and len(result.scored):
        votes = result.scored["n_replies"]
        row["asks"] += f" (votes: median {votes.median():g}, most {votes.max():g})"
    if not (key.variant == "" and key.arm == "base"):
        row |= difference_cells(compare(_find(found, key, "base", ""), result), "base_")
    if not reference:
        row |= difference_cells(compare(_find(found, key, "tt_si", ""), result), "tt_si_")
    if key.variant and key.arm == "tt_si":
        row |= difference_cells(compare(_find(found, key, "base", key.variant), result), "own_")
    return row


def _find(found: Mapping[Key, Answers], key: Key, arm: str, variant: str) -> Answers | None:
    """An arm's answers to hold a row against: same inference and mode where there is one, else the first."""
    there = {k: a for k, a in found.items() if (k.arm, k.variant) == (arm, variant)}
    for same in (("inference", "mode"), ("inference",), ("mode",), ()):
        for k, a in there.items():
            if all(getattr(k, field) == getattr(key, field) for field in same):
                return a
    return None


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _place(row: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> tuple[int, int, str]:
    arms = ("base", "tt_si", *CONTROL_ARMS)
    if row["variant"]:
        names = list(settings)
        return (names.index(row["variant"]), arms.index(row["arm"]), row["mode"])
    return (arms.index(row["arm"]), 0, row["mode"])


def _absent(
    rows: list[dict[str, Any]], settings: Mapping[str, Mapping[str, Any]], benchmark: str
) -> list[dict[str, Any]]:
    arms = {r["arm"] for r in rows if r["variant"] == ""}
    varied = {k for r in rows for k in settings.get(r["variant"], {})}
    missing = [{"control": a, "arm": a, "asks": q} for a, q in CONTROL_ARMS.items() if a not in arms]
    missing += [{"control": k, "asks": q} for k, q in CONTROL_SETTINGS.items() if k not in varied]
    return [m | {"benchmark": benchmark, "note": NOT_RUN} for m in missing]


def controls_view(table: pd.DataFrame) -> pd.DataFrame:
    """The controls for reading: accuracy, differences to base, to tt_si, and to the variant's own base."""

    def difference(r: Mapping[str, Any], prefix: str) -> str:
        shown = spread(r, f"{prefix}_difference", sign="+")
        return f"{shown}, +{r[f'{prefix}_gained']} −{r[f'{prefix}_lost']}" if shown else ""

    def row(r: Mapping[str, Any]) -> dict[str, str]:
        there = pd.notna(r["accuracy"])
        return {
            "control": r["control"],
            "asks": text(r["asks"]),
            "arm": " ".join(filter(None, [text(r["arm"]), text(r["mode"]).replace("none", "")])),
            "n": text(r["n"]),
            "accuracy %": bracket(r["accuracy"], r["low"], r["high"]) if there else text(r["note"]),
            "− base": difference(r, "base"),
            "− tt_si": difference(r, "tt_si"),
            "p, Holm (tt_si)": p_text(r["tt_si_p"], r["tt_si_p_holm"]),
            "gain under it": difference(r, "own"),
        }

    return pd.DataFrame([row(r) for r in rows_of(table)])


def controls_caption(table: pd.DataFrame) -> str:
    """What the columns are, n, discordant counts and detectable differences."""
    reading = (
        f"{label(table['benchmark'].iloc[0])}. Accuracy in %, 95 % Wilson interval; differences in points "
        "on the "
        "same samples, paired 95 % interval, samples gained and lost; p against tt_si, Holm over all "
        "controls "
        "here. Gain under it: tt_si − base, both under the variant's setting. A control that ties with tt_si "
        "explains the gain only if its interval excludes a loss as large as the gain."
    )
    power = power_note(
        rows_of(table), lambda r: f"{r['control']}, {r['arm']} {text(r['mode'])} − tt_si", "tt_si_"
    )
    return "\n\n".join(filter(None, [reading, power]))


def controls_reading(table: pd.DataFrame) -> str:
    """One Markdown line per control: its difference to tt_si (or base's to base), and what it shows."""
    lines = []
    for r in rows_of(table[table["asks"].astype(object).fillna("") != ""]):
        against = "base" if r["arm"] == "base" else "tt_si"
        if pd.isna(r["accuracy"]) or pd.isna(r[f"{against}_difference"]):
            continue
        shown = spread(r, f"{against}_difference", sign="+")
        p = r[f"{against}_p_holm"]
        low, high, least = (r[f"{against}_{k}"] for k in ("difference_low", "difference_high", "detectable"))
        says = verdict(low, high, least, p)
        mode = "" if r["mode"] == "none" else f", {r['mode']}"
        lines.append(
            f"- **{r['control']}**, {r['arm']}{mode} ({r['asks']}) {shown} points to {against}, "
            f"n = {r[f'{against}_pairs']}, Holm's p = {p:.3g}: {says}."
        )
    absent = [r["control"] for r in rows_of(table[table["note"] == NOT_RUN])]
    lines += [f"- {NOT_RUN[0].upper()}{NOT_RUN[1:]}: {', '.join(absent)}."] if absent else []
    return "\n".join(lines)


CODES = ("ok", "wrong_value", "wrong_type", "missing_argument", "extra_argument", "wrong_name",
         "unknown_tool", "wrong_count", "bad_json", "no_call")  # fmt: skip


def error_codes(records: pd.DataFrame, arm: str = "tt_si") -> pd.DataFrame:
    """How each verdict moved: rows benchmark × mode × code before (base) × code after, with counts.

    Only samples that the arm adapted and both judged; direct answers, the profile itself.
    """
    mine = select(records, variant="", inference="direct")
    columns = ["benchmark", "mode", "before", "after", "n"]
    if mine.empty:
        return pd.DataFrame(columns=columns)
    ok = mine[mine["status"] == "ok"]
    adapted = ok[(ok["arm"] == arm) & ok["adapted"].astype(bool)]
    keys = ["benchmark", "sample", "seed"]
    both = adapted.merge(ok.loc[ok["arm"] == "base", [*keys, "code"]], on=keys, suffixes=("", "_before"))
    moved = (
        both.groupby(["benchmark", "mode", "code_before", "code"], sort=False).size().reset_index(name="n")
    )
    moved = moved.set_axis(columns, axis=1)
    order = {c: i for i, c in enumerate(CODES)}
    return moved.sort_values(
        columns[:4], key=lambda c: c.map(lambda x: f"{order.get(x, 99):02d}{x}"), ignore_index=True
    )


def codes_view(moved: pd.DataFrame, benchmark: str, mode: str) -> pd.DataFrame:
    """One mode's moves as a matrix: a row per code before, a column per code after."""
    mine = moved[(moved["benchmark"] == benchmark) & (moved["mode"] == mode)]
    if mine.empty:
        return pd.DataFrame([{"before ↓ after →": "no sample was adapted"}])
    there = [c for c in (*CODES, "") if c in {*mine["before"], *mine["after"]}]
    grid = mine.pivot(index="before", columns="after", values="n").reindex(index=there, columns=there)
    shown = grid.fillna(0).astype(int)
    shown["all before"] = shown.sum(axis=1)
    shown.loc["all after"] = shown.sum(axis=0)
    return shown.rename_axis("before ↓ after →").reset_index()


def codes_reading(moved: pd.DataFrame) -> str:
    """One Markdown line per benchmark and mode: verdicts that moved, errors mended and made."""
    lines = []
    for key, rows in moved.groupby(["benchmark", "mode"], sort=False):
        benchmark, mode = map(str, key)
        total = int(rows["n"].sum())
        same = int(rows.loc[rows["before"] == rows["after"], "n"].sum())
        mended = rows[(rows["before"] != "ok") & (rows["after"] == "ok")]
        made = rows[(rows["before"] == "ok") & (rows["after"] != "ok")]
        parts = [
            f"{name}: " + (", ".join(f"{r[code]} {r['n']}" for r in rows_of(part)) or "none")
            for name, part, code in (("mended", mended, "before"), ("made", made, "after"))
        ]
        lines.append(
            f"- **{label(benchmark)}**, {mode}: {total} adapted answers, {same} with the same verdict code "
            "as "
            f"before; {'; '.join(parts)}."
        )
    return "\n".join(lines) or "No sample was adapted in this run."
