"""ttsi: an open implementation of "Self-Improving LLM Agents at Test-Time"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttsi.agent import Agent, Answer

__version__ = "0.1.0"
__all__ = ["Agent", "Answer", "__version__"]


def __getattr__(name: str) -> Any:
    """`Agent` and `Answer`, imported when first asked for: `import ttsi` alone brings in nothing."""
    if name in ("Agent", "Answer"):
        from ttsi import agent

        return getattr(agent, name)
    raise AttributeError(f"module 'ttsi' has no attribute {name!r}")
