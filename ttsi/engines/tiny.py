"""A tiny language model fitted on the fixture in seconds: what the profile `smoke` and the tests run on.

It is a Qwen2 of some 200,000 parameters with a tokenizer of its own. Nothing about it says anything
about the method; it is there so that every path of a run is walked: it answers some requests right and
some wrong, is sure of some tools and torn between others, and writes examples of which some can't be read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ttsi import fixture, prompts
from ttsi.benchmarks import to_sample
from ttsi.calls import format_calls
from ttsi.engines.base import Prompt
from ttsi.engines.chat import Chat
from ttsi.types import Call, Sample

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TORN_OFF = {"set_timer", "set_alarm"}  # examples with these are taught without their answer: G must fail too
_ORDERS = 3  # tool orders (run seeds) it is fitted on
_STEPS = 400
_ROWS, _TAILS = 2, 12  # system turns per step, conversations behind each
_LEARNING_RATE = 4e-3


def tokenizer(texts: Sequence[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with ChatML's control tokens and chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_CONTROLS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    return fast


@dataclass(frozen=True)
class _Lesson:
    """A prompt and the reply to learn."""

    prompt: Prompt
    reply: str


def lessons(seed: int) -> list[_Lesson]:
    """What is taught: the answer to every request of the training pool, and an example like it."""
    rng = random.Random(f"ttsi tiny {seed}")
    out = []
    for order in range(_ORDERS):
        pool = [to_sample(r, "fixture_train", i, seed=order) for i, r in enumerate(fixture.records("train"))]
        for sample in pool:
            out.append(_Lesson(prompts.act(sample.query), _answer(sample)))
            alike = rng.choice([s for s in pool if s.gold[0].name == sample.gold[0].name and s is not sample])
            example = f"Request: {alike.query.question}"
            if alike.gold[0].name not in _TORN_OFF:
                example += f"\nAnswer: {_answer(alike)}"
            out.append(_Lesson(prompts.synthesis(sample.query), example))
    return out


def _answer(sample: Sample) -> str:
    return format_calls([Call(g.name, {k: v[0] for k, v in g.arguments.items()}) for g in sample.gold])


def build(folder: Path, seed: int = 0, steps: int = _STEPS) -> None:
    """Writes config, tokenizer and safetensors of the fitted model into `folder`. Takes under 20 s.

    The same seed, machine and library versions give the same weights: two threads, whatever the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _build(folder, seed, steps)
    finally:
        torch.set_num_threads(threads)


def _build(folder: Path, seed: int, steps: int) -> None:
    taught = lessons(seed)
    texts = [t for x in taught for t in (x.prompt.system, *(m.content for m in x.prompt.messages), x.reply)]
    fast = tokenizer([*texts, "user assistant system tool"])
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(fast),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    )
    _fit(model, _pages(taught, Chat(fast)), random.Random(f"ttsi tiny batches {seed}"), steps)
    fast.save_pretrained(folder)
    model.save_pretrained(folder)


@dataclass(frozen=True)
class _Page:
    """A system turn, and the rest of every conversation that opens with it with its number of labels."""

    prefix: tuple[int, ...]
    tails: list[tuple[tuple[int, ...], int]]


def _pages(taught: Sequence[_Lesson], chat: Chat) -> list[_Page]:
    pages: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
    for lesson in taught:
        bare, whole = chat.encode(lesson.prompt), chat.encode(lesson.prompt, reply=lesson.reply)
        tail = (whole.ids[whole.prefix :], len(whole.ids) - len(bare.ids))
        pages.setdefault(whole.ids[: whole.prefix], []).append(tail)
    return [_Page(p, t) for p, t in pages.items()]


def _fit(model: Qwen2ForCausalLM, pages: Sequence[_Page], rng: random.Random, steps: int) -> None:
    """Fits the model: AdamW, one cycle, loss on the replies' tokens.

    The system turn is most of a prompt and the same for many, so it is read once for several
    conversations: they stand behind it side by side, and each sees it and itself.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        loss = torch.zeros(())
        for page in rng.choices(pages, weights=[len(p.tails) for p in pages], k=_ROWS):
            loss = loss + _loss(model, page.prefix, rng.choices(page.tails, k=_TAILS))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        cycle.step()


def _loss(
    model: Qwen2ForCausalLM, prefix: Sequence[int], tails: Sequence[tuple[Sequence[int], int]]
) -> Tensor:
    ids, owner, positions = list(prefix), [-1] * len(prefix), list(range(len(prefix)))
    at: list[int] = []
    for i, (tail, labels) in enumerate(tails):
        end = len(ids) + len(tail)
        at += range(end - labels, end)
        ids += tail
        owner += [i] * len(tail)
        positions += range(len(prefix), len(prefix) + len(tail))
    who, order = torch.tensor(owner), torch.arange(len(ids))
    mask = ((who == -1) | (who == who[:, None])) & (order <= order[:, None])
    hidden = model.model(
        input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=mask[None, None]
    ).last_hidden_state[0]
    target = torch.tensor(at)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[target - 1]), torch.tensor(ids)[target])
