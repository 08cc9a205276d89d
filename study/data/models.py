"""Models by name, the tiny one included: where they lie and what identifies them. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

from study.data import benchmarks, fixture, sources
from study.data.cache import built, cache_dir
from study.data.downloads import digest
from ttsi import calls, prompts

TINY = "tiny"


def model_dir(name: str) -> Path:
    """Folder of a model's config, tokenizer and weights; fetched, or for `tiny` fitted, if need be."""
    if name != TINY:
        return sources.model_dir(name)
    from study.data import tiny  # its fitting needs torch, its name doesn't

    source = tiny_hash()
    return built(cache_dir() / "models" / f"tiny-{source[:16]}", source, tiny.build)


def is_here(name: str) -> bool:
    """Whether a model lies on this machine already."""
    return name == TINY or sources.folder_of(name).is_dir() or Path(name).expanduser().is_dir()


@cache
def model_hash(name: str) -> str:
    """What identifies a model's weights, tokenizer and chat template, without fetching any of them.

    All three lie in the GGUF file, at the hub's revision, or in the local folder that is hashed.
    """
    return tiny_hash() if name == TINY else sources.model_hash(name)


def tiny_hash() -> str:
    """What the tiny model is made from: its code, its lessons, the prompts and the libraries that fit it.

    Changing one fits anew.
    """
    versions = [importlib.metadata.version(p) for p in ("torch", "transformers", "tokenizers")]
    files = [Path(__file__).with_name("tiny.py"), fixture.WRITTEN]
    files += [Path(str(module.__file__)) for module in (fixture, benchmarks, calls)]
    parts = [*map(digest, files), prompts.version(), *versions]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
