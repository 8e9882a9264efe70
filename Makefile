# The two commands of the README are `make demo` and `make test`; both install first, into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/pip --disable-pip-version-check
DEMO := build/demo

.PHONY: install demo test test-all check bench clean

install: $(STAMP)

# torch goes first and alone: asked for together with the rest, pip may take a build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[cpu,onnx,space,dev,eval]'
	@touch $(STAMP)

demo: install
	@rm -rf $(DEMO)
	$(BIN)/gradmap-hub demo --output $(DEMO)

test: install
	$(BIN)/python -m pytest

test-all: install
	$(BIN)/python -m pytest -m ''

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
