#!/usr/bin/env bash
# Makes .venv with the pinned packages; called by make, and quick when nothing is missing.
# PYTHON names the interpreter, TTSI_TORCH_INDEX the package index to take torch from.
set -euo pipefail
cd "$(dirname "$0")/.."
target=setup venv=.venv lock=requirements.lock
. tools/venv.sh

if ! locked --no-index >/dev/null 2>&1 || ! torch_is_there; then
    # One tiny package first: without a network this takes seconds, not one pip timeout per package.
    # Retries and timeouts are given each time, because pip's own settings may allow many minutes.
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    pip download --no-deps --no-cache-dir --retries 0 --timeout 10 -d "$scratch" \
        "$(sed -n 's/^\(iniconfig==[^ ]*\).*/\1/p' requirements.lock)" >/dev/null 2>&1 ||
        fail "the Python package index can't be reached: connect this machine, or name a mirror or a proxy" \
            "(PIP_INDEX_URL, HTTPS_PROXY), and run make again"
    echo "setup: installing the pinned packages into .venv, once (some minutes)" >&2
    locked --retries 3 --timeout 30 || fail "the packages of requirements.lock could not be installed (see above)"
    torch_is_there ||
        pip install --retries 3 --timeout 30 -c constraints.txt "torch==$torch" \
            ${TTSI_TORCH_INDEX:+--index-url "$TTSI_TORCH_INDEX"} ||
        fail "torch $torch could not be installed (see above); TTSI_TORCH_INDEX may name another index for it"
    torch_is_there || fail "torch is not $torch after all: remove .venv and run make again"
fi
pip install --no-index --no-deps --no-build-isolation -e .
