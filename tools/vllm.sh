#!/usr/bin/env bash
# Makes .venv-vllm: ttsi with vLLM, apart from .venv because vLLM pins libraries of its own. Called by make.
# Without a GPU: vLLM's build for the CPU, every package by its hash (Linux on x86). With an NVIDIA driver: the
# package's extra `vllm`, the usual build for CUDA; that way has not been tried.
# PYTHON names the interpreter, TTSI_TORCH_INDEX the package index to take torch from.
set -euo pipefail
cd "$(dirname "$0")/.."
target=test-vllm venv=.venv-vllm lock=requirements-vllm.lock
. tools/venv.sh

if [ -e /proc/driver/nvidia/version ]; then
    echo "test-vllm: an NVIDIA driver is here, so vLLM's CUDA build is installed; this has not been tried" >&2
    pip install -e '.[study,test,vllm]' || fail "vLLM could not be installed (see above)"
    exit
fi

[ "$(uname -sm)" = "Linux x86_64" ] || fail "vLLM's build for the CPU is pinned for Linux on x86_64 only"
torch_is_there || echo "test-vllm: installing vLLM into .venv-vllm, once (some minutes)" >&2
locked --no-index >/dev/null 2>&1 || locked --retries 3 --timeout 30 ||
    fail "the packages of requirements-vllm.lock could not be installed (see above)"
# Its needs are in the lock already, without the CUDA libraries that the index's build brings along.
torch_is_there || pip install --no-deps --retries 3 --timeout 30 "torch==$torch" \
    --index-url "${TTSI_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ||
    fail "torch $torch for the CPU could not be installed; TTSI_TORCH_INDEX may name another index for it"
torch_is_there || fail "torch is not $torch after all: remove .venv-vllm and run make again"
pip install --no-index --no-deps --no-build-isolation -e .
