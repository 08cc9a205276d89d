# Sourced by the scripts that make an environment. They name `target` (for messages), `venv` and `lock` first;
# after it $venv is an empty environment, or one to go on with.
# PYTHON names the interpreter.
python=${PYTHON:-python3}
torch=2.13.0

fail() { echo "$target: $*" >&2; exit 1; }
pip() {
    "$venv/bin/python" -m pip "$1" --quiet --disable-pip-version-check --no-input "${@:2}"
}
locked() { pip install --no-deps --require-hashes -r "$lock" "$@"; }
torch_is_there() {
    "$venv/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$torch'" 2>/dev/null
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # none yet, or one whose making was cut short
    command -v "$python" >/dev/null ||
        fail "no '$python' here: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version 2>&1) is too old: Python 3.11 or newer is needed; name one: make PYTHON=python3.11"
    "$python" -m venv "$venv" || fail "'$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv)"
fi
