"""What was measured stays found and stays the same: committed figures, stored results, their keys.

A key is the hash of a result's settings, and those hold digests of what was taught. Code may move as it
likes; where it changes one byte of what is hashed, hours of results are orphaned without a word. These tests
say the word.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

import ttsi
from study.data.models import model_hash
from study.run import export as exports
from study.run.config import Profile
from study.run.store import Store, settings_hash
from study.run.study import Study
from ttsi.engines.base import Prompt, Request
from ttsi.types import Fit, Generation, LoraSettings, Sampling, Scored

ROOT = Path(__file__).resolve().parent.parent
PINNED = Path(__file__).parent / "fixtures" / "smoke_keys.json"
EXPORTS = sorted(p.parent.name for p in (ROOT / "results").glob("*/header.json"))
LATER = {"likelihood", "refused", "likelihood_name", "likelihood_keys", "likelihood_values"}
"""Columns that came after the exports."""
KEY = ["stage", "settings", "benchmark", "sample", "seed"]


# --- figures from committed results ---------------------------------------------------------------------


@pytest.mark.parametrize("profile", EXPORTS)
def test_tables_are_made_again_byte_for_byte(profile: str, tmp_path: Path) -> None:
    places = {"TTSI_RUNS": str(tmp_path / "runs"), "TTSI_FIGURES": str(tmp_path / "figures")}
    command = [sys.executable, "-m", "study.notebooks", "figures", "--from", f"results/{profile}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    made, committed = tables(tmp_path / "figures" / profile), tables(ROOT / "figures" / profile)
    assert len(committed) > 30
    assert made.keys() == committed.keys()
    assert [name for name, content in made.items() if content != committed[name]] == []


def tables(folder: Path) -> dict[str, bytes]:
    """Those made from records alone; what a machine recomputed is its own."""
    found = (p for p in sorted(folder.iterdir()) if p.suffix in (".csv", ".md"))
    return {p.name: p.read_bytes() for p in found if "reproduction" not in p.name}


# --- stored results are found again ---------------------------------------------------------------------


@dataclass
class Again:
    """An export that was loaded into a fresh store, what a study of it found there, and its own export."""

    committed: Path
    exported: Path
    found: set[tuple[Any, ...]]


@pytest.fixture(scope="session", params=EXPORTS)
def again(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Again:
    """Each committed export, loaded and exported once more. Computes nothing and loads no model."""
    committed, runs = ROOT / "results" / request.param, tmp_path_factory.mktemp("runs")
    about = json.loads((committed / "header.json").read_text())
    found: set[tuple[Any, ...]] = set()
    get = Store.get

    def watched(
        self: Store, stage: str, settings: Mapping[str, Any], benchmark: str, seed: int, samples: Any
    ) -> Any:
        rows = get(self, stage, settings, benchmark, seed, samples)
        found.update((stage, settings_hash(settings), benchmark, i, seed) for i in rows)
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSI_RUNS", str(runs))
        patch.setattr(Study, "_load", lambda *_: pytest.fail("a model was loaded"))
        dtype = about["context"]["dtype"]  # "auto" may be another one on this machine
        study = Study(Profile.model_validate(about["profile"] | {"dtype": dtype}))
        exports.load_into(study.store.path, committed)
        stages = exports._stages
        with pytest.MonkeyPatch.context() as spy:

            def unwatched(*given: Any) -> pd.DataFrame:
                spy.setattr(Store, "get", get)  # it lists what is stored, asked for or not
                return stages(*given)

            spy.setattr(exports, "_stages", unwatched)
            spy.setattr(Store, "get", watched)
            exported = exports.export(study, runs / "again")  # makes every frame of every variant
            spy.setattr(Store, "get", watched)
            for benchmark in study.profile.benchmarks:  # was run in every mode before one was enough
                for mode in study.profile.modes_of(benchmark):
                    queries = [s.query for s in study.samples(benchmark, 0)]
                    study.play(("tt_si_and_icl", mode, "direct", 0), queries, benchmark, 0, False)
        if study.missing:
            pytest.skip(f"the keys hold hashes of the data: {'; '.join(study.missing.values())}")
        frames = [pd.read_parquet(exported / f"{name}.parquet") for name in ("records", "scores", "examples")]
        assert any(len(frame) for frame in frames)
        return Again(committed, exported, found)


def test_every_stored_result_is_found(again: Again) -> None:
    """What the code asks for today are the keys under which the export keeps its rows."""
    rows = pd.read_parquet(again.committed / "stages.parquet")
    hashes = {text: settings_hash(json.loads(text)) for text in set(rows["settings"])}
    kept = set(rows.assign(settings=rows["settings"].map(hashes))[KEY].itertuples(index=False, name=None))
    assert len(kept) == len(rows) > 100
    lost = kept - again.found
    assert not lost, f"{len(lost)} of {len(kept)} results are orphaned, e.g. {min(lost)}"


def test_an_export_of_an_export_is_the_same(again: Again) -> None:
    """Stages and samples whole; the other frames as far as what they are made of could leave."""

    def both(name: str, key: Sequence[str]) -> list[pd.DataFrame]:
        pair = [pd.read_parquet(of / f"{name}.parquet") for of in (again.committed, again.exported)]
        return [t.sort_values(list(key)).reset_index(drop=True) for t in pair]

    pd.testing.assert_frame_equal(*both("stages", KEY))
    pd.testing.assert_frame_equal(*both("samples", ["benchmark", "sample", "seed"]))
    question = ["variant", "benchmark", "sample", "seed"]
    for name, key, other in (
        ("examples", [*question, "writer", "index"], None),
        ("scores", question, None),
        ("records", [*question, "arm", "mode", "inference", "pool_n"], "source"),
    ):
        whole, part = (t.drop(columns=other or []) for t in both(name, key))
        assert set(part.columns) - set(whole.columns) <= LATER
        part = part[list(whole.columns)]
        rows = [pd.MultiIndex.from_frame(t[key].astype(str)) for t in (whole, part)]
        assert not len(rows[1].difference(rows[0]))
        whole = whole[rows[0].isin(rows[1])].reset_index(drop=True)
        pd.testing.assert_frame_equal(whole.where(part.notna()), part.where(part.notna()), check_dtype=False)


# --- the keys of a run ----------------------------------------------------------------------------------


def number(*parts: object) -> int:
    """What decides a reply: the same for the same text, whatever classes hold it."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:6])


