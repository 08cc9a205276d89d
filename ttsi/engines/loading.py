"""A model folder as the torch engine needs it: loaded, or refused where the engine would be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hub_logging

import ttsi.engines.attention  # noqa: F401  # registers "ttsi"
from ttsi.engines.lora import FrozenWeight


def load(folder: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers model under ttsi's attention, its weights frozen. Raises ValueError for other layers."""
    # It would stand in every notebook, full.
    hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="ttsi", trust_remote_code=False, use_safetensors=True
    )
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if other := layers - {"full_attention", "sliding_attention"}:
        raise ValueError(f"the model has layers of {other.pop()}, which ttsi's engine doesn't compute")
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def check_head(model: Any, head: FrozenWeight, one: dict[str, Tensor]) -> None:
    """Raises ValueError if the logits of `one` token are more than a product with the head: a bias, a cap."""
    ours = head(model.get_decoder()(**one).last_hidden_state).float()
    theirs = model(**one).logits.float()
    if not torch.allclose(ours, theirs, rtol=0, atol=1e-3 * float(theirs.abs().max())):
        name = type(model).__name__
        raise ValueError(f"{name} does more with its logits than a product, which ttsi doesn't compute")


def pack(model: Any, weights: Sequence[FrozenWeight], wanted: bool | None) -> None:
    """Packs the weights, by default if a quarter of the free memory holds the model's."""
    if wanted is None:
        wanted = sum(p.numel() * p.element_size() for p in model.parameters()) < _free_memory() / 4
    if wanted:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(FrozenWeight.pack, weights))


def prefixes_kept(device: torch.device) -> int:
    """Bytes of prefixes to keep: were it fewer than a group's, each stage would read every prompt again."""
    most = 4 << 30
    return most if device.type == "cuda" else min(most, max(1 << 30, _free_memory() // 8))


def skip_unread(block: Any) -> Any:
    """The last layer's feed-forward block, made to compute only the tokens from `block.read_from` on.

    Nothing after it mixes tokens: what a prefix pass keeps of the last layer is its keys and values.
    """
    block.read_from = 0
    block.register_forward_pre_hook(lambda b, inputs: (inputs[0][:, b.read_from :],))
    block.register_forward_hook(
        lambda b, _, out: torch.nn.functional.pad(out, (0, 0, b.read_from, 0)) if b.read_from else out
    )
    return block


def _free_memory() -> int:
    """Bytes of memory that this machine can still give; 0 where it doesn't say."""
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
