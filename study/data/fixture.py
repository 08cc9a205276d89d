"""A small benchmark written for this project: what the tests and the profile `smoke` are asked.

A dozen short tools, requests made from templates, arguments out of small vocabularies, so that a model
of some 200,000 parameters learns it in seconds (`engines/tiny.py`). Some requests fit two tools, and
the gold call is now one, now the other: nothing can be sure of them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["test", "train"]
Record = dict[str, Any]

_CITIES = [
    "Oslo",
    "Rome",
    "Paris",
    "Tokyo",
    "Lima",
    "Cairo",
    "Delhi",
    "Quito",
    "Berlin",
    "Madrid",
    "Vienna",
    "Dublin",
]
_RARE = ["Tunis", "Perth"]  # in test requests only: nobody taught the model these
_VALUES: dict[str, list[Any]] = {
    "city": _CITIES,
    "origin": _CITIES,
    "destination": _CITIES,
    "days": [2, 3, 4, 5, 6, 7],
    "nights": [2, 3, 4, 5, 6, 7],
    "minutes": list(range(5, 65, 5)),
    "amount": [10, 20, 50, 80, 100, 200],
    "source": ["euros", "dollars", "pounds", "yen"],
    "target": ["francs", "rupees", "pesos", "crowns"],
    "word": ["bread", "water", "house", "river", "night", "friend"],
    "language": ["Spanish", "German", "French", "Italian", "Greek", "Polish"],
    "genre": ["jazz", "rock", "blues", "folk", "opera", "soul"],
    "cuisine": ["Thai", "Indian", "Mexican", "Korean", "Turkish", "Persian"],
}
_TOOLS = {
    "get_weather": "Weather in a city now.",
    "get_forecast": "Weather in a city for some days.",
    "get_air_quality": "Air quality in a city.",
    "set_timer": "Start a timer.",
    "set_alarm": "Ring an alarm after some minutes.",
    "find_train": "Trains between cities.",
    "find_flight": "Flights between cities.",
    "find_hotel": "Hotels in a city.",
    "find_restaurant": "Restaurants in a city.",
    "convert_currency": "Convert money.",
    "translate_word": "Translate a word.",
    "play_music": "Play music.",
}
_PARAMETERS = {
    "get_weather": "city",
    "get_forecast": "city days",
    "get_air_quality": "city",
    "set_timer": "minutes",
    "set_alarm": "minutes",
    "find_train": "origin destination",
    "find_flight": "origin destination",
    "find_hotel": "city nights",
    "find_restaurant": "city cuisine",
    "convert_currency": "amount source target",
    "translate_word": "word language",
    "play_music": "genre",
}
_SETS = (
    ("get_weather", "get_forecast", "get_air_quality"),
    ("set_timer", "set_alarm", "play_music"),
    ("find_train", "find_flight", "find_hotel", "find_restaurant"),
    ("convert_currency", "translate_word"),
    ("find_train", "find_flight", "get_weather"),
    ("find_hotel", "find_restaurant", "get_forecast", "get_weather"),
    ("set_timer", "set_alarm", "translate_word"),
)


@dataclass(frozen=True)
class Kind:
    """Requests that mean the same: wordings, and the tools that answer them, each as likely as listed.

    `ambiguous`: more than one tool fits.
    """

    wordings: tuple[str, ...]
    tools: tuple[str, ...]

    @property
    def ambiguous(self) -> bool:
        return len(set(self.tools)) > 1


KINDS = (
    Kind(("What is the weather in {city}?", "Is it raining in {city} now?"), ("get_weather",)),
    Kind(
        ("Forecast for {city} for {days} days.", "Weather in {city} for the next {days} days?"),
        ("get_forecast",),
    ),
    Kind(("How clean is the air in {city}?", "Air quality in {city}, please."), ("get_air_quality",)),
    Kind(("How is it outside in {city}?",), ("get_weather", "get_air_quality", "get_weather")),
    Kind(("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes."), ("set_timer",)),
    Kind(("Ring the alarm in {minutes} minutes.", "Set an alarm for {minutes} minutes."), ("set_alarm",)),
    Kind(("Call me in {minutes} minutes.",), ("set_timer", "set_alarm")),
    Kind(
        ("Trains from {origin} to {destination}.", "By rail from {origin} to {destination}."), ("find_train",)
    ),
    Kind(
        ("Flights from {origin} to {destination}.", "Fly me from {origin} to {destination}."),
        ("find_flight",),
    ),
    Kind(("How do I get from {origin} to {destination}?",), ("find_train", "find_flight")),
    Kind(("A hotel in {city} for {nights} nights.", "I stay {nights} nights in {city}."), ("find_hotel",)),
    Kind(("Where is {cuisine} food in {city}?", "A {cuisine} place in {city}."), ("find_restaurant",)),
    Kind(
        ("How many {target} are {amount} {source}?", "Turn {amount} {source} into {target}."),
        ("convert_currency",),
    ),
    Kind(("What is {word} in {language}?", "Say {word} in {language}."), ("translate_word",)),
    Kind(("Play some {genre}.", "I want to hear {genre}."), ("play_music",)),
)


def tool(name: str) -> Record:
    """One tool as upstream benchmarks write it: flat parameters and a list of the required ones."""
    names = _PARAMETERS[name].split()
    types = {n: {"type": "int" if isinstance(_VALUES[n][0], int) else "str"} for n in names}
    return {"name": name, "description": _TOOLS[name], "parameters": types, "required": names}


def draw(rng: random.Random, rare: bool = False) -> Record:
    """One record `{"query", "tools", "answers"}`: a request among tools that can answer it.

    rare: a city in it, if there is one, is one that the training pool never names.
    """
    kind = rng.choice([k for k in KINDS for _ in range(2 if k.ambiguous else 1)])
    wording = rng.choice(kind.wordings)
    values: Record = {}
    for slot in re.findall(r"{(\w+)}", wording):
        values[slot] = rng.choice([v for v in _VALUES[slot] if v not in values.values()])
    if rare and (cities := [s for s in values if _VALUES[s] is _CITIES]):
        values[cities[-1]] = rng.choice(_RARE)
    name = rng.choice(kind.tools)
    arguments = {parameter: values[parameter] for parameter in _PARAMETERS[name].split()}
    names = rng.choice([s for s in _SETS if set(kind.tools) <= set(s)])
    return {
        "query": wording.format(**values),
        "tools": [tool(n) for n in names],
        "answers": [{"name": name, "arguments": arguments}],
    }


def records(split: Split) -> list[Record]:
    """The records of a split: 40 to test on, 200 to train on, no question in both or twice in one.

    The test split ends with a record that has one tool, a conversation, and one with two gold calls.
    """
    special = _special()
    test = _distinct("test", 37, set(map(question, special))) + special
    return test if split == "test" else _distinct("train", 200, set(map(question, test)))


def question(record: Record) -> str:
    """What a record's last user turn asks."""
    query = record["query"]
    return query if isinstance(query, str) else str(query[-1]["content"])


