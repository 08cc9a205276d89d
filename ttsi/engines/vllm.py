"""vLLM as an engine: it answers and scores, each request under its own LoRA adapter; torch trains beside it.

It serves mode `exact` only: vLLM has no activated adapters. Its processes start when they are first needed,
and again after they died. This file and `vllm_logits` alone import vllm, only for who asks for that engine.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from ttsi.engines.base import EngineError, Prompt, Request, native_dtype
from ttsi.engines.chat import Chat, ChatEngine
from ttsi.seeds import reply_seed
from ttsi.types import Generation, Sampling, Scored

os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the second one knows no logits processors of our kind
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report this machine to its makers
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# A large batch on cores that others use as well takes minutes; a dead process is noticed in other ways.
os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer wants the same cores

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from ttsi.engines.guide import Guide
from ttsi.engines.vllm_logits import GRAMMAR, ForcedTokens, GuidedTokens, forcing

if TYPE_CHECKING:
    from ttsi.engines.lora import Adapter
    from ttsi.engines.torch import TorchEngine

NO_ACTIVATED = (
    "vLLM has no activated adapters: run mode 'activated' with engine 'torch', or mode 'exact' with 'vllm'"
)
_FOLDER = "ttsi-adapters-"  # and the process that wrote it
_CPU_CACHE = 512 << 20  # bytes of key-value cache on a CPU, or as much more as one context window takes
_CPU_BLOCK = 32  # tokens of a cache block there; prompts share whole blocks
_MOST_ADAPTERS = 16  # in one pass; with more, requests wait for each other
# What is left to the torch engine.
_TORCHS = {"device", "lora", "training_pass", "label_loss", "embed", "outside_failures"}

Asked = tuple[Sequence[int], SamplingParams, LoRARequest | None]
"""What vLLM is asked for: the ids of a prompt, how to go on, and under which adapter."""


class VllmEngine(ChatEngine):
    """An `Engine` over vLLM, with a `TorchEngine` of the same model beside it for training and embedding.

    folder: a model folder (config, tokenizer, safetensors).
    dtype: "auto", "float32" or "bfloat16"; vLLM rounds adapters to it, torch trains them in float32.
    gpu_memory_utilization: the share of a GPU's memory that vLLM takes; the rest is left to training and to
        other engines. On a CPU the key-value cache has a fixed size.
    rank: of the largest adapter to serve. threads: of each of the two engines on a CPU.
    vLLM starts processes of its own, so a script that makes one needs `if __name__ == "__main__":`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.5,
        rank: int = 8,
        threads: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.name = name or self.folder.name
        self.dtype = native_dtype() if dtype == "auto" else dtype
        self.gpu_memory_utilization = gpu_memory_utilization
        self.rank = rank
        self.threads = threads
        self.chat = Chat(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.context: int = self.config.max_position_embeddings
        self._llm: LLM | None = None
        self._started = False
        self._failed: EngineError | None = None
        self._loads = 0
        self.prompt_tokens = self.cached_tokens = 0
        """Tokens of all prompts so far, and those of them that the prefix cache already held."""

    # --- vLLM's processes -------------------------------------------------------------------------------

    @property
    def llm(self) -> LLM:
        """vLLM, started if it isn't running. If its first start fails, EngineError now and ever after."""
        if self._failed is not None:
            raise self._failed
        if self._llm is None:
            try:
                self._llm = self._start()
            except Exception as error:
                failed = EngineError(f"vLLM could not be started: {error}")
                self._failed = None if self._started else failed
                raise failed from error
            self._started = True
        return self._llm

    def _start(self) -> LLM:
        _sweep()
        settings: dict[str, Any] = {"gpu_memory_utilization": self.gpu_memory_utilization}
        if not torch.cuda.is_available():
            c = self.config
            dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
            numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * dim * self.context
            window = numbers * (2 if self.dtype == "bfloat16" else 4)
            settings = {
                "kv_cache_memory_bytes": max(_CPU_CACHE, window * 9 // 8),
                "block_size": _CPU_BLOCK,
                # Prompts in one piece: what is drawn behind a piece is thrown away, and vLLM dies of the
                # attempt to wind a CPU's generator back.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": self.context,
            }
        threads = str(self.threads or os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
        with patch.dict(os.environ, OMP_NUM_THREADS=threads):
            return LLM(
                str(self.folder),
                skip_tokenizer_init=True,
                trust_remote_code=False,
                load_format="safetensors",
                generation_config="vllm",  # none of the model's own habits of decoding
                dtype=self.dtype,
                max_model_len=self.context,
                enable_prefix_caching=True,
                enable_lora=True,
                max_lora_rank=next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= self.rank),
                max_loras=_MOST_ADAPTERS,
                logprobs_mode="raw_logprobs",
                logits_processors=[f"{p.__module__}:{p.__name__}" for p in (ForcedTokens, GuidedTokens)],
                async_scheduling=False,  # which token is forced depends on how many were read
                **settings,
            )

    def close(self) -> None:
        """Ends vLLM's processes; the next request starts them again."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            multiprocessing.active_children()  # takes leave of those that have ended

    def _ask(self, asked: Sequence[Asked]) -> list[Any]:
        """What vLLM adds to each prompt: token ids and their raw log-probabilities, in one call.

        After any failure vLLM is ended: what it was still at must not mix with the next request's replies.
        """
        if not asked:
            return []
        llm = self.llm
        try:
            done = llm.generate(
                [{"prompt_token_ids": list(ids)} for ids, _, _ in asked],
                [params for _, params, _ in asked],
                lora_request=[lora for _, _, lora in asked],
                use_tqdm=False,
            )
        except Exception as error:
            self.close()
            raise EngineError(f"vLLM failed: {error}") from error
        except BaseException:
            self.close()
            raise
        self.prompt_tokens += sum(len(row.prompt_token_ids) for row in done)
        self.cached_tokens += sum(row.num_cached_tokens or 0 for row in done)
        return [row.outputs[0] for row in done]

    # --- scoring ----------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        opening: str,
        continuations: Sequence[Sequence[str]],
        upto: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Scored]]:
        """Token log-probabilities of each prompt's continuations of `opening`, all in one call.

        Every continuation is a request of its own whose reply is forced: the prompt comes from the prefix
        cache, which vLLM's own `prompt_logprobs` goes past.
        """
        limits = upto or [[len(text) for text in group] for group in continuations]
        asked: list[Asked] = []
        parts: list[list[tuple[str, list[int], list[int]]]] = []
        for prompt, group, ends in zip(prompts, continuations, limits, strict=True):
            before = self.encode(prompt).ids
            parts.append([])
            for text, limit in zip(group, ends, strict=True):
                ids, own, covered = self.chat.upto(opening, text, limit)
                self.check_room(len(before) + len(ids), "to score")
                parts[-1].append((text, ids[own:], covered))
                if ids[own:]:
                    asked.append(([*before, *ids[:own]], forcing(ids[own:]), None))
        done = iter(self._ask(asked))
        return [
            [Scored(text, _followed(next(done), ids) if ids else (), tuple(ends)) for text, ids, ends in row]
            for row in parts
        ]

    # --- generation -------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        """`sampling.n` replies per request, decoded together, each row under its own adapter.

        Drafts are not used. Raises TooLong if a prompt and its reply exceed the context window, EngineError
        if vLLM fails, ValueError for an adapter that vLLM can't serve or a grammar that can't be read.
        """
        if not requests:
            return []
        for grammar in {r.grammar for r in requests} - {""}:
            Guide(grammar, self.chat)  # in vLLM's process a grammar that can't be read would end it
        prompts = [self.asked(request)[1] for request in requests]
        self.check_room(max(map(len, prompts)) + sampling.max_tokens, "asked for")
        with self._loaded([r.adapter for r in requests]) as loras:
            asked = [
                (ids, self._params(request, k, sampling), lora)
                for request, ids, lora in zip(requests, prompts, loras, strict=True)
                for k in range(sampling.n)
            ]
            done = iter(self._ask(asked))
        return [
            [
                self.replied(request, d.token_ids, _log_probs(d), d.finish_reason == "stop", len(ids))
                for d in itertools.islice(done, sampling.n)
            ]
            for request, ids in zip(requests, prompts, strict=True)
        ]

    def _params(self, request: Request, k: int, sampling: Sampling) -> SamplingParams:
        """How the k-th reply to a request is decoded; each has a seed of its own, the same as under torch.

        At temperature 0 vLLM itself lets go of what is about drawing.
        """
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seed=reply_seed(request.seed, k),
            max_tokens=sampling.max_tokens,
            stop_token_ids=sorted(self.chat.stop_ids),
            logprobs=0,
            detokenize=False,
            extra_args={GRAMMAR: request.grammar} if request.grammar else None,
        )

    # --- adapters ---------------------------------------------------------------------------------------

    @contextmanager
    def _loaded(self, adapters: Sequence[Adapter | None]) -> Iterator[list[LoRARequest | None]]:
        """Within the block vLLM can answer under these adapters; after it, neither it nor any file has them.

        Names, numbers and folders are used once: vLLM keeps what it cached of a prompt by them, so that no
        two adapters ever share any of it.
        """
        distinct = {id(a): a for a in adapters if a is not None}
        for adapter in distinct.values():
            if adapter.settings.mode == "activated":
                raise ValueError(NO_ACTIVATED)
            if (rank := adapter.settings.rank) > self.rank:
                raise ValueError(f"an adapter of rank {rank}, but the engine serves up to {self.rank}")
        if not distinct:
            yield [None] * len(adapters)
            return
        loras: dict[int, LoRARequest] = {}
        prefix = f"{_FOLDER}{os.getpid()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=_memory(), ignore_cleanup_errors=True) as folder:
            try:
                for key, adapter in distinct.items():
                    self._loads += 1
                    at = Path(folder, f"ttsi-{self._loads}")
                    self.lora.save(adapter, at, base_model=self.name, invocation=())
                    loras[key] = LoRARequest(at.name, self._loads, str(at))
            except (OSError, SafetensorError) as error:
                raise EngineError(f"an adapter could not be written to {folder}: {error}") from error
            try:
                yield [None if a is None else loras[id(a)] for a in adapters]
            finally:
                self._forget(loras.values())

    def _forget(self, loras: Iterable[LoRARequest]) -> None:
        """Evicts the adapters; a vLLM that can't even do that is ended."""
        try:
            for lora in loras:
                if self._llm is not None:  # else it ended, and they with it
                    self._llm.llm_engine.remove_lora(lora.lora_int_id)
        except Exception:
            self.close()

    # --- training and embedding, by torch ---------------------------------------------------------------

    @cached_property
    def training(self) -> TorchEngine:
        """The torch engine that trains and embeds, loaded on first use."""
        from ttsi.engines.torch import TorchEngine

        return TorchEngine(self.folder, name=self.name, dtype=self.dtype, threads=self.threads, pack=False)

    def __getattr__(self, name: str) -> Any:
        if name in _TORCHS:
            return getattr(self.training, name)
        raise AttributeError(name)

    def prefix(self, ids: tuple[int, ...]) -> Any:
        """Refused: nothing that vLLM keeps can be had, and only an activated adapter trains behind it."""
        raise ValueError(NO_ACTIVATED)


def _log_probs(done: Any) -> tuple[float, ...]:
    return tuple(step[token].logprob for token, step in zip(done.token_ids, done.logprobs, strict=True))


def _followed(done: Any, forced: Sequence[int]) -> tuple[float, ...]:
    """The log-probabilities of a forced reply. Raises EngineError if vLLM said anything else."""
    if list(done.token_ids) != list(forced):
        raise EngineError("vLLM did not follow the tokens to score: its version is not the one pinned")
    return _log_probs(done)


def _memory() -> Path:
    """Where adapters lie while vLLM reads them: in memory where the system offers a place there."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _sweep() -> None:
    """Removes the adapters that killed processes left in memory."""
    for folder in _memory().glob(f"{_FOLDER}*"):
        owner = folder.name.removeprefix(_FOLDER).partition("-")[0]
        if not Path("/proc", owner).exists():  # vLLM runs on Linux only
            shutil.rmtree(folder, ignore_errors=True)


__all__ = ["NO_ACTIVATED", "VllmEngine"]
