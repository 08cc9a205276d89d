"""Runs that travel: a folder of Parquet files that a run exports, and that figures and further runs read.

No text of a benchmark leaves with it: what a model wrote is replaced by its SHA-256 where it resembles its
sample's question or quotes eight words in a row of any prompt. Numbers, verdicts and sample ids stay, and the
stage results behind them, so that another machine goes on where this run stopped.
"""

from __future__ import annotations

import difflib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import TypeAdapter

from study.data import benchmarks, pools, sources
from study.data.downloads import say
from study.data.models import model_hash
from study.run import frames
from study.run.config import Profile
from study.run.memory import REDACTED, prompts_hash
from study.run.stages import together, writing
from study.run.store import Row, Store
from ttsi.synthesizer import compared, copy_ratio
from ttsi.types import Sample, Synthesis

if TYPE_CHECKING:
    from study.run.study import Study

FREE = frozenset({"bfcl", "fixture"})
"""Benchmarks that may be quoted: BFCL by its licence, the fixture because it is this project's."""
QUOTE = 8
"""So many words in a row are a quotation."""
ALIKE = 0.6
"""From this similarity on, a text is taken for its sample's question."""
_STAGES = "stages.parquet"
_SYNTHESIS = TypeAdapter(Synthesis)
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_SELECTING = {
    "benchmarks",
    "arms",
    "modes",
    "inference",
    "seeds",
    "variants",
    "name",
    "batch",
    "threads",
    "bank",
}


# --- what may not leave ---------------------------------------------------------------------------------


class Redactor:
    """Finds the text of one benchmark in what models wrote."""

    def __init__(self, benchmark: str, samples: Mapping[str, Sample]) -> None:
        self.free = benchmark in FREE
        self.samples = samples
        self._forbidden: set[tuple[str, ...]] = set()
        if self.free:
            return
        shown = [*samples.values()]
        if benchmark in pools.IN_DOMAIN:
            shown += benchmarks.load(pools.IN_DOMAIN[benchmark])
        for sample in shown:
            texts = [m.content for m in sample.messages]
            for tool in sample.tools:
                texts += [tool.description, *_words(dict(tool.parameters))]
            for text in texts:
                self._forbidden |= quotations(text)

    def matches(self, text: str, sample: str) -> bool:
        """Whether a text resembles its sample's question, or quotes any prompt."""
        if self.free or not text.strip():
            return False
        if quotations(text) & self._forbidden:
            return True
        if (known := self.samples.get(sample)) is None:
            return False
        # An argument may be the question itself, too short to be a quotation and lost in the reply around it.
        question = known.query.question
        return any(_alike(part, question) for part in (text, *_QUOTED.findall(text)))


