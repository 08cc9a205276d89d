"""The reference engine: a transformers model on a CPU or a GPU, with shared prefixes and per-row adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hub_logging

from ttsi.engines.base import EngineError, Prompt, Request, native_dtype
from ttsi.engines.cache import KeyValues, PrefixCache, RowCache, padded
from ttsi.engines.chat import Chat, ChatEngine
from ttsi.engines.drafts import propose
from ttsi.engines.lora import Adapter, Bank, FrozenWeight, LabelLoss, LoraLayers
from ttsi.seeds import reply_seed
from ttsi.types import Generation, Sampling, Scored

_GROUP_TOKENS = 16  # up to this many query tokens, heads that share keys are folded instead of repeated
_FREE_ROWS = 6  # so many tokens cost a pass little more than one: room for guesses from the prompt
_DRAFT_ROWS = 32  # room for guesses from an earlier answer, most of which come true
_CHUNK_TOKENS = 256  # prefills are batched up to this many tokens a pass; beyond it one row fills the cores


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention under an explicit mask [rows, 1, queries, keys]; None means causal.

    Under a mask that `_folded` made, query tokens are folded into the group dimension, so that shared
    key-value heads are not copied once per query head at every decoding step.

    ttsi_prefix: keys and values per layer that stand in front of the new ones in a training pass.
    """
    mask: Any = kwargs.get("ttsi_mask")
    scale, prefix = kwargs.get("scaling"), kwargs.get("ttsi_prefix")
    if prefix is not None:
        keys, values = prefix[module.layer_idx]
        if query.device.type == "cpu" and query.dtype == torch.float32:
            if len(query) == 1:  # no padding: the prefix is seen whole
                mask = mask[..., keys.shape[2] :]
            out = _BehindPrefix.apply(query, key, value, keys, values, mask, scale)  # type: ignore[no-untyped-call]
            return out.transpose(1, 2), None
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    groups = query.shape[1] // key.shape[1]
    rows, heads, length, dim = query.shape
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if mask is not None and mask.shape[2] != length:
        folded = query.reshape(rows, key.shape[1], groups * length, dim)
        out = sdpa(folded, key, value, attn_mask=mask, scale=scale)
        out = out.reshape(rows, heads, length, dim)
    else:
        out = sdpa(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
        )
    return out.transpose(1, 2), None


