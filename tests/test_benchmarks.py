"""Benchmarks: every rule on fixtures written for it, and the counts of the real files where they are."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from study.data import benchmarks, sources
from study.data.benchmarks import BrokenData, load, to_sample
from study.data.judge import gold_calls, judge
from ttsi.calls import format_calls
from ttsi.declared import schema_errors
from ttsi.types import AcceptedObject, Message, Sample

FIXTURES = Path(__file__).parent / "fixtures"
NESTED = {
    "type": "dict",
    "properties": {"size": {"type": "integer"}, "tags": {"type": "tuple", "items": {"type": "float"}}},
    "required": ["size"],
}
BFCL_TOOLS = [
    {
        "name": "shop.order",
        "description": "Order goods.",
        "parameters": {
            "type": "dict",
            "required": ["item"],
            "properties": {
                "item": {"type": "string", "description": "What", "enum": ["tea", "rice"]},
                "box": {**NESTED, "description": "The box"},
                "rows": {"type": "array", "items": NESTED},
                "marks": {"type": "array", "items": {"type": "string"}, "enum": ["new", "old"]},
                "count": {"type": "integer", "default": 1, "optional": True},
                "extra": {"type": "any"},
            },
        },
    },
    {"name": "shop.stop", "description": "Stop.", "parameters": {"type": "dict", "properties": {}}},
]
BFCL_GOLD = {
    "item": ["tea", "green tea"],
    "box": [{"size": [3, 4], "tags": ["", [1.5]]}],
    "rows": ["", [{"size": [1]}, {"size": [2]}]],
    "count": ["", 1],
}


@pytest.fixture
def own_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every benchmark read from fixtures: two BFCL samples in `multiple`, none in the other categories."""
    question = [
        [{"role": "system", "content": "You sell tea."}, {"role": "user", "content": "A tea, please."}]
    ]
    asked = [{"id": f"multiple_{i}", "question": question, "function": BFCL_TOOLS} for i in range(2)]
    answered = [
        {"id": "multiple_1", "ground_truth": [{"shop.stop": {}}]},
        {"id": "multiple_0", "ground_truth": [{"shop.order": BFCL_GOLD}]},
    ]

    def bfcl_file(category: str, answers: bool) -> bytes:
        rows = (answered if answers else asked) if category == "multiple" else []
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    monkeypatch.setattr(sources, "benchmark_file", lambda name: FIXTURES / f"{name}.json")
    monkeypatch.setattr(sources, "bfcl_file", bfcl_file)
    monkeypatch.setattr(sources, "_bfcl_wheel", lambda: Path(__file__))  # where its questions stand


def by_id(name: str, **settings: Any) -> dict[str, Sample]:
    return {sample.id: sample for sample in load(name, **settings)}


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_files")
def test_ids_are_the_upstream_indices() -> None:
    assert set(by_id("sealtool")) == {f"sealtool-{i}" for i in range(4)}
    assert set(by_id("apibank")) == {"apibank_l1-0", "apibank_l1-1", "apibank_l1-2", "apibank_l2-0"}
    assert set(by_id("bfcl")) == {"bfcl_multiple-0", "bfcl_multiple-1"}
    for name in benchmarks.FILES:
        assert {sample.benchmark for sample in load(name)} == {name}


@pytest.mark.usefixtures("own_files")
def test_the_twin_of_nexusraven_has_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads((FIXTURES / "nexusraven.json").read_bytes())
    own = by_id("nexusraven")
    twin = [{key: row[key] for key in ("query", "tools", "answers")} for row in rows]
    (tmp_path / "nexusraven.json").write_text(json.dumps(twin))
    monkeypatch.setattr(sources, "benchmark_file", lambda name: tmp_path / f"{name}.json")
    other = by_id("nexusraven")
    assert set(own) == {"nexusraven-0", "nexusraven-1"}
    assert not set(own) & set(other)
    assert len({sample.cluster for sample in other.values()}) == 1  # the same tools