def quotations(text: str) -> set[tuple[str, ...]]:
    """Every eight words in a row of a text, without case and punctuation."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + QUOTE]) for i in range(len(words) - QUOTE + 1)}


def _alike(text: str, question: str) -> bool:
    matcher = difflib.SequenceMatcher(None, compared(text), compared(question), autojunk=False)
    # Each of the first two is an upper bound of the third, and far cheaper.
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio)
    return all(bound() >= ALIKE for bound in bounds) and copy_ratio(text, question) >= ALIKE


def _words(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _words(part)
    elif isinstance(value, list):
        for part in value:
            yield from _words(part)


def _redacted(stage: str, value: Any, hides: Callable[[str], bool]) -> tuple[str, Any] | None:
    """(stage, value) fit to leave; None where nothing would be left of use."""
    if not any(map(hides, _words(value))):
        return stage, value
    if stage != "example":
        return None

    def hidden(text: str) -> str:
        return f"sha256:{frames.sha256(text)}" if hides(text) else text

    examples = []
    for example in value["examples"]:
        if any(map(hides, _words(example))):
            example = {
                **example,
                "question": f"sha256:{frames.sha256(example['question'])}",
                "calls": [{**c, "name": hidden(c["name"]), "arguments": {}} for c in example["calls"]],
                "schema_errors": [""] * len(example["schema_errors"]),
            }
        examples.append(example)
    return REDACTED + stage, {**value, "examples": examples}


# --- export ---------------------------------------------------------------------------------------------


def export(study: Study, folder: Path) -> Path:
    """The folder, holding what is stored of a study and its variants; computes nothing.

    `records`, `scores`, `examples`, `embeddings` and `samples` are the frames, `stages` the results they come
    from, `header.json` how it was run; it is written last.
    """
    parts = [study, *map(study.variant, study.profile.variants)]
    redactors: dict[str, Redactor] = {}
    for part in parts:
        for benchmark in part.profile.benchmarks:
            if benchmark in redactors or not part.samples(benchmark, part.profile.seeds[0]):
                continue
            redactors[benchmark] = Redactor(benchmark, {s.id: s for s in benchmarks.load(benchmark)})
    records = _joined([p.records() for p in parts], frames.RECORDS)
    hidden = [
        redactors[b].matches(text, sample)
        for b, sample, text in zip(records["benchmark"], records["sample"], records["reply"], strict=True)
    ]
    texts = [f"sha256:{frames.sha256(t)}" if h else t for t, h in zip(records["reply"], hidden, strict=True)]
    records = records.assign(reply=texts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "header.json").unlink(missing_ok=True)
    tables = {
        "records": records,
        "scores": _joined([p.scores() for p in parts], frames.SCORES),
        "examples": _joined([p.examples_frame() for p in parts], frames.EXAMPLES),
        "embeddings": study.embeddings_frame(compute=False),
        "samples": study.everything().samples_frame(),
    }
    for name, table in tables.items():
        _write(table, folder / f"{name}.parquet")
    _write(_stages(study, parts, redactors), folder / _STAGES)
    about = {
        "header": study.header(),
        "context": study.context,
        "profile": study.profile.model_dump(),
        "missing": study.missing,
        "lacking": [[*key, why] for key, why in study.lacking.items()],
    }
    (folder / "header.json").write_text(json.dumps(about, indent=1) + "\n")
    return folder


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path, index=False, compression="zstd", compression_level=19)


def _joined(tables: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    filled = [t for t in tables if len(t)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))


def _stages(study: Study, parts: Sequence[Study], redactors: Mapping[str, Redactor]) -> pd.DataFrame:
    """The stored results that the study's prompts, as they are now, would find again."""
    current = {
        prompts_hash(b, seed, p.profile.tool_order, p.profile.keep_components)
        for p in parts
        for b in p.profile.benchmarks
        if b in redactors
        for seed in p.profile.seeds
    }
    written: dict[tuple[str, str, str, int], set[str]] = {}  # "example" is sorted before "redacted example"
    rows = []
    for stage, settings, benchmark, seed, ids in _groups(study.store.path):
        if json.loads(settings).get("samples") not in current or stage == "embedding":
            continue
        found = study.store.get(stage, json.loads(settings), benchmark, seed, ids)
        written[REDACTED + stage, settings, benchmark, seed] = {
            i for i, r in found.items() if r.status == "ok"
        }
        for i, row in sorted(found.items()):
            if row.status != "ok":
                continue
            if stage.startswith(REDACTED) and i in written.get((stage, settings, benchmark, seed), ()):
                continue  # written again since it was loaded
            hides = partial(redactors[benchmark].matches, sample=i)
            kept = _redacted(stage.removeprefix(REDACTED), json.loads(row.value), hides)
            if kept is None:
                continue
            as_stage = stage if stage.startswith(REDACTED) else kept[0]
            text = json.dumps(kept[1], ensure_ascii=False, separators=(",", ":"))
            rows.append((as_stage, settings, benchmark, i, seed, text, row.seconds, row.batch))
    columns = ["stage", "settings", "benchmark", "sample", "seed", "value", "seconds", "batch"]
    return pd.DataFrame(rows, columns=columns)


def _groups(path: Path) -> list[tuple[str, str, str, int, list[str]]]:
    """(stage, settings, benchmark, seed, samples) of every set of results in a store."""
    asked = (
        "SELECT r.stage, s.json, r.benchmark, r.seed, json_group_array(r.sample) "
        "FROM result r JOIN settings s ON s.hash = r.settings "
        "GROUP BY r.stage, r.settings, r.benchmark, r.seed ORDER BY r.stage, r.benchmark, r.seed, r.settings"
    )
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return [(*row[:4], json.loads(row[4])) for row in db.execute(asked)]


# --- going on from an export ----------------------------------------------------------------------------


def load_into(path: Path, folder: Path) -> int:
    """Number of stage results put into the store at `path`, marked as loaded; those it has already stay.

    Raises ValueError if the folder holds no export.
    """
    about = _about(folder)
    table = pd.read_parquet(folder / _STAGES)
    store = Store(path, about["context"], source="loaded")
    try:
        for key, rows in table.groupby(["stage", "settings", "benchmark", "seed"], sort=False):
            stage, settings, benchmark, seed = map(str, key)
            fields = zip(rows["sample"], rows["value"], rows["seconds"], rows["batch"], strict=True)
            put = [Row(i, "ok", value, float(seconds), int(batch)) for i, value, seconds, batch in fields]
            store.put(stage, json.loads(settings), benchmark, int(seed), put)
    finally:
        store.close()
    say(f"{len(table)} stage results loaded from {folder}")
    return len(table)


def _about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / "header.json").read_text())
        return about
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no results of a run: {error}") from error


class Results:
    """An exported run, read like a study: the same frames, nothing computed, no model, no data files."""

    def __init__(self, folder: Path, profile: Profile | None = None, variant: str = "") -> None:
        self.folder = folder
        self._about = _about(folder)
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
        changed = [k for k in own if own[k] != others[k] and k not in _SELECTING]
        if changed:
            raise ValueError(
                f"the results in {folder} were made with "
                + ", ".join(f"{k} = {own[k]!r}" for k in changed)
                + "; another value wants a run: leave out the source"
            )
        return cls(folder, asked)

    def header(self) -> str:
        """How the run was made, as one Markdown paragraph."""
        return f"{self._about['header']}  \n**Loaded** from `{self.folder.name}`, nothing computed here"

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
        return table[keep].reset_index(drop=True)

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
        rows = pd.read_parquet(self.folder / _STAGES, filters=only)
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
