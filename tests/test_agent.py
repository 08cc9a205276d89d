"""The agent for one live query, its script and its panel, with the tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from study import playground
from study.data import benchmarks, fixture, sources
from study.data.models import model_dir
from study.playground import Playground
from ttsi import Agent, Answer, estimator, prompts, synthesizer, trainer
from ttsi.calls import canonical, parse_calls
from ttsi.engines.base import EngineError, Request, TooLong
from ttsi.engines.openai import OpenAIEngine
from ttsi.engines.torch import TorchEngine
from ttsi.live import turn
from ttsi.seeds import seed_for
from ttsi.stages import Stages
from ttsi.types import Generation, LoraSettings, Message, Sampling, Tool

ROOT = Path(__file__).resolve().parent.parent
TRAVEL = [fixture.tool(n) for n in ("find_train", "find_flight", "find_hotel", "find_restaurant")]
CLOCK = [fixture.tool(n) for n in ("set_timer", "set_alarm", "play_music")]
TORN = "How do I get from Rome to Oslo?"
SURE = "A hotel in Rome for 3 nights."
LIKELY = "A hotel in Rome for 2 nights."
ALWAYS = 1.01
PAPER: dict[str, Any] = {"uncertainty": "margin", "answer_with": "adapted", "filters": ()}
SHORT = {
    "answering": Sampling(max_tokens=64),
    "writing": Sampling(0.7, 0.8, 20, 1.1, max_tokens=96),
    "lora": LoraSettings(learning_rate=0.01),
}


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(model_dir("tiny"), name="tiny", dtype="float32", threads=1)


def agent(engine: Any, tools: Any = TRAVEL, **settings: Any) -> Agent:
    """The paper's agent; the default one is `selective`."""
    return Agent(engine, tools, **SHORT | PAPER | settings)


def selective(engine: Any, tools: Any = TRAVEL, **settings: Any) -> Agent:
    return Agent(engine, tools, **SHORT | settings)


def same(a: Answer, b: Answer) -> bool:
    return dataclasses.replace(a, seconds={}) == dataclasses.replace(b, seconds={})


# --- Algorithm 1 --------------------------------------------------------------------------------------


def test_what_it_is_torn_between_it_adapts_to(engine: TorchEngine) -> None:
    answer = agent(engine).call(TORN)
    assert answer.uncertain and answer.adapted and answer.margin < 0.95
    assert list(answer.log_probs) == [t["name"] for t in TRAVEL]
    assert {c.name for c in answer.calls} <= {"find_train", "find_flight"}
    assert answer.calls and answer.error == "" and answer.finished and answer.problems == ()
    assert len(answer.examples) == 1 and len(answer.losses) == 3 and answer.losses[-1] < answer.losses[0]
    assert all(answer.seconds[stage] > 0 for stage in ("h", "g", "t", "answer"))


def test_what_it_is_sure_of_it_answers(engine: TorchEngine) -> None:
    answer = agent(engine).call(SURE)
    assert answer.margin > 0.95 and not answer.uncertain and not answer.adapted
    assert [c.name for c in answer.calls] == ["find_hotel"]
    assert (answer.examples, answer.losses, answer.failures) == ((), (), ())
    assert answer.seconds["g"] == answer.seconds["t"] == 0 < answer.seconds["answer"]


def test_it_is_the_three_stages_and_nothing_else(engine: TorchEngine) -> None:
    """The same numbers as the study's functions called one after the other."""
    live = agent(engine, k=2).open(TORN)
    answer, query = live.answer(), live.query

    def seed(stage: str, attempt: int = 0) -> int:
        return seed_for(0, "live", query.id, stage, attempt)

    u = estimator.estimate(engine, query)
    assert (answer.margin, tuple(answer.log_probs.values())) == (u.margin, u.log_probs)
    writing = SHORT["writing"]
    written = synthesizer.synthesize(engine, [query], lambda _, i: seed("example", i), writing, k=2)[0]
    assert answer.examples == written.examples and answer.failures == written.failures
    settings = dataclasses.replace(SHORT["lora"], mode="activated")
    fitted = trainer.fit(engine, [trainer.job(query.tools, written.examples, seed("adapter"))], settings)[0]
    assert fitted is not None and answer.losses == fitted[1].losses
    request = Request(prompts.act(query), seed("answer"), adapter=fitted[0])
    assert answer.text == engine.generate([request], SHORT["answering"])[0][0].text


