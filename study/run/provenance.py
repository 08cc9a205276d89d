"""Where results come from: versions, commit and machine, as rows and notebooks carry them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from study.data import benchmarks
from study.data.models import model_hash
from study.run.config import Profile
from ttsi import __version__

_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "scikit-learn", "papermill")


def context(profile: Profile, dtype: str) -> dict[str, Any]:
    """What a reader needs to know to trust or repeat a row: versions, commit, machine."""
    versions = {"ttsi": __version__, "python": platform.python_version()}
    packages = list(_PACKAGES)
    if profile.engine == "vllm":  # each of its builds has a name of its own
        packages += importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    threads = f" ({profile.threads} used)" if profile.threads else ""
    return {
        "versions": versions,
        "commit": commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores{threads}, {platform.system()}",
        "model": profile.model,
        "dtype": dtype,
    }


def header(p: Profile, dtype: str, made: Mapping[str, Any], machines: Mapping[str, set[str]]) -> str:
    """Versions, model and run as one Markdown paragraph, for the top of a notebook.

    made: the run's `context`. machines: those that made its results, with the stages of each.
    """
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    counts = ", ".join(f"{b} {'all' if n is None else n}{_file(p, b)}" for b, n in p.benchmarks.items())
    heat = p.answer_temperature
    others = {m: stages for m, stages in machines.items() if m != made["machine"]}
    apart = "".join(f" · {', '.join(sorted(stages))}: {m}" for m, stages in sorted(others.items()))
    run = f"`{p.name}` of profile `{p.store}`" if p.store else f"`{p.name}`"
    return (
        f"**Run** {run} · model `{p.model}` ({model_hash(p.model)[:12]}, {dtype}) · "
        f"teacher `{p.teacher_name if p.teacher else 'none'}` · "
        f"samples: {counts} · seeds {p.seeds} · tools {p.tool_order} · τ = {p.tau} · K = {p.k} · "
        f"{p.epochs} epochs · SFT {p.sft_epochs or p.epochs} · "
        f"{f'answers at temperature {heat}' if heat else 'greedy answers'} · "
        f"commit `{made['commit']}`  \n"
        f"**Machine** {made['machine']}{apart} · {versions}"
    )


def _file(p: Profile, benchmark: str) -> str:
    """What a benchmark of one's own was read from."""
    if benchmark not in p.files:
        return ""
    return f" (`{Path(p.files[benchmark]).name}`, {benchmarks.fingerprint(benchmark)[:12]})"


def commit() -> str:
    """This code's commit, `-dirty` where what computes differs from it; figures it replaces don't count."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    ask = partial(subprocess.run, capture_output=True, text=True, timeout=10)
    try:
        name = ask([*git, "describe", "--always", "--abbrev=12"], check=True).stdout.strip()
        code = ("ttsi", "study", "notebooks", "profiles")
        changed = ask([*git, "status", "--porcelain", "--", *code], check=True).stdout
        return f"{name}-dirty" if changed else name
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    for line in cpu.read_text().splitlines() if cpu.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