@pytest.mark.usefixtures("own_files")
def test_a_smaller_n_is_a_prefix_for_every_seed() -> None:
    for name in benchmarks.FILES:
        everything = [sample.id for sample in load(name)]
        for n in range(len(everything) + 2):
            assert [sample.id for sample in load(name, n, seed=n % 5)] == everything[:n]
    assert [s.id for s in load("sealtool")] != sorted(s.id for s in load("sealtool"))  # permuted at all


def test_wrong_requests_are_errors() -> None:
    with pytest.raises(ValueError, match="sealtool, apibank"):
        load("sealtools")
    with pytest.raises(ValueError, match="negative"):
        load("sealtool", -1)
    with pytest.raises(ValueError, match="neither 'shuffled' nor 'original'"):
        to_sample({"query": "?", "tools": [], "answers": []}, "own", 0, tool_order="random")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", "sealtool.json: is no JSON"),
        (b'{"a": 1}', "sealtool.json: is no list"),
        (b"[" * 100_000, "sealtool.json: is no JSON"),
        (b"[7]", "sealtool.json: record 0: field 'record' is not an object"),
        (b'[{"tools": [], "answers": []}]', "sealtool.json: record 0: field 'query' is neither"),
        (
            b'[{"query": " ", "tools": [], "answers": []}]',
            "record 0: field 'query' has nothing said by the user",
        ),
        (b'[{"query": "?", "answers": []}]', "record 0: field 'tools' is not a list"),
        (b'[{"query": "?", "tools": "[", "answers": []}]', "record 0: field 'tools' is no plain JSON"),
        (b'[{"query": "?", "tools": []}]', "record 0: field 'answers' is not a list"),
        (b'[{"query": "?", "tools": [{}], "answers": []}]', r"field 'tools\[0\].name' is no text"),
        (
            b'[{"query": [{"role": "king", "content": ""}], "tools": [], "answers": []}]',
            r"field 'query\[0\]' needs",
        ),
        (
            b'[{"query": "?", "tools": [{"name": "a", "parameters": {"x": {"type": 5}}}], "answers": []}]',
            r"field 'tools\[0\].parameters.x.type' is not the name",
        ),
        (
            b'[{"query": "?", "tools": [{"name": "a", "parameters": {"x": 5}}], "answers": []}]',
            r"field 'tools\[0\].parameters.x' is not an object",
        ),
        (
            b'[{"query": "?", "tools": [{"name": "a", "parameters": {}, "required": "x"}], "answers": []}]',
            r"field 'tools\[0\].parameters.required' is not a list",
        ),
    ],
)
def test_a_broken_file_names_file_index_and_field(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sealtool.json").write_bytes(content)
    monkeypatch.setattr(sources, "benchmark_file", lambda name: tmp_path / f"{name}.json")
    with pytest.raises(BrokenData, match=message):
        load("sealtool", 1)


def test_a_broken_bfcl_record_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"id": "multiple_0", "question": [[{"role": "user", "content": "?"}]]}
    monkeypatch.setattr(
        sources, "bfcl_file", lambda category, answers: json.dumps(row).encode() * (not answers)
    )
    monkeypatch.setattr(sources, "data_hash", lambda _: "of this row")
    with pytest.raises(BrokenData, match="BFCL multiple: record 0: field 'ground_truth' is no list of calls"):
        load("bfcl")


