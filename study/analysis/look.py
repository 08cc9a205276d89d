"""How tables look: names, order, numbers for reading, Markdown that model text can't break, files."""

from __future__ import annotations

import html
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

AVERAGE, POOLED = "avg", "pooled"
BENCHMARKS = {
    "nexusraven": "NexusRaven",
    "sealtool": "SealTool",
    "apibank": "API-Bank",
    "toolalpaca": "ToolAlpaca",
    "bfcl": "BFCL",
    "fixture": "Fixture",
    AVERAGE: "Average of the three",
    POOLED: "All benchmarks, pooled",
}
MODELS = {
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M dequantised",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M dequantised",
    "smollm2-135m": "SmolLM2-135M-Instruct, Q4_1 dequantised",
    "qwen2.5-1.5b": "Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b": "Qwen2.5-7B-Instruct",
}
# Arm → its colour, in the order of rows. Okabe and Ito's eight and Paul Tol's muted ones; with so many arms
# colour alone tells none apart: every arm is also named beside what is drawn. A new arm needs no entry here.
ARMS = {
    "base": "#4d4d4d",
    "tt_si": "#0072b2",
    "tt_d": "#d55e00",
    "teacher": "#882255",
    "tt_si_all": "#56b4e9",
    "tt_si_certain": "#332288",
    "tt_si_icl": "#cc79a7",
    "tt_si_and_icl": "#8e5f00",
    "icl_nearest": "#e69f00",
    "icl_random": "#c8b400",
    "sft": "#009e73",
    "sft_ood": "#999933",
    "oracle": "#000000",
    "generic": "#aa7777",
    "donor": "#6699cc",
    "amortised": "#117777",
    "random_subset": "#997700",
    "self_consistency": "#994455",
    "constrained": "#44aa99",
    "tt_si_constrained": "#003366",
    "tt_si_selective": "#7a5cc4",
    "tt_si_selective_constrained": "#4b1a86",
}
KNOWN = {"benchmark": tuple(BENCHMARKS), "inference": ("direct", "majority", "pass@5"), "arm": tuple(ARMS)}
NOT_RUN = "not run in this profile"


# --- names and order ------------------------------------------------------------------------------------


def label(benchmark: str) -> str:
    """The benchmark's name for reading."""
    return BENCHMARKS.get(benchmark, benchmark)


def model_label(model: str) -> str:
    """The model's full name, with its quantisation."""
    return MODELS.get(model, model)


def size(model: str) -> str:
    """The model's size, by its name's end: 1.5B."""
    return model.rpartition("-")[2].upper()


def arm_name(row: Mapping[str, Any]) -> str:
    """The arm, with the size of its training pool where it has one."""
    pool = row.get("pool_n")
    if pool is None or pd.isna(pool) or not pool:
        return str(row["arm"])
    return f"{row['arm']} ({pool:g} sample{'s' if pool > 1 else ''})"


def main_benchmark(benchmarks: Iterable[str]) -> str:
    """The benchmark that single-benchmark questions are asked on: SealTool where there, else the first."""
    names = list(benchmarks)
    return "sealtool" if "sealtool" in names else names[0]


def in_order(names: Iterable[str], kind: str = "benchmark") -> list[str]:
    """The names, each once, in the order that every table and figure keeps; unknown ones last, by name."""
    known = KNOWN[kind]
    return sorted(set(names), key=lambda x: (known.index(x) if x in known else len(known), str(x)))


def sort_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows by benchmark, inference and arm, each in its usual order; what ties keeps its place."""

    def rank(column: pd.Series) -> pd.Series:
        return column.map({x: i for i, x in enumerate(in_order(column, str(column.name)))})

    by = [c for c in KNOWN if c in table]
    return table.sort_values(by, key=rank, kind="stable", ignore_index=True)


# --- numbers for reading --------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A cell for reading: empty for nothing, floats with one decimal."""
    if isinstance(value, float | np.floating) and not np.isnan(value):
        return f"{value:.1f}"
    return "" if pd.isna(value) else str(value)


