"""A notebook's code cells, run on made-up frames: what they choose is tested where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import IPython.display
import nbformat
import pandas as pd
import pytest

from study.analysis import figures, look
from study.notebooks import find
from study.run import frames
from study.run import study as opening
from study.run.config import load_profile


class Run:
    """What a study is to a notebook: made-up frames, of a variant those under its name; computes nothing."""

    def __init__(self, records: pd.DataFrame, other: Mapping[str, Any], variant: str | None = None) -> None:
        self.all, self.other = records, dict(other)
        self.missing, self.lacking = other.get("missing", {}), other.get("lacking", {})
        of = {"name": "full", "benchmarks": dict.fromkeys(records.get("benchmark", ["sealtool"]))}
        of |= {k: v for k, v in other.items() if k in type(load_profile("full")).model_fields}
        self.profile = load_profile("full").model_copy(update={"variants": {}} | of)
        self.variant_name = "" if variant is None else variant

    def variant(self, name: str) -> Run:
        settings = {k: v for k, v in self.profile.variants.get(name, {}).items() if k != "arms"}
        return Run(self.all, {**self.other, **settings, "variants": {}}, name)

    def everything(self) -> Run:
        return self

    def header(self) -> str:
        return "made up"

    def run(self, arms: Any = None, benchmarks: Any = None) -> None: ...

    def records(self, arms: Any = None) -> pd.DataFrame:
        made = whole(self.all, frames.RECORDS)
        mine = made[made["variant"] == self.variant_name]
        return mine[mine["arm"].isin(arms)] if arms else mine

    def score(self) -> None: ...

    def scores(self) -> pd.DataFrame:
        return self._frame("scores", frames.SCORES)

    def samples_frame(self) -> pd.DataFrame:
        return self._frame("samples", ["benchmark"])

    def examples_frame(self) -> pd.DataFrame:
        return self._frame("examples", frames.EXAMPLES)

    def embeddings_frame(self) -> pd.DataFrame:
        return self._frame("embeddings", ["benchmark"])

    def _frame(self, name: str, columns: Sequence[str]) -> pd.DataFrame:
        made: pd.DataFrame = self.other.get(name, pd.DataFrame())
        return whole(made[made["variant"] == self.variant_name] if "variant" in made else made, columns)

    def samples(self, benchmark: str, seed: int = 0) -> list[Any]:
        return list(self.other.get("asked", ()))

    def examples(self, benchmark: str, seed: int = 0) -> dict[str, Any]:
        return dict(self.other.get("written", {}))


def whole(made: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The frame, with the columns that a real one also has."""
    return made.assign(**{c: None for c in columns if c not in made})


def played(
    number: str, records: pd.DataFrame, until: str = "", study: Mapping[str, Any] | None = None, **given: Any
) -> dict[str, Any]:
    """The names a notebook's cells leave behind, up to the cell that makes `until`; `said`: what was shown.

    study: what the run has: settings of its profile, `missing`, `lacking`. given: the notebook's parameters.
    """
    cells = [c for c in nbformat.read(find(number), 4).cells if c["cell_type"] == "code"]
    said: list[str] = []

    def display(*things: Any) -> None:
        said.extend(str(getattr(t, "data", t)) for t in things)

    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_study", lambda *_, **__: Run(records, study or {}))
        patch.setattr(IPython.display, "display", display)
        patch.setattr(IPython.display, "Image", str)
        patch.setattr(figures, "save_figure", lambda *_: "a figure")
        patch.setattr(look, "write", lambda path, content: Path(path))
        for cell in cells:
            exec(compile(cell["source"], f"{number}, {cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                assert given.keys() <= names.keys()
                names |= {"source": None} | given  # the frames are a run's, not an exported one's
            if until and until in names:
                break
    return names | {"said": "\n".join(said)}