def test_tau_is_moved_without_computing_anything_twice(engine: TorchEngine) -> None:
    live = agent(engine).open(TORN)
    below, above = live.answer(0), live.answer(ALWAYS)
    assert not below.uncertain and below.text == live.before.text
    assert above.adapted and live.after is not None and above.text == live.after.text
    passes = engine.counters.passes
    assert same(live.answer(0), below) and same(live.answer(ALWAYS), above)
    assert live.answer(live.certainty.margin).uncertain is False, "uncertain is strictly below"
    assert engine.counters.passes == passes


def test_a_failed_synthesis_is_answered_as_it_is(engine: TorchEngine) -> None:
    answer = agent(engine, CLOCK, retries=1).call("Call me in 20 minutes.", tau=ALWAYS)
    assert answer.uncertain and not answer.adapted and not answer.diverged
    assert answer.examples == () and len(answer.failures) == 2
    assert answer.calls == agent(engine, CLOCK).call("Call me in 20 minutes.", tau=0).calls


def test_diverged_training_is_answered_as_it_is(engine: TorchEngine) -> None:
    live = agent(engine, lora=LoraSettings(learning_rate=1e30)).open(TORN)
    answer = live.answer()
    assert answer.uncertain and answer.diverged and not answer.adapted and answer.losses == ()
    assert answer.examples and answer.text == live.before.text


def test_a_likely_answer_costs_nothing_more(engine: TorchEngine) -> None:
    """No tool is scored, no example written: the passes are those of the answer."""
    before = engine.counters.passes
    assert selective(engine).open(LIKELY).before.text
    alone = engine.counters.passes - before
    answer = selective(engine).call(LIKELY)
    assert 0 < engine.counters.passes - before - alone <= alone
    assert answer.why == "certain" and not answer.uncertain and not answer.adapted
    assert answer.likelihood is not None and answer.likelihood >= 0.5 == answer.tau
    assert answer.margin is None and answer.log_probs == {} and answer.likelihood_adapted is None
    assert answer.seconds["h"] == answer.seconds["g"] == answer.seconds["t"] == 0 < answer.seconds["answer"]


def test_the_likelier_answer_stands(engine: TorchEngine) -> None:
    """The adapted answer if the adapted model is surer of it; the likelihoods are the two replies'."""
    seen = set()
    for question in (TORN, "How do I get from Lima to Cairo?", "From Paris to Rome by night, please.", SURE):
        for rate in (0.01, 0.2):
            live = selective(engine, lora=LoraSettings(learning_rate=rate), filters=()).open(question)
            answer = live.answer(ALWAYS)
            if live.after is None:
                continue
            was, now = (estimator.likelihood(_counted(engine, r)) for r in (live.before, live.after))
            assert (answer.likelihood, answer.likelihood_adapted) == (was, now)
            assert answer.adapted == (now > was) and answer.refused == (now <= was)
            assert answer.text == (live.after if now > was else live.before).text
            assert answer.why == "adapted" or "no likelier" in answer.why
            seen.add(answer.adapted)
    assert seen == {True, False}, "one of each, or the test says nothing"


def test_how_much_likelier_it_has_to_be_is_a_choice(engine: TorchEngine) -> None:
    def asked(factor: float) -> Any:
        lora = LoraSettings(learning_rate=0.01)
        return selective(engine, lora=lora, filters=(), surer_by=factor).call(TORN, tau=ALWAYS)

    first = asked(1)
    ratio = first.likelihood_adapted / first.likelihood
    below, above = asked(0.9 * ratio), asked(1.1 * ratio)
    assert below.adapted and not above.adapted and above.refused and above.text != below.text
    assert above.why.endswith("too little likelier" if ratio > 1 else "no likelier")


