"""One's own records: four forms read as one, errors with their place, identity by hash, every notebook."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from study import notebooks
from study.data import benchmarks, fixture, own, pools
from study.data.benchmarks import BrokenData
from study.run import asked, keys
from study.run.config import load_profile
from study.run.export import export
from study.run.results import Results
from study.run.study import Study, open_study
from study.run.written import WrongParameter
from ttsi.types import Gold, Sample

ROOT = Path(notebooks.__file__).parent.parent
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Weather of a city.", "parameters": SCHEMA}
ASKED = "What is the weather in Oslo?"
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
OPENAI_CALL = {
    "id": "c",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
OPENAI_TOOLS = [{"type": "function", "function": TOOL}]
USER = {"role": "user", "content": ASKED}
PLAIN = {"query": ASKED, "tools": [TOOL], "answers": [CALL]}
CHAT = {"messages": [USER, {"role": "assistant", "tool_calls": [OPENAI_CALL]}], "tools": OPENAI_TOOLS}
BFCL = {"id": "a_0", "question": [[USER]], "function": [TOOL]}
FORMS: dict[str, dict[str, Any]] = {
    "this project's": PLAIN,
    "turns": {**PLAIN, "query": [USER]},
    "xlam": {"id": 1, "query": ASKED, "tools": json.dumps([TOOL]), "answers": json.dumps([CALL])},
    "openai, last turn": CHAT,
    "openai, what follows": {
        **CHAT,
        "messages": [*CHAT["messages"], {"role": "tool", "content": "4"}, {"role": "bot", "content": "4"}],
    },
    "openai, beside": {"messages": [USER], "tools": OPENAI_TOOLS, "tool_calls": [OPENAI_CALL]},
    "openai, functions": {
        "messages": [USER, {"role": "assistant", "content": None, "function_call": OPENAI_CALL["function"]}],
        "functions": [TOOL],
    },
    "bfcl": {**BFCL, "ground_truth": [{"weather": {"city": ["Oslo"]}}]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a process knows of files ends with each test."""
    monkeypatch.setattr(benchmarks, "_OWN", {})
    monkeypatch.setattr(pools, "IN_DOMAIN", dict(pools.IN_DOMAIN))
    monkeypatch.delenv("TTSI_NAME", raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    benchmarks._OWN.clear()
    for cached in (keys._data_hash, keys.prompts_hash, pools._load):
        cached.cache_clear()


def put(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def loaded(path: Path) -> list[Sample]:
    forget()
    benchmarks.add("mine", path)
    return benchmarks.load("mine")


# --- forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_sample(form: str, tmp_path: Path) -> None:
    (sample,) = loaded(put(tmp_path / "r.jsonl", FORMS[form]))
    (expected,) = loaded(put(tmp_path / "plain.jsonl", PLAIN))
    assert sample == expected
    assert sample.gold == (Gold("weather", {"city": ("Oslo",)}),)
    assert not sample.flags and sample.id == sample.cluster == "mine-0"


def test_forms_may_stand_in_one_file_and_an_array_is_the_same_as_lines(tmp_path: Path) -> None:
    records = list(FORMS.values())
    lines = loaded(put(tmp_path / "r.jsonl", *records))
    assert {s.id for s in lines} == {f"mine-{i}" for i in range(len(records))}
    (tmp_path / "r.json").write_text(json.dumps(records, indent=2))
    assert loaded(tmp_path / "r.json") == lines


def test_bom_empty_lines_and_line_separators_inside_a_string(tmp_path: Path) -> None:
    record = {**PLAIN, "query": "first\u2028second\u0085third"}
    (tmp_path / "r.jsonl").write_text(f"\ufeff\r\n{json.dumps(record, ensure_ascii=False)}\r\n\n", "utf-8")
    (sample,) = loaded(tmp_path / "r.jsonl")
    assert sample.query.question == record["query"]


def test_a_chat_that_ends_in_words_wants_no_call(tmp_path: Path) -> None:
    chat = {"messages": [USER, {"role": "assistant", "content": "I can't."}], "tools": OPENAI_TOOLS}
    (sample,) = loaded(put(tmp_path / "r.jsonl", chat))
    assert sample.gold == () and [m.content for m in sample.messages] == [ASKED]


def test_bfcl_s_answers_are_found_beside(tmp_path: Path) -> None:
    path = put(tmp_path / "BFCL_v4_mine.json", BFCL)
    truth = {"id": "a_0", "ground_truth": [{"weather": {"city": ["Oslo", "Oslo, Norway", ""]}}]}
    beside = put(tmp_path / own.BESIDE / path.name, truth)
    (sample,) = loaded(path)
    assert sample.gold == (Gold("weather", {"city": ("Oslo", "Oslo, Norway", "")}, frozenset({"city"})),)
    before = benchmarks.fingerprint("mine")
    put(beside, {**truth, "ground_truth": [{"weather": {"city": ["Oslo"]}}]})
    loaded(path)
    assert benchmarks.fingerprint("mine") != before, "what is accepted is part of what was read"


# --- what is wrong --------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Any, str]] = {
    "nothing": ("\n", "r.jsonl: holds no record"),
    "no JSON": ('{"query": "a",}', "r.jsonl: line 1, column 15: is no JSON: "),
    "two in a line": ("{} {}", "r.jsonl: line 1, column 4: is no JSON: Extra data"),
    "a key twice": ('{"query": "a", "query": "b"}', "r.jsonl: line 1: is no plain JSON: a key is repeated"),
    "not a number": ('{"query": NaN}', "r.jsonl: line 1: is no plain JSON: NaN is no JSON"),
    "no object": ("7", "r.jsonl: line 1: field 'record' is not an object"),
    "no UTF-8": (b'{"query": "a"}\n\xff', "r.jsonl: line 2: is no UTF-8: "),
    "an array cut": ('[\n{"query": "a"},\n', "r.jsonl: line 3, column 1: is no JSON: "),
    "no form": ({"prompt": "a"}, "r.jsonl: line 1: field 'query' is missing: a record has "),
    "no tools": ({"query": "a", "answers": []}, "r.jsonl: line 1: field 'tools' is not a list"),
    "empty tools": ({"query": "a", "tools": [], "answers": []}, "r.jsonl: line 1: field 'tools' is empty"),
    "no answers": ({"query": "a", "tools": [TOOL]}, "r.jsonl: line 1: field 'answers' is not a list"),
    "a tool without a name": (
        {**PLAIN, "tools": [TOOL, {}]}, "r.jsonl: line 1: field 'tools[1].name' is no text",
    ),
    "no call": (
        {**PLAIN, "answers": ["weather(city='Oslo')"]}, "r.jsonl: line 1: field 'answers[0]' is no call: ",
    ),
    "another tool": (
        {**PLAIN, "answers": [CALL, {"name": "wether", "arguments": {}}]},
        "r.jsonl: line 1: field 'answers[1]' calls 'wether', which is none of the record's tools",
    ),
    "nobody asks": ({**PLAIN, "query": []}, "r.jsonl: line 1: field 'query' has nothing said by the user"),
    "a role": (
        {**CHAT, "messages": [{"role": "king", "content": "a"}, *CHAT["messages"]]},
        "r.jsonl: line 1: field 'messages[0]' needs a role",
    ),
    "a chat without calls": (
        {"messages": [USER], "tools": OPENAI_TOOLS}, "r.jsonl: line 1: field 'tool_calls' is missing",
    ),
    "a chat's call": (
        {**CHAT, "messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": ""}}]}]},
        "r.jsonl: line 1: field 'messages[1].tool_calls[0]' is no call: ",
    ),
    "no answers beside": (BFCL, f"{own.BESIDE}/r.jsonl: can't be read: No such file"),
    "several steps": (
        {**BFCL, "question": [[USER], [USER]], "ground_truth": []},
        "r.jsonl: line 1: field 'question' is not the one list of turns",
    ),
    "ground truth": (
        {**BFCL, "ground_truth": "x"}, "r.jsonl: line 1: field 'ground_truth' is no list of calls",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_one_line_with_file_line_and_field(kind: str, tmp_path: Path) -> None:
    content, said = BROKEN[kind]
    path = tmp_path / "r.jsonl"
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode()
        if isinstance(content, str) else json.dumps(content).encode()
    )  # fmt: skip
    with pytest.raises(BrokenData) as error:
        loaded(path)
    assert said in str(error.value) and "\n" not in str(error.value)
    # Mended, it is read under the same name: nothing of the broken one is kept.
    benchmarks.add("mine", put(path, PLAIN))
    assert len(benchmarks.load("mine")) == 1


