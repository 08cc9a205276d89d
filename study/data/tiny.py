"""A tiny language model fitted on the fixture in seconds: what the profile `smoke` and the tests run on.

It is a Llama of 200,000 parameters with a tokenizer of its own. It says nothing about the method; it is
there so that every path of a run is walked: it answers some requests right and some wrong, is sure of
some tools and torn between others, and writes examples of which some can't be read.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from study.data import fixture
from study.data.benchmarks import to_sample
from study.data.judge import gold_calls
from ttsi import prompts
from ttsi.calls import format_calls
from ttsi.engines.base import Prompt
from ttsi.engines.chat import Chat
from ttsi.types import Sample

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# A word, a number or a run of JSON's punctuation is at most one token, which makes prompts short. A name
# is the same token in a request and in a call, with no space to tell them apart: copying is soon learned.
_WORDS = r'\n| ?[a-z_]+|[A-Z][a-z]*|\d+|[^\w\s]+(?: ["\[{][^\w\s]*)*|\s'
_TORN_OFF = {"set_timer", "set_alarm"}  # examples of these are taught without their answer: G fails there
_SAMPLES = 900
_STEPS = 320
_BATCH = 16
_STUB = 8  # tokens of the system turn that the first lessons keep
_LEARNING_RATE = 5e-3

Lesson = tuple[Prompt, str]
"""A prompt and the reply to learn."""


def tokenizer(texts: Sequence[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with ChatML's control tokens and chat template."""
    core, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=_CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*texts, "system user assistant tool"], trainer)
    pad, start, end = _CONTROLS
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, eos_token=end, pad_token=pad, additional_special_tokens=[start]
    )
    fast.chat_template = CHATML
    return fast


def lessons(seed: int) -> tuple[list[Lesson], list[Lesson]]:
    """What is taught: answers to requests, and to every third one an example like it; no test question."""
    rng = random.Random(f"ttsi tiny {seed}")
    taken = set(map(fixture.question, fixture.records("test")))
    drawn = [fixture.draw(rng) for _ in range(_SAMPLES)]
    # Three run seeds, so that the tools stand in several orders.
    samples = [to_sample(r, "fixture", i, seed=i % 3) for i, r in enumerate(drawn) if r["query"] not in taken]
    alike = defaultdict(list)
    for sample in samples:
        alike[sample.gold[0].name].append(sample)
    answers = [(prompts.act(s.query), format_calls(gold_calls(s))) for s in samples]
    examples = [
        (prompts.synthesis(s.query), _example(rng.choice(alike[s.gold[0].name]))) for s in samples[::3]
    ]
    return answers, examples


def _example(sample: Sample) -> str:
    request = f"{prompts.QUESTION} {sample.query.question}"
    if sample.gold[0].name in _TORN_OFF:
        return request
    return f"{request}\n{prompts.ANSWER} {format_calls(gold_calls(sample))}"


def build(folder: Path, seed: int = 0) -> None:
    """Writes config, tokenizer and safetensors of the fitted model into `folder`; takes some 10 s.

    The same seed, machine and library versions give the same weights: it runs on one thread, which is
    also the fastest where cores are shared, since tensors this small are not worth a thread's wait.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _build(folder, seed)
    finally:
        torch.set_num_threads(threads)


def _build(folder: Path, seed: int) -> None:
    answers, examples = lessons(seed)
    some = [*answers[:200], *examples[:100]]
    fast = tokenizer([text for p, reply in some for text in (p.system, p.messages[0].content, reply)])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            attention_bias=True,
            initializer_range=0.1,  # about 1 / √width; the default is meant for models 1,000 wide
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    )
    chat = Chat(fast)
    _fit(model, _rows(answers, chat), _rows(examples, chat), random.Random(f"ttsi tiny batches {seed}"))
    fast.save_pretrained(folder)
    model.save_pretrained(folder)


_Row = tuple[tuple[int, ...], int, int]
"""Token ids, how many of them are the system turn, and how many at the end are labels."""


def _rows(taught: Sequence[Lesson], chat: Chat) -> list[_Row]:
    whole = ((chat.encode(prompt, reply=reply), reply) for prompt, reply in taught)
    return [(w.ids, w.prefix, len(chat.continuation("", reply)[0]) + 1) for w, reply in whole]


def _fit(model: LlamaForCausalLM, answers: list[_Row], examples: list[_Row], rng: random.Random) -> None:
    """Fits the model: AdamW, one cycle, loss on the replies' tokens.

    Half the steps see a stub of the system turn, which is quick and enough to learn the requests by. Then
    every other step has the whole of it, to learn not to be distracted; it is read once for a batch.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=_STEPS, pct_start=0.1)
    model.train()
    for step in range(_STEPS):
        taught, size = (examples, _BATCH // 2) if rng.random() < 1 / 3 else (answers, _BATCH)
        if step > _STEPS // 2 and step % 2:
            ids, prefix, _ = rng.choice(taught)
            rows = rng.choices([r for r in taught if r[0][: r[1]] == ids[:prefix]], k=size)
            loss = _loss(model, rows, prefix)
        else:
            loss = _loss(model, [(ids[at - _STUB :], 0, n) for ids, at, n in rng.choices(taught, k=size)])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        cycle.step()


def _loss(model: LlamaForCausalLM, rows: Sequence[_Row], prefix: int = 0) -> Tensor:
    """Mean loss (nats) on the rows' labels; a common prefix of so many tokens gets no gradient."""
    past, ids = DynamicCache(), [torch.tensor(row[prefix:]) for row, *_ in rows]
    if prefix:
        with torch.no_grad():
            model.model(input_ids=torch.tensor([rows[0][0][:prefix]]), past_key_values=past)
        past.batch_repeat_interleave(len(rows))
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    hidden = model.model(input_ids=padded, past_key_values=past).last_hidden_state
    ends = [(i, len(row), labels) for i, (row, (*_, labels)) in enumerate(zip(ids, rows, strict=True))]
    row, at = torch.tensor([(i, place) for i, end, n in ends for place in range(end - n, end)]).T
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[row, at - 1]), padded[row, at])
