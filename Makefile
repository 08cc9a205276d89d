# `make` lists the targets. Each one sets up .venv first if need be; a second run installs nothing.
PROFILE ?= cpu
PYTHON ?= python3
PY := .venv/bin/python
# Models and data stay inside the project unless told otherwise: remove the folder and all is gone.
export TTSI_CACHE ?= $(CURDIR)/.cache
export TTSI_RUNS ?= $(CURDIR)/runs
export TTSI_FIGURES ?= $(CURDIR)/figures
export PYTHON
# Threads that wait without spinning: no slower alone, and several times faster where cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONWARNINGS ?= ignore:IProgress not found
# Through the environment, so that quotes in ARGS reach the notebook as they were typed.
export TTSI_ARGS = $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce plan notebook lab fetch test lint clean

help: ## this list
	@echo "make TARGET [PROFILE=cpu|cpu-full|smoke]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/.complete ## .venv with the pinned packages

.venv/.complete: requirements.lock constraints.txt pyproject.toml tools/setup.sh
	@tools/setup.sh
	@touch $@

reproduce: setup ## every table and figure into figures/PROFILE
	@$(PY) -m ttsi.notebooks reproduce --profile $(PROFILE)

plan: setup ## what `make reproduce` would compute, in time and disk
	@$(PY) -c "import sys; from ttsi.study import Study; print(Study(sys.argv[1]).plan())" $(PROFILE)

notebook: setup ## one analysis with other parameters: make notebook N=02 ARGS="benchmarks=['sealtool'] n=8"
	@$(if $(N),,$(error say which one, e.g. make notebook N=02))
	@$(PY) -m ttsi.notebooks run $(N) --profile $(PROFILE)

lab: setup ## the notebooks in JupyterLab
	@$(PY) -m jupyterlab notebooks

fetch: setup ## models and data of the default profile, ahead of time
	@$(PY) -m ttsi.sources fetch default

test: setup ## all tests
	@$(PY) -m pytest

lint: setup ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

clean: ## remove what tools leave behind; .venv, models (.cache), answers (runs) and results stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find ttsi tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