def _counted(engine: TorchEngine, reply: Generation) -> list[float]:
    """Log-probabilities of the tokens behind the first function name's quote."""
    parts = estimator.answer_parts(reply, engine.chat.ends(reply.text, reply.tokens))
    return [x for part in parts.values() for x in part]


def test_what_fails_leaves_the_base_answer(engine: TorchEngine) -> None:
    class Down:
        name = "down"

        def generate(self, *_: Any) -> Any:
            raise EngineError("the endpoint is down")

    answer = selective(engine, writer=Down()).call(TORN, tau=ALWAYS)
    assert answer.text == selective(engine).open(TORN).before.text and not answer.adapted
    assert answer.why.startswith("kept the base answer because the machine failed") and "down" in answer.why
    diverged = selective(engine, lora=LoraSettings(learning_rate=1e30), filters=()).call(TORN, tau=ALWAYS)
    assert diverged.diverged and diverged.why == "kept the base answer because training diverged"
    with pytest.raises(EngineError, match="down"):  # nothing to fall back on: H scores tools, then G fails
        agent(engine, writer=Down()).call(TORN, tau=ALWAYS)


def test_an_example_that_fails_its_filters_is_not_learnt(engine: TorchEngine) -> None:
    """What the default agent learns from keeps its schema, is new, and is what the model says anyway."""
    learnt = 0
    asked = [TORN, "How do I get from Lima to Cairo?", "A table in Rome for two."]
    trips = (f"How do I get from {a} to {b}?" for a, b in permutations(("Rome", "Oslo", "Lima", "Cairo"), 2))
    # The tiny model is another one on each kind of processor; every fourth question or so gets its example.
    for n, question in enumerate([*asked, SURE, *trips]):
        if n >= len(asked) and learnt:
            break
        live = selective(engine).open(question)
        written, answer = live.synthesis, live.answer(ALWAYS)
        assert len(written.examples) <= 1 and answer.examples == written.examples
        assert set(written.failures) <= {"schema", "copy", "disagrees", "no_question", "no_call", "bad_json",
                                         "unknown_tool"}  # fmt: skip
        for example in written.examples:
            learnt += 1
            assert not example.schema_errors and example.copy_ratio < 1
            said = selective(engine).open(example.question).before
            # The example's own question, asked alone: the same prompt, so the same greedy answer.
            assert canonical(parse_calls(said.text).calls) == canonical(example.calls)
        if not written.examples:
            assert not answer.adapted and "no example" in answer.why
    assert learnt


def test_both_modes_and_the_weights_stay(engine: TorchEngine) -> None:
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    modes = [agent(engine, mode=mode).call(TORN) for mode in ("exact", "activated")]
    assert all(a.adapted for a in modes) and modes[0].losses != modes[1].losses
    assert all(torch.equal(v, before[k]) for k, v in engine.model.state_dict().items())


def test_the_same_question_gives_the_same_answer(engine: TorchEngine) -> None:
    first = agent(engine).call(TORN)
    agent(engine).call("How do I get from Lima to Cairo?")
    assert same(agent(engine).call(TORN), first)
    assert agent(engine, seed=1).call(TORN).examples != first.examples


def test_one_tool_is_no_choice(engine: TorchEngine) -> None:
    answer = agent(engine, TRAVEL[:1]).call(TORN)
    assert answer.margin == 1 and not answer.uncertain


def test_a_call_that_breaks_its_schema_is_named(engine: TorchEngine) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "integer"}}, "required": ["city"]}
    tools = [{**TRAVEL[2], "parameters": parameters}, TRAVEL[0]]
    answer = agent(engine, tools).call(SURE, tau=0)
    assert answer.calls and any(p.startswith("find_hotel: ") for p in answer.problems)


# --- other minds and machines -------------------------------------------------------------------------


