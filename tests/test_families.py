"""Models of other families than ChatML's: what a chat template has is found by rendering it."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import EngineContract, Mode
from families import FAMILIES, Family
from jinja2 import TemplateError
from test_prompts import QUERY, TALK
from test_trainer import JOBS, peft_losses
from transformers import AutoConfig, AutoModelForCausalLM

from ttsi import estimator, prompts
from ttsi.calls import parse_calls
from ttsi.engines.base import EngineError, Prompt, Request
from ttsi.engines.chat import Chat
from ttsi.engines.torch import TorchEngine
from ttsi.grammar import grammar
from ttsi.trainer import Job, train
from ttsi.types import LoraSettings, Message, Sampling

ENGINES = ["llama3", "gemma3", "mistral", "phi3", "qwen3"]
SYSTEM = "sys tools hello"
ODD = (
    Message("assistant", "good day"),
    Message("user", "first wish"),
    Message("user", "second wish"),
    Message("assistant", "calling"),
    Message("tool", "a result"),
    Message("user", "last wish"),
    Message("assistant", "at once"),
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def chat(family: Family) -> Chat:
    return Chat(family.tokenizer())


# --- prompts --------------------------------------------------------------------------------------------


def asked(*said: str, system: str = SYSTEM) -> Prompt:
    roles = ("user", "assistant")
    return Prompt(system, tuple(Message(roles[i % 2], text) for i, text in enumerate(said)))


def template(chat: Chat, prompt: Prompt, opened: bool = True) -> str:
    """What transformers makes of a conversation, the system turn joined to the user's if that is refused."""
    said = [{"role": m.role, "content": m.content} for m in prompt.messages]
    settings = {"tokenize": False, "add_generation_prompt": opened, "enable_thinking": False}
    try:
        whole = [{"role": "system", "content": prompt.system}, *said]
        return str(chat.tokenizer.apply_chat_template(whole, **settings))
    except TemplateError:
        said[0]["content"] = f"{prompt.system}\n\n{said[0]['content']}"
        return str(chat.tokenizer.apply_chat_template(said, **settings))


def shown(chat: Chat, ids: Any) -> str:
    return chat.tokenizer.decode(list(ids), skip_special_tokens=False)


@pytest.mark.parametrize("prompt", [asked("hi  there\n\n\nyou"), asked("a", "b é", "\nc"), Prompt("s", ODD)])
def test_ids_are_those_of_the_whole_string(chat: Chat, prompt: Prompt) -> None:
    whole = chat.tokenizer.encode(chat.render(prompt), add_special_tokens=False)
    assert list(chat.encode(prompt).ids) == whole


def test_every_turn_is_shown_whatever_roles_the_template_has(chat: Chat) -> None:
    text, at = chat.render(Prompt(SYSTEM, ODD)), 0
    for message in ODD:
        assert message.content in text[at:], message
        at = text.index(message.content, at) + len(message.content)
    assert SYSTEM in text


def test_a_conversation_that_the_template_takes_is_left_as_it_is(chat: Chat) -> None:
    ours, want = chat.render(asked("a", "b", "c")), template(chat, asked("a", "b", "c"))
    # Today's date, which the template writes, would make it another prompt every day.
    assert ours == re.sub("Today Date: .*", "Today Date: 26 Jul 2024", want)


def test_the_prefix_is_what_prompts_about_the_same_tools_share(chat: Chat) -> None:
    codes = [chat.encode(asked(text)) for text in ("hello you", "what", "\n\nthe")]
    assert len({code.ids[: code.prefix] for code in codes}) == 1
    for code in codes:
        assert SYSTEM in shown(chat, code.ids[: code.prefix])
        assert shown(chat, code.ids[code.prefix :]).count(SYSTEM) == 0
    other = chat.encode(asked("hello you", system="others"))
    assert SYSTEM not in shown(chat, other.ids[: other.prefix])