def _distinct(split: Split, count: int, taken: set[str]) -> list[Record]:
    rng = random.Random(f"ttsi fixture {split}")
    found: dict[str, Record] = {}
    while len(found) < count:
        record = draw(rng, rare=split == "test" and rng.random() < 0.15)
        if record["query"] not in taken:
            found.setdefault(record["query"], record)
    return list(found.values())


def _special() -> list[Record]:
    def weather(city: str) -> Record:
        return {"name": "get_weather", "arguments": {"city": city}}

    conversation = [
        {"role": "user", "content": "What is the weather in Lima?"},
        {
            "role": "assistant",
            "content": '<tool_call>[{"name": "get_weather", "arguments": {"city": "Lima"}}]</tool_call>',
        },
        {"role": "tool", "content": '{"sky": "clear"}'},
        {"role": "agent", "content": "It is clear."},
        {"role": "user", "content": "Is it raining in Paris now?"},
    ]
    tools = [tool(n) for n in _SETS[0]]
    return [
        {
            "query": "What is the weather in Vienna?",
            "tools": [tool("get_weather")],
            "answers": [weather("Vienna")],
        },
        {"query": conversation, "tools": tools, "answers": [weather("Paris")]},
        {
            "query": "What is the weather in Cairo and in Dublin?",
            "tools": tools,
            "answers": [weather("Cairo"), weather("Dublin")],
        },
    ]
