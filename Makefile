# The two commands of the README are `make demo` and `make test`; both install first, into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/pip --disable-pip-version-check
DEMO := build/demo

.PHONY: install demo test test-all reliability architectures check bench bench-inference clean

install: $(STAMP)

# torch goes first and alone: asked for together with the rest, pip may take a build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[cpu,onnx,serve,space,dev,eval]'
	@touch $(STAMP)

demo: install
	@rm -rf $(DEMO)
	$(BIN)/gradmap-hub demo --output $(DEMO)

# Two workers, a file to each at a time: much of the suite waits for other processes.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: install
	$(BIN)/python -m pytest -m ''

# Every fault and every kill of docs/reliability.md, whose tables it writes anew.
reliability: install
	RELIABILITY=docs/reliability.md $(BIN)/python -m pytest -m '' tests/publish/test_faults.py tests/cli/test_kill.py

# Every model type, ONNX included: the table of docs/architectures.md.
architectures: install
	RELIABILITY=docs/architectures.md $(BIN)/python -m pytest -m '' tests/test_families.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install
	$(BIN)/python -m benchmarks

# Of the folders that `make demo` leaves; export int8 and others into them first, to have them in the table.
bench-inference: install
	$(BIN)/python -m benchmarks.inference $(wildcard $(DEMO)/*-gradmap-*[0-9]) --original $(DEMO)/original

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
