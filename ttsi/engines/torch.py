"""The reference engine: a transformers model on a CPU or a GPU, with shared prefixes and per-row adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from ttsi.engines.attention import additive, uneven, within
from ttsi.engines.base import EngineError, Prompt, Request, native_dtype
from ttsi.engines.cache import KeyValues, PrefixCache, RowCache
from ttsi.engines.chat import Chat, ChatEngine, Encoded
from ttsi.engines.decoding import Decoder, chunks, log_probs
from ttsi.engines.loading import check_head, load, prefixes_kept, skip_unread
from ttsi.engines.loading import pack as pack_weights
from ttsi.engines.lora import Adapter, FrozenWeight, LabelLoss, LoraLayers
from ttsi.types import Generation, Sampling, Scored

_CHUNK_TOKENS = 256  # prefills are batched up to this many tokens a pass; beyond it one row fills the cores


@dataclass
class Counters:
    """What the engine did since it was made: tokens per kind of pass, passes, drafted and accepted tokens."""

    prefix_tokens: int = 0
    prompt_tokens: int = 0
    scored_tokens: int = 0
    decoded_tokens: int = 0
    decode_rows: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0


class TorchEngine(ChatEngine):
    """An `Engine` over a transformers causal language model.

    folder: a model folder (config, tokenizer, safetensors).
    dtype: "auto", "float32" or "bfloat16"; adapters and their optimisers are float32 always.
    rows: replies in flight at a time, by default all that are asked for. In float32 only: in bfloat16, where
        the shape of a batch can turn a near-tie, all that are asked for together are decoded together.
    prefix_limit: bytes of prefix key-values to keep; by default 4 GiB, on a CPU 1 to 4 (`prefixes_kept`).
    drafts: whether drafted decoding is on; it changes the speed, not the text (float32).
    pack: see `FrozenWeight`: twice the speed where reading weights is what takes the time, for as much
        memory again. By default on a CPU in float32 if a quarter of the free memory holds the weights.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        rows: int | None = None,
        prefix_limit: int | None = None,
        drafts: bool = True,
        pack: bool | None = None,
        threads: int | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = getattr(torch, native_dtype() if dtype == "auto" else dtype)
        self.name = name or Path(folder).name
        self.chat = Chat(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        self.model = load(folder, self.dtype, self.device)
        self.decoder = self.model.get_decoder()
        self._head = FrozenWeight(self.model.get_output_embeddings().weight)
        where = {module: name for name, module in self.model.named_modules()}
        self.lora = LoraLayers(self.decoder, where[self.decoder])
        pack_weights(self.model, [self._head, *(x.weight for x in self.lora.layers)], pack)
        config = self.model.config.get_text_config()
        self.context: int = config.max_position_embeddings
        self.groups: int = config.num_attention_heads // config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        empty = torch.zeros(1, 0, config.num_key_value_heads, dim, dtype=self.dtype, device=self.device)
        self._nothing: KeyValues = [(empty, empty)] * config.num_hidden_layers
        self.window: int | None = getattr(config, "sliding_window", None)
        """Tokens that a layer with a sliding window sees; None = there are no such layers."""
        self.prefixes = PrefixCache(prefix_limit or prefixes_kept(self.device))
        self.rows, self.drafts = rows, drafts
        self.counters = Counters()
        self._mask4d = torch.zeros(1, 1, 1, 1, device=self.device)
        self._last_block = skip_unread(self.decoder.layers[-1].mlp)
        one = {"input_ids": self._tensor([[0]]), "attention_mask": self._mask4d}
        check_head(self.model, self._head, one)

    # --- forward passes ---------------------------------------------------------------------------------

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Any,
        prefix: KeyValues | None = None,
        read_from: int = 0,
        keys: Tensor | None = None,
        ends: list[int] | None = None,
    ) -> Tensor:
        """Final hidden states [rows, tokens, width]; adapters as applied by the caller.

        keys: where the keys stand that the mask is about [rows, keys]; by default they are the tokens' own.
        read_from: the first token whose hidden state is read; those of the tokens before it are not had.
        ends: see `attention`.
        """
        self.counters.passes += 1
        self._last_block.read_from = read_from
        near = within(self.window, positions, positions if keys is None else keys, mask)
        masks = [
            m if m is None or cache is None else additive(m, self.groups, self.dtype) for m in (mask, near)
        ]
        return self.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask4d,  # four dimensions: transformers builds none of its own
            ttsi_mask=masks[0],
            ttsi_near=masks[1],
            ttsi_prefix=prefix,
            ttsi_ends=ends,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (float32) [..., vocabulary] of hidden states [..., width]."""
        return self._head(hidden).float()

    def prefix(self, ids: tuple[int, ...]) -> KeyValues:
        """Keys and values of a system turn under the base weights, from the cache if they are there."""

        def compute() -> KeyValues:
            self.counters.prefix_tokens += len(ids)
            cache = RowCache(self._nothing, 1, len(ids))
            self.step(cache, [ids], [0], len(ids) - 1)
            return cache.pairs

        with torch.no_grad():
            return self.prefixes.get(ids, compute) if ids else self._nothing

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(r) for r in rows)
        return torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], device=self.device)

    def step(
        self, cache: RowCache, rows: Sequence[Sequence[int]], starts: Sequence[int], read_from: int = 0
    ) -> Tensor:
        """Feeds each row's tokens behind its `start`; padding lands in slots that are overwritten later.

        Or, where a row has few slots left, in the last one, which no reply ever reaches. read_from: see
        `forward`.
        """
        ids = self._tensor(rows)
        steps = torch.arange(ids.shape[1], device=self.device)
        slots = torch.tensor(starts, device=self.device)[:, None] + steps
        cache.slots = slots.clamp(max=cache.capacity - 1)
        ends = [start + len(row) for start, row in zip(starts, rows, strict=True)]
        cache.visible = max(ends)
        seen = torch.arange(cache.visible, device=self.device)
        mask = (seen[None, None] <= cache.slots[..., None])[:, None]
        whole = len(rows) == 1 and starts[0] == 0
        apart = uneven(ends) if (self.device.type, self.dtype) == ("cpu", torch.float32) else None
        return self.forward(
            ids, cache.slots, None if whole else mask, cache, None, read_from, seen[None], apart
        )

    # --- scoring ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        opening: str,
        continuations: Sequence[Sequence[str]],
        upto: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Scored]]:
        """Token log-probabilities of each prompt's continuations, in one pass per prompt.

        All continuations stand side by side behind the cached prefix; each sees the prompt and itself.
        """
        ends = upto or [[len(c) for c in group] for group in continuations]
        with self.outside_failures():
            return [
                self._score(p, opening, c, e) for p, c, e in zip(prompts, continuations, ends, strict=True)
            ]

    def _score(
        self, prompt: Prompt, opening: str, continuations: Sequence[str], upto: Sequence[int]
    ) -> list[Scored]:
        code = self.encode(prompt)
        parts = [self.chat.upto(opening, t, limit) for t, limit in zip(continuations, upto, strict=True)]
        columns = zip(*(ids[:own] for ids, own, _ in parts), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        stem = [*code.ids[code.prefix :], *parts[0][0][:shared]]
        tails = [ids[shared:] for ids, _, _ in parts]
        read = [tail[:-1] for tail in tails]  # the last token is predicted and predicts nothing
        base, n, total = code.prefix, len(stem), len(stem) + sum(map(len, read))
        self.check_room(base + total, "to score")

        owner = self._tensor([[*[-1] * n, *(i for i, tail in enumerate(read) for _ in tail)]])[0]
        depth = self._tensor([[*range(n), *(n + j for tail in read for j in range(len(tail)))]])
        order = torch.arange(total, device=self.device)
        seen = ((owner == -1) | (owner == owner[:, None])) & (order <= order[:, None])
        mask = torch.nn.functional.pad(seen, (base, 0), value=True)[None, None]
        cache = RowCache.of([self.prefix(code.ids[:base])], base + total)
        cache.slots, cache.visible = base + order[None], base + total
        ids = self._tensor([[*stem, *chain.from_iterable(read)]])
        keys = torch.cat([torch.arange(base, device=self.device)[None], base + depth], dim=1)
        hidden = self.forward(ids, base + depth, mask, cache, None, n - 1, keys)[0]
        self.counters.scored_tokens += total

        spans = pairwise(accumulate(map(len, read), initial=n))
        before = [i for at, end in spans for i in (n - 1, *range(at, end))]
        values = log_probs(self.head(hidden[before]), [*chain.from_iterable(tails)])
        rows = torch.split(values, [len(tail) for tail in tails])
        # Less the opening tokens that a continuation did not share with the others.
        return [
            Scored(text, tuple(row[own - shared :].tolist()), tuple(ends))
            for text, (_, own, ends), row in zip(continuations, parts, rows, strict=True)
        ]

    # --- generation -------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        """`sampling.n` replies per request, each row under its own adapter, in float32 `rows` at a time.

        Raises TooLong if a prompt and its reply exceed the context window, EngineError if the machine fails.
        """
        if not requests:
            return []
        for adapter in filter(None, (r.adapter for r in requests)):
            self.check_mode(adapter.settings.mode)
        with self.outside_failures():
            most = self.rows if self.dtype == torch.float32 else None
            replies = Decoder(self, requests, sampling, most).run()
        return [replies[i : i + sampling.n] for i in range(0, len(replies), sampling.n)]

    def prefill(
        self, requests: Sequence[Request], asked: Sequence[tuple[Encoded, list[int]]]
    ) -> list[tuple[KeyValues, Tensor]]:
        """Each prompt's keys and values, and the logits [1, vocabulary] behind it, under its adapter.

        asked: ids as `ChatEngine.asked` gives them. An activated adapter leaves the history before the last
        user turn to the base weights.
        """
        adapters = [r.adapter for r in requests]
        kept, history = [], {}
        for i, (adapter, (code, ids)) in enumerate(zip(adapters, asked, strict=True)):
            exact = adapter is not None and adapter.settings.mode == "exact"
            own = adapter is not None and not exact  # a template without a system turn has it in the user's
            base = min(code.prefix, code.turn) if own else code.prefix
            kept.append(self.prefix(() if exact else code.ids[:base]))
            if own and code.turn > base:
                history[i] = ids[base : code.turn]
        self._read(kept, history, [None] * len(kept))
        last = self._read(kept, {i: ids[_length(kept[i]) :] for i, (_, ids) in enumerate(asked)}, adapters)
        return list(zip(kept, self.head(last)[:, None], strict=True))

    def _read(
        self, kept: list[KeyValues], parts: Mapping[int, list[int]], adapters: Sequence[Adapter | None]
    ) -> Tensor:
        """Reads tokens behind what is kept of the named prompts, batched as far as that helps, and keeps
        them too; last hidden state per prompt."""
        last = []
        for chunk in chunks(parts, 1 << 30 if self.device.type == "cuda" else _CHUNK_TOKENS):
            tokens, starts = [parts[i] for i in chunk], [_length(kept[i]) for i in chunk]
            cache = RowCache.of([kept[i] for i in chunk], max(starts) + max(map(len, tokens)))
            with self.lora.applied(self.lora.stack([adapters[i] for i in chunk])):
                hidden = self.step(cache, tokens, starts, min(map(len, tokens)) - 1)
            for row, i in enumerate(chunk):
                kept[i] = cache.read(row, starts[row] + len(tokens[row]))
                last.append(hidden[row, len(tokens[row]) - 1])
            self.counters.prompt_tokens += sum(map(len, tokens))
        return torch.stack(last) if last else torch.empty(0)

    # --- training ---------------------------------------------------------------------------------------

    def training_pass(
        self,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        prefixes: Sequence[KeyValues] | None,
        read_from: int,
    ) -> Tensor:
        """Hidden states [rows, tokens, width] with gradients, of `rows` read behind their prefixes.

        read_from: see `forward`.
        """
        ids = self._tensor(rows)
        order = torch.arange(ids.shape[1], device=self.device)
        start = torch.tensor(starts, device=self.device)
        mask = prefix = None
        positions = keys = start[:, None] + order
        if prefixes is not None or len(rows) > 1:
            width = max(map(_length, prefixes)) if prefixes else 0
            before = (torch.arange(width, device=self.device) < start[:, None])[:, None]
            own = (order <= order[:, None]).expand(len(rows), -1, -1)
            mask = torch.cat([before.expand(-1, len(order), -1), own], dim=2)[:, None]
            if prefixes:
                padded = RowCache.of(prefixes, width).pairs
                prefix = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in padded]
                behind = torch.arange(width, device=self.device).expand(len(rows), -1)
                keys = torch.cat([behind, positions], dim=1)
        return self.forward(ids, positions, mask, None, prefix, read_from, keys)

    def label_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean loss (nats) of `labels` [tokens] after `hidden` [tokens, width], with a gradient to those."""
        loss: Tensor = LabelLoss.apply(hidden, self._head, labels)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Mean-pooled final hidden states of the base weights, float32 [texts, width]."""
        out = []
        for text in texts:
            ids = self.chat.continuation("", text)[0][: self.context] or [self.chat.end_of_turn]
            cache = RowCache(self._nothing, 1, len(ids))
            out.append(self.step(cache, [ids], [0])[0].float().mean(dim=0).cpu().numpy())
        return np.stack(out)

    @contextmanager
    def outside_failures(self) -> Iterator[None]:
        """Within the block, running out of memory is an EngineError: the machine's failure, not an answer."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            full = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if full or "memory" in str(error).lower():
                raise EngineError(f"out of memory: {error}") from error
            raise


def _length(kept: KeyValues) -> int:
    return kept[0][0].shape[1]


__all__ = ["Adapter", "Counters", "TorchEngine"]