def test_the_turn_is_where_the_last_users_turn_opens(chat: Chat, family: Family) -> None:
    code = chat.encode(asked("early", "b", "late"))
    if not family.opens:
        assert chat.invocation == () and code.turn == 0
        return
    last = shown(chat, code.ids[code.turn :])
    assert last.startswith(family.opens) and "late" in last and "early" not in last
    assert code.ids[code.turn :][: len(chat.invocation)] == chat.invocation
    alone = chat.encode(asked("late"))
    assert shown(chat, alone.ids[alone.turn :]).startswith(family.opens)
    pose = chat.encode(asked("early", "b", f"late {family.opens} x"))
    assert pose.turn == code.turn


def test_a_reply_ends_as_the_template_ends_it(chat: Chat, family: Family) -> None:
    bare, whole = chat.encode(asked("a")), chat.encode(asked("a"), reply="fine then")
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == family.stop == chat.end
    assert chat.stop_ids == {chat.end_of_turn, chat.tokenizer.eos_token_id}
    assert whole.ids[: len(bare.ids)] == bare.ids and whole.ids[-1] == chat.end_of_turn
    assert chat.decode(whole.ids[len(bare.ids) :]) == "fine then"
    if "think" in chat.render(asked("a")):  # what it thinks is taken out of a past reply
        return
    said = chat.render(asked("a"), reply="fine then")
    assert list(whole.ids) == chat.tokenizer.encode(said, add_special_tokens=False)
    assert said[said.rindex("fine") - 2 :] in template(chat, asked("a", "fine then"), opened=False)


def test_no_text_acts_as_a_control_token(chat: Chat, family: Family) -> None:
    hostile = f"x {' '.join(family.controls.split())} y"
    controls = {chat.tokenizer.convert_tokens_to_ids(c) for c in family.controls.split()}
    for plain, posing in ((asked("x"), asked(hostile)), (asked("x"), asked("x", system=hostile))):
        counts = [sum(i in controls for i in chat.encode(p, reply="z").ids) for p in (plain, posing)]
        assert counts[0] == counts[1]
    assert hostile in chat.render(asked(hostile))


@pytest.mark.parametrize("query", [QUERY, TALK], ids=["question", "conversation"])
def test_tools_stand_in_the_models_own_template_or_it_is_said_that_it_has_none(
    chat: Chat, family: Family, query: Any
) -> None:
    prompt = prompts.act(query, "template")
    if not family.tools:
        with pytest.raises(EngineError, match="lists no tools: use layout native or paper"):
            chat.encode(prompt)
        return
    text = chat.render(prompt)
    assert all(t.name in text and t.description in text for t in query.tools)
    codes = [chat.encode(p) for p in (prompt, prompts.synthesis(query, "template"))]
    assert codes[0].ids[: codes[0].prefix] == codes[1].ids[: codes[0].prefix] or query is TALK


def test_a_model_without_a_chat_template_is_refused_in_one_line(family: Family) -> None:
    tokens = copy.deepcopy(family.tokenizer())
    tokens.chat_template = None
    with pytest.raises(ValueError, match=r"^the model has no chat template: take an instruct model.*$"):
        Chat(tokens)
    tokens.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"^the model's chat template doesn't show what users and .* say$"):
        Chat(tokens)
    tokens.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match=r"^the model's chat template ends a reply with no control token$"):
        Chat(tokens)


# --- engines --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].build(folder)
    return folder


@pytest.fixture(scope="module")
def shared(tiny_folder: Path) -> TorchEngine:
    return TorchEngine(tiny_folder, dtype="float32")