@pytest.mark.parametrize("depth", [50, 70, 600, 940, 980, 990, 5000])
def test_a_deeply_nested_record_is_broken_not_fatal(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = '{"items": ' * depth + "{}" + "}" * depth
    record = f'[{{"query": "?", "tools": [{{"name": "a", "parameters": {{"x": {schema}}}}}], "answers": []}}]'
    (tmp_path / "sealtool.json").write_text(record)
    monkeypatch.setattr(sources, "benchmark_file", lambda name: tmp_path / f"{name}.json")
    problem = ""
    try:
        load("sealtool")
    except BrokenData as error:
        problem = str(error)
    assert (problem == "") == (depth <= 50)
    assert problem == "" or re.search("nested too deeply|is no JSON", problem)


# --- tools ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_files")
def test_samples_with_the_same_tools_share_one_order_whatever_upstream_s_was() -> None:
    for seed in range(5):
        orders = {tuple(t.name for t in s.tools) for s in load("sealtool", seed=seed)}
        assert len(orders) == 1  # sealtool-1 lists the tools backwards
    assert len({tuple(t.name for t in load("sealtool", 1, seed=seed)[0].tools) for seed in range(30)}) > 3
    original = by_id("sealtool", tool_order="original")
    assert [t.name for t in original["sealtool-0"].tools] == ["bakeBread", "brewTea", "boilEgg"]
    assert [t.name for t in original["sealtool-1"].tools] == ["boilEgg", "brewTea", "bakeBread"]


def test_every_place_is_as_likely() -> None:
    tools = [{"name": name, "parameters": {}} for name in "abcd"]
    firsts = Counter(
        to_sample({"query": "?", "tools": tools, "answers": []}, "own", 0, seed=seed).tools[0].name
        for seed in range(400)
    )
    assert all(60 < firsts[name] < 140 for name in "abcd")


def test_two_tools_stand_in_either_order_in_different_tool_sets() -> None:
    def a_before_b(third: str) -> bool:
        tools = [{"name": name, "parameters": {}} for name in ("a", "b", third)]
        names = [
            tool.name for tool in to_sample({"query": "?", "tools": tools, "answers": []}, "own", 0).tools
        ]
        return names.index("a") < names.index("b")

    assert 10 < sum(a_before_b(f"c{i}") for i in range(40)) < 30


def parameters(entry: dict[str, Any]) -> dict[str, Any]:
    sample = to_sample({"query": "?", "tools": [{"name": "f", **entry}], "answers": []}, "own", 0)
    return dict(sample.tools[0].parameters)


@pytest.mark.parametrize(
    ("upstream", "expected"),
    [
        ("str", {"type": "string"}),
        ("string", {"type": "string"}),
        ("int", {"type": "integer"}),
        ("integer", {"type": "integer"}),
        ("float", {"type": "number"}),
        ("number", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("boolean", {"type": "boolean"}),
        ("list", {"type": "array"}),
        ("array", {"type": "array"}),
        ("tuple", {"type": "array"}),
        ("list(str)", {"type": "array", "items": {"type": "string"}}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        ("dict", {"type": "object"}),
        ("object", {"type": "object"}),
        ("any", {}),
        (None, {}),
        ("Callable[[int], int]", {}),
        ("str, optional", {"type": "string"}),
        ("Optional[float]", {"type": "number"}),
        (["str", "null"], {"type": ["string", "null"]}),
    ],
)
def test_type_names_become_json_schema_s(upstream: Any, expected: dict[str, Any]) -> None:
    assert parameters({"parameters": {"x": {"type": upstream}}})["properties"] == {"x": expected}


def test_flat_parameters_become_a_schema() -> None:
    flat = {
        "type": {"type": "str", "description": "a parameter called type", "default": "a", "enum": ["a", "b"]},
        "size": {"type": "int", "required": True},
        "unit": {"type": "str", "required": False},
    }
    expected = {
        "type": "object",
        "properties": {
            "type": {
                "type": "string",
                "description": "a parameter called type",
                "default": "a",
                "enum": ["a", "b"],
            },
            "size": {"type": "integer"},
            "unit": {"type": "string"},
        },
        "required": ["unit", "size"],
    }
    assert parameters({"parameters": flat, "required": ["unit"]}) == expected
    assert parameters({"parameters": {"x": {"type": "str"}}})["required"] == []  # nothing said: optional
    assert parameters({}) == {"type": "object", "properties": {}, "required": []}


def test_json_schema_is_taken_as_it_is() -> None:
    schema = {
        "type": "object",
        "properties": {
            "x": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/a"}]},
            "y": {"type": "integer", "minimum": 1},
        },
        "required": ["x"],
        "$defs": {"a": {"$ref": "#/$defs/a"}},
    }
    assert parameters({"parameters": schema}) == schema
    assert parameters({"type": "function", "function": {"name": "f", "parameters": schema}}) == schema


@pytest.mark.usefixtures("own_files")
def test_bfcl_schemas_are_normalised_at_every_depth() -> None:
    box = {
        "type": "object",
        "properties": {"size": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "number"}}},
        "required": ["size"],
    }
    (tool,) = (tool for tool in by_id("bfcl")["bfcl_multiple-0"].tools if tool.name == "shop.order")
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "item": {"type": "string", "description": "What", "enum": ["tea", "rice"]},
            "box": {**box, "description": "The box"},
            "rows": {"type": "array", "items": box},
            "marks": {"type": "array", "items": {"type": "string", "enum": ["new", "old"]}},
            "count": {"type": "integer", "default": 1},
            "extra": {},
        },
        "required": ["item"],
    }


