"""Runs that travel: a folder of Parquet files that a run exports, and that figures and further runs read.

No text of a benchmark leaves with it (see `redaction`). The stage results behind the frames do, so that
another machine goes on where this run stopped.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from study.data import benchmarks
from study.data.downloads import say
from study.run import frames
from study.run.config import Profile
from study.run.keys import prompts_of
from study.run.memory import REDACTED
from study.run.redaction import Redactor, redacted
from study.run.results import SELECTING, STAGES, about
from study.run.store import Row, Store, settings_hash
from study.run.study import Study
from ttsi.filters import TRIES

_QUESTION = ["variant", "benchmark", "sample", "seed"]
KEYS: dict[str, list[str]] = {
    "records": [*_QUESTION, "arm", "mode", "inference", "pool_n"],
    "scores": _QUESTION,
    "examples": [*_QUESTION, "writer", "index"],
    "embeddings": [],
    "samples": ["benchmark", "sample", "seed"],
    "stages": ["stage", "settings", "benchmark", "sample", "seed"],
}
"""What names a row of each file. The embeddings share their components: they are replaced as a whole."""

_ADAPTER = {"lora", "material"}
"""What the settings of an adapted answer have beyond those of the answer without it."""


def export(study: Study, folder: Path, onto: bool = False) -> Path:
    """The folder, holding what is stored of a study and its variants; computes nothing.

    `records`, `scores`, `examples`, `embeddings` and `samples` are the frames, `stages` the results they come
    from, `header.json` how it was run; it is written last.
    onto: rows that the folder holds of an earlier export of the profile, and this run lacks, stay: a long run
    is exported machine by machine, each with what it computed. Raises ValueError where the earlier one was
    made under other settings.
    """
    before = _earlier(study, folder) if onto else None
    parts = [study, *map(study.variant, study.profile.variants)]
    redactors: dict[str, Redactor] = {}
    for part in parts:
        for benchmark in part.profile.benchmarks:
            if benchmark in redactors or not part.samples(benchmark, part.profile.seeds[0]):
                continue
            redactors[benchmark] = Redactor(benchmark, {s.id: s for s in benchmarks.load(benchmark)})
    records = _joined([p.records() for p in parts], frames.RECORDS)
    replies = [
        frames.hidden(text) if redactors[b].matches(text, sample) else text
        for b, sample, text in zip(records["benchmark"], records["sample"], records["reply"], strict=True)
    ]
    records = records.assign(reply=replies)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "header.json").unlink(missing_ok=True)
    tables = {
        "records": records,
        "scores": _joined([p.scores() for p in parts], frames.SCORES),
        "examples": _joined([p.examples_frame() for p in parts], frames.EXAMPLES),
        "embeddings": study.embeddings_frame(compute=False),
        "samples": study.everything().samples_frame(),
    }
    tables["stages"] = _stages(study, parts, redactors)
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        table = _with_earlier(table, path, KEYS[name]) if before else table
        _write(_askable(study, table) if name == "stages" else table, path)
    made = {
        "header": study.header(),
        "context": study.context,
        "profile": study.profile.model_dump() | _names(study.profile.files, study.profile.pools),
        "missing": study.missing,
        "lacking": [[*key, why] for key, why in study.lacking.items()],
    }
    if before:
        all_made = [*before.get("earlier", []), before["context"]]
        made["earlier"] = [c for n, c in enumerate(all_made) if c not in all_made[:n]]
    (folder / "header.json").write_text(json.dumps(made, indent=1) + "\n")
    return folder


def _earlier(study: Study, folder: Path) -> dict[str, Any] | None:
    """How the export in a folder was made; None = there is none."""
    if not (folder / "header.json").exists():
        return None
    before = about(folder)
    was, now = Profile.model_validate(before["profile"]).model_dump(), study.profile.model_dump()
    asks = SELECTING | {"estimators", "ood_sizes"}  # what is run, not how
    if other := [k for k in now if was[k] != now[k] and k not in asks]:
        raise ValueError(
            f"the results in {folder} were made with another {', '.join(other)}: export elsewhere"
        )
    if (made := before["context"]["dtype"]) != study.dtype:
        raise ValueError(f"the results in {folder} were made in {made}, not {study.dtype}: export elsewhere")
    for name in was["variants"].keys() & now["variants"].keys():
        old, new = (p["variants"][name] for p in (was, now))
        if other := [k for k in {*old, *new} - asks if old.get(k) != new.get(k)]:
            what = f"another {', '.join(sorted(other))}"
            raise ValueError(f"variant {name} in {folder} was made with {what}: export elsewhere")
    return before


def _with_earlier(table: pd.DataFrame, path: Path, key: Sequence[str]) -> pd.DataFrame:
    """The rows of the table in a file, in their order, as this run has them; behind them its new ones.

    A row that this run did not compute says what it said, as far as it said anything: another machine may
    have been able to read more.
    """
    if not path.exists() or (len(table) and not key):
        return table
    old = pd.read_parquet(path)
    if not len(table) or not len(old):
        return table if len(table) else old
    named, mine = (pd.MultiIndex.from_frame(t[key].astype(str)) for t in (old, table))
    place = mine.get_indexer(named)
    both = place >= 0
    was, now = old[both].reindex(columns=table.columns), table.iloc[place[both]].set_axis(old.index[both])
    if "source" in now:
        computed = now["source"] != "loaded"
        now = now.assign(source=now["source"].where(computed, None))
        now = pd.concat([now[computed], now[~computed].where(now.notna(), was)])
    else:
        now = now.where(now.notna(), was)
    kept = pd.concat([_one_margin(old[~both], table), now]).sort_index()
    return pd.concat([kept, table[~mine.isin(named)]], ignore_index=True)


def _one_margin(old: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of an earlier export with this run's margin of their sample, if it has asked again.

    Two machines differ in its last digits, and a sample has one margin.
    """
    if "arm" not in table or not len(old):
        return old
    of = ["variant", "benchmark", "sample", "seed"]
    asked = table.dropna(subset="margin").drop_duplicates(of).set_index(of)["margin"]
    again = asked.reindex(pd.MultiIndex.from_frame(old[of])).set_axis(old.index)
    return old.assign(margin=again.where(old["margin"].notna()).fillna(old["margin"]))