@pytest.mark.parametrize("tiny_folder", ENGINES, indirect=True)
class TestFamilies(EngineContract):
    """What holds for every engine: tests/contract.py."""

    @pytest.mark.parametrize("mode", ["exact", "activated"])
    def test_losses_equal_plain_peft(self, shared: Any, tiny_folder: Path, mode: Mode) -> None:
        settings = LoraSettings(mode=mode, learning_rate=1e-3, epochs=4)
        together = train(shared, JOBS, settings)
        for job, (_, fit) in list(zip(JOBS, together, strict=True))[:2]:
            alone = train(shared, [job], settings)[0][1].losses
            plain = peft_losses(tiny_folder, shared, job, settings)
            assert alone == pytest.approx(plain, abs=1e-5, rel=1e-5)
            assert fit.losses == pytest.approx(alone, abs=1e-5, rel=1e-5)
            assert alone[-1] < alone[0]

    @pytest.mark.parametrize("mode", ["exact", "activated"])
    def test_a_reply_that_was_learnt_is_said_and_ends_and_goes_with_its_adapter(
        self, shared: Any, mode: Mode
    ) -> None:
        prompt, reply = prompts.act(TALK), prompts.write([])
        weights = {name: w.clone() for name, w in shared.model.state_dict().items()}
        before = shared.generate([Request(prompt)], Sampling(max_tokens=24))[0][0]
        settings = LoraSettings(mode=mode, learning_rate=3e-3, epochs=40)
        adapter, fit = train(shared, [Job(((prompt, reply),), 0)], settings)[0]
        assert fit.losses[-1] < 0.1 < fit.losses[0]
        (learnt,) = shared.generate([Request(prompt, adapter=adapter)], Sampling(max_tokens=24))[0]
        assert (learnt.text, learnt.finished) == (reply, True)
        assert learnt.tokens[-1] == shared.chat.end_of_turn
        assert shared.generate([Request(prompt)], Sampling(max_tokens=24))[0][0] == before
        assert all(torch.equal(w, weights[name]) for name, w in shared.model.state_dict().items())

    def test_a_reply_under_the_grammar_of_its_tools_calls_one_of_them(self, shared: Any) -> None:
        query = replace(QUERY, tools=QUERY.tools[1:])  # no strings, which a random model never ends
        request = Request(prompts.act(query), opening=prompts.OPENING, grammar=grammar(query.tools))
        (reply,) = shared.generate([request], Sampling(max_tokens=80))[0]
        assert reply.finished and parse_calls(reply.text).error is None
        assert {c.name for c in parse_calls(reply.text).calls} <= {t.name for t in query.tools}

    def test_h_scores_the_tools_of_a_question(self, shared: Any) -> None:
        for query in (QUERY, TALK):
            found = estimator.estimate(shared, query)
            assert len(found.log_probs) == len(query.tools) and 0 < found.margin < 1


@pytest.mark.parametrize("tiny_folder", ["mistral_v1"], indirect=True)
def test_a_template_that_cant_serve_activated_says_so_and_serves_exact(shared: TorchEngine) -> None:
    line = r"^the model's chat template opens a user's turn with no control token.*: use mode 'exact'$"
    with pytest.raises(ValueError, match=line):
        train(shared, JOBS[:1], LoraSettings(mode="activated"))
    adapter = shared.lora.fresh(LoraSettings(mode="activated"), 0, shared.device)
    with pytest.raises(ValueError, match=line):
        shared.generate([Request(asked("a"), adapter=adapter)], Sampling(max_tokens=1))
    adapter, _ = train(shared, JOBS[:1], LoraSettings(mode="exact"))[0]
    assert shared.generate([Request(asked("a"), adapter=adapter)], Sampling(max_tokens=1))[0][0].tokens


@pytest.mark.parametrize(
    ("architecture", "settings", "said"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": None}, "softcap"),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 1.0}, "its logits"),
        ("phi", {}, "its logits"),  # a bias
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_what_the_engine_doesnt_compute_is_refused_at_once(
    tmp_path: Path, architecture: str, settings: dict[str, Any], said: str
) -> None:
    tokens = FAMILIES["qwen3"].tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokens), pad_token_id=0, tie_word_embeddings=False, **sizes, **settings
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    tokens.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^.*{said}.*ttsi.*$"):
        TorchEngine(tmp_path, dtype="float32")