class Teacher:
    """A writer that counts what it is asked, and may fail."""

    name = "teacher"

    def __init__(self, engine: TorchEngine, error: EngineError | None = None) -> None:
        self.engine, self.error, self.asked = engine, error, 0

    def score(self, *_: Any) -> Any:
        raise NotImplementedError

    def generate(self, requests: Any, sampling: Sampling) -> list[list[Generation]]:
        self.asked += len(requests)
        if self.error:
            raise self.error
        return self.engine.generate(requests, sampling)


def test_a_teacher_writes_in_its_place(engine: TorchEngine) -> None:
    teacher = Teacher(engine)
    answer = agent(engine, writer=teacher).call(TORN)
    assert answer.adapted and answer.failures and teacher.asked == 1, "one request, drawn again in its place"
    assert agent(engine, writer=teacher).call(SURE).adapted is False
    assert teacher.asked == 1


def test_a_machines_failure_is_no_answer(engine: TorchEngine) -> None:
    with pytest.raises(EngineError, match="endpoint is down"):
        agent(engine, writer=Teacher(engine, EngineError("endpoint is down"))).call(TORN)
    with pytest.raises(TooLong):
        agent(engine).call("Trains from Rome to Oslo. " * 400)
    assert agent(engine).call(SURE).calls, "the next call is served as ever"


def test_threads_take_turns(engine: TorchEngine) -> None:
    """Two agents with different tools on one model, four threads: the answers of one after the other."""
    travel, clock = agent(engine), agent(engine, CLOCK, retries=0)
    asked = [
        (travel, TORN),
        (clock, "Call me in 20 minutes."),
        (travel, SURE),
        (clock, "Play some jazz."),
    ] * 2
    alone = [a.call(q) for a, q in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: pair[0].call(pair[1]), asked))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert turn(travel.engine) is turn(clock.engine)


def test_a_model_and_its_writer_are_each_asked_by_one_thread_at_a_time(engine: TorchEngine) -> None:
    """The filters ask the model itself, also where another one writes."""
    another = TorchEngine(model_dir("tiny"), name="another", dtype="float32", threads=1)
    inside, most = Counter[str](), Counter[str]()

    class Watched:
        def __init__(self, name: str, of: Any) -> None:
            self.name, self.of = name, of

        def __getattr__(self, name: str) -> Any:
            return getattr(self.of, name)

        def generate(self, requests: Any, sampling: Any) -> Any:
            inside[self.name] += 1
            most[self.name] = max(most[self.name], inside[self.name])
            time.sleep(0.01)
            try:
                return self.of.generate(requests, sampling)
            finally:
                inside[self.name] -= 1

    model, other = Watched("model", engine), Watched("writer", another)
    asked = selective(model, writer=other, filters=("agreeing",))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda question: asked.call(question, tau=ALWAYS), [TORN, LIKELY, SURE, TORN]))
    assert most == {"model": 1, "writer": 1}


