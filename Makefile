# `make help` lists what there is. Everything runs in a separate environment, .venv, so that it
# works the same inside your virtual or conda environment and leaves that untouched.
#
#   make demo PYTHON=python3.12    made from this Python
#   make demo VENV=$VIRTUAL_ENV    installed into the environment that is active
#   make demo CORES=4              at most 4 cores
#   make test JOBS=8               tests side by side (a test may start 4 processes)
#   make test PYTEST="-k resume"   options for pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test check sharing reruns recipes matrix mutants bench-convert chaos faults damage prompts layouts soak-data fuzz-data bench-data screenshots bench-cli newcomer release-check test-cluster docs format describe environment clean

PYTHON ?= python3
VENV ?= .venv
CORES ?= all
JOBS ?= 3
PYTEST ?=
export PYTHON VENV
# These would make pip or Python search beyond the environment, or Snakemake beyond its own profile.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX SNAKEMAKE_PROFILE
# Containers often set this. Each of the many processes here would compile all its imports again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: ## from handwritten digits to a LLaVA that reads them: install, run, evaluate
	@start=$$(date +%s.%N); .ci/environment; \
	HF_HUB_OFFLINE=1 $(BIN)/python -m snakemake --cores $(CORES); \
	$(BIN)/python -m llava_steps summary --started $$start

test: ## the whole test suite
	@.ci/environment test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST)

check: ## style, types, import layers, word list, file length, workflow format, documentation site
	@.ci/environment test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/unit/test_imports.py tests/unit/test_words.py
	$(BIN)/snakefmt --check workflow
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs: ## the documentation as a site in site/; broken links and unlisted pages fail
	@.ci/environment test
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

matrix: ## vision towers x language models x layouts against transformers
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.matrix

mutants: ## break each row of the mapping table in turn: a check must fail
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.mutants

LAYERS ?= 32
ROOM ?= .
bench-convert: ## convert a 7B model both ways (needs 45 GB in ROOM; LAYERS=8 is a quarter)
	@.ci/environment test
	@$(BIN)/python -m tests.benchmarks.convert --layers $(LAYERS) --directory $(ROOM)

KILLS ?= 100
SIGNALS ?= 50
chaos: ## kill and stop trainings at random moments: they end as if undisturbed
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.chaos --kills $(KILLS) --signals $(SIGNALS)

PAIRS ?= 0
layouts: ## train in every parallel layout, and resume each other's checkpoints
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.layouts --pairs $(PAIRS)

EVERY ?= 1
faults: ## a kill, a full disk, a broken disk in every file operation of a save
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.drive --every $(EVERY)

sharing: ## start two runs together ROUNDS times (1), half of them killed: each shared step runs once
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.sharing --rounds $(ROUNDS)

CHANGES ?= 700
reruns: ## change each setting of a run, singly and in pairs: only what it feeds is computed
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.reruns --changes $(CHANGES)

RECIPES ?= 20
recipes: ## run RECIPES random recipes with stub steps: what is computed equals an independent model
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.recipes --count $(RECIPES)

CONVERSATIONS ?= 200
prompts: ## ids of CONVERSATIONS in training, evaluation, chat and transformers, for 21 tokenizers
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.prompts --conversations $(CONVERSATIONS)

DAMAGES ?= 500
damage: ## damage copies of a checkpoint: each must be noticed
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.damage --damages $(DAMAGES)

STOPS ?= 50
soak-data: ## stop the loader at STOPS random steps and resume in other layouts
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.soak_data --stops $(STOPS)

COUNT ?= 2000
SEED ?= 0
fuzz-data: ## COUNT damaged images, texts and tars: nothing lost, nothing written elsewhere
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.fuzz_data --count $(COUNT) --seed $(SEED)

SAMPLES ?= 12000
bench-data: ## speed of sharding (10 GB in ROOM) and of the loader, fill of packed rows, time to resume
	@.ci/environment test
	@status=0; export OMP_NUM_THREADS=1; \
	$(BIN)/python -m tests.benchmarks.sharding --samples $(SAMPLES) --directory $(ROOM) || status=1; \
	$(BIN)/python -m tests.benchmarks.loading || status=1; \
	exit $$status

SCREENSHOTS ?= screenshots
screenshots: ## open the report of results/demo in Chromium: pictures, checks, size, seconds
	@.ci/environment test
	@$(BIN)/python -m tests.browser.screenshots --to $(SCREENSHOTS)

REPEATS ?= 5
bench-cli: ## time of every --help and of a dry run, against doing nothing
	@.ci/environment test
	@$(BIN)/python -m tests.benchmarks.cli --rounds $(REPEATS)

newcomer: ## clone, make demo, ask the model: the README's commands, unchanged
	@.ci/environment test
	@$(BIN)/python -m tests.benchmarks.newcomer

release-check: ## build, twine check, install into a clean environment, --help of every command
	@.ci/environment test
	@$(BIN)/python -m tests.benchmarks.release

ROUNDS ?= 1
MINUTES ?= 27
test-cluster: ## as root on Debian 12: the chain on a real Slurm, in a real container, disturbed
	@.ci/environment test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.cluster.drive --rounds $(ROUNDS) --minutes $(MINUTES)

format: ## put code into the style that `make check` wants
	@.ci/environment test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt workflow

describe: ## renew config.schema.json and the tables of the pages from the settings classes
	@.ci/environment
	$(BIN)/python -m llava_steps.pipeline.describe

environment: ## only make .venv, with the test tools
	@.ci/environment test

clean: ## remove .venv and caches; results/ and store/ are yours and stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './store/*' -prune -exec rm -rf {} +
