"""An exported run, read like a study: the same frames, nothing computed, no model, no data files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from study.data import sources
from study.data.models import model_hash
from study.run.config import Profile
from study.run.keys import writing
from study.run.stages import together
from ttsi.types import Synthesis

STAGES = "stages.parquet"
_SYNTHESIS = TypeAdapter(Synthesis)
SELECTING = {
    "benchmarks",
    "arms",
    "modes",
    "inference",
    "seeds",
    "variants",
    "name",
    "store",
    "batch",
    "rows",
    "threads",
    "bank",
}


def about(folder: Path) -> dict[str, Any]:
    """How the run in a folder was made. Raises ValueError if there is none."""
    try:
        made: dict[str, Any] = json.loads((folder / "header.json").read_text())
        return made
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no results of a run: {error}") from error


class Results:
    """An exported run, read like a study: the same frames, nothing computed, no model, no data files."""

    def __init__(self, folder: Path, profile: Profile | None = None, variant: str = "") -> None:
        self.folder = folder
        self._about = about(folder)
        self.whole = Profile.model_validate(self._about["profile"])
        self.profile = profile or self.whole
        self.variant_name = variant
        self.missing: dict[str, str] = self._about["missing"]
        self.lacking = {(b, arm): why for b, arm, why in self._about["lacking"]}

    @classmethod
    def under(cls, folder: Path, overrides: Mapping[str, Any]) -> Results:
        """The results in a folder, less what the overrides leave out.

        Raises ValueError for an override that would want another run.
        """
        whole = cls(folder)
        asked = whole.profile.under(overrides)
        own, others = whole.profile.model_dump(), asked.model_dump()
        changed = [k for k in own if own[k] != others[k] and k not in SELECTING]
        if changed:
            raise ValueError(
                f"the results in {folder} were made with "
                + ", ".join(f"{k} = {own[k]!r}" for k in changed)
                + "; another value wants a run: source=None"
            )
        return cls(folder, asked)

    def header(self) -> str:
        """How the run was made, as one Markdown paragraph."""
        name = f" as `{self.profile.name}`" if self.profile.store else ""
        return f"{self._about['header']}  \n**Loaded** from `{self.folder.name}`{name}, nothing computed here"

    def everything(self) -> Results:
        """This run as if it were asked for all samples of its benchmarks."""
        whole = dict.fromkeys(self.profile.benchmarks)
        return Results(self.folder, self.profile.model_copy(update={"benchmarks": whole}), self.variant_name)

    def variant(self, name: str) -> Results:
        """The run beside this one under the profile's variant settings."""
        return Results(self.folder, self.profile.variant(name), name)

    def run(self, arms: Sequence[str] | None = None, benchmarks: Sequence[str] | None = None) -> None:
        """Nothing: what was run is here, what wasn't isn't."""

    def score(self, benchmarks: Sequence[str] | None = None) -> None:
        """Nothing, like `run`."""

    def embed(self, benchmarks: Sequence[str] | None = None) -> None:
        """Nothing, like `run`."""

    def records(self, arms: Sequence[str] | None = None) -> pd.DataFrame:
        """One judged row per benchmark, sample, seed, arm, mode and inference."""
        table = self._selected("records")
        p = self.profile
        keep = [
            arm in p.arms_of(b)
            and (arms is None or arm in arms)
            and i in p.inference
            and (mode == "none" or mode in p.modes_of(b))
            for b, arm, mode, i in zip(
                table["benchmark"], table["arm"], table["mode"], table["inference"], strict=True
            )
        ]
        return table[pd.Series(keep, table.index, dtype=bool)].reset_index(drop=True)

    def scores(self) -> pd.DataFrame:
        """One row per benchmark, sample and seed: what H and its rivals say."""
        return self._selected("scores")

    def examples_frame(self) -> pd.DataFrame:
        """One row per synthetic example, without its text."""
        return self._selected("examples")

    def examples(self, benchmark: str, seed: int = 0) -> dict[str, Synthesis]:
        """The synthetic examples of a benchmark by sample id, as far as their text was exported."""
        p = self.profile
        try:
            model = model_hash(p.model)
        except sources.Unavailable:  # a folder on the machine that ran it
            return {}
        dtype = self._about["context"]["dtype"] if p.dtype == "auto" else p.dtype
        only = [("stage", "==", "example"), ("benchmark", "==", benchmark), ("seed", "==", seed)]
        rows = pd.read_parquet(self.folder / STAGES, filters=only)
        of = {"model": model, "dtype": dtype, "engine": p.engine}
        wanted = [{**of, **writing(p, index)} for index in range(p.k)]
        found: dict[str, dict[int, Synthesis]] = {}
        for settings, sample, value in zip(rows["settings"], rows["sample"], rows["value"], strict=True):
            given = {"engine": "torch", **json.loads(settings)}
            index = next((n for n, w in enumerate(wanted) if w.items() <= given.items()), None)
            if index is not None:
                found.setdefault(sample, {})[index] = _SYNTHESIS.validate_json(value)
        order = self._order.get(benchmark, [])[: p.benchmarks.get(benchmark)]
        return {i: together([found[i][n] for n in range(p.k)]) for i in order if len(found.get(i, ())) == p.k}

    def embeddings_frame(self, compute: bool = False) -> pd.DataFrame:
        """One row per question: principal components of the model's hidden states."""
        return self._selected("embeddings")

    def samples_frame(self) -> pd.DataFrame:
        """One row per sample of what is studied: counts and flags."""
        return self._selected("samples")

    def plan(self) -> str:
        """That nothing is to be done."""
        return f"Nothing to compute: tables and figures are made from {self.folder}"

    def _selected(self, name: str) -> pd.DataFrame:
        """A table's rows of this variant, for the profile's benchmarks, seeds and numbers of samples."""
        table, p = _read(self.folder / f"{name}.parquet"), self.profile
        if table.empty:
            return table
        keep = table["benchmark"].isin(list(p.benchmarks)) & table["seed"].isin(p.seeds)
        if "variant" in table:
            keep &= table["variant"] == self.variant_name
        for benchmark, n in p.benchmarks.items():
            if n is not None:
                first = self._order.get(benchmark, [])[:n]
                keep &= (table["benchmark"] != benchmark) | table["sample"].isin(first)
        return table[keep].reset_index(drop=True)

    @cached_property
    def _order(self) -> dict[str, list[str]]:
        samples = _read(self.folder / "samples.parquet")
        return {str(b): list(dict.fromkeys(g["sample"])) for b, g in samples.groupby("benchmark", sort=False)}


@cache
def _read(path: Path) -> pd.DataFrame:
    """A table as it was before it was written: lists are lists again, and None is None."""
    table = pd.read_parquet(path)
    for column in table.columns:
        if table[column].dtype == object or str(table[column].dtype) in ("str", "string"):
            table[column] = pd.Series(
                [v.tolist() if hasattr(v, "tolist") else v for v in table[column]], dtype=object
            )
    return table
