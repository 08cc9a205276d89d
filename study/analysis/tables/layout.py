"""How tables look: names, order, numbers for reading, Markdown that model text can't break, files."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from study.data import sources

BENCHMARKS = {
    "nexusraven": "NexusRaven",
    "sealtool": "SealTool",
    "apibank": "API-Bank",
    "toolalpaca": "ToolAlpaca",
    "bfcl": "BFCL",
}
AVERAGE, POOLED = "avg", "pooled"
LABELS = BENCHMARKS | {
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
# Rows are ordered by these; arms and benchmarks that are not named come after, by name.
ARMS = (
    "base", "tt_si", "tt_d", "teacher", "tt_si_all", "tt_si_certain", "tt_si_icl", "tt_si_and_icl",
    "icl_nearest", "icl_random", "sft", "sft_ood", "oracle", "generic", "donor", "amortised",
    "random_subset", "self_consistency",
)  # fmt: skip
INFERENCES = ("direct", "majority", "pass@5")
NOT_RUN = "not run in this profile"


def rank(name: str, known: Sequence[str]) -> str:
    """A sorting key: the known names in their order, then the others by name."""
    return f"{known.index(name):03d}" if name in known else f"999{name}"


def in_order(names: Iterable[str]) -> list[str]:
    """The benchmarks, each once, in the order that every table and figure keeps; unknown ones last."""
    return sorted(set(names), key=lambda name: rank(name, tuple(LABELS)))


def sort_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows by benchmark, inference and arm, each in its usual order; what ties keeps its place."""
    known = {"benchmark": tuple(LABELS), "inference": INFERENCES, "arm": ARMS}
    return table.sort_values(
        [c for c in known if c in table],
        key=lambda c: c.map(lambda x: rank(x, known[str(c.name)])),
        kind="stable",
        ignore_index=True,
    )


def label(benchmark: str) -> str:
    """The benchmark's name for reading."""
    return LABELS.get(benchmark, benchmark)


def model_label(model: str) -> str:
    """The model's full name, with its quantisation."""
    return MODELS.get(model, model)


def text(value: Any) -> str:
    """A cell for reading: empty for nothing, floats with one decimal."""
    if isinstance(value, float | np.floating) and not np.isnan(value):
        return f"{value:.1f}"
    return "" if pd.isna(value) else str(value)


def bracket(value: float, low: float, high: float, digits: int = 1, sign: str = "") -> str:
    """'value [low, high]'; the value alone without an interval, empty without a value."""
    if pd.isna(value):
        return ""
    shown = [f"{x:{sign}.{digits}f}".replace("-", "−") for x in (value, low, high)]
    return shown[0] if pd.isna(low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def signed(value: float, digits: int = 2) -> str:
    """The number with its sign, a minus being a minus and no hyphen."""
    return f"{value:+.{digits}f}".replace("-", "−")


def spread(row: Mapping[str, Any], name: str, digits: int = 1, sign: str = "", scale: float = 1) -> str:
    """`bracket` of a row's cell and its neighbours `<name>_low` and `<name>_high`, each times `scale`."""
    cells = (row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"))
    value, low, high = (float("nan") if c is None or pd.isna(c) else scale * float(c) for c in cells)
    return bracket(value, low, high, digits, sign)


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table's rows, each a mapping from column to cell."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown. Cells are escaped: what a model wrote can neither break a row nor be HTML."""

    def cell(value: Any) -> str:
        return html.escape(text(value), quote=False).replace("|", "\\|").replace("\n", " ")

    lines = [[cell(c) for c in table.columns], ["---"] * len(table.columns)]
    lines += [[cell(v) for v in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def quote(written: str) -> str:
    """Model text as an HTML block that shows it letter by letter and runs none of it."""
    return f'<pre style="white-space: pre-wrap">{html.escape(written)}</pre>'


def save_table(
    table: pd.DataFrame, name: str, profile: str, caption: str = "", view: pd.DataFrame | None = None
) -> Path:
    """Path of the CSV written to figures/<profile>/<name>.csv, with a `.md` beside it.

    The CSV holds every column, floats to six digits, so that the same numbers give the same bytes.
    The Markdown shows `view` (default: the table) and the caption.
    """
    folder = sources.figures_dir() / profile
    write(folder / f"{name}.md", (markdown(table if view is None else view) + f"\n{caption}\n").encode())
    return write(folder / f"{name}.csv", csv_bytes(table))


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
