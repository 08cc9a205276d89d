"""Test-time self-improvement as one writes it with PEFT and transformers: what `make bench` compares with.

Nothing here is slowed down: the prompt is read once for all candidates, scoring computes no
logits of it, the trainer saves nothing of its own. As usual, training computes the logits of every token, and
decoding goes token by token. It is the loop the paper describes: score, write, train,
merge, save, reload, answer, go back to the base model.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class UsualLoop:
    """One model, one sample at a time. clock: around each stage, told its name."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, getattr(torch, dtype)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = self._load(folder)
        self.clock: Callable[[str], AbstractContextManager[None]] = lambda stage: nullcontext()

    def _load(self, folder: str | Path) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, use_safetensors=True)
        return model.eval()

    def _ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    @torch.no_grad()
    def _generate(self, prompt: str, **sampling: Any) -> str:
        ids = self._ids(prompt)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    def answer(self, prompt: str, max_tokens: int) -> str:
        """The reply of the model as it is, greedy."""
        return self._generate(prompt, max_new_tokens=max_tokens, repetition_penalty=1.0)

    @torch.no_grad()
    def score(self, prompt: str, opening: str, continuations: list[str]) -> list[list[float]]:
        """Log-probabilities (nats) of each continuation's tokens, all in one batch behind one prompt."""
        with self.clock("h"):
            coded = [
                self.tokenizer(opening + c, add_special_tokens=False, return_offsets_mapping=True)
                for c in continuations
            ]
            width = max(len(c.input_ids) for c in coded)
            rows = torch.tensor([c.input_ids + [0] * (width - len(c.input_ids)) for c in coded])
            past = self.model(self._ids(prompt), use_cache=True, logits_to_keep=1)
            before = past.logits[:, -1:].expand(len(rows), -1, -1)
            past.past_key_values.batch_repeat_interleave(len(rows))
            after = self.model(rows, past_key_values=past.past_key_values).logits[:, :-1]
            log_probs = torch.cat([before, after], dim=1).float().log_softmax(-1)
            picked = log_probs.gather(2, rows[:, :, None])[:, :, 0].tolist()
            return [
                [
                    p
                    for p, (_, end) in zip(row[: len(c.input_ids)], c["offset_mapping"], strict=True)
                    if end > len(opening)
                ]
                for row, c in zip(picked, coded, strict=True)
            ]

    def write(self, prompt: str, max_tokens: int, penalty: float) -> str:
        """The synthetic example as the model writes it, greedy with the paper's repetition penalty."""
        with self.clock("g"):
            return self._generate(prompt, max_new_tokens=max_tokens, repetition_penalty=penalty)

    def adapt_and_answer(
        self, example: str, reply: str, prompt: str, max_tokens: int, settings: dict[str, Any], seed: int
    ) -> tuple[str, list[float]]:
        """The adapted answer and the loss (nats) of each step; the base model stands again afterwards."""
        with self.clock("t"):
            adapted: Any = get_peft_model(
                self.model,
                LoraConfig(
                    r=settings["rank"],
                    lora_alpha=settings["alpha"],
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
            _same_start(adapted, seed)
            ids = self._ids(example + reply)[0]
            labels = ids.clone()
            labels[: self._ids(example).shape[1]] = -100
            data = [{"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}]
            with tempfile.TemporaryDirectory() as scratch:
                trainer = Trainer(
                    adapted,
                    TrainingArguments(
                        scratch,
                        per_device_train_batch_size=1,
                        num_train_epochs=settings["epochs"],
                        learning_rate=settings["learning_rate"],
                        lr_scheduler_type="cosine",
                        warmup_steps=math.floor(settings["warmup_ratio"] * settings["epochs"]),
                        weight_decay=settings["weight_decay"],
                        max_grad_norm=settings["clip"],
                        logging_steps=1,
                        save_strategy="no",
                        report_to="none",
                        disable_tqdm=True,
                        dataloader_pin_memory=False,
                    ),
                    train_dataset=data,
                )
                trainer.train()
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        with tempfile.TemporaryDirectory() as merged:
            with self.clock("merge"):
                whole = adapted.merge_and_unload()
            with self.clock("save"):
                whole.save_pretrained(merged)
            del trainer, adapted, whole
            self.model = None
            with self.clock("reload"):
                self.model = self._load(merged)
            with self.clock("answer"):
                text = self._generate(prompt, max_new_tokens=max_tokens, repetition_penalty=1.0)
        with self.clock("restore"):
            self.model = None
            self.model = self._load(self.folder)
        return text, losses


def _same_start(adapted: Any, seed: int) -> None:
    """Draws the A matrices as ttsi does, so that both programs train the same adapter."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng))