def _names(files: Mapping[str, str], pools: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The names of one's own files, without the folders of this machine."""
    return {k: {b: Path(p).name for b, p in f.items()} for k, f in {"files": files, "pools": pools}.items()}


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path, index=False, compression="zstd", compression_level=19)


def _joined(tables: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    filled = [t for t in tables if len(t)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))


def _stages(study: Study, parts: Sequence[Study], redactors: Mapping[str, Redactor]) -> pd.DataFrame:
    """The stored results that the study's prompts, as they are now, would find again."""
    current = {
        prompts_of(p.profile, b, seed)
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
            kept = redacted(stage.removeprefix(REDACTED), json.loads(row.value), hides)
            if kept is None:
                continue
            as_stage = stage if stage.startswith(REDACTED) else kept[0]
            text = json.dumps(kept[1], ensure_ascii=False, separators=(",", ":"))
            rows.append((as_stage, settings, benchmark, i, seed, text, row.seconds, row.batch))
    columns = ["stage", "settings", "benchmark", "sample", "seed", "value", "seconds", "batch"]
    return pd.DataFrame(rows, columns=columns)


def _askable(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows less those that a reader of hashes can't ask for, as what decides on them left as a hash.

    Probes and adapters to a later example, where an example's text is hidden: a filter reads texts.
    Adapted answers under a grammar where the answer itself is hidden: its likelihood is looked at first.
    """
    hidden = {*rows.loc[rows["stage"] == f"{REDACTED}example", KEYS["samples"]].itertuples(index=False)}
    later = {
        study.stages(b, seed).keys.examples("self", [index])
        for b, seed in {(b, seed) for b, _, seed in hidden}
        for index in range(1, TRIES)
    }
    read = {text: json.loads(text) for text in rows["settings"].unique()}
    asked = {t: settings_hash({k: v for k, v in s.items() if k not in _ADAPTER}) for t, s in read.items()}
    keys = list(zip(rows["settings"].map(asked), *(rows[c] for c in KEYS["samples"]), strict=True))
    answered = {key for key, stage in zip(keys, rows["stage"], strict=True) if stage == "answer"}

    def lost(stage: str, text: str, key: tuple[Any, ...]) -> bool:
        material = read[text].get("material")
        if stage == "adapted" and "grammar" in read[text] and key not in answered:
            return True
        to_later = stage == "adapted" and isinstance(material, str) and material in later
        return key[1:] in hidden and (stage == "probe" or to_later)

    gone = map(lost, rows["stage"], rows["settings"], keys)
    return rows[[not is_gone for is_gone in gone]].reset_index(drop=True)


def _groups(path: Path) -> list[tuple[str, str, str, int, list[str]]]:
    """(stage, settings, benchmark, seed, samples) of every set of results in a store."""
    asked = (
        "SELECT r.stage, s.json, r.benchmark, r.seed, json_group_array(r.sample) "
        "FROM result r JOIN settings s ON s.hash = r.settings "
        "GROUP BY r.stage, r.settings, r.benchmark, r.seed ORDER BY r.stage, r.benchmark, r.seed, r.settings"
    )
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return [(*row[:4], json.loads(row[4])) for row in db.execute(asked)]


def load_into(path: Path, folder: Path) -> int:
    """Number of stage results put into the store at `path`, marked as loaded; those it has already stay.

    Raises ValueError if the folder holds no export.
    """
    made = about(folder)
    table = pd.read_parquet(folder / STAGES)
    store = Store(path, made["context"], source="loaded")
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