@pytest.mark.usefixtures("own_files")
def test_components_go_unless_they_are_kept() -> None:
    names = {tool.name for sample in load("toolalpaca") for tool in sample.tools}
    assert names == {"getZone", "listZones"}
    kept = by_id("toolalpaca", keep_components=True)
    assert all("components" in {tool.name for tool in sample.tools} for sample in kept.values())
    record = {"query": "?", "tools": [{"name": "components"}], "answers": []}
    assert len(to_sample(record, "own", 0).tools) == 1  # another benchmark's tool may be called so


# --- conversations ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_files")
def test_apibank_conversations() -> None:
    samples = by_id("apibank")
    assert samples["apibank_l1-0"].messages == (
        Message("user", "Light up the attic."),
        Message("assistant", "How bright?"),
        Message("user", "Level 7, red and blue."),
    )
    call = '<tool_call>[{"name": "FindRoom", "arguments": {"name": "attic"}}]</tool_call>'
    assert samples["apibank_l1-1"].messages[2:] == (
        Message("assistant", call),
        Message("tool", "{'id': 12}"),
        Message("assistant", "It is room 12."),
    )
    assert samples["apibank_l2-0"].messages[1:] == (Message("assistant", call), Message("tool", "none"))
    assert samples["apibank_l1-0"].query.question == "Level 7, red and blue."


def test_only_the_last_turn_s_request_line_goes() -> None:
    turns = [
        {"role": "user", "content": "Say:\nGenerate API Request:"},
        {"role": "agent", "content": "Generate API Request: no"},
        {"role": "user", "content": "Generate API Request:"},
    ]
    messages = to_sample({"query": turns, "tools": [], "answers": []}, "apibank", 0).messages
    assert [m.content for m in messages] == ["Say:\nGenerate API Request:", "Generate API Request: no"]
    others = to_sample({"query": turns, "tools": [], "answers": []}, "own", 0).messages
    assert [m.content for m in others] == [t["content"] for t in turns]
    question = "What does this mean?\nGenerate API Request:"
    assert to_sample({"query": question, "tools": [], "answers": []}, "own", 0).query.question == question


@pytest.mark.usefixtures("own_files")
def test_clusters() -> None:
    apibank = {sample.cluster for sample in load("apibank")}
    assert len(apibank) == 1  # they open with the same turn
    assert "attic" not in "".join(apibank)
    assert {sample.cluster for sample in load("nexusraven")} == {"nexusraven:network"}
    assert all(
        sample.cluster == sample.id for name in ("sealtool", "toolalpaca", "bfcl") for sample in load(name)
    )


@pytest.mark.usefixtures("own_files")
def test_a_system_turn_of_bfcl_is_kept_and_is_not_the_question() -> None:
    sample = by_id("bfcl")["bfcl_multiple-0"]
    assert sample.messages == (Message("user", "You sell tea."), Message("user", "A tea, please."))
    assert sample.query.question == "A tea, please."


