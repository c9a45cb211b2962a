# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export GPTQMODEL_DISABLE_PACK_EXT ?= 1

.PHONY: demo test check lint cover gpu clean

# torch first and by its exact version: plain resolution would pull gigabytes of CUDA packages on a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quantize,eval,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps resemblyzer
	touch $(STAMP)

# The main job on the bundled checkpoint: quantize, inspect, speak, evaluate, report.
demo: $(STAMP)
	rm -rf demo
	$(BIN)/s2quant demo --out demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not checkpoint"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet s2quant
	$(BIN)/lint-imports

check: lint test

cover: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not checkpoint" --cov --cov-report=term-missing

# Tests that need a CUDA device; `tools/gpu_check.py` times the real size.
gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

clean:
	rm -rf $(VENV) demo build *.egg-info