def test_the_line_and_the_record_are_counted(tmp_path: Path) -> None:
    bad = {**PLAIN, "tools": 7}
    (tmp_path / "r.jsonl").write_text(f"{json.dumps(PLAIN)}\n\n{json.dumps(bad)}\n")
    with pytest.raises(BrokenData, match=r"^r\.jsonl: line 3: field 'tools'"):
        loaded(tmp_path / "r.jsonl")
    (tmp_path / "r.json").write_text(json.dumps([PLAIN, bad]))
    with pytest.raises(BrokenData, match=r"^r\.json: record 1: field 'tools'"):
        loaded(tmp_path / "r.json")


def test_an_id_without_ground_truth_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "r.json", BFCL, {**BFCL, "id": "a_1"})
    put(tmp_path / own.BESIDE / "r.json", {"id": "a_0", "ground_truth": []})
    with pytest.raises(BrokenData, match=r"^r\.json: line 2: field 'ground_truth' is no list of calls"):
        loaded(path)
    put(tmp_path / own.BESIDE / "r.json", {"id": "a_0"})
    with pytest.raises(BrokenData, match=rf"^{own.BESIDE}/r\.json: line 1: field 'id' or 'ground_truth'"):
        loaded(path)


def test_odd_gold_is_flagged_not_refused(tmp_path: Path) -> None:
    (sample,) = loaded(put(tmp_path / "r.jsonl", {**PLAIN, "answers": [{**CALL, "arguments": {"town": 1}}]}))
    assert "gold_issue" in sample.flags