class _BehindPrefix(torch.autograd.Function):
    """Attention of new tokens to a prefix and to themselves, with gradients to the new ones only.

    Query [rows, heads, tokens, dim]; new and prefix keys and values [rows, shared heads, length, dim]. On a
    CPU the library's own backward pass computes the gradients of the prefix too, the greater part by far, and
    copies the shared heads. A mask of fewer columns is of the last ones; the others are seen by all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
        scale: float,
    ) -> Tensor:
        rows, shared, length, dim = key.shape
        width = keys.shape[2]
        keys = torch.cat([keys, key], dim=2).flatten(0, 1)
        values = torch.cat([values, value], dim=2).flatten(0, 1)
        folded = (query * scale).reshape(rows * shared, -1, dim)  # heads that share keys, one after another
        scores = torch.bmm(folded, keys.transpose(1, 2))
        scores.view(rows, -1, length, width + length)[..., -mask.shape[3] :].masked_fill_(~mask, -torch.inf)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(folded, keys, values, weights)
        ctx.width, ctx.scale = width, scale
        return torch.bmm(weights, values).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        folded, keys, values, weights = ctx.saved_tensors
        shape, shared = gradient.shape, (gradient.shape[0], -1, gradient.shape[2], gradient.shape[3])
        gradient = gradient.reshape(folded.shape)
        into_value = torch.bmm(weights[..., ctx.width :].transpose(1, 2), gradient)
        into_scores = torch._softmax_backward_data(
            torch.bmm(gradient, values.transpose(1, 2)), weights, -1, weights.dtype
        )
        into_query = torch.bmm(into_scores, keys).mul_(ctx.scale)
        into_key = torch.bmm(into_scores[..., ctx.width :].transpose(1, 2), folded)
        return into_query.view(shape), into_key.view(shared), into_value.view(shared), None, None, None, None


AttentionInterface.register("ttsi", attention)


class _LastBlock(torch.nn.Module):
    """The last layer's feed-forward block, for those tokens whose hidden state somebody reads.

    Nothing after it mixes tokens: what a prefix pass keeps of the last layer is its keys and values.
    """

    def __init__(self, whole: torch.nn.Module) -> None:
        super().__init__()
        self.whole = whole
        self.read_from = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.read_from == 0:
            return self.whole(x)
        unread = torch.zeros_like(x[:, : self.read_from])
        return torch.cat([unread, self.whole(x[:, self.read_from :])], dim=1)


@dataclass
class _Row:
    """One reply in the making."""

    request: int
    ids: list[int]  # prompt and opening
    draft: tuple[int, ...]
    lookup: tuple[int, ...]
    rng: torch.Generator
    out: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False
    trust: int = _GROUP_TOKENS  # length of the next draft: grows while drafts come true


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
    prefix_limit: bytes of prefix key-values to keep; by default 4 GiB on a GPU and 1 GiB on a CPU.
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
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would stand in every notebook, full
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=self.dtype,
            attn_implementation="ttsi",
            trust_remote_code=False,
            use_safetensors=True,
        )
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.chat = Chat(tokenizer)
        self.decoder = self.model.get_decoder()
        head: Tensor = self.model.get_output_embeddings().weight
        self._head = FrozenWeight(head)
        self.lora = LoraLayers(self.decoder)
        if pack is None:
            needed = sum(p.numel() * p.element_size() for p in self.model.parameters())
            pack = needed < _free_memory() / 4
        if pack:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(FrozenWeight.pack, [self._head, *(x.weight for x in self.lora.layers)]))
        self.context: int = self.model.config.max_position_embeddings
        self.prefixes = PrefixCache(prefix_limit or (4 << 30 if self.device.type == "cuda" else 1 << 30))
        self.drafts = drafts
        self.counters = Counters()
        self._mask4d = torch.zeros(1, 1, 1, 1, device=self.device)
        last = self.decoder.layers[-1]
        last.mlp = self._last_block = _LastBlock(last.mlp)

    # --- forward passes ---------------------------------------------------------------------------------

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Any,
        prefix: KeyValues | None = None,
        read_from: int = 0,
    ) -> Tensor:
        """Final hidden states [rows, tokens, width]; adapters as applied by the caller.

        read_from: the first token whose hidden state is read; those of the tokens before it are not had.
        """
        self.counters.passes += 1
        self._last_block.read_from = read_from
        return self.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask4d,  # four dimensions: transformers builds none of its own
            ttsi_mask=mask if mask is None or cache is None else self._folded(mask),
            ttsi_prefix=prefix,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _folded(self, mask: Tensor) -> Tensor:
        """The mask of a few tokens per row as what is added to their scores, once per head of a group."""
        groups = self.model.config.num_attention_heads // self.model.config.num_key_value_heads
        if groups == 1 or mask.shape[2] > _GROUP_TOKENS:
            return mask
        added = torch.zeros(mask.shape, dtype=self.dtype, device=self.device).masked_fill_(~mask, -torch.inf)
        return added.repeat(1, 1, groups, 1)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (float32) [..., vocabulary] of hidden states [..., width]."""
        return self._head(hidden).float()

    def prefix(self, ids: tuple[int, ...]) -> KeyValues:
        """Keys and values of a system turn under the base weights, from the cache if they are there."""

        def compute() -> KeyValues:
            self.counters.prefix_tokens += len(ids)
            n = len(ids)
            cache = self._rows([self._empty()], n)
            cache.slots, cache.visible = torch.arange(n, device=self.device)[None], n
            self.forward(self._tensor([ids]), cache.slots, None, cache, read_from=n - 1)
            return list(zip(cache.keys, cache.values, strict=True))

        with torch.no_grad():
            return self.prefixes.get(ids, compute)

    def _empty(self) -> KeyValues:
        config = self.model.config
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        empty = torch.zeros(1, 0, heads, dim, dtype=self.dtype, device=self.device)
        return [(empty, empty)] * config.num_hidden_layers

    def _rows(self, prefixes: Sequence[KeyValues], capacity: int) -> RowCache:
        return RowCache.from_prefixes(prefixes, capacity)

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(r) for r in rows)
        return torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], device=self.device)

    def _step(
        self, cache: RowCache, rows: Sequence[Sequence[int]], starts: Sequence[int], read_from: int = 0
    ) -> Tensor:
        """Feeds each row's tokens behind its `start`; padding lands in slots that are overwritten later.

        Or, where a row has few slots left, in the last one, which no reply ever reaches. read_from: see
        `forward`.
        """
        ids = self._tensor(rows)
        steps = torch.arange(ids.shape[1], device=self.device)
        slots = torch.tensor(starts, device=self.device)[:, None] + steps
        cache.slots = slots.clamp(max=cache.keys[0].shape[1] - 1)
        cache.visible = max(start + len(row) for start, row in zip(starts, rows, strict=True))
        seen = torch.arange(cache.visible, device=self.device)
        mask = (seen[None, None] <= cache.slots[..., None])[:, None]
        whole = len(rows) == 1 and starts[0] == 0
        return self.forward(ids, cache.slots, None if whole else mask, cache, read_from=read_from)

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
        shared = min(n for _, n, _ in parts)
        while any(ids[:shared] != parts[0][0][:shared] for ids, _, _ in parts):
            shared -= 1
        stem = [*code.ids[code.prefix :], *parts[0][0][:shared]]
        tails = [ids[shared:] for ids, _, _ in parts]
        read = [tail[:-1] for tail in tails]  # the last token is predicted and predicts nothing
        flat = [t for tail in read for t in tail]
        base, n, total = code.prefix, len(stem), len(stem) + len(flat)
        self.check_room(base + total, "to score")

        owner = torch.tensor([-1] * n + [i for i, tail in enumerate(read) for _ in tail], device=self.device)
        positions = torch.tensor(
            [*range(base, base + n), *(base + n + j for tail in read for j in range(len(tail)))],
            device=self.device,
        )
        order = torch.arange(total, device=self.device)
        mine = (owner[None] == -1) | (owner[None] == owner[:, None])
        new = mine & (order[None] <= order[:, None])
        mask = torch.cat([torch.ones(total, base, dtype=torch.bool, device=self.device), new], dim=1)
        cache = self._rows([self.prefix(code.ids[:base]) if base else self._empty()], base + total)
        cache.slots, cache.visible = base + order[None], base + total
        ids = self._tensor([[*stem, *flat]])
        hidden = self.forward(ids, positions[None], mask[None, None], cache, read_from=n - 1)[0]
        self.counters.scored_tokens += total

        before, at = [], n
        for tail in read:
            before += [n - 1, *range(at, at + len(tail))]
            at += len(tail)
        logits = self.head(hidden[before])
        wanted = torch.tensor([t for tail in tails for t in tail], device=self.device)
        values = (logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=-1)).tolist()
        out, at = [], 0
        for text, (_, own, ends), tail in zip(continuations, parts, tails, strict=True):
            skip = own - shared  # opening tokens this continuation did not share with the others
            out.append(Scored(text, tuple(values[at + skip : at + len(tail)]), tuple(ends)))
            at += len(tail)
        return out

    # --- generation -------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        """`sampling.n` replies per request, decoded together, each row under its own adapter.

        Raises TooLong if a prompt and its reply exceed the context window, EngineError if the machine fails.
        """
        if not requests:
            return []
        with self.outside_failures():
            cache, rows, logits, bank = self._prefill(requests, sampling)
            done = self._decode(cache, rows, logits, bank, sampling)
        replies: list[list[Generation]] = [[] for _ in requests]
        for row in done:
            replies[row.request].append(
                self.replied(requests[row.request], row.out, row.log_probs, row.finished, len(row.ids))
            )
        return replies

    def _prefill(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> tuple[RowCache, list[_Row], Tensor, Bank | None]:
        codes, ids = zip(*map(self.asked, requests), strict=True)
        longest = max(map(len, ids)) + sampling.max_tokens
        self.check_room(longest, "asked for")
        exact = [r.adapter is not None and r.adapter.settings.mode == "exact" for r in requests]
        starts = [0 if e else c.prefix for e, c in zip(exact, codes, strict=True)]
        prefixes = [
            self.prefix(c.ids[:s]) if s else self._empty() for c, s in zip(codes, starts, strict=True)
        ]
        cache = self._rows(prefixes, longest + _GROUP_TOKENS)
        bank = self.lora.stack([r.adapter for r in requests])

        # An activated adapter leaves the history before the last user turn to the base weights.
        history = [
            i
            for i, r in enumerate(requests)
            if r.adapter is not None and not exact[i] and codes[i].turn > starts[i]
        ]
        if history:
            ends = {i: codes[i].turn for i in history}
            self._fill(cache, {i: ids[i][starts[i] : ends[i]] for i in history}, starts, None)
            starts = [ends.get(i, s) for i, s in enumerate(starts)]
        last = self._fill(cache, {i: ids[i][starts[i] :] for i in range(len(ids))}, starts, bank)
        logits = self.head(last)

        rows = []
        for i, request in enumerate(requests):
            look = (*request.draft, *ids[i]) if request.lookup else ()
            for k in range(sampling.n):
                rng = torch.Generator().manual_seed(reply_seed(request.seed, k))
                rows.append(_Row(i, ids[i], request.draft, tuple(look), rng))
        if sampling.n > 1:
            repeat = torch.arange(len(requests), device=self.device).repeat_interleave(sampling.n)
            cache.select(repeat)
            logits = logits[repeat]
            bank = [(a[repeat], b[repeat]) for a, b in bank] if bank else None
        return cache, rows, logits, bank

    def _fill(
        self, cache: RowCache, parts: dict[int, list[int]], starts: Sequence[int], bank: Bank | None
    ) -> Tensor:
        """Feeds prompt tokens to the named rows, batched as far as that helps; last hidden state per row."""
        last = {}
        for chunk in _chunks(parts, 1 << 30 if self.device.type == "cuda" else _CHUNK_TOKENS):
            index = torch.tensor(chunk, device=self.device)
            view = RowCache()
            view.keys, view.values = ([t[index] for t in side] for side in (cache.keys, cache.values))
            tokens = [parts[i] for i in chunk]
            with self.lora.applied([(a[index], b[index]) for a, b in bank] if bank else None):
                read_from = min(map(len, tokens)) - 1
                hidden = self._step(view, tokens, [starts[i] for i in chunk], read_from)
            for side, new in ((cache.keys, view.keys), (cache.values, view.values)):
                for old, tensor in zip(side, new, strict=True):
                    old[index] = tensor
            for row, i in enumerate(chunk):
                last[i] = hidden[row, len(tokens[row]) - 1]
            self.counters.prompt_tokens += sum(map(len, tokens))
        return torch.stack([last[i] for i in sorted(last)])

    def _decode(
        self, cache: RowCache, rows: list[_Row], logits: Tensor, bank: Bank | None, sampling: Sampling
    ) -> list[_Row]:
        everyone = list(rows)
        pending: list[tuple[int, ...]] = [()] * len(rows)
        batch: list[Tensor] = list(logits[:, None])
        while True:
            for row, row_logits, draft in zip(rows, batch, pending, strict=True):
                self._accept(row, row_logits, draft, sampling)
            active = [i for i, r in enumerate(rows) if not r.finished and len(r.out) < sampling.max_tokens]
            if not active:
                return everyone
            if 4 * len(active) <= 3 * len(rows):
                index = torch.tensor(active, device=self.device)
                cache.select(index)
                bank = [(a[index], b[index]) for a, b in bank] if bank else None
                rows = [rows[i] for i in active]
            pending = [self._draft(r, sampling, len(rows)) for r in rows]
            tokens = [[r.out[-1], *d] for r, d in zip(rows, pending, strict=True)]
            starts = [len(r.ids) + len(r.out) - 1 for r in rows]
            with self.lora.applied(bank):
                hidden = self._step(cache, tokens, starts)
            self.counters.decode_rows += len(rows)
            flat = torch.cat([hidden[i, : len(t)] for i, t in enumerate(tokens)])
            batch = list(torch.split(self.head(flat), [len(t) for t in tokens]))

    def _draft(self, row: _Row, sampling: Sampling, rows: int) -> tuple[int, ...]:
        if row.finished or len(row.out) >= sampling.max_tokens or not self.drafts:
            return ()
        room = _FREE_ROWS // rows - 1
        if row.draft:
            room = max(room, min(_DRAFT_ROWS // rows, _GROUP_TOKENS, row.trust + 1) - 1)
        room = min(room, sampling.max_tokens - len(row.out) - 1)
        return propose(row.out, row.draft, row.lookup, room)

    def _accept(self, row: _Row, logits: Tensor, draft: tuple[int, ...], sampling: Sampling) -> None:
        """Takes tokens from `logits` [1 + drafted, vocabulary] as long as the draft foresaw them.

        Every token is chosen from the model's own distribution with the row's own generator, so the text
        is that of decoding one token at a time; the draft only decides how many are had in one pass.
        """
        if row.finished or len(row.out) >= sampling.max_tokens:
            return
        self.counters.drafted += len(draft)
        greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        best = logits.argmax(dim=-1).tolist() if greedy else []
        picked = []
        for i in range(len(draft) + 1):
            token = best[i] if greedy else _pick(logits[i], [*row.ids, *row.out], sampling, row.rng)
            picked.append(token)
            row.out.append(token)
            row.finished = token in self.chat.stop_ids
            if row.finished or len(row.out) >= sampling.max_tokens or i == len(draft) or draft[i] != token:
                break
        if draft:
            came_true = len(picked) - 1
            row.trust = min(2 * row.trust, _GROUP_TOKENS) if came_true == len(draft) else came_true + 1
        chosen = torch.tensor(picked, device=logits.device)
        used = logits[: len(picked)]
        values = used.gather(1, chosen[:, None])[:, 0] - used.logsumexp(dim=-1)
        row.log_probs += values.tolist()
        self.counters.accepted += len(picked) - 1
        self.counters.decoded_tokens += len(picked)

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
        prefix = padded(prefixes) if prefixes is not None else None
        order = torch.arange(ids.shape[1], device=self.device)
        start = torch.tensor(starts, device=self.device)
        mask = None
        if prefixes is not None or len(rows) > 1:
            own = (order[None] <= order[:, None]).expand(len(rows), -1, -1)
            width = prefix[0][0].shape[2] if prefix else 0
            before = torch.arange(width, device=self.device)[None] < start[:, None]
            mask = torch.cat([before[:, None].expand(-1, len(order), -1), own], dim=2)[:, None]
        return self.forward(ids, start[:, None] + order, mask, None, prefix, read_from)

    def label_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean loss (nats) of `labels` [tokens] after `hidden` [tokens, width], with a gradient to those."""
        loss: Tensor = LabelLoss.apply(hidden, self._head, labels)  # type: ignore[no-untyped-call]
        return loss

    # --- embedding --------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Mean-pooled final hidden states of the base weights, float32 [texts, width]."""
        out = []
        for text in texts:
            ids = self.chat.continuation("", text)[0][: self.context] or [self.chat.end_of_turn]
            cache = self._rows([self._empty()], len(ids))
            out.append(self._step(cache, [ids], [0])[0].float().mean(dim=0).cpu().numpy())
        return np.stack(out)

    @contextmanager
    def outside_failures(self) -> Iterator[None]:
        """Within the block, running out of memory is an EngineError: the machine's failure, not an answer."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise EngineError(f"out of memory: {error}") from error
        except RuntimeError as error:
            if "memory" in str(error).lower():
                raise EngineError(f"out of memory: {error}") from error
            raise


def _free_memory() -> int:
    """Bytes of memory that this machine can still give; 0 where it doesn't say."""
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


def _chunks(parts: dict[int, list[int]], limit: int) -> Iterator[list[int]]:
    """Rows grouped so that no pass exceeds `limit` tokens, padding included, and none is left out."""
    chunk: list[int] = []
    for i in sorted(parts):
        width = max(len(parts[j]) for j in [*chunk, i])
        if chunk and width * (len(chunk) + 1) > limit:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def _pick(logits: Tensor, history: list[int], sampling: Sampling, rng: torch.Generator) -> int:
    """One token: penalty, temperature, top-k and top-p in transformers' order."""
    logits = logits.float().cpu().clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(history)))
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    k = sampling.top_k or len(logits)
    top, index = (logits / sampling.temperature).topk(min(k, len(logits)))
    probabilities = top.softmax(dim=-1)
    if not bool(probabilities.isfinite().all()):
        return int(index[0])  # nothing to draw from; the log-probability says so, and the caller refuses it
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= sampling.top_p] = 0  # the first token always stays
    return int(index[torch.multinomial(probabilities, 1, generator=rng)])


__all__ = ["Adapter", "Counters", "TorchEngine"]
