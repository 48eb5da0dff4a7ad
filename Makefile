# `make demo` and `make test` do all the set-up themselves: Python >= 3.10, pip and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test lint types docs check clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 8

demo: $(VENV)/.demo  ## Install, and run the main job: sdsopt compare (about 4 minutes on 2 cores)
	$(BIN)/sdsopt compare

# The tensors of the tests are small, and several threads for them only wait for each other.
test: export OMP_NUM_THREADS = 1
# The processes that share the tests must give them the same names.
test: export PYTHONHASHSEED = 0
test: $(VENV)/.test  ## Install, and run the tests with coverage
	$(BIN)/coverage erase
	$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal --cov --cov-report=
	$(BIN)/coverage report

lint: $(VENV)/.test  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## Check types, strictly
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs  ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

check: lint types test docs  ## All of the above

clean:  ## Remove what these commands made
	rm -rf $(VENV) site results sdsopt-results .coverage* .pytest_cache .ruff_cache .hypothesis

# One stamp for each extra.
$(VENV)/.%: pyproject.toml constraints.txt $(VENV)/torch
	$(PIP) -c constraints.txt -e '.[$*]'
	@touch $@

# torch first, and without a GPU from its CPU index: the default wheels for Linux bring gigabytes of CUDA.
# A machine that does not reach that index may have CPU wheels of its own; that is looked up before anything is taken.
$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("sdsopt needs Python 3.10 or newer, and this is " + sys.version.split()[0] + \
	  "; name another one: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null; then \
	  $(PIP) '$(TORCH)'; \
	elif $(PIP) --retries 1 '$(TORCH)' --index-url https://download.pytorch.org/whl/cpu 2>/dev/null; then :; \
	elif $(PIP) --dry-run --ignore-installed --report - '$(TORCH)' | grep -q '"name": "nvidia-'; then \
	  echo "There is no GPU here, and the CPU build of $(TORCH) cannot be reached: see https://pytorch.org/get-started" >&2; \
	  echo "To install it yourself: $(BIN)/pip install torch, then touch $@ and run make again." >&2; \
	  exit 1; \
	else \
	  $(PIP) '$(TORCH)'; \
	fi
	@touch $@
