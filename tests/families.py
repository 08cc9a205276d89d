"""Tiny models of other families: each with its own architecture, way of tokenising and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from study.data import sources

TEMPLATES = Path(__file__).parent / "fixtures" / "templates"
GEMMA = Path(sources.__file__).with_name("gemma.jinja")
TEXTS = [
    "hello world user assistant system tool call name arguments what the a b c d",
    '<tool_call>[{"name": "book_table", "arguments": {"guests": 4, "day": "friday"}}]</tool_call>',
] * 10
WINDOW = 12
"""Tokens that a layer with a sliding window sees: fewer than any prompt here has."""


def byte_level(core: Tokenizer) -> None:
    """Llama 3's, Qwen's and Phi-4's way."""
    words = pre.Split(Regex(r"\s*[\r\n]+| ?[^\W_]+| ?[^\w\s]+|_|\s+"), "isolated")
    as_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre.Sequence([words, as_bytes])
    core.decoder = decoders.ByteLevel()


def unspaced(core: Tokenizer) -> None:
    """Gemma's way: a space is part of what follows it, and no text is given one."""
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def spaced_once(core: Tokenizer) -> None:
    """Mistral's way: the whole text is given a space in front, what follows a control token isn't."""
    core.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)


def spaced_always(core: Tokenizer) -> None:
    """Llama 2's and Phi-3's way: every run of text is given a space in front."""
    spaced_once(core)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Family:
    """What a published family of models looks like.

    opens: what opens a user's turn; "" if that is no control token. stop: what ends a reply. swallows:
    whether control tokens swallow the space behind them. tools: whether the template lists tools. seed: of
    the weights, such that some replies of the contract end by themselves and others are cut.
    """

    architecture: str
    template: Path
    controls: str
    opens: str
    stop: str
    eos: str
    bos: str | None = None
    words: Callable[[Tokenizer], None] = byte_level
    swallows: bool = False
    tools: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer trained on a few words, with the family's control tokens and chat template."""
        core = Tokenizer(models.BPE())
        special = [AddedToken(c, rstrip=self.swallows) for c in ["<pad>", *self.controls.split()]]
        whole_bytes = self.words is byte_level
        core.pre_tokenizer = pre.ByteLevel(False) if whole_bytes else pre.Metaspace()
        alphabet = pre.ByteLevel.alphabet() if whole_bytes else []
        core.train_from_iterator(
            TEXTS, BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        )
        if not whole_bytes:  # characters that were never seen are spelt in bytes
            text = json.loads(core.to_str())
            vocabulary = text["model"]["vocab"]
            for token in ["\n", *(f"<0x{i:02X}>" for i in range(256))]:
                vocabulary.setdefault(token, len(vocabulary))
            core = Tokenizer.from_str(json.dumps({**text, "model": {**text["model"], "byte_fallback": True}}))
        self.words(core)
        if self.bos:  # which ttsi must not ask for: the template writes it
            ids = [(self.bos, core.token_to_id(self.bos))]
            core.post_processor = processors.TemplateProcessing(f"{self.bos} $A", special_tokens=ids)
        fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=core,
            bos_token=self.bos,
            eos_token=self.eos,
            pad_token="<pad>",
            additional_special_tokens=[c for c in special[1:] if c.content not in (self.bos, self.eos)],
        )
        fast.chat_template = self.template.read_text()
        return fast

    def build(self, folder: Path) -> None:
        """Writes config, tokenizer and safetensors of a model with random weights, loud as in conftest."""
        tokens = self.tokenizer()
        config = AutoConfig.for_model(
            self.architecture,
            vocab_size=len(tokens),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
            **self.config,
        )
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.copy_((3 * parameter).bfloat16())
        tokens.save_pretrained(folder)
        model.save_pretrained(folder)


_GEMMA = {
    "controls": "<bos> <eos> <start_of_turn> <end_of_turn>",
    "opens": "<start_of_turn>user",
    "stop": "<end_of_turn>",
    "eos": "<eos>",
    "bos": "<bos>",
    "words": unspaced,
    "tools": False,
}
_PHI = {
    "controls": "<|endoftext|> <|system|> <|user|> <|assistant|> <|tool|> <|/tool|> <|end|>",
    "opens": "<|user|>",
    "stop": "<|end|>",
    "eos": "<|endoftext|>",
}
_LLAMA2: dict[str, Any] = {
    "controls": "<s> </s>",
    "opens": "",
    "stop": "</s>",
    "eos": "</s>",
    "bos": "<s>",
    "words": spaced_always,
    "tools": False,
}
FAMILIES: dict[str, Family] = {
    "llama3": Family(
        "llama",
        TEMPLATES / "llama3.jinja",
        controls="<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        opens="<|start_header_id|>user<|end_header_id|>",
        stop="<|eot_id|>",
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
    ),
    "gemma3": Family(
        "gemma3_text",
        GEMMA,
        seed=1,
        config={
            "initializer_range": 0.1,  # what its last norm leaves is too small to be sure of anything else
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        **_GEMMA,
    ),
    "gemma": Family("gemma", TEMPLATES / "gemma2.jinja", config={"head_dim": 16}, **_GEMMA),
    "mistral": Family(
        "mistral",
        TEMPLATES / "mistral.jinja",
        controls="<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]",
        opens="[INST]",
        stop="</s>",
        eos="</s>",
        bos="<s>",
        words=spaced_once,
        config={"sliding_window": WINDOW},
        seed=1,
    ),
    "mistral_v1": Family("mistral", TEMPLATES / "mistral_v1.jinja", **_LLAMA2),
    "zephyr": Family("llama", TEMPLATES / "zephyr.jinja", **_LLAMA2),
    "phi3": Family(
        "phi3",
        TEMPLATES / "phi3.jinja",
        words=spaced_always,
        swallows=True,
        tools=False,
        config={"sliding_window": WINDOW},
        **_PHI,
    ),
    "phi4": Family("phi3", TEMPLATES / "phi4.jinja", **_PHI),
    "qwen3": Family(
        "qwen3",
        TEMPLATES / "qwen3.jinja",
        controls="<|endoftext|> <|im_start|> <|im_end|>",
        opens="<|im_start|>user",
        stop="<|im_end|>",
        eos="<|im_end|>",
        config={"head_dim": 32},
    ),
}
