# The contract: the same targets in README, CONTRIBUTING and CI. Every target does its own set-up on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
# Named first, so that pip does not choose another build while it resolves the rest.
TORCH ?= torch==2.13.0
# Registers and spills are the compiler's: docs/triton-check.md is of this one.
TRITON ?= triton==3.7.1
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install compare test sanitize fuzz bench triton-check doctor lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install hfac with everything its commands and tests need

compare: $(INSTALLED) ## train a byte-level GPT on real text with AdamW, Adafactor, HFac and SMMF; ends with a table
	$(BIN)/hfac compare $(ARGS)

test: $(INSTALLED) ## run the tests (no GPU needed)
	$(BIN)/python -m pytest $(ARGS)

sanitize: $(INSTALLED) ## run the parity table on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/sanitize.py $(ARGS)

fuzz: $(INSTALLED) ## try random lists of tensors on every backend (HFAC_FUZZ_LISTS of them, 3000 if not set)
	HFAC_FUZZ_LISTS=$${HFAC_FUZZ_LISTS:-3000} $(BIN)/python -m pytest -q tests/test_fuzz.py $(ARGS)

bench: $(INSTALLED) ## measure every op and whole steps against their rivals (ARGS="--quick --plot")
	$(BIN)/python -m bench $(ARGS)

triton-check: $(INSTALLED) ## compile the Triton kernels for four GPUs that need not be here; writes docs/triton-check.md
	$(BIN)/python -m pip install -q $(TRITON)
	$(BIN)/python -m hfac.triton_kernels.check $(ARGS)

doctor: $(INSTALLED) ## which backends are here, and why others are not
	$(BIN)/hfac doctor

lint: $(INSTALLED) ## check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info hfac/*.so hfac/_build_info.json

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[cli,test]"
	touch $@