class Scripted:
    """An engine, and its adapters' store, whose replies follow from the text of the prompt and the seed."""

    name, device, chat = "scripted", "cpu", types.SimpleNamespace(invocation=())
    outside_failures = nullcontext

    @property
    def lora(self) -> Scripted:
        return self

    def save(self, adapter: str, folder: Path, **_: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text(adapter)

    def load(self, folder: Path, *_: Any) -> str:
        return (folder / "adapter_model.safetensors").read_text()

    def tokens(self, text: str) -> tuple[int, ...]:
        return ()

    def embed(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([number(t) % 9, 1.0]) for t in texts]

    def score(
        self,
        prompts: Sequence[Prompt],
        opening: str,
        continuations: Sequence[Sequence[str]],
        upto: Any = None,
    ) -> list[list[Scored]]:
        return [
            [Scored(c, (-(number(asked(p), c) % 6000) / 1000,), (len(c),)) for c in texts]
            for p, texts in zip(prompts, continuations, strict=True)
        ]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        return [[self._reply(r, i) for i in range(sampling.n)] for r in requests]

    def _reply(self, request: Request, index: int) -> Generation:
        n = number(asked(request.prompt), request.seed, request.adapter, index)
        lines = request.prompt.system.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
        tool = json.loads(lines[n % len(lines)])
        arguments = dict.fromkeys(tool["parameters"].get("properties", {}), f"value {n % 7}")
        text = json.dumps([{"name": tool["name"], "arguments": arguments}])
        if "Question:" in request.prompt.system + request.opening:
            text = f"Question: question {n}\nAnswer: {text if n % 4 else '[{'}"
        else:
            text = f"<tool_call>{text}</tool_call>"
        return Generation(text, tuple(text.encode()), (-0.5,) * len(text), True, 9)


def asked(prompt: Prompt) -> list[str]:
    return [prompt.system, *(m.content for m in prompt.messages)]


class Job(NamedTuple):
    """The trainer's, without torch."""

    examples: Sequence[tuple[Prompt, str]]
    seed: int


def fit(engine: Any, jobs: Sequence[Job], settings: LoraSettings, bank: Any = None) -> list[tuple[str, Fit]]:
    """An adapter is a number that follows from what is taught."""
    made = [number(settings.mode, [[asked(p), r] for p, r in j.examples], j.seed) for j in jobs]
    return [(f"adapter {n}", Fit((2.0, 1.0), (1e-4, 1e-4), n % 90, 9)) for n in made]


def test_the_keys_of_a_run_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm, mode and stage of profile smoke: settings, samples and digests of what was taught.

    The model is one that pins name, so no hash of a library or of this machine is in a key.
    """
    stand_in = types.SimpleNamespace(Job=Job, fit=fit)
    monkeypatch.setitem(sys.modules, "ttsi.trainer", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(ttsi, "trainer", stand_in, raising=False)
    monkeypatch.setattr(Study, "_load", lambda *_: Scripted())
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    study = Study("smoke", model="smollm2-135m", teacher="qwen2.5-coder-0.5b", n=6)
    variants = [name for name, keys in study.profile.variants.items() if "layout" not in keys]
    for part in (study, *map(study.variant, variants)):
        part.run()
        part.score()
    study.embed()
    kept: dict[str, dict[str, list[str]]] = defaultdict(dict)
    with sqlite3.connect(study.store.path) as db:
        for stage, settings, sample in db.execute(
            "SELECT stage, json, sample FROM result JOIN settings ON settings = hash ORDER BY 1, 2, 3"
        ):
            kept[stage].setdefault(masked(settings), []).append(sample)
    assert set(kept) == {
        "answer", "score", "whole", "example", "probe", "shown", "adapted", "fit", "shared", "embedding"
    }  # fmt: skip
    if not PINNED.exists():  # a change of keys that is meant: remove the file, look at the difference
        PINNED.write_text(json.dumps(kept, indent=0, ensure_ascii=False) + "\n")
        pytest.fail(f"{PINNED.name} was missing and is written anew")
    assert kept == json.loads(PINNED.read_text())


def masked(settings: str) -> str:
    """Settings with names in place of the hashes of models."""
    for name in ("smollm2-135m", "qwen2.5-coder-0.5b"):
        settings = settings.replace(model_hash(name), name)
    return settings