# --- gold -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_files")
def test_gold_is_coerced_to_its_declared_type_or_flagged() -> None:
    samples = {k: v for name in benchmarks.FILES for k, v in by_id(name).items()}
    found = {k: (v.gold[0].arguments, set(v.flags)) for k, v in samples.items()}
    assert found["sealtool-0"] == ({"flour": ("rye",), "loaves": (2,), "hours": (1.5,)}, {"gold_coerced"})
    assert found["sealtool-1"] == ({"leaf": ("green",), "sweet": (False,)}, set())
    assert found["sealtool-2"] == ({"minutes": ("soft",)}, {"gold_issue"})
    assert found["sealtool-3"][1] == {"gold_issue"}  # a required argument is missing
    lamp = {"room": ("attic",), "level": (7,), "colours": (["red", "blue"],), "on": (True,)}
    assert found["apibank_l1-0"] == (lamp, {"gold_coerced"})
    assert found["apibank_l1-1"] == ({"room": ("12",), "floor": ("3",)}, {"gold_issue"})  # no such parameter
    assert found["apibank_l1-2"] == (lamp, {"gold_coerced", "duplicate"})
    assert found["apibank_l2-0"][1] == {"gold_tool_missing"}
    assert found["nexusraven-1"] == ({"body": ({"a": 1},), "limit": (None,)}, {"gold_issue"})
    assert samples["nexusraven-1"].gold[0].may_omit == {"limit"}
    assert found["toolalpaca-1"] == ({"city": (5,)}, {"gold_issue", "gold_tool_missing"})
    assert found["sealtool_train-1"][1] == {"gold_issue"}  # a list where a number is declared
    assert samples["sealtool_train-1"].gold[1].arguments["hours"] == ([0, 1],)


@pytest.mark.usefixtures("own_files")
def test_bfcl_gold_holds_sets_of_accepted_values() -> None:
    gold = by_id("bfcl")["bfcl_multiple-0"].gold[0]
    assert gold.arguments == {
        "item": ("tea", "green tea"),
        "box": (AcceptedObject({"size": (3, 4), "tags": ("", [1.5])}, frozenset({"tags"})),),
        "rows": ([AcceptedObject({"size": (1,)}), AcceptedObject({"size": (2,)})],),
        "count": (1,),
    }
    assert gold.may_omit == {"rows", "count"}


@pytest.mark.parametrize(
    "answer",
    [
        7,
        None,
        "f()",
        {},
        {"name": 5},
        {"name": "f"},
        {"name": "f", "arguments": [1]},
        {"name": "f", "arguments": "x"},
    ],
)
def test_gold_never_makes_a_record_broken(answer: Any) -> None:
    sample = to_sample({"query": "?", "tools": [{"name": "f"}], "answers": [answer]}, "own", 0)
    assert "gold_issue" in sample.flags
    assert not judge("nothing", sample).correct


def test_to_sample_takes_json_text_and_a_user_s_own_names() -> None:
    tools = [{"name": "f", "parameters": {"x": {"type": "int"}}}]
    record = {
        "query": "?",
        "tools": json.dumps(tools),
        "answers": json.dumps([{"name": "f", "arguments": {"x": 1}}]),
    }
    sample = to_sample(record, "mine", 7)
    assert (sample.id, sample.benchmark, sample.cluster, sample.flags) == (
        "mine-7",
        "mine",
        "mine-7",
        frozenset(),
    )
    assert judge(format_calls(gold_calls(sample)), sample).correct


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["[]", "[1, 2]", "1e999"]),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=8), value, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(JUNK)
def test_any_record_is_a_sample_or_broken_data_and_gold_is_never_what_breaks_it(junk: Any) -> None:
    good = {"query": "?", "tools": [{"name": "f", "parameters": {"x": {"type": "int"}}}], "answers": []}
    for record in (
        junk,
        *({**good, field: junk} for field in good),
        {**good, "tools": [{"name": "f", "parameters": junk}]},
    ):
        with suppress(BrokenData):
            to_sample(record, "own", 0)
    answers = [junk, {"name": "f", "arguments": {"x": junk, "y": junk}}]
    assert len(to_sample({**good, "answers": answers}, "own", 0).gold) == 2


