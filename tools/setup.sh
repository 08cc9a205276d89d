#!/usr/bin/env bash
# Makes .venv with the pinned packages; called by make, and quick when nothing is missing.
# PYTHON names the interpreter, TTSI_TORCH_INDEX the package index to take torch from.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=2.13.0

fail() { echo "setup: $*" >&2; exit 1; }
pip() {
    .venv/bin/python -m pip "$1" --quiet --disable-pip-version-check --no-input "${@:2}"
}
locked() { pip install --no-deps --require-hashes -r requirements.lock "$@"; }
torch_is_there() {
    .venv/bin/python -c "import torch; assert torch.__version__.split('+')[0] == '$torch'" 2>/dev/null
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or one whose making was cut short
    command -v "$python" >/dev/null ||
        fail "no '$python' here: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version 2>&1) is too old: Python 3.11 or newer is needed; name one: make PYTHON=python3.11"
    "$python" -m venv .venv || fail "'$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv)"
fi

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