# --- profiles -------------------------------------------------------------------------------------------


def profile(folder: Path, text: str) -> str:
    path = folder / "study.yaml"
    path.write_text(f"model: tiny\ndtype: float32\nthreads: 1\n{text}\n")
    return str(path)


def test_a_path_is_found_beside_its_profile_or_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "a" / "r.jsonl", PLAIN)
    p = load_profile(profile(tmp_path / "a", "benchmarks: {mine: r.jsonl, fixture: 4}"))
    assert p.files == {"mine": str(path)} and p.benchmarks == {"mine": None, "fixture": 4}
    p = load_profile(profile(tmp_path / "a", "benchmarks: {mine: {path: r.jsonl, n: 3}}"))
    assert p.files == {"mine": str(path)} and p.benchmarks == {"mine": 3}
    monkeypatch.chdir(tmp_path / "a")
    for given in ("r.jsonl", {"path": "r.jsonl"}, {"path": "r.jsonl", "n": None}):
        changed = load_profile("smoke", benchmarks={"mine": given}, n=2)
        assert changed.files == {"mine": str(path)} and changed.benchmarks == {"mine": 2}
    assert p.under({"benchmarks": ["mine"], "n": 1}).files == p.files, "the name is enough from then on"
    assert p.under({"benchmarks": {"mine": 1}}).benchmarks == {"mine": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("benchmarks: {mine: nosuch.jsonl}", "benchmarks.mine: there is no file 'nosuch.jsonl'"),
        ("benchmarks: {mine: r.jsonl}\npools: {mine: x.jsonl}", "pools.mine: there is no file 'x.jsonl'"),
        ("benchmarks: {mine: 4}", "no benchmark 'mine'"),
        ("benchmarks: {sealtol: 4}", "did you mean 'sealtool'? there are sealtool, apibank"),
        ("benchmarks: {sealtool: r.jsonl}", "can't be called 'sealtool'"),
        ("benchmarks: {avg: r.jsonl}", "can't be called 'avg'"),
        ("benchmarks: {a/b: r.jsonl}", "can't be called 'a/b'"),
        ("benchmarks: {mine: {file: r.jsonl}}", "benchmarks.mine: write a number, null, a path, or {path: …"),
        ("benchmarks: {mine: {path: r.jsonl, n: -1}}", "benchmarks.mine: Input should be greater than"),
        ("benchmarks: {fixture: 4}\npools: {fixture: r.jsonl}", "'fixture' is no benchmark of your own"),
    ],
)
def test_a_wrong_profile_of_own_data_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    put(tmp_path / "r.jsonl", PLAIN)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_profile(profile(tmp_path, text))
    assert "\n" not in str(error.value)


