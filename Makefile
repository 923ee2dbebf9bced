# The contract: the same targets in README, CONTRIBUTING and CI. Every target does its own set-up on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
# Named first, so that pip does not choose another build while it resolves the rest.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install compare test test-emulated cuda-check bench doctor lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install hfac with everything its commands and tests need

compare: $(INSTALLED) ## train a byte-level GPT on real text with AdamW, Adafactor, HFac and SMMF; ends with a table
	$(BIN)/hfac compare $(ARGS)

test: $(INSTALLED) ## run the tests (no GPU needed)
	$(BIN)/python -m pytest $(ARGS)

test-emulated: $(INSTALLED) ## run the CUDA kernels' tests on the host (no GPU needed)
	HFAC_EMULATION=1 $(BIN)/python setup.py -q build_ext
	$(BIN)/python -m pytest tests/test_cuda_emulated.py tests/test_cuda_sanitizers.py tests/test_cuda_plan.py $(ARGS)

cuda-check: $(INSTALLED) ## compile the CUDA kernels and check registers, spills and accesses (needs nvcc, no GPU)
	$(BIN)/python -m bench.cuda_check $(ARGS)

bench: $(INSTALLED) ## measure every op and whole steps against their rivals (ARGS="--quick --plot")
	$(BIN)/python -m bench $(ARGS)

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
