"""Random numbers that depend on what they are for, not on when they are drawn."""

from __future__ import annotations

import hashlib


def seed_for(run_seed: int, benchmark: str, sample: str, stage: str, attempt: int = 0) -> int:
    """A 63-bit seed: the first 8 bytes of SHA-256 over what the number is for.

    Never the arm and never the order of work: arms stay paired, and resuming changes nothing.
    """
    text = "\x1f".join([str(run_seed), benchmark, sample, stage, str(attempt)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def reply_seed(seed: int, k: int) -> int:
    """Seed of the k-th reply to a request, in [0, 2**63): far apart, and the same in every engine."""
    return (seed + k * 0x9E3779B97F4A7C15) % (1 << 63)
