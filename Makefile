# `make` lists the targets. Each one sets up .venv first if need be; a second run installs nothing.
PROFILE ?= full
# The committed records that `make reproduce` checks; FROM= empty: everything is computed. DRAW: the seed of the part.
FROM ?= $(patsubst %/header.json,%,$(wildcard results/$(PROFILE)/header.json))
MINUTES ?= 25
DRAW ?= 0
PYTHON ?= python3
PY := .venv/bin/python
# Models and data stay inside the project unless told otherwise: remove the folder and all is gone.
export TTSI_CACHE ?= $(CURDIR)/.cache
export TTSI_RUNS ?= $(CURDIR)/runs
export TTSI_FIGURES ?= $(CURDIR)/figures
export PYTHON
# Freed memory is kept for the next tensor, up to 1 GB: handing it back and forth costs a tenth of a prefill, and
# a fifth of training behind a long prompt.
export MALLOC_MMAP_THRESHOLD_ ?= 67108864
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
# Memory in pages of 2 MB where Linux has them: a virtual machine loads a model in half the time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export PYTHONWARNINGS ?= ignore:IProgress not found
# Through the environment, so that quotes in ARGS reach the notebook as they were typed.
export TTSI_ARGS = $(ARGS)
# What tables, figures and executed notebooks are filed under. As typed here only: some systems set a NAME.
ifneq (,$(filter command,$(origin NAME)))
export TTSI_NAME = $(NAME)
endif

.DEFAULT_GOAL := help
.PHONY: help setup reproduce figures export plan notebook lab site fetch test test-faults test-soak ray test-ray test-vllm bench lint clean

help: ## this list
	@echo "make TARGET [PROFILE=full|paper|smoke|my.yaml] [NAME=my-run]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/.complete ## .venv with the pinned packages

.venv/.complete: requirements.lock constraints.txt pyproject.toml tools/setup.sh tools/venv.sh
	@tools/setup.sh
	@touch $@

reproduce: setup ## every table and figure from the committed records, then MINUTES=25 of computing a part anew; FROM= computes all
	@$(PY) -m study.notebooks reproduce --profile $(PROFILE) $(if $(LOAD),--load $(LOAD),$(if $(FROM),--from $(FROM) --minutes $(MINUTES) --draw $(DRAW)))

figures: setup ## the same from committed records, FROM=results/PROFILE: no model, no data, a minute
	@$(PY) -m study.notebooks figures --from $(or $(FROM),results/$(PROFILE))

export: setup ## what was run into results/PROFILE, its outputs into the notebooks (or those in N="01 02"): what a commit needs
	@$(PY) -m study.notebooks export --profile $(PROFILE)
	@$(PY) -m study.notebooks keep --profile $(PROFILE) $(N)

plan: setup ## what `make reproduce FROM=` would compute, in time and disk; DETAILS=1: stage by stage
	@$(PY) -c "import sys; from study.run.plan import plan; from study.run.study import Study; print(plan(Study(sys.argv[1]), bool(sys.argv[2:])))" $(PROFILE) $(DETAILS)

notebook: setup ## one analysis with other parameters, into figures/PROFILE-changed or figures/NAME: make notebook N=02 ARGS="n=8"
	@$(if $(N),,$(error say which one, e.g. make notebook N=02))
	@$(PY) -m study.notebooks run $(N) --profile $(PROFILE)

lab: export TTSI_NAME ?= lab
lab: setup ## the project in JupyterLab; what its notebooks make goes into figures/lab, or figures/NAME
	@$(PY) -m jupyterlab --ServerApp.root_dir=$(CURDIR) --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

site: setup ## all of it as pages in site/, to be opened from disk: nothing is fetched
	@$(PY) -m study.site

fetch: setup ## models and data of the default profile, ahead of time
	@$(PY) -m study.data.sources fetch default

# Threads that sleep while they wait: alone a fifth to a third slower, where processes share cores many times faster.
# One to each of the two processes that run all tests: they ask for no more cores than there are.
test test-faults test-ray test-vllm: export OMP_WAIT_POLICY ?= PASSIVE
test: export OMP_NUM_THREADS ?= 1
test: setup ## all tests
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: setup ## real processes killed, starved and fed damaged files; writes docs/reliability.md
	@TTSI_LEDGER=docs $(PY) -m pytest -n 2 --dist worksteal tests/faults

ray: .venv/.ray ## Ray beside the pinned packages: what `executor: ray` needs

.venv/.ray: .venv/.complete requirements-ray.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-input --no-deps --require-hashes -r requirements-ray.lock
	@touch $@

test-ray: ray ## a study on a Ray cluster: the same records, whatever is killed on the way
	@$(PY) -m pytest tests/ray

.venv-vllm/.complete: requirements-vllm.lock pyproject.toml tools/vllm.sh tools/venv.sh
	@tools/vllm.sh
	@touch $@

test-vllm: .venv-vllm/.complete ## vLLM in .venv-vllm: the engine's contract, parity with torch, its server as a teacher
	@.venv-vllm/bin/python -m pytest tests/vllm

test-soak: setup ## hundreds of adaptations in one process (half an hour); writes docs/reliability.md
	@TTSI_LEDGER=docs $(PY) -m pytest -s tests/soak

bench: setup ## what test-time training costs, against the usual loop: figures/bench.md (half an hour; ARGS=--go-on: what the last run lacks, --vllm: beside vLLM, --spent: where T and passes go)
	@$(PY) -m study.bench $(ARGS)

lint: setup ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

clean: ## remove what tools leave behind; .venv, models (.cache), answers (runs) and results stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find ttsi study tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
