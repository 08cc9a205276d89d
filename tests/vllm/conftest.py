"""What the tests of vLLM share. They run in .venv-vllm: `make test-vllm`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from study.data import benchmarks, sources
from ttsi import prompts
from ttsi.types import Sample

pytest.register_assert_rewrite("contract")

MODEL = os.environ.get("TTSI_VLLM_MODEL", "smollm2-135m")


@pytest.fixture(scope="session")
def tiny_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for the torch engine, but twice as wide: vLLM's kernels know no heads of less than 32."""
    folder = tmp_path_factory.mktemp("tiny-wide")
    config = AutoConfig.from_pretrained(tiny_folder)
    config.hidden_size, config.intermediate_size = 128, 256
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # by √2 less than there, as the sums are twice as long
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The real model that vLLM is held to torch on: `TTSI_VLLM_MODEL`, by default the smallest there is."""
    try:
        return sources.model_dir(MODEL)
    except sources.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def samples() -> Sequence[Sample]:
    """Twenty samples of BFCL with tools to choose from: the shortest prompts of some two hundred."""
    try:
        found = [s for s in benchmarks.load("bfcl", 200) if 2 <= len(s.tools) <= 6]
    except sources.Unavailable as error:
        pytest.skip(str(error))
    return sorted(found, key=lambda s: len(prompts.system(s.tools)))[:20]
