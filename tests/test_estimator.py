"""H by hand-worked values, and against a plain forward pass."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ttsi import estimator, prompts
from ttsi.engines.base import EngineError, Prompt
from ttsi.engines.torch import TorchEngine
from ttsi.estimator import candidate_log_prob, continuation, margin, rss
from ttsi.types import Message, Query, Scored, Tool


def test_rss_by_hand() -> None:
    assert rss([0.0, math.log(0.5), math.log(0.5)]) == pytest.approx([0.5, 0.25, 0.25])
    assert rss([-1000.0, -1001.0]) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_margin_by_hand() -> None:
    assert margin([math.log(0.6), math.log(0.3), math.log(0.1)]) == pytest.approx(0.3)
    assert margin([-2.0, -2.0, -9.0]) == pytest.approx(0, abs=1e-9)
    assert margin([-3.0]) == 1
    assert margin([-5.0, -1.0]) == margin([-1.0, -5.0])  # the order of tools means nothing
    # The sign that the printed Algorithm 1 has wrong: a likelier best tool makes the model more certain.
    assert margin([-0.1, -3.0]) > margin([-1.0, -3.0])


@pytest.mark.parametrize("bad", [[], [math.nan, -1.0], [-math.inf], [math.inf, -1.0]])
def test_margin_refuses_what_is_no_score(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scored|non-finite"):
        margin(bad)


def test_candidate_sums_to_the_token_with_the_closing_quote() -> None:
    # tokens: get | Weather | ", | " | arguments … : the third holds the quote that ends the name
    text = continuation("getWeather")
    assert text == 'getWeather", "arguments": {'
    scored = Scored(text, (-1.0, -2.0, -0.5, -7.0, -7.0), (3, 10, 12, 14, len(text)))
    assert candidate_log_prob(scored, "getWeather") == -3.5
    assert candidate_log_prob(scored, "getWeather", normalise=True) == pytest.approx(-3.5 / 3)
    assert candidate_log_prob(scored, "getWeather", "name+opening") == -17.5


def test_a_quoted_name_ends_at_its_own_quote() -> None:
    text = continuation('say "hi"')
    assert text == 'say \\"hi\\"", "arguments": {'
    ends = tuple(range(1, len(text) + 1))
    scored = Scored(text, (-1.0,) * len(text), ends)
    assert candidate_log_prob(scored, 'say "hi"') == -11.0


def query(*names: str) -> Query:
    tools = tuple(Tool(n, "does it", {"type": "object", "properties": {}}) for n in names)
    return Query("t-0", "t", (Message("user", "Do it, please"),), tools)


def test_scores_equal_a_plain_forward_pass(tiny_folder: Path) -> None:
    engine = TorchEngine(tiny_folder, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    asked = query("alpha", "beta_two", "al", "gamma.ray")
    u = estimator.estimate(engine, asked)
    head = engine.encode(prompts.act(asked)).ids
    for tool, log_prob in zip(asked.tools, u.log_probs, strict=True):
        # The ids of opening and name equal those of the whole string tokenised at once.
        ids, shared, ends = engine.chat.continuation(prompts.OPENING, continuation(tool.name))
        whole = engine.chat.tokenizer.encode(
            prompts.OPENING + continuation(tool.name), add_special_tokens=False
        )
        assert ids == whole
        logits = plain(torch.tensor([[*head, *ids]])).logits[0].log_softmax(-1)
        wanted = 0.0
        for j, end in enumerate(ends):
            wanted += logits[len(head) + shared + j - 1, ids[shared + j]].item()
            if end >= len(tool.name) + 1:
                break
        assert log_prob == pytest.approx(wanted, abs=1e-4)
    assert u.margin == pytest.approx(margin(u.log_probs))


def test_one_tool_is_certain_and_none_is_a_failure(tiny_folder: Path) -> None:
    engine = TorchEngine(tiny_folder, dtype="float32")
    assert estimator.estimate(engine, query("only")).margin == 1
    with pytest.raises(EngineError, match="no tools"):
        estimator.estimate(engine, query())


def test_a_score_that_is_not_finite_is_a_failure_never_a_margin() -> None:
    class Broken:
        name = "broken"

        def score(
            self, prompts: list[Prompt], opening: str, continuations: list[list[str]], upto: object
        ) -> list[list[Scored]]:
            return [[Scored(c, (math.nan,), (len(c),)) for c in row] for row in continuations]

    with pytest.raises(EngineError, match="finite"):
        estimator.estimate(Broken(), query("a", "b"))  # type: ignore[arg-type]


# --- what the margin is compared with -------------------------------------------------------------------


def test_every_estimator_points_to_certainty() -> None:
    sure, torn = [math.log(0.98), math.log(0.01), math.log(0.01)], [math.log(1 / 3)] * 3
    assert estimator.certain_of_tool(torn) == pytest.approx(0)
    assert estimator.certain_of_tool(sure) > 0.85
    assert estimator.certain_of_tool([math.log(0.5), math.log(0.5)]) == pytest.approx(0)
    assert estimator.certain_of_tool([-7.0]) == 1
    assert estimator.certain_of_answer([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)
    assert estimator.certain_of_every_token([math.log(0.5), math.log(0.125)]) == pytest.approx(0.125)
    assert estimator.agreement(["a", "b", "a", None, "a"]) == pytest.approx(0.6)
    assert estimator.agreement([None, None]) == 0, "what can't be read agrees with nothing"
    for function in (estimator.certain_of_answer, estimator.certain_of_every_token, estimator.agreement):
        with pytest.raises(ValueError, match=r"perplexity|least likely|sampled"):
            function([])


def test_certainties_leave_out_what_was_not_run() -> None:
    row = {"benchmark": "t", "sample": "t-1", "margin": 0.5, "log_probs": [-0.1, -3.0], "votes": None}
    bare = estimator.certainties(row)
    assert set(bare) == {"rss", "trivial", "entropy", "random"} and bare["rss"] == 0.5
    assert bare["random"] == estimator.certainties(row)["random"] != estimator.certainties(row, 1)["random"]
    draws = [estimator.certainties({**row, "sample": f"t-{i}"})["random"] for i in range(200)]
    assert 0 <= min(draws) < 0.1 and 0.9 < max(draws) < 1
    full = estimator.certainties({**row, "answer_log_probs": [-0.1], "votes": ["a", "a"]})
    assert set(full) - set(bare) == {"perplexity", "smallest_token", "disagreement"}


def test_lengths_normalise_a_margin() -> None:
    assert estimator.candidate_margin([-2.0, -2.0], [1, 4]) == pytest.approx(margin([-2.0, -0.5]))
    assert estimator.candidate_margin([-2.0, -3.0]) == margin([-2.0, -3.0])
