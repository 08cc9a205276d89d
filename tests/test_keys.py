"""Keys have a form of their own: what `repr` and `asdict` gave at first, whatever becomes of the classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

import pytest

from study.run import keys
from ttsi.types import PAPER_SAMPLING, LoraSettings, Message, Query, Sampling, Tool, Worked

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "enum": [1, 2.5, None, True]}}}
NO_TOOLS = Worked(Query("a-1", "a", (Message("user", 'It\'s “so”:\n"é" \\ \u200b?'),), ()), "[]")
TWO = Worked(
    Query(
        "b-2",
        "b",
        (Message("user", "One?"), Message("assistant", "Two.")),
        (Tool("f", "", SCHEMA), Tool("g", "It's g.", {})),
    ),
    '<tool_call>[{"name": "f", "arguments": {"n": 1}}]</tool_call>',
)


@pytest.mark.parametrize(
    "taught", [[], (), [TWO], (TWO,), (NO_TOOLS, TWO), [{"sample": "b-2", "of": "0123"}, {"sample": "c"}]]
)
def test_the_form_is_the_first_one(taught: Any) -> None:
    assert keys.digest(taught) == sha256(repr(taught).encode()).hexdigest()[:16]


def test_a_digest_is_pinned() -> None:
    """Should a class be renamed, `repr` is no measure any more; these stay."""
    assert keys.digest([TWO]) == "01ffa36436227fb1"
    assert keys.digest((NO_TOOLS, TWO)) == "00915bb8c62fcc64"
    assert keys.digest([TWO, NO_TOOLS]) != keys.digest([NO_TOOLS, TWO])


@pytest.mark.parametrize(
    "value", [Sampling(), PAPER_SAMPLING, LoraSettings(), LoraSettings(mode="activated")]
)
def test_settings_are_the_first_ones(value: Sampling | LoraSettings) -> None:
    assert keys.settings(value) == asdict(value)


def test_a_renamed_class_and_a_later_field_change_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Turn:
        content: str
        role: str
        images: tuple[str, ...] = ()
        extra: dict[str, Any] = field(default_factory=dict)

    monkeypatch.setitem(keys._PINNED, Turn, keys._PINNED[Message])

    def taught(**more: Any) -> list[Worked]:
        turns: Any = tuple(Turn(role=m.role, content=m.content, **more) for m in TWO.query.messages)
        return [Worked(Query("b-2", "b", turns, TWO.query.tools), TWO.reply)]

    assert keys.digest(taught()) == keys.digest([TWO])
    with_image, with_extra = taught(images=("a.png",)), taught(extra={"a": 1})
    assert len({keys.digest(t) for t in (with_image, with_extra, [TWO])}) == 3, "what differs has another key"


def test_settings_that_came_later_count_once_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Drawing(Sampling):
        min_p: float = 0.0

    monkeypatch.setitem(keys._PINNED, Drawing, keys._PINNED[Sampling])
    assert keys.settings(Drawing(n=5)) == asdict(Sampling(n=5))
    assert keys.settings(Drawing(min_p=0.1)) == {**asdict(Sampling()), "min_p": 0.1}
