"""What every engine that holds a model must do, against plain transformers and plain PEFT, in float32.

The tests of an engine inherit `EngineContract` and give it `shared`, an engine over `tiny_folder`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ttsi.engines.base import Prompt, Request, TooLong
from ttsi.engines.guide import Guide
from ttsi.engines.lora import Adapter
from ttsi.grammar import grammar
from ttsi.types import Generation, LoraSettings, Message, Sampling, Tool

Mode = Literal["exact", "activated"]
GREEDY = Sampling(max_tokens=30)
DRAWN = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1, max_tokens=20, n=3)
CONVERSATION = (
    Message("user", "a"),
    Message("assistant", "b <|im_end|> c"),
    Message("tool", "é 世界"),
    Message("user", "what"),
)
PROMPTS = [
    *(Prompt("sys tools hello", (Message("user", "hello " * (i + 1)),)) for i in range(5)),
    Prompt("other tools", CONVERSATION),
]
TOOLS = [Tool('the "é"', "", {"properties": {"on": {"type": "boolean"}}}), Tool("go", "", {})]
GRAMMARS = [grammar(TOOLS), "", grammar(TOOLS), 'start: "hello"+', "", "start: /[a-f]+/"]


def plain_reply(model: Any, engine: Any, prompt: Prompt) -> list[int]:
    """Token ids of the greedy reply by transformers' own `generate`."""
    ids = torch.tensor([engine.encode(prompt).ids])
    stop = list(engine.chat.stop_ids)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=GREEDY.max_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],
    )
    return out[0, ids.shape[1] :].tolist()


def tokens(replies: Sequence[Sequence[Generation]]) -> list[list[tuple[int, ...]]]:
    return [[g.tokens for g in row] for row in replies]


def loud(engine: Any, seed: int, mode: Mode) -> Adapter:
    """An adapter with random B, so large that it changes what the model says."""
    fresh = engine.lora.fresh(LoraSettings(mode=mode), seed, engine.device)
    rng = torch.Generator().manual_seed(seed)
    return Adapter(fresh.a, tuple(torch.randn(b.shape, generator=rng) * 0.3 for b in fresh.b), fresh.settings)


