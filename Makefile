# The contract: the same targets in README, CONTRIBUTING and CI. Every target does its own set-up on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
# Named first, so that pip does not choose another build while it resolves the rest.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Where no GPU is, CUDA's kernels take minutes to compile and cannot run: left out there, unless HFAC_CUDA=1 asks for them.
CUDA := $(if $(shell command -v nvidia-smi),,0)
# The CUDA kernels compiled for the host, for the tests.
EMULATED := $(VENV)/.emulated

.DEFAULT_GOAL := help
.PHONY: help install compare test test-all test-torch test-triton planted test-emulated cuda-check triton-check sanitize fuzz bench gpu-report gpu-objects plan doctor docs lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install hfac with everything its commands and tests need

compare: $(INSTALLED) ## train a byte-level GPT on real text with AdamW, Adafactor, HFac (with an int8 moment, too) and SMMF; ends with a table
	$(BIN)/hfac compare $(ARGS)

test: lint $(EMULATED) ## check style and run the tests, the CUDA kernels' among them (no GPU needed; 15 to 25 minutes on 2 cores)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-all: lint $(EMULATED) ## the same, and the tests that take too long for `make test` (31 to 55 minutes on 2 cores before they were made fewer)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "" $(ARGS)

# What another torch could break: numbers, state, conformance to torch.optim, sharding.
TORCH_TESTS := $(addprefix tests/,backends/test_parity.py optim/test_state.py optim/test_conformance.py optim/test_vectors.py \
	optim/test_compile.py distributed/test_sharded.py distributed/test_sharded_checkpoints.py distributed/test_agreement.py)
OTHER := .venv-torch-$(VERSION)

test-torch: $(INSTALLED) ## run the parity, state, conformance and sharded tests with another torch (VERSION=2.6.0)
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install -q torch==$(VERSION)
	$(OTHER)/bin/python -m pip install -q pytest pytest-xdist hypothesis numpy setuptools
	$(OTHER)/bin/python -m pytest -n auto --dist worksteal $(TORCH_TESTS) $(ARGS)

# What another Triton could break: numbers in its interpreter, plans, launches.
TRITON_TESTS := $(addprefix tests/,backends/test_triton.py backends/test_triton_launches.py tools/test_triton_plan.py)

test-triton: $(INSTALLED) ## run the Triton kernels' tests with another Triton (VERSION=3.6.0; ARGS='-m ""' adds the slow ones)
	$$($(BIN)/python -m bench.triton_versions --python $(VERSION)) -m pytest -n auto --dist worksteal $(TRITON_TESTS) $(ARGS)

planted: $(EMULATED) ## plant faults in a copy of this checkout and see whether `make test` notices (ARGS="clip sharded" chooses)
	$(BIN)/python tests/tools/planted.py $(ARGS)

test-emulated: $(EMULATED) ## run all tests of the CUDA kernels on the host (no GPU needed)
	$(BIN)/python -m pytest -m "" tests/backends/test_cuda_*.py tests/backends/test_*_steps.py $(ARGS)

cuda-check: $(INSTALLED) ## compile the CUDA kernels, check registers, spills, accesses and budgets (needs nvcc, no GPU)
	$(BIN)/python -m bench.launch_plan --write
	$(BIN)/python -m bench.cuda_check $(ARGS)
	$(BIN)/python -m bench.launch_plan --check

sanitize: $(INSTALLED) ## run the parity table on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/tools/sanitize.py $(ARGS)

fuzz: $(INSTALLED) ## try random lists of tensors on every backend (HFAC_FUZZ_LISTS of them for each, 1000 if not set)
	HFAC_FUZZ_LISTS=$${HFAC_FUZZ_LISTS:-1000} $(BIN)/python -m pytest -q tests/backends/test_fuzz.py $(ARGS)

bench: $(INSTALLED) ## measure every op and whole steps against their rivals (ARGS="--quick --plot")
	$(BIN)/python -m bench $(ARGS)

gpu-report: ## on a machine with a GPU, torch and nvcc, in seven minutes: tests, measurements, profiles (ARGS=--quick: three)
	$(PYTHON) -m bench.gpu_report $(ARGS)

gpu-objects: $(INSTALLED) ## compile for gpu-report beforehand, into build/gpu-objects (needs nvcc, no GPU; ARGS="--arch 90")
	$(BIN)/python -m bench.gpu_objects $(ARGS)

triton-check: $(INSTALLED) ## compile the Triton kernels by several versions of Triton, check their budgets; writes docs/triton-check.md
	$(BIN)/python -m bench.triton_versions $(ARGS)

plan: $(INSTALLED) ## what memory each optimizer takes of a model (ARGS="llama-3-8b --world-size 1,8")
	$(BIN)/hfac plan $(ARGS)

doctor: $(INSTALLED) ## which backends are here, and why others are not
	$(BIN)/hfac doctor

docs: $(INSTALLED) ## build the site of README, docs/ and docstrings into build/site; a dead link is an error
	$(BIN)/python -m sphinx -q -n -W --keep-going -b html -c docs/site . build/site $(ARGS)

lint: $(INSTALLED) ## check style with ruff and clang-format, types with mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files csrc 'tests/*.cpp' 'tests/*.h')
	$(BIN)/mypy

wheels: $(INSTALLED) ## build sdist and wheels into dist/, and step with each in an environment without compilers (ARGS="--archs 80;90")
	$(BIN)/python tests/tools/wheels.py $(ARGS)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info hfac/*.so hfac/_build_info.json

$(INSTALLED): pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	HFAC_CUDA=$${HFAC_CUDA-$(CUDA)} $(BIN)/python -m pip install -v -e ".[cli,test,docs]"
	touch $@

$(EMULATED): $(INSTALLED) $(shell find csrc -type f)
	HFAC_EMULATION=1 $(BIN)/python setup.py -q build_ext
	touch $@
