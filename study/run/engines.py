"""The models of this process's runs: loaded once, and handed on where they were kept."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from study.data.models import model_dir
from study.run.config import Profile

_LIVE: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_KEPT: dict[tuple[Any, ...], Any] = {}
"""Models that this process's studies have loaded, and those that later ones take over."""


def load(p: Profile, model: str, dtype: str) -> Any:
    """The engine of a profile over a model; one that was kept, if there is one just like it.

    Raises ValueError for a model whose chat template can't serve the profile's training modes.
    """
    rank = max(s.rank for s in (p, *map(p.variant, p.variants)))
    key = (p.engine, model_dir(model), dtype, p.threads, p.rows, p.gpu_memory_utilization, rank)
    _LIVE[key] = engine = _KEPT.get(key) or _started(p, model, dtype, rank)
    for mode in {m for b in p.benchmarks for m in p.modes_of(b)} if model == p.model else ():
        engine.check_mode(mode)
    return engine


def _started(p: Profile, model: str, dtype: str, rank: int) -> Any:
    if p.engine == "torch":
        from ttsi.engines.torch import TorchEngine

        return TorchEngine(model_dir(model), name=model, dtype=dtype, threads=p.threads, rows=p.rows)
    try:
        from ttsi.engines.vllm import VllmEngine
    except ImportError as error:
        raise ValueError(
            "engine vllm needs vLLM, which is not in this environment: `make test-vllm` makes one, "
            f"and `make reproduce PROFILE={p.name} PY=.venv-vllm/bin/python` runs in it"
        ) from error
    return VllmEngine(
        model_dir(model),
        name=model,
        dtype=dtype,
        gpu_memory_utilization=p.gpu_memory_utilization,
        rank=rank,
        threads=p.threads,
    )


def keep_models() -> None:
    """Has later studies of this process use the models that are loaded now, with what they know of prompts.

    For notebooks that run one after the other in one kernel: what comes first in each is then not charged
    with loading a model and with passes over prompts that it has read before.
    """
    _KEPT.update(_LIVE)
