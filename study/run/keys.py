"""What is hashed into keys, in a form of its own: classes may be renamed and fields added, keys stay.

A result is stored under the hash of its settings, and those hold digests of what was taught. Written by
`repr` or `asdict`, they would be other ones as soon as a class is called something else, and hours of results
would be orphaned without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from study.data.pools import Worked
from ttsi.types import LoraSettings, Message, Query, Sampling, Tool

_PINNED: dict[type, tuple[str, str]] = {
    Worked: ("Worked", "query reply"),
    Query: ("Query", "id benchmark messages tools"),
    Message: ("Message", "role content"),
    Tool: ("Tool", "name description parameters"),
    Sampling: ("Sampling", "temperature top_p top_k repetition_penalty max_tokens n"),
    LoraSettings: (
        "LoraSettings",
        "rank alpha epochs learning_rate warmup_ratio weight_decay clip betas mode init_seed",
    ),
}
"""What a class is called in keys, and those of its fields that have always been in them, in their order."""


def settings(value: Sampling | LoraSettings) -> dict[str, Any]:
    """What settings add to a key: by name. A field that came later counts where it isn't at its default."""
    pinned = _PINNED[type(value)][1].split()
    later = {f.name for f in fields(value) if getattr(value, f.name) != _default(f)} - {*pinned}
    return {name: getattr(value, name) for name in (*pinned, *sorted(later))}


def digest(taught: Sequence[Worked] | Sequence[Mapping[str, Any]]) -> str:
    """A hash of what is taught, worked examples or names of material, in its order.

    A list and a tuple of the same have different ones; so had they always.
    """
    return hashlib.sha256(_written(taught).encode()).hexdigest()[:16]


def _written(value: Any) -> str:
    """A value as `repr` wrote it when the first keys were made."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return repr(dict(value))
    if type(value) not in _PINNED:
        return repr(value)
    parts = [f"{name}={_written(part)}" for name, part in settings(value).items()]
    return f"{_PINNED[type(value)][0]}({', '.join(parts)})"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