def one_by_one(engine: Any, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
    return [engine.generate([request], sampling)[0] for request in requests]


class EngineContract:
    """tolerance: nats a log-probability may be off. modes: what the engine serves; the others it refuses."""

    tolerance: ClassVar[float] = 1e-4
    modes: ClassVar[tuple[Mode, ...]] = ("exact", "activated")

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, tiny_folder: Path) -> Any:
        """The same weights in plain transformers."""
        return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()

    @contextmanager
    def serving(self, *modes: Mode) -> Iterator[None]:
        """Runs what needs these modes; where the engine hasn't got one, it must say so in place of it."""
        if set(modes) <= set(self.modes):
            yield
            return
        with pytest.raises(ValueError, match="activated"):
            yield

    # --- generating -------------------------------------------------------------------------------------

    def test_greedy_equals_plain_generate(self, shared: Any, plain: Any) -> None:
        replies = shared.generate([Request(p) for p in PROMPTS], GREEDY)
        for prompt, (reply,) in zip(PROMPTS, replies, strict=True):
            assert list(reply.tokens) == plain_reply(plain, shared, prompt)
            ids = shared.encode(prompt).ids
            logits = plain(torch.tensor([[*ids, *reply.tokens]])).logits[0].log_softmax(dim=-1)
            want = [logits[len(ids) + i - 1, t].item() for i, t in enumerate(reply.tokens)]
            assert reply.log_probs == pytest.approx(want, abs=self.tolerance)
            assert reply.prompt_tokens == len(ids)
        assert len({r[0].tokens for r in replies}) > 1  # else it would prove nothing

    def test_a_batch_equals_one_at_a_time(self, shared: Any) -> None:
        requests = [Request(p, opening="[name: " if i % 2 else "") for i, p in enumerate(PROMPTS)]
        together = shared.generate(requests, GREEDY)
        assert tokens(together) == tokens(one_by_one(shared, requests, GREEDY))
        assert all(row[0].text.startswith(r.opening) for r, row in zip(requests, together, strict=True))

    def test_prefixes_of_very_different_length_share_a_batch(self, shared: Any) -> None:
        """A short question under a long system turn beside a long question under a short one."""
        requests = [
            Request(Prompt("a b c d e f " * 40, (Message("user", "hi"),))),
            Request(Prompt("x", (Message("user", "a b c d " * 12),))),
        ]
        short = Sampling(max_tokens=4)
        assert tokens(shared.generate(requests, short)) == tokens(one_by_one(shared, requests, short))

    def test_no_requests_no_replies(self, shared: Any) -> None:
        assert shared.generate([], GREEDY) == []

    def test_a_reply_ends_with_a_stop_token_or_is_cut(self, shared: Any, monkeypatch: Any) -> None:
        whole = [g[0].tokens for g in shared.generate([Request(p) for p in PROMPTS], GREEDY)]
        # Tokens that end some replies early and others never.
        early = {whole[0][3], whole[2][8]}
        monkeypatch.setattr(shared.chat, "stop_ids", frozenset(early))
        replies = shared.generate([Request(p) for p in PROMPTS], GREEDY)
        for (reply,), all_of_it in zip(replies, whole, strict=True):
            want = list(itertools.takewhile(lambda t: t not in early, all_of_it))
            assert reply.finished == (len(want) < len(all_of_it))
            assert list(reply.tokens) == list(all_of_it[: len(want) + reply.finished])
        assert len({g[0].finished for g in replies}) > 1

    def test_drawn_replies_follow_their_seeds_in_any_batch(self, shared: Any) -> None:
        requests = [Request(p, seed=7 + i) for i, p in enumerate(PROMPTS)]
        want = tokens(shared.generate(requests, DRAWN))
        assert tokens(one_by_one(shared, requests, DRAWN)) == want
        assert all(len(set(row)) > 1 for row in want)  # three votes of one sample are three draws
        other = [Request(r.prompt, seed=r.seed + 100) for r in requests]
        assert tokens(shared.generate(other, DRAWN)) != want

    def test_too_long_is_said_not_cut(self, shared: Any) -> None:
        prompt = Prompt("s", (Message("user", "a b c d " * 600),))
        assert not shared.fits(prompt, 1)
        with pytest.raises(TooLong, match="2048"):
            shared.generate([Request(prompt)], GREEDY)
        with pytest.raises(TooLong, match="2048"):
            shared.score([prompt], "x", [["y"]])
        room = shared.context - len(shared.encode(PROMPTS[0]).ids)
        assert shared.fits(PROMPTS[0], room)
        assert not shared.fits(PROMPTS[0], room + 1)

    def test_under_a_grammar_greedy_is_the_best_of_what_is_allowed(self, shared: Any, plain: Any) -> None:
        """In a batch where others are free, some end with the grammar and some are cut."""
        requests = [Request(p, grammar=g) for p, g in zip(PROMPTS, GRAMMARS, strict=True)]
        ended = set()
        for request, (reply,) in zip(requests, shared.generate(requests, GREEDY), strict=True):
            ids = shared.encode(request.prompt).ids
            guide = Guide(request.grammar, shared.chat) if request.grammar else None
            logits = plain(torch.tensor([[*ids, *reply.tokens]])).logits[0, len(ids) - 1 : -1]
            for token, row in zip(reply.tokens, logits, strict=True):
                assert token == (guide.masked(row) if guide else row).argmax()
                if guide:
                    guide.take(token)
            want = logits.log_softmax(dim=-1).gather(1, torch.tensor(reply.tokens)[:, None])[:, 0].tolist()
            assert reply.log_probs == pytest.approx(want, abs=self.tolerance)  # of the raw distribution
            ended |= {reply.finished} if guide else set()
        assert ended == {True, False}

    def test_drawn_replies_under_a_grammar_follow_their_seeds_in_any_batch(self, shared: Any) -> None:
        requests = [
            Request(p, seed=i, grammar=g) for i, (p, g) in enumerate(zip(PROMPTS, GRAMMARS, strict=True))
        ]
        want = tokens(shared.generate(requests, DRAWN))
        assert tokens(one_by_one(shared, requests, DRAWN)) == want
        assert want != tokens(shared.generate([Request(r.prompt, r.seed) for r in requests], DRAWN))

    def test_a_grammar_that_cannot_be_read_is_refused(self, shared: Any) -> None:
        with pytest.raises(ValueError, match="no grammar"):
            shared.generate([Request(PROMPTS[0], grammar="start: nowhere")], GREEDY)
        assert shared.generate([Request(PROMPTS[0])], GREEDY)  # and it goes on

    # --- scoring ----------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("opening", "texts"),
        [
            ("[name: ", ['alpha", {', 'beta two", {', 'g", {']),
            ("hel", ["lo world", "p", "lo"]),  # the first token spans the opening's end
            ("", ["one", "on", "two"]),
            ("世", ["界 ok", "é"]),
            ("call ", ["x"]),
        ],
    )
    def test_scores_equal_a_plain_forward_pass(
        self, shared: Any, plain: Any, opening: str, texts: list[str]
    ) -> None:
        chosen = [PROMPTS[0], PROMPTS[5]]
        for prompt, row in zip(chosen, shared.score(chosen, opening, [texts] * 2), strict=True):
            ids = shared.encode(prompt).ids
            for text, scored in zip(texts, row, strict=True):
                whole = shared.chat.tokenizer(
                    opening + text, add_special_tokens=False, return_offsets_mapping=True
                )
                first = next(i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(opening))
                logits = plain(torch.tensor([[*ids, *whole["input_ids"]]])).logits[0].log_softmax(dim=-1)
                want = [
                    logits[len(ids) + i - 1, t].item() for i, t in enumerate(whole["input_ids"]) if i >= first
                ]
                assert scored.continuation == text
                assert scored.log_probs == pytest.approx(want, abs=self.tolerance)
                assert len(scored.ends) == len(want)
                assert scored.ends[-1] == len(text)

    @pytest.mark.parametrize("limit", [1, 4, 6])
    def test_scores_stop_at_the_token_that_reaches_the_limit(self, shared: Any, limit: int) -> None:
        text = "hello 界 world"
        whole = shared.score(PROMPTS[:1], "[name: ", [[text]])[0][0]
        short = shared.score(PROMPTS[:1], "[name: ", [[text]], [[limit]])[0][0]
        last = next(end for end in whole.ends if end >= limit)
        count = sum(end <= last for end in whole.ends)
        assert 0 < count < len(whole.ends)
        assert short.ends == whole.ends[:count]
        assert short.log_probs == pytest.approx(whole.log_probs[:count], abs=self.tolerance)

    # --- adapters ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("modes", [("exact",), ("activated",), ("exact", "activated")])
    def test_adapters_in_a_batch_equal_adapters_one_by_one(
        self, shared: Any, modes: tuple[Mode, ...]
    ) -> None:
        """A row of its own for every adapter, rows without one, and both modes side by side."""
        kinds = list(itertools.islice(itertools.cycle([None, *modes]), len(PROMPTS)))
        adapters = [None if mode is None else loud(shared, i, mode) for i, mode in enumerate(kinds)]
        requests = [Request(p, adapter=a) for p, a in zip(PROMPTS, adapters, strict=True)]
        with self.serving(*modes):
            together = tokens(shared.generate(requests, GREEDY))
            assert together == tokens(one_by_one(shared, requests, GREEDY))
            base = tokens(shared.generate([Request(p) for p in PROMPTS], GREEDY))
            for adapter, ours, theirs in zip(adapters, together, base, strict=True):
                assert (ours == theirs) == (adapter is None)

    @pytest.mark.parametrize("mode", ["exact", "activated"])
    def test_adapted_votes_share_one_adapter(self, shared: Any, mode: Mode) -> None:
        requests = [Request(p, seed=i, adapter=loud(shared, i, mode)) for i, p in enumerate(PROMPTS)]
        with self.serving(mode):
            assert tokens(shared.generate(requests, DRAWN)) == tokens(one_by_one(shared, requests, DRAWN))

    @pytest.mark.parametrize("mode", ["exact", "activated"])
    @pytest.mark.parametrize("prompt", [PROMPTS[1], PROMPTS[5]], ids=["one turn", "conversation"])
    def test_saved_adapters_are_peft_adapters(
        self, shared: Any, tiny_folder: Path, tmp_path: Path, mode: Mode, prompt: Prompt
    ) -> None:
        adapter = loud(shared, 3, mode)
        invocation = list(shared.encode(prompt).ids)[shared.encode(prompt).turn :][:2]
        shared.lora.save(adapter, tmp_path, base_model=str(tiny_folder), invocation=invocation)
        fresh = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
        with self.serving(mode):
            (reply,) = shared.generate([Request(prompt, adapter=adapter)], GREEDY)[0]
            assert list(reply.tokens) == plain_reply(model, shared, prompt)
            ids = shared.encode(prompt).ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
            assert logits[reply.tokens[0]].item() == pytest.approx(reply.log_probs[0], abs=self.tolerance)

    def test_a_fresh_adapter_changes_nothing_and_follows_its_seed_alone(self, shared: Any) -> None:
        one, same, other = (shared.lora.fresh(LoraSettings(), seed, shared.device) for seed in (1, 1, 2))
        assert all(map(torch.equal, one.a, same.a))
        assert not all(map(torch.equal, one.a, other.a))
        request = Request(PROMPTS[0], adapter=one)
        adapted, base = (shared.generate([r], GREEDY) for r in (request, Request(PROMPTS[0])))
        assert tokens(adapted) == tokens(base)
