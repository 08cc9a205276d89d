"""Reading and judging calls: a hand-worked case per error code, and one per rule of the comparison."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from study.data.judge import gold_calls, judge
from ttsi.calls import canonical, format_calls, parse_calls
from ttsi.declared import fits, schema_errors
from ttsi.types import AcceptedObject, Call, Gold, Message, Query, Sample, Tool

BOOK = Tool(
    "book_table",
    "Reserve a table.",
    {
        "type": "object",
        "properties": {
            "place": {"type": "string"},
            "guests": {"type": "integer"},
            "deposit": {"type": "number"},
            "outside": {"type": "boolean"},
            "dishes": {"type": "array", "items": {"type": "string"}},
            "times": {"type": "array", "items": {"type": "integer"}},
            "contact": {"type": "object", "properties": {"floor": {"type": "integer"}}},
            "note": {},
        },
        "required": ["place", "guests"],
    },
)
CANCEL = Tool("cancel", "Cancel it.", {"type": "object", "properties": {"place": {"type": "string"}}})


def sample(*gold: Gold, benchmark: str = "own") -> Sample:
    return Sample(Query("own-0", benchmark, (Message("user", "A table, please."),), (BOOK, CANCEL)), gold)


def gold(may_omit: tuple[str, ...] = (), name: str = "book_table", **arguments: Any) -> Gold:
    return Gold(name, {k: (v,) for k, v in arguments.items()}, frozenset(may_omit))


def say(*calls: tuple[str, dict[str, Any]]) -> str:
    return format_calls(Call(name, arguments) for name, arguments in calls)


def code(given: dict[str, Any], wanted: dict[str, Any], **settings: Any) -> str:
    """The code of a call to book_table with `given` where gold has `wanted`; both have place and guests."""
    base = {"place": "Luna", "guests": 2}
    target = gold(**{**base, **wanted})
    return judge(say(("book_table", {**base, **given})), sample(target), **settings).code


# --- one golden case per code -----------------------------------------------------------------------

RIGHT = {"place": "Luna", "guests": 2}
GOLDEN = [
    ("ok", say(("book_table", RIGHT))),
    ("no_call", "I can't book tables."),
    ("no_call", "<tool_call>[]</tool_call>"),
    ("bad_json", '<tool_call>[{"name": "book_table", "arguments": {"place": </tool_call>'),
    ("wrong_count", say(("book_table", RIGHT), ("cancel", {}))),
    ("unknown_tool", say(("reserve", RIGHT))),
    ("wrong_name", say(("cancel", RIGHT))),
    ("missing_argument", say(("book_table", {"place": "Luna"}))),
    ("extra_argument", say(("book_table", {**RIGHT, "deposit": 5}))),
    ("wrong_type", say(("book_table", {**RIGHT, "guests": "two"}))),
    ("wrong_value", say(("book_table", {**RIGHT, "guests": 3}))),
]


@pytest.mark.parametrize(("expected", "reply"), GOLDEN)
def test_golden_case_of_each_code(expected: str, reply: str) -> None:
    verdict = judge(reply, sample(gold(place="Luna", guests=2)))
    assert (verdict.code, verdict.correct) == (expected, expected == "ok")


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        # Each holds what the code names and everything that comes after it in the order of precedence.
        ("missing_argument", {"guests": "two", "deposit": 5}),
        ("extra_argument", {"place": "Sol", "guests": "two", "deposit": 5}),
        ("wrong_type", {"place": "Sol", "guests": "two"}),
        ("wrong_value", {"place": "Sol", "guests": 2}),
    ],
)
def test_the_first_code_in_the_order_of_precedence_is_reported(
    expected: str, arguments: dict[str, Any]
) -> None:
    assert judge(say(("book_table", arguments)), sample(gold(place="Luna", guests=2))).code == expected


def test_count_comes_before_names_and_names_before_arguments() -> None:
    wanted = sample(gold(place="Luna", guests=2))
    assert judge(say(("nobody", {}), ("nowhere", {})), wanted).code == "wrong_count"
    assert judge(say(("nobody", {"deposit": "x"})), wanted).code == "unknown_tool"
    assert judge(say(("cancel", {"deposit": "x"})), wanted).code == "wrong_name"


# --- forms ------------------------------------------------------------------------------------------

CALL = '{"name": "cancel", "arguments": {"place": "Luna"}}'


@pytest.mark.parametrize(
    ("text", "form", "number"),
    [
        (f"<tool_call>[{CALL}]</tool_call>", "tagged", 1),
        (f"<tool_call>\n{CALL}\n</tool_call>", "tagged", 1),
        (
            f"Sure. <tool_call>{CALL}</tool_call> and <tool_call>[{CALL}, {CALL}]</tool_call> done",
            "tagged",
            3,
        ),
        (f"<tool_call>[{CALL}]", "tagged", 1),
        (f"<tool_call>{CALL}</tool_call><tool_call>{CALL}  \n", "tagged", 2),
        (f"```json\n[{CALL}]\n```", "fenced", 1),
        (f"Here:\n```\n{CALL}\n```\nthat's all", "fenced", 1),
        (f"[{CALL}]", "bare", 1),
        (CALL, "bare", 1),
        (f"I call {CALL}\n{CALL}", "bare", 2),
        (f'{CALL}\nresult: {{"status": "done"}}', "bare", 1),
    ],
)
def test_forms(text: str, form: str, number: int) -> None:
    parsed = parse_calls(text)
    assert (parsed.form, len(parsed.calls), parsed.error) == (form, number, None)
    assert set(map(repr, parsed.calls)) == {repr(Call("cancel", {"place": "Luna"}))}


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>[{CALL}",  # the JSON isn't complete
        f"<tool_call>[{CALL}]]</tool_call>",
        f"<tool_call>[{CALL}] and so on",  # nor is it the end of the reply
        f"<tool_call>{CALL}<tool_call>{CALL}</tool_call>",
        f"<tool_call>{CALL}</tool_call><tool_call>{CALL[:-2]}</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>cancel(place='Luna')</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>[["cancel"]]</tool_call>',
        '<tool_call>{"name": "cancel", "arguments": [1]}</tool_call>',
        "{'name': 'cancel', 'arguments': {}}",
        '{"status": "done"}',
        f"{CALL} {CALL[:-3]}",
    ],
)
def test_what_opens_like_a_call_and_is_none_is_bad_json(text: str) -> None:
    parsed = parse_calls(text)
    assert (parsed.calls, parsed.error) == ((), "bad_json")


@pytest.mark.parametrize(
    "text", ["", "No.", "see [1] and {x | x > 0}", "[]", "{}", "</tool_call>", "```\ncode\n```"]
)
def test_prose_is_no_call(text: str) -> None:
    assert parse_calls(text).error == "no_call"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('[{"name": "cancel", "arguments": {"place": "<tool_call>[]</tool_call>"}}]', "bare"),
        ('```json\n{"name": "cancel", "arguments": {"place": "a <tool_call>"}}\n```', "fenced"),
        (
            '<tool_call>[{"name": "cancel", "arguments": {"place": "</tool_call><tool_call>"}}]</tool_call>',
            "tagged",
        ),
        (
            '{"thought": "<tool_call>"} <tool_call>[{"name": "cancel", "arguments": {}}]</tool_call>',
            "tagged",
        ),
    ],
)
def test_tags_inside_json_strings_are_text(text: str, form: str) -> None:
    parsed = parse_calls(text)
    assert (parsed.form, len(parsed.calls)) == (form, 1)


def test_missing_arguments_are_none_and_arguments_may_be_json_text() -> None:
    for arguments in ("", ', "arguments": null', ', "arguments": {}', ', "arguments": "{}"'):
        assert parse_calls(f'{{"name": "cancel"{arguments}}}').calls == (Call("cancel", {}),)


def test_tagged_accepts_no_other_form() -> None:
    wanted = sample(gold(name="cancel", place="Luna"))
    assert judge(f"<tool_call>[{CALL}]</tool_call>", wanted, accept="tagged").correct
    for text in (f"```json\n{CALL}\n```", CALL):
        assert judge(text, wanted).correct
        assert judge(text, wanted, accept="tagged").code == "no_call"


# --- comparison under declared types -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        # numbers and bools
        ({"guests": 2.0}, {}, "ok"),
        ({"guests": 2.5}, {}, "wrong_type"),
        ({"guests": True}, {"guests": 1}, "wrong_type"),
        ({"outside": 1}, {"outside": True}, "wrong_type"),
        ({"deposit": 29}, {"deposit": 29.0}, "ok"),
        ({"note": True}, {"note": 1}, "wrong_value"),
        ({"note": [0]}, {"note": [False]}, "wrong_value"),
        ({"deposit": 10**400}, {"deposit": 1.5}, "wrong_value"),
        # a string that spells the declared type
        ({"guests": "2"}, {}, "ok"),
        ({"guests": " 2.0 "}, {}, "ok"),
        ({"guests": "2 people"}, {}, "wrong_type"),
        ({"guests": '"2"'}, {}, "wrong_type"),
        ({"deposit": "1e1"}, {"deposit": 10}, "ok"),
        ({"outside": "true"}, {"outside": True}, "ok"),
        ({"outside": "True"}, {"outside": True}, "wrong_type"),
        ({"outside": "1"}, {"outside": True}, "wrong_type"),
        ({"times": "[7, 8]"}, {"times": [7, 8]}, "ok"),
        ({"times": ["7", "8"]}, {"times": [7, 8]}, "ok"),
        ({"times": "['7']"}, {"times": [7]}, "wrong_type"),
        ({"contact": '{"floor": 3}'}, {"contact": {"floor": 3}}, "ok"),
        ({"note": "2"}, {"note": 2}, "wrong_value"),  # any is no declared number
        # strings
        ({"place": " Luna\n"}, {}, "ok"),
        ({"place": "luna"}, {}, "wrong_value"),
        ({"place": 5}, {"place": "5"}, "wrong_type"),
        ({"place": 5}, {"place": 5}, "ok"),
        ({"place": "5"}, {"place": 5}, "ok"),
        ({"place": 6}, {"place": 5}, "wrong_value"),
        ({"place": ["a", "b"]}, {"place": ["a", "b"]}, "ok"),
        ({"place": "12 kg"}, {"guests": 2, "place": "12 kg"}, "ok"),
        ({"guests": "12 kg"}, {"guests": "12 kg"}, "ok"),  # gold that breaks its own schema
        # lists are ordered, objects aren't
        ({"dishes": ["soup", " tart"]}, {"dishes": ["soup", "tart"]}, "ok"),
        ({"dishes": ["tart", "soup"]}, {"dishes": ["soup", "tart"]}, "wrong_value"),
        ({"dishes": ["soup"]}, {"dishes": ["soup", "tart"]}, "wrong_value"),
        ({"dishes": ["soup", 1]}, {"dishes": ["soup", "tart"]}, "wrong_type"),
        ({"dishes": "soup"}, {"dishes": ["soup"]}, "wrong_type"),
        ({"note": {"a": 1, "b": 2}}, {"note": {"b": 2, "a": 1}}, "ok"),
        ({"note": {"a": 1}}, {"note": {"a": 1, "b": 2}}, "wrong_value"),
        # null and ""
        ({"deposit": None}, {}, "ok"),
        ({"note": ""}, {}, "ok"),
        ({"deposit": None}, {"deposit": 5}, "missing_argument"),
        ({"place": ""}, {}, "wrong_value"),
        ({"place": None}, {}, "wrong_type"),
        ({"unheard": None}, {}, "extra_argument"),
    ],
)
def test_values_are_compared_under_their_declared_type(
    given: dict[str, Any], wanted: dict[str, Any], expected: str
) -> None:
    assert code(given, wanted) == expected


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({"guests": "2"}, {}), ({"times": "[7]"}, {"times": [7]}), ({"outside": "true"}, {"outside": True})],
)
def test_strict_types_take_no_string_for_what_it_spells(
    given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert (code(given, wanted), code(given, wanted, strict_types=True)) == ("ok", "wrong_type")
    assert code({"guests": 2.0}, {}, strict_types=True) == "ok"


def test_an_empty_gold_value_may_be_absent_even_where_it_is_required() -> None:
    for empty in (None, ""):
        wanted = sample(gold(may_omit=("place",), place=empty, guests=2))
        for arguments in ({"guests": 2}, {"guests": 2, "place": None}, {"guests": 2, "place": ""}):
            assert judge(say(("book_table", arguments)), wanted).correct
        assert judge(say(("book_table", {"guests": 2, "place": "Luna"})), wanted).code == "wrong_value"


def test_a_call_equal_to_a_gold_call_outside_the_tool_list_is_right() -> None:
    wanted = sample(gold(name="elsewhere", x=1))
    assert judge(say(("elsewhere", {"x": 1})), wanted).correct
    assert judge(say(("elsewhere", {"x": 2})), wanted).code == "wrong_value"
    assert judge(say(("nowhere", {"x": 1})), wanted).code == "unknown_tool"


# --- several calls -----------------------------------------------------------------------------------


def test_calls_are_a_multiset() -> None:
    one, two = ("cancel", {"place": "Luna"}), ("cancel", {"place": "Sol"})
    wanted = sample(*(gold(name=n, **a) for n, a in (one, two, two)))
    assert judge(say(two, one, two), wanted).correct
    assert judge(say(one, one, two), wanted).code == "wrong_value"
    assert judge(say(one, two), wanted).code == "wrong_count"


def test_the_matching_is_the_best_one() -> None:
    # The first call satisfies both gold calls, the second only the first: a greedy reader gets stuck.
    loose = Gold("cancel", {"place": ("Luna", "Sol")})
    wanted = sample(loose, gold(name="cancel", place="Luna"))
    assert judge(say(("cancel", {"place": "Luna"}), ("cancel", {"place": "Sol"})), wanted).correct


def test_the_matching_makes_as_many_calls_right_as_can_be() -> None:
    # Crossed, both calls would miss by a value only; but the first one is right.
    omit = Gold("book_table", {"place": ("Luna",), "note": ("quiet",)}, frozenset({"note"}))
    wanted = sample(omit, gold(place="Sol"))
    said = say(("book_table", {"place": "Luna"}), ("book_table", {"place": "Mar", "note": "loud"}))
    assert judge(said, wanted).code == "extra_argument"


def test_the_code_of_several_calls_is_the_first_among_what_stays_unmatched() -> None:
    wanted = sample(gold(place="Luna", guests=2), gold(name="cancel", place="Sol"))
    assert (
        judge(say(("cancel", {"place": "sol"}), ("book_table", {"place": "Luna"})), wanted).code
        == "missing_argument"
    )
    assert judge(
        say(("cancel", {"place": "Sol"}), ("book_table", {"place": "Luna", "guests": 3})), wanted
    ).code == ("wrong_value")
    assert judge(say(("cancel", {"place": "Sol"}), ("fly", {})), wanted).code == "unknown_tool"


def test_no_gold_call_is_answered_by_no_call() -> None:
    assert judge("Nothing to do.", sample()).correct
    assert judge(say(("cancel", {})), sample()).code == "wrong_count"


# --- other rules -------------------------------------------------------------------------------------


def test_string_rule_compares_what_is_written_and_drops_empty_strings() -> None:
    assert code({"guests": "2"}, {}, rule="string") == "ok"
    assert code({"place": 5}, {"place": "5"}, rule="string") == "ok"
    assert code({"guests": 2.0}, {}, rule="string") == "wrong_value"  # '2.0' isn't '2'
    assert code({"place": "Luna "}, {}, rule="string") == "wrong_value"
    assert code({"note": ""}, {}, rule="string") == "ok"
    assert code({"note": None}, {}, rule="string") == "extra_argument"
    assert code({}, {"deposit": 5}, rule="string") == "missing_argument"
    required_null = sample(gold(may_omit=("place",), place=None, guests=2))
    assert judge(say(("book_table", {"guests": 2})), required_null, rule="string").code == "missing_argument"
    assert judge(say(("book_table", {"guests": 2, "place": None})), required_null, rule="string").correct


def test_bfcl_rule_folds_strings_and_wants_exact_types() -> None:
    assert code({"place": "l-U.n a"}, {}, rule="bfcl") == "ok"
    assert code({"place": "Lunas"}, {}, rule="bfcl") == "wrong_value"
    assert code({"dishes": ["SOUP"]}, {"dishes": ["soup"]}, rule="bfcl") == "ok"
    assert code({"guests": "2"}, {}, rule="bfcl") == "wrong_type"
    assert code({"guests": 2.0}, {}, rule="bfcl") == "wrong_type"
    assert code({"deposit": 5}, {"deposit": 5.0}, rule="bfcl") == "ok"
    assert code({"deposit": None}, {}, rule="bfcl") == "extra_argument"
    no_guests = sample(gold(place="Luna"))  # gold itself breaks its schema
    assert judge(say(("book_table", {"place": "Luna"})), no_guests).correct
    assert judge(say(("book_table", {"place": "Luna"})), no_guests, rule="bfcl").code == "missing_argument"
    wanted = sample(gold(may_omit=("place", "note"), place="", guests=2, note=""))
    assert judge(say(("book_table", {"guests": 2})), wanted, rule="bfcl").code == "missing_argument"
    assert judge(say(("book_table", {"guests": 2, "place": ""})), wanted, rule="bfcl").correct


@pytest.mark.parametrize("rule", ["schema", "bfcl"])
def test_accepted_values_are_alternatives_at_every_depth(rule: Any) -> None:
    contact = AcceptedObject({"floor": (3, 4), "name": ("Ann", "Anna", "")}, frozenset({"name"}))
    wanted = sample(
        Gold(
            "book_table",
            {
                "place": ("Luna", "Bar Luna"),
                "guests": (2,),
                "contact": (contact,),
                "note": ([contact, contact],),
            },
            frozenset({"note"}),
        )
    )
    base = {"place": "Bar Luna", "guests": 2}
    assert judge(say(("book_table", {**base, "contact": {"floor": 4}})), wanted, rule).correct
    full = {
        **base,
        "contact": {"floor": 3, "name": "Anna"},
        "note": [{"floor": 3}, {"floor": 4, "name": "Ann"}],
    }
    assert judge(say(("book_table", full)), wanted, rule).correct
    for contact_given in ({"floor": 5}, {"name": "Ann"}, {"floor": 3, "age": 1}):
        assert (
            judge(say(("book_table", {**base, "contact": contact_given})), wanted, rule).code == "wrong_value"
        )
    assert judge(say(("book_table", {**base, "contact": [3]})), wanted, rule).code == "wrong_type"
    assert judge(
        say(("book_table", {**base, "contact": {"floor": 3}, "note": [{"floor": 3}]})), wanted, rule
    ).code == ("wrong_value")
    assert judge(format_calls(gold_calls(wanted)), wanted, rule).correct


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rule"):
        judge("", sample(), rule="fuzzy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accepted form"):
        judge("", sample(), accept="yaml")  # type: ignore[arg-type]


# --- writing -----------------------------------------------------------------------------------------

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be shared
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
JSON = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=6
)
NAMES = TEXT.filter(bool)
CALLS = st.lists(st.builds(Call, NAMES, st.dictionaries(NAMES, JSON, max_size=3)), min_size=1, max_size=3)


def test_format_is_the_one_that_models_are_shown() -> None:
    text = format_calls([Call("cancel", {"place": "Café"})])
    assert text == '<tool_call>[{"name": "cancel", "arguments": {"place": "Café"}}]</tool_call>'


@calm
@given(CALLS)
def test_written_calls_are_read_back(calls: list[Call]) -> None:
    parsed = parse_calls(format_calls(calls))
    assert (list(parsed.calls), parsed.error, parsed.form) == (calls, None, "tagged")
    bare = parse_calls(json.dumps([{"name": c.name, "arguments": c.arguments} for c in calls]))
    assert (list(bare.calls), bare.form) == (calls, "bare")


@calm
@given(CALLS, st.randoms())
def test_gold_said_in_any_order_is_right(calls: list[Call], random: Any) -> None:
    wanted = sample(*(Gold(c.name, {k: (v,) for k, v in c.arguments.items()}) for c in calls))
    said = list(calls)
    random.shuffle(said)
    for rule in ("schema", "bfcl"):
        assert judge(format_calls(said), wanted, rule).correct  # type: ignore[arg-type]
    extra = [*said, Call("one more", {})]
    assert judge(format_calls(extra), wanted).code == "wrong_count"


@calm
@given(CALLS, st.randoms())
def test_the_vote_of_a_call_depends_on_no_order(calls: list[Call], random: Any) -> None:
    said = [Call(c.name, dict(sorted(c.arguments.items(), key=lambda _: random.random()))) for c in calls]
    random.shuffle(said)
    assert canonical(said) == canonical(calls)
    assert canonical([*said, Call("one more", {})]) != canonical(calls)


def test_votes_that_mean_the_same_are_the_same() -> None:
    assert canonical([Call("a", {"x": 29.0, "y": " b "})]) == canonical([Call("a", {"y": "b", "x": 29})])
    for other in ({"x": True}, {"x": "1"}, {"x": 1.5}, {"x": [1]}, {}):
        assert canonical([Call("a", {"x": 1})]) != canonical([Call("a", other)])


def test_gold_calls_leave_out_what_may_be_and_is_not_required() -> None:
    wanted = sample(Gold("book_table", {"place": ("",), "note": ("x", "")}, frozenset({"place", "note"})))
    assert gold_calls(wanted) == (Call("book_table", {"place": ""}),)


# --- schemas -----------------------------------------------------------------------------------------


def test_fits_is_json_schema_without_bools_as_numbers() -> None:
    for value, kind in (
        (29.0, "integer"),
        (3, "number"),
        (None, ["string", "null"]),
        (None, None),
        ([], "array"),
    ):
        assert fits(value, {"type": kind})
    for value, kind in (
        (True, "integer"),
        (True, "number"),
        (0, "boolean"),
        (1, ["string", "null"]),
        (2.5, "integer"),
    ):
        assert not fits(value, {"type": kind})
    assert fits(object(), {})
    values = (None, True, False, 0, 1, -3, 2.0, 2.5, 1e300, "", "1", [], [1], {}, {"a": 1})
    for value, kind in product(values, ("string", "integer", "number", "boolean", "array", "object", "null")):
        assert fits(value, {"type": kind}) == Draft202012Validator({"type": kind}).is_valid(value)


def test_schema_errors_name_what_is_wrong() -> None:
    assert schema_errors(Call("book_table", {"place": "Luna", "guests": 2}), [BOOK]) == ()
    assert schema_errors(Call("fly", {}), [BOOK]) == ("unknown tool",)
    found = schema_errors(Call("book_table", {"guests": "2", "colour": 1}), [BOOK])
    assert len(found) == 3
    for part in ("unknown argument 'colour'", "$.guests: '2' is not", "'place' is a required property"):
        assert sum(part in line for line in found) == 1
    assert schema_errors(Call("book_table", {"place": "a", "guests": True}), [BOOK])


def test_schema_errors_follow_references_inside_the_schema() -> None:
    tool = Tool(
        "tree",
        "",
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {"root": {"$ref": "#/$defs/node"}},
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"inner": {"$ref": "#/$defs/node"}, "size": {"type": "integer"}},
                }
            },
        },
    )
    assert schema_errors(Call("tree", {"root": {"inner": {"inner": {"size": 1}}}}), [tool]) == ()
    assert "$.root.inner.size" in schema_errors(Call("tree", {"root": {"inner": {"size": "x"}}}), [tool])[0]
