"""ttsi: an open implementation of "Self-Improving LLM Agents at Test-Time"."""

__version__ = "0.1.0"