# --- identity -------------------------------------------------------------------------------------------


def test_the_file_s_hash_is_in_the_key_and_a_change_is_never_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))
    path = put(tmp_path / "r.jsonl", *fixture.records("test")[:3])
    name = profile(tmp_path, "benchmarks: {mine: r.jsonl}\narms: [base]")
    study = Study(name)
    study.run()
    assert study.stages("mine", 0).keys.common()["data"] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert len(study.records()) == 3
    assert f"mine all (`r.jsonl`, {benchmarks.fingerprint('mine')[:12]})" in study.header()
    first = path.read_bytes()
    # Only what the answer should be is another: what is asked is the same to the letter.
    changed = [r | {"answers": []} for r in fixture.records("test")[:3]]
    put(path, *changed)
    with pytest.raises(BrokenData, match=r"r\.jsonl is not what this process has read"):
        Study(name)
    forget()  # another process
    assert Study(name).records().empty
    path.write_bytes(first)
    forget()
    assert len(Study(name).records()) == 3


# --- pools ----------------------------------------------------------------------------------------------


def test_a_pool_opens_the_arms_that_learn_from_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))
    test, train = fixture.records("test")[:4], fixture.records("train")[:12]
    put(tmp_path / "r.jsonl", *test)
    arms = "arms: [base, sft, icl_nearest, icl_random]\nlearning_rate: 0.01\nanswer_tokens: 64"
    without = Study(profile(tmp_path, f"benchmarks: {{mine: r.jsonl}}\n{arms}"))
    without.run()
    assert set(without.records()["arm"]) == {"base"}
    assert without.lacking["mine", "sft"] == "no training split"
    forget()
    put(tmp_path / "train.jsonl", *train, *test)
    study = Study(profile(tmp_path, f"benchmarks: {{mine: r.jsonl}}\npools: {{mine: train.jsonl}}\n{arms}"))
    study.run()
    records = study.records()
    assert records.groupby("arm")["sample"].nunique().to_dict() == dict.fromkeys(
        ["base", "sft", "icl_nearest", "icl_random"], 4
    )
    assert not study.lacking and (records["status"] == "ok").all()
    asked = {fixture.question(r) for r in test}
    pool = pools.load("mine", "in", "all", 0)
    assert len(pool) >= 8 and not asked & {s.query.question for s in pool}, "nothing learns from the test"
    assert study.samples_frame()["in_pool"].any()


def test_a_pool_of_test_questions_is_none(tmp_path: Path) -> None:
    path = put(tmp_path / "r.jsonl", *fixture.records("test"))
    benchmarks.add("mine", path)
    pools.add("mine", path)
    with pytest.raises(pools.NoPool, match=r"^mine: no sample of its training pool"):
        pools.load("mine", "in", "all", 0)