def test_where_the_check_of_an_example_fails_the_base_answer_stands(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not tried again: what failed may be what takes long."""
    tried = []

    def fails(self: Any, queries: Any, lessons: Any) -> Any:
        tried.append(queries)
        raise EngineError("out of memory")

    monkeypatch.setattr(Stages, "probe", fails)
    answer = selective(engine, filters=("agreeing",)).call(TORN, tau=ALWAYS)
    assert answer.calls and not answer.adapted and "out of memory" in answer.why
    assert len(tried) == 1 and answer.seconds["g"] > 0


def test_an_endpoint_is_asked_by_several_at_once() -> None:
    assert OpenAIEngine.concurrent
    with turn(SimpleNamespace(concurrent=True)), turn(SimpleNamespace(concurrent=True)):
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answer_with": "surest"}, "answer_with = 'surest' is none of adapted, surer"),
        ({"uncertainty": "marginn"}, "uncertainty = 'marginn' is none of margin, likelihood"),
        ({"layout": "nativ"}, "layout = 'nativ'"),
        ({"surer_by": 0.0}, "surer_by = 0.0 is no factor"),
        ({"mode": "active"}, "mode = 'active' is none of exact, activated"),
        ({"filters": ("agreed",)}, r"filters\[0\] = 'agreed'"),
    ],
)
def test_a_wrong_choice_is_said(engine: TorchEngine, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Agent(engine, TRAVEL, **wrong)


def test_what_is_no_json_is_named_by_its_place(engine: TorchEngine) -> None:
    with pytest.raises(ValueError, match=r"tools\[1\] holds a function, which is no JSON"):
        Agent(engine, [*TRAVEL[:1], lambda x: x])
    asked = agent(engine)
    with pytest.raises(ValueError, match="give a list"):
        asked.open({"role": "user", "content": SURE})
    with pytest.raises(ValueError, match=r"messages\[0\] holds a set"):
        asked.open([{"role": "user", "content": {1, 2}}])


# --- what goes in -------------------------------------------------------------------------------------


def test_tools_in_every_form_are_the_same(engine: TorchEngine) -> None:
    query = benchmarks.to_sample(
        {"query": SURE, "tools": TRAVEL, "answers": []}, "live", 0, tool_order="original"
    ).query
    schemas = [
        {"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in query.tools
    ]
    functions = [{"type": "function", "function": s} for s in schemas]
    for tools in (TRAVEL, schemas, functions, query.tools):
        assert agent(engine, tools).open(SURE).query.tools == query.tools
    assert agent(engine, TRAVEL[::-1]).open(SURE).query.tools == query.tools[::-1], (
        "the order is the caller's"
    )


def test_conversations_in_openais_form(engine: TorchEngine) -> None:
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "find_hotel", "arguments": '{"city": "Rome"}'},
    }
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "A hotel in Rome."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "none free"},
        Message("user", "Then in Oslo."),
    ]
    live = agent(engine).open(turns)
    past = '<tool_call>[{"name": "find_hotel", "arguments": {"city": "Rome"}}]</tool_call>'
    assert live.query.messages == (
        Message("user", "A hotel in Rome."),
        Message("assistant", past),
        Message("tool", "none free"),
        Message("user", "Then in Oslo."),
    )
    assert live.answer().text


BAD: list[tuple[Any, Any]] = [
    ([], SURE),
    ([{"description": "nameless"}], SURE),
    ([TRAVEL[0], TRAVEL[0]], SURE),
    ([Tool("x", "", {"type": "object", "properties": {"a": {"type": "number", "maximum": math.nan}}})], SURE),
    (TRAVEL, []),
    (TRAVEL, [{"role": "user", "content": None}]),
    (TRAVEL, [{"role": "user", "content": [{"type": "image_url", "image_url": "…"}]}]),
    (TRAVEL, [{"role": "wizard", "content": "x"}]),
    (TRAVEL, [{"role": "assistant", "content": "only its own words"}]),
    (TRAVEL, [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{broken"}}]}]),
    (TRAVEL, [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": 7}}]}]),
    (TRAVEL, "\ud800"),
]


@pytest.mark.parametrize(("tools", "messages"), BAD)
def test_what_cannot_be_read_is_refused(engine: TorchEngine, tools: Any, messages: Any) -> None:
    passes = engine.counters.passes
    with pytest.raises(ValueError, match=r"."):
        agent(engine, tools).open(messages)
    assert engine.counters.passes == passes


def test_wrong_tools_are_found_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="tools"):
        Agent("no-such-model", [])
    with pytest.raises(ValueError, match="no model folder"):
        Agent("no-such-model", [{"name": "f"}]).call("Hello")


@pytest.mark.parametrize("tau", [0.0, 2.0])
def test_a_call_is_required_only_if_one_says_so(engine: TorchEngine, tau: float) -> None:
    asked = "Reply with a joke."
    free, called = (agent(engine, TRAVEL, tau=tau, required=r).call(asked) for r in (False, True))
    assert called.text.startswith(prompts.OPENING)
    assert free.margin == called.margin  # H scores behind the opening anyway
    query = agent(engine, TRAVEL).open(asked).query
    request = Request(prompts.act(query), opening=prompts.OPENING)
    if tau == 0:
        assert called.text == engine.generate([request], SHORT["answering"])[0][0].text
    other = agent(engine, TRAVEL, tau=0, layout="paper").call(asked)
    assert other.log_probs != free.log_probs  # another prompt


@pytest.mark.parametrize("uncertainty", ["margin", "likelihood"])
def test_instructions_stand_in_every_prompt(
    engine: TorchEngine, uncertainty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen, encode = "Mind the gap.", list[prompts.Prompt](), engine.chat.encode

    def heard(prompt: prompts.Prompt, **more: Any) -> Any:
        seen.append(prompt)
        return encode(prompt, **more)

    monkeypatch.setattr(engine.chat, "encode", heard)
    how = {"tau": 2, "uncertainty": uncertainty, "filters": (), "instructions": own}
    answers = (agent(engine, TRAVEL, seed=seed, **how).call(TORN) for seed in range(9))
    wrote = next(answer.examples[0] for answer in answers if answer.examples)
    query = agent(engine, TRAVEL).open(TORN).query
    taught = prompts.example(query.tools, wrote.question, "native", own)
    assert {prompts.act(query, "native", own), prompts.synthesis(query, "native", own), taught} <= {*seen}
    assert {p.system.splitlines()[-1] for p in seen} == {own}


def test_importing_it_is_cheap() -> None:
    code = (
        "import sys, ttsi; assert not [m for m in sys.modules if m.startswith('ttsi.')]; "
        "from ttsi import Agent; ttsi.Answer; "
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'httpx', 'ipywidgets'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import ttsi

    with pytest.raises(AttributeError, match="no attribute 'agent_'"):
        _ = ttsi.agent_  # type: ignore[attr-defined]


# --- the script and the panel -------------------------------------------------------------------------


def test_the_script_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["agent.py", "--model", "tiny", "--tau", "0", SURE])
    runpy.run_path(str(ROOT / "examples" / "agent.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "certain at 0.0" in shown and "the model as it is answers" in shown
    assert "'find_hotel' {'city': 'Rome'" in shown


def panel(engine: Any, **more: Any) -> Playground:
    return Playground(engine, **SHORT | more)


def test_the_panel_walks_through_the_stages(engine: TorchEngine) -> None:
    p = panel(engine)
    p.button.click()
    assert p.answer is not None and p.answer.adapted
    assert "uncertain" in p.panes["h"].value and "find_flight" in p.panes["h"].value
    assert p.answer.examples[0].question in p.panes["g"].value
    assert "step 3" in p.panes["t"].value
    assert "before" in p.panes["answer"].value and "after" in p.panes["answer"].value
    assert p.status.value == "done: adapted" and not p.button.disabled
    assert p.picture().startswith(b"\x89PNG")

    passes = engine.counters.passes
    p.tau.value = 0.0
    assert p.answer is not None and not p.answer.uncertain
    assert p.panes["g"].value == p.panes["t"].value == "" and "after" not in p.panes["answer"].value
    p.tau.value = 0.95
    assert p.answer is not None and p.answer.adapted
    assert engine.counters.passes == passes, "moving τ computes nothing again"

    p.question.value = SURE
    p.button.click()
    assert "≥ τ: certain" in p.panes["h"].value and p.status.value == "done: answered as it is"


def test_the_panel_opens_with_what_it_is_given(engine: TorchEngine) -> None:
    assert json.loads(playground.default_tools())[0]["parameters"]["required"] == ["origin", "destination"]
    p = panel(engine, question=SURE, tools=json.dumps(TRAVEL), tau=0.0, mode="exact")
    p.ask()
    assert p.answer is not None and [c.name for c in p.answer.calls] == ["find_hotel"]


EVIL = "</div><script>alert(1)</script>\x1b[2J\u202e"


def test_the_panel_shows_errors_and_escapes_them(engine: TorchEngine) -> None:
    p = panel(engine, question=EVIL)
    for tools, told in (
        ("[", "no JSON"),
        ("{}", "no list"),
        ("[]", "needs tools"),
        (f'[{{"{EVIL}', "no JSON"),
    ):
        p.tools.value = tools
        p.ask()
        assert told in p.status.value and p.answer is None and p.panes["h"].value == ""
    p.tools.value = json.dumps(
        [{"name": f"$x{EVIL}", "description": EVIL}, {"name": "$\\frac{", "description": ""}]
    )
    p.ask()
    assert p.answer is not None
    assert p.picture()
    shown = "".join(w.value for w in (p.status, *p.panes.values()))
    assert "script&gt;" in shown
    assert "<script" not in shown and "\x1b" not in shown and "\u202e" not in shown
    p.question.value = "Trains from Rome to Oslo. " * 400
    p.ask()
    assert "the machine failed" in p.status.value and not p.button.disabled


def test_what_a_model_wrote_is_escaped() -> None:
    reply = playground._reply(Generation(EVIL, (), (), finished=False))
    assert "<script" not in reply and "&lt;script&gt;" in reply and "(cut)" in reply
    assert "\x1b" not in reply and "\u202e" not in reply


def test_a_panel_without_a_model_says_so() -> None:
    p = panel(None)
    p.ask()
    p.tau.value = 0.5
    assert "without `source`" in p.status.value and p.picture().startswith(b"\x89PNG")


def test_enter_asks_and_old_results_fade(engine: TorchEngine) -> None:
    p = panel(engine)
    enter: Any = {"event": "submit"}
    p.question._handle_custom_msg(enter, [])  # what the browser sends
    assert p.answer is not None and p.asked == (p.tools.value, TORN) and not p.faded
    done = p.status.value
    p.question.value = SURE
    assert p.faded and p.results._dom_classes == ("ttsi-faded",) and "Enter asks" in p.status.value
    assert "find_flight" in p.panes["h"].value, "faded, not gone"
    p.tau.value = 0.0
    assert p.faded and not p.answer.uncertain, "what is moved is the old question's"
    p.question.value, p.tau.value = TORN, 0.95
    assert not p.faded and p.results._dom_classes == () and p.status.value == done
    p.tools.value = json.dumps(TRAVEL)
    assert p.faded
    p.question._handle_custom_msg(enter, [])
    assert not p.faded and p.status.value.startswith("done")


def test_the_panel_stands_before_the_model_is_loaded(engine: TorchEngine) -> None:
    loaded: list[TorchEngine] = []

    def load() -> TorchEngine:
        loaded.append(engine)
        return engine

    p = panel(load)
    assert p.view.children and not loaded
    for empty in ("", "  \n"):
        p.question.value = empty
        p.ask()
        assert p.status.value == "Type a question first: Enter asks it." and p.answer is None
    p.question.value, p.tools.value = SURE, "["
    p.ask()
    assert "no JSON" in p.status.value and not loaded
    p.tools.value = json.dumps(TRAVEL)
    p.ask()
    p.ask()
    assert p.answer is not None and loaded == [engine], "once"

    def fail() -> TorchEngine:
        raise sources.Unavailable("no such model <here>")

    p = panel(fail)
    p.ask()
    assert p.status.value == "no such model &lt;here&gt;" and p.answer is None


def test_the_picture_follows_every_move(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bytes] = []

    class Cell:
        update = staticmethod(lambda image: shown.append(image.data))

    def display(image: Any, display_id: bool) -> Cell:
        assert display_id
        shown.append(image.data)
        return Cell()

    monkeypatch.setattr(playground, "display", display)
    p = panel(engine)
    p.keep()
    p.ask()
    p.tau.value = 0.5
    p.tau.value = 0.0
    p.question.value = SURE
    p.ask()
    p.question.value = ""
    p.ask()
    assert len(shown) == 6 and all(png.startswith(b"\x89PNG") for png in shown)
    assert len(set(shown)) == 5 and shown[0] == shown[-1], "nothing was answered, first and last"