def texts(*columns: Iterable[Any], form: str = "") -> list[str]:
    """Cells for reading, each as `text` has it, or its row's values put into `form`; empty for nothing."""
    rows = zip(*columns, strict=True)
    return ["" if any(map(pd.isna, r)) else _minus(form.format(*r)) if form else text(r[0]) for r in rows]


def _minus(said: str) -> str:
    """The sign of numbers as the other cells have it, that of exponents left alone."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", said)


def bracket(value: float, low: float, high: float, digits: int = 1, sign: str = "") -> str:
    """'value [low, high]'; the value alone without an interval, empty without a value."""
    if pd.isna(value):
        return ""
    shown = [f"{x:{sign}.{digits}f}".replace("-", "−") for x in (value, low, high)]
    return shown[0] if pd.isna(low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def spread(row: Mapping[str, Any], name: str, digits: int = 1, sign: str = "", scale: float = 1) -> str:
    """`bracket` of a row's cell and its neighbours `<name>_low` and `<name>_high`, each times `scale`.

    `low` and `high` are the neighbours of `accuracy`.
    """
    ends = ("low", "high") if name == "accuracy" else (f"{name}_low", f"{name}_high")
    cells = (row.get(c) for c in (name, *ends))
    value, low, high = (float("nan") if c is None or pd.isna(c) else scale * float(c) for c in cells)
    return bracket(value, low, high, digits, sign)


def spreads(table: pd.DataFrame, name: str, digits: int = 1, sign: str = "", scale: float = 1) -> list[str]:
    """`spread` of each row."""
    return [spread(r, name, digits, sign, scale) for r in rows_of(table)]


def first_of(*columns: Sequence[str]) -> list[str]:
    """In each row the first text that isn't empty."""
    return [next(filter(None, cells), "") for cells in zip(*columns, strict=True)]


def together(between: str, *columns: Sequence[str]) -> list[str]:
    """In each row the texts that aren't empty, with something between them."""
    return [between.join(filter(None, cells)) for cells in zip(*columns, strict=True)]


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table's rows, each a mapping from column to cell."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


# --- Markdown and files ---------------------------------------------------------------------------------


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown. Cells are escaped: what a model wrote can neither break a row nor be HTML."""

    def cell(value: Any) -> str:
        return html.escape(text(value), quote=False).replace("|", "\\|").replace("\n", " ")

    def lines() -> Iterator[list[str]]:
        yield [cell(c) for c in table.columns]
        yield ["---"] * len(table.columns)
        yield from ([cell(v) for v in row] for row in table.itertuples(index=False))

    return "".join("| " + " | ".join(line) + " |\n" for line in lines())


def quote(written: str) -> str:
    """Model text as an HTML block that shows it letter by letter and runs none of it."""
    return f'<pre style="white-space: pre-wrap">{html.escape(written)}</pre>'


def caption(*parts: str) -> str:
    """The paragraphs, less those that are empty."""
    return "\n\n".join(filter(None, parts))


def figures_dir() -> Path:
    """Folder of tables and figures: TTSI_FIGURES or ./figures; outputs go to its <profile>/."""
    return Path(os.environ.get("TTSI_FIGURES") or "figures").expanduser()


def save_table(
    table: pd.DataFrame, name: str, profile: str, caption: str = "", view: pd.DataFrame | None = None
) -> str:
    """The table as Markdown with its caption, once figures/<profile>/ holds it as <name>.csv and <name>.md.

    The CSV holds every column, floats to six digits, so that the same numbers give the same bytes.
    The Markdown shows `view` (default: the table).
    """
    shown = markdown(table if view is None else view) + f"\n{caption}\n"
    write(figures_dir() / profile / f"{name}.md", shown.encode())
    write(figures_dir() / profile / f"{name}.csv", csv_bytes(table))
    return shown


def csv_bytes(table: pd.DataFrame) -> bytes:
    """The table as CSV, floats to six significant digits, newline endings."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()


def write(path: Path, content: bytes) -> Path:
    """The path, once it holds the content: written to a temporary name and renamed, so never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner only
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