# --- the real files ---------------------------------------------------------------------------------

COUNTS = {  # benchmark: (samples, flags)
    "sealtool": (294, {"gold_coerced": 55, "unknowable": 5}),
    "apibank": (
        526,
        {"gold_coerced": 54, "duplicate": 26, "gold_issue": 8, "gold_tool_missing": 6, "unknowable": 6},
    ),
    "nexusraven": (318, {"gold_issue": 10, "unknowable": 3}),
    "toolalpaca": (114, {"gold_issue": 5, "gold_tool_missing": 6, "unknowable": 34}),
    "bfcl": (1477, {"gold_issue": 19}),  # 7 of them outside a declared enum
    "sealtool_train": (669, {"gold_coerced": 46, "gold_issue": 4, "unknowable": 8}),
    "fixture": (40, {}),
    "fixture_train": (200, {}),
}


def real(name: str, **settings: Any) -> list[Sample]:
    try:
        return load(name, **settings)
    except sources.Unavailable as error:
        pytest.skip(f"{name} can't be had here: {error}")


def raw(name: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(sources.benchmark_file(name).read_bytes())
    return records


def declared(name: str) -> list[tuple[int, str, Any]]:
    """(record, declared type, value) of each gold argument as upstream wrote it; the type '' = none."""
    found = []
    for i, record in enumerate(raw(name)):
        tools = {tool["name"]: tool["parameters"] for tool in record["tools"]}
        for answer in record["answers"]:
            schema = tools.get(answer.get("name", answer.get("tool")), {})
            values = answer.get("arguments", answer.get("parameters"))
            found += [(i, schema.get(key, {}).get("type", ""), value) for key, value in values.items()]
    return found


@pytest.mark.parametrize("name", benchmarks.FILES)
def test_real_counts(name: str) -> None:
    samples = real(name)
    number, flags = COUNTS[name]
    assert len(samples) == number
    if not samples[0].id.startswith("nexusraven_twin"):
        assert Counter(flag for s in samples for flag in s.flags) == flags
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(len({tool.name for tool in sample.tools}) == len(sample.tools) for sample in samples)


@pytest.mark.parametrize("name", benchmarks.FILES)
def test_real_gold_said_as_a_model_should_say_it_is_right(name: str) -> None:
    for sample in real(name):
        reply = format_calls(gold_calls(sample))
        for options in ({}, {"strict_types": True}, {"accept": "tagged"}, {"rule": "string"}):
            assert judge(reply, sample, **options).correct, (sample.id, options)  # type: ignore[arg-type]
        if "gold_issue" not in sample.flags:
            assert judge(reply, sample, rule="bfcl").correct, sample.id


@pytest.mark.parametrize("name", ["sealtool", "apibank", "nexusraven", "toolalpaca", "sealtool_train"])
def test_real_gold_without_a_flag_satisfies_its_schema(name: str) -> None:
    for sample in real(name):
        if not sample.flags & {"gold_issue", "gold_tool_missing"}:
            assert not [e for call in gold_calls(sample) for e in schema_errors(call, sample.tools)], (
                sample.id
            )


def test_real_sealtool() -> None:
    samples = real("sealtool", tool_order="original")
    assert all(len(s.tools) == 5 and len(s.gold) == 1 for s in samples)
    assert sum(s.tools[0].name == s.gold[0].name for s in samples) == 258
    assert sum(s.tools[0].name == s.gold[0].name for s in real("sealtool")) < 100  # 294 / 5 = 59 by chance
    odd = [(i, v) for i, kind, v in declared("sealtool") if kind in ("int", "float") and isinstance(v, str)]
    assert (len(odd), len({i for i, _ in odd})) == (68, 55)  # 68 values in 55 samples


def test_real_apibank() -> None:
    samples = real("apibank")
    levels = Counter(s.id.split("-")[0] for s in samples)
    assert levels == {"apibank_l1": 399, "apibank_l2": 127}
    assert Counter(s.id.split("-")[0] for s in samples if "duplicate" in s.flags) == {
        "apibank_l1": 10,
        "apibank_l2": 16,
    }
    assert Counter(s.messages[-1].role for s in samples) == {"assistant": 341, "user": 135, "tool": 50}
    assert (sum(len(s.tools) == 1 for s in samples), sum(len(s.tools) > 1 for s in samples)) == (188, 338)
    assert all(s.id.startswith("apibank_l2") for s in samples if "gold_tool_missing" in s.flags)
    values = declared("apibank_l1") + declared("apibank_l2")
    assert sum(kind == "int" and isinstance(v, str) for _, kind, v in values) == 34
    lists = [v for _, kind, v in values if kind.startswith("list") and isinstance(v, str)]
    assert len(lists) == 37
    assert all(isinstance(ast.literal_eval(v), list) for v in lists)
    assert sum(kind == "bool" and v in ("True", "False") for _, kind, v in values) == 3
    assert not any(
        "required" in p for r in raw("apibank_l1") for t in r["tools"] for p in t["parameters"].values()
    )
    assert not any("Generate API Request:" in m.content for s in samples for m in s.messages)
    # Nothing else is lost: a turn's text stands in its message, past calls without their fence.
    texts = {s.id: [m.content for m in s.messages] for s in samples}
    for level in levels:
        for i, record in enumerate(raw(level)):
            turns = [
                turn["content"].removesuffix("Generate API Request:").strip().strip("`")
                for turn in record["query"]
            ]
            assert all(turn in text for turn, text in zip(turns, texts[f"{level}-{i}"], strict=True))


def test_real_nexusraven() -> None:
    samples = real("nexusraven")
    if samples[0].id.startswith("nexusraven_twin"):
        pytest.skip("upstream's twin has no domains")
    clusters = {"cve_cpe": 78, "emailrep": 38, "virustotal": 151, "toolalpaca": 51}
    assert Counter(s.cluster for s in samples) == {
        f"nexusraven:{domain}": n for domain, n in clusters.items()
    }
    assert len({tool.name for s in samples for tool in s.tools}) == 65
    assert len({tuple(tool.name for tool in s.tools) for s in samples}) == 12  # one order per tool set
    assert {len(s.tools) for s in samples if s.cluster.endswith("virustotal")} == {12}


def test_real_toolalpaca() -> None:
    samples = real("toolalpaca")
    assert sum(len(s.tools) == 1 for s in samples) == 38
    assert sum(len(s.gold) > 1 for s in samples) == 20
    assert all(any(t.name == "components" for t in s.tools) for s in real("toolalpaca", keep_components=True))


def test_real_training_pool_is_apart_from_the_test_samples() -> None:
    pool, test = real("sealtool_train"), real("sealtool")
    assert Counter(len(s.gold) == 1 for s in pool) == {True: 200, False: 469}
    assert not {s.query.question for s in pool} & {s.query.question for s in test}
    known = {gold.name for s in pool for gold in s.gold}
    assert sum(s.gold[0].name in known for s in test) == 65


def test_real_bfcl_has_several_tools_each() -> None:
    samples = real("bfcl")
    sizes = {
        "bfcl_multiple": 200,
        "bfcl_live_multiple": 1053,
        "bfcl_parallel_multiple": 200,
        "bfcl_live_parallel_multiple": 24,
    }
    assert Counter(s.id.rsplit("-", 1)[0] for s in samples) == sizes
    assert all(len(s.tools) > 1 for s in samples)
    for sample in samples:
        for tool in sample.tools:
            assert set(re.findall(r'"type": "(\w+)"', json.dumps(tool.parameters))) <= {
                "string", "integer", "number", "boolean", "array", "object",
            }  # fmt: skip