# --- a whole study --------------------------------------------------------------------------------------


SETTINGS = """teacher: tiny
benchmarks: {mine: r.jsonl}
pools: {mine: pool.json}
arms: [base, tt_si, tt_si_all, tt_d, icl_nearest, icl_random, sft, oracle]
modes: {default: [activated]}
learning_rate: 0.01
sft_samples: 8
retries: 1
answer_tokens: 64
synthesis_tokens: 96"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of every notebook's run on ten own records of three forms, without controls and variants."""
    folder = tmp_path_factory.mktemp("own")
    profile(folder, SETTINGS)
    forms = [plain, xlam, chat] * 4
    put(folder / "r.jsonl", *(f(r) for r, f in zip(fixture.records("test")[:10], forms, strict=False)))
    (folder / "pool.json").write_text(json.dumps(fixture.records("train")[:40]))
    command = [sys.executable, "-m", "study.notebooks", "reproduce", "--profile", "study.yaml"]
    places = {"TTSI_RUNS": "runs", "TTSI_FIGURES": "figures", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.rstrip().endswith("tables and figures: figures/study")
    return folder


def plain(record: dict[str, Any]) -> dict[str, Any]:
    return record


def xlam(record: dict[str, Any]) -> dict[str, Any]:
    return record | {key: json.dumps(record[key]) for key in ("tools", "answers")}


def chat(record: dict[str, Any]) -> dict[str, Any]:
    turns = (
        record["query"]
        if isinstance(record["query"], list)
        else [{"role": "user", "content": record["query"]}]
    )
    calls = [{"type": "function", "function": c | {"arguments": json.dumps(c["arguments"])}}
             for c in record["answers"]]  # fmt: skip
    tools = [{"type": "function", "function": t} for t in record["tools"]]
    return {"messages": [*turns, {"role": "assistant", "tool_calls": calls}], "tools": tools}


def test_every_notebook_runs_on_own_records(run: Path) -> None:
    copies = sorted((run / "runs" / "study").glob("*.ipynb"))
    assert [c.name for c in copies] == [p.name for p in notebooks.notebooks()]
    figures = run / "figures" / "study"
    for table in figures.glob("*.csv"):
        read = pd.read_csv(table)
        if "benchmark" in read:
            assert "fixture" not in set(read["benchmark"]), table.name
    main = pd.read_csv(figures / "table1_main.csv").query("benchmark == 'mine' and inference == 'direct'")
    assert {"base", "tt_si", "tt_d"} <= set(main["arm"]) and (main["n"] == 10).all()
    methods = pd.read_csv(figures / "figure2_methods.csv")
    assert methods.loc[methods["arm"].isin(["sft", "icl_nearest", "icl_random", "oracle"]), "n"].eq(10).all()
    assert "| mine | direct | base |" in (figures / "table1_main.md").read_text(), "its name is its key"
    assert pd.read_csv(figures / "table_data.csv")["samples"].tolist() == [10]


def test_an_export_carries_no_record_and_no_path(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(run / "runs"))
    study = Study(str(run / "study.yaml"))
    folder = export(study, tmp_path / "results")
    header = json.loads((folder / "header.json").read_text())
    assert header["profile"]["files"] == {"mine": "r.jsonl"} and header["profile"]["pools"] == {
        "mine": "pool.json"
    }
    assert str(run) not in (folder / "header.json").read_text()
    texts = [str(v) for f in folder.glob("*.parquet") for c in pd.read_parquet(f).items() for v in c[1]]
    questions = [s.query.question for s in study.samples("mine", 0)]
    long = [q for q in questions if len(q.split()) >= 4]
    assert long and not [(q, t) for q in long for t in texts if q in t]
    count = len(study.records())
    shutil.move(run / "r.jsonl", run / "gone.jsonl")
    forget()
    try:
        again = Results(folder)
        assert len(again.records()) == count > 0, "read without the file"
    finally:
        shutil.move(run / "gone.jsonl", run / "r.jsonl")


def test_a_file_on_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A notebook that takes one benchmark, and one that takes several; what is stored is used again."""
    monkeypatch.setenv("TTSI_RUNS", str(run / "runs"))
    monkeypatch.setenv("TTSI_FIGURES", str(run / "figures"))
    own, before = str(run / "r.jsonl"), (run / "figures" / "study" / "table2_threshold.csv").read_bytes()
    given = ["--profile", str(run / "study.yaml")]
    assert notebooks.main(["run", "04", *given, f"benchmark={{'mine':'{own}'}}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Estimated 0 minutes at most")
    assert printed.rstrip().endswith(f"tables and figures: {run / 'figures' / 'study-changed'}")
    table = pd.read_csv(run / "figures" / "study-changed" / "table2_threshold.csv")
    assert set(table["benchmark"]) == {"mine"} and table["n"].max() == 10
    assert (run / "figures" / "study" / "table2_threshold.csv").read_bytes() == before
    monkeypatch.setenv("TTSI_NAME", "few")
    assert notebooks.main(["run", "00", *given, f"benchmarks={{'mine':'{own}'}}", "n=4"]) == 0
    assert pd.read_csv(run / "figures" / "few" / "table_data.csv")["samples"].tolist() == [4]
    assert (run / "runs" / "few" / "00_data_and_prompts.ipynb").exists()


def test_own_data_in_a_notebook_s_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))
    path = put(tmp_path / "r.jsonl", *fixture.records("test")[:3])
    study = open_study("smoke", benchmarks={"mine": str(path)})
    assert study.profile.name == "smoke-changed" and study.profile.store == "smoke"
    assert study.everything().samples_frame()["benchmark"].tolist() == ["mine"] * 3
    with pytest.raises(WrongParameter, match=r"benchmark = .*: one name"):
        asked.opened({"profile": "smoke", "benchmark": {"a": str(path), "b": str(path)}})


# --- the documentation ----------------------------------------------------------------------------------


def test_the_section_on_your_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = (ROOT / "docs" / "your-own.md").read_text()
    (section,) = (s for s in re.split(r"^## ", text, flags=re.MULTILINE) if s.startswith("Your data\n"))
    (records,), (settings,), (code,), (first, second) = (
        re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)
        for kind in ("jsonl", "yaml", "python", "bash")
    )
    assert "model: qwen2.5-coder-0.5b" in settings
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTSI_RUNS", "runs")
    Path("records.jsonl").write_text(records)
    put(Path("train.jsonl"), *fixture.records("train")[:5])
    Path("my-study.yaml").write_text(settings.replace("qwen2.5-coder-0.5b", "tiny"))
    exec(code, {})
    printed = capsys.readouterr().out
    assert "mine-0" in printed and "mine-1" in printed and "tt_si" in printed
    for line in re.findall(r"ARGS=\"(.*?)\"", first):
        given = notebooks.read_parameters(line)
        number = "03" if "benchmark" in given else "02"
        notebooks.check_parameters(notebooks.find(number), given)
        forget()
        assert asked.opened({"profile": "smoke", **given}).profile.files == {
            "mine": str(tmp_path / "records.jsonl")
        }
    assert "PROFILE=my-study.yaml" in second and load_profile("my-study.yaml").pools
    said = re.search(r"`(records\.jsonl: line 2: .*?)`\.? ", section)
    assert said
    Path("records.jsonl").write_text(
        records.replace('"name": "set_timer", "arguments"', '"name": "set_tmer", "arguments"')
    )
    with pytest.raises(BrokenData, match=re.escape(said[1])):
        loaded(Path("records.jsonl"))
