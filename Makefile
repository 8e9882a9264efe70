# The two commands of the README are `make demo` and `make test`; both install first, into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/pip --disable-pip-version-check
DEMO := build/demo
BIN5 := .venv5/bin
STAMP5 := .venv5/.installed
PIP5 := $(BIN5)/pip --disable-pip-version-check

.PHONY: install install-5 demo test test-fast test-5 test-all reliability architectures architectures-5 check bench bench-inference bench-heal check-gpu docs clean

install: $(STAMP)

# torch goes first and alone: asked for together with the rest, pip may take a build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[cpu,onnx,lora,serve,json,space,dev,eval]'
	@touch $(STAMP)

# The other lane: transformers 5, for which Optimum has no release; exports run in an environment of their own there.
install-5: $(STAMP5)

$(STAMP5): pyproject.toml constraints-5.txt Makefile
	$(PYTHON) -m venv .venv5
	$(PIP5) install --quiet --constraint constraints-5.txt torch
	$(PIP5) install --quiet --constraint constraints-5.txt --editable '.[cpu,lora,serve,json,space,dev,eval]'
	@touch $(STAMP5)

demo: install
	@rm -rf $(DEMO)
	$(BIN)/gradmap-hub demo --output $(DEMO)

# Two workers, a file to each at a time: much of the suite waits for other processes.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# While working: no real model, no browser, and nothing that is marked long.
test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not real and not browser and not slow and not long'

# With the other lane installed too, the tests that compare the two run as well.
test-all: install install-5
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ''
	$(BIN5)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m '' $(TESTS5)

# What transformers and the Hub's client have a part in. Exporters and Space are tested with 4.57, which they run on.
TESTS5 := tests/runtime tests/serving tests/local_hub tests/hub tests/models tests/data tests/pruning tests/healing tests/evaluation tests/sweeping tests/card tests/space \
  tests/pipeline tests/benchmarks tests/cli $(filter-out tests/conftest.py, $(wildcard tests/*.py))

test-5: install-5
	$(BIN5)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS5)

# Every fault, every kill and the bent files of docs/reliability.md, whose tables it writes anew. MUTATIONS=2000: 2000
# bent files of each kind (hours).
reliability: install
	RELIABILITY=docs/reliability.md $(BIN)/python -m pytest -m '' tests/hub/test_faults.py tests/cli/test_kill.py tests/cli/test_bent_files.py

# Every model type, ONNX included: the table of docs/architectures.md.
architectures: install
	RELIABILITY=docs/architectures.md $(BIN)/python -m pytest -m '' tests/models/test_families.py

# The same with transformers 5, but for ONNX: the second table.
architectures-5: install-5
	RELIABILITY=docs/architectures.md $(BIN5)/python -m pytest -m '' tests/models/test_families.py -k 'not onnx'

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install
	$(BIN)/python -m benchmarks

# Of the folders that `make demo` leaves; export int8 and others into them first, to have them in the table.
bench-inference: install
	$(BIN)/python -m benchmarks.inference $(wildcard $(DEMO)/*-gradmap-*[0-9]) --original $(DEMO)/original

# Perplexity, chat and answers by budget of healing; about an hour for its two budgets.
bench-heal: install
	$(BIN)/python -m benchmarks.healing

# Speed and memory of training in the shapes of a 135M and an 8B model; ten minutes on one large GPU. Elsewhere --tiny.
check-gpu: install
	$(BIN)/python -m benchmarks.training $(if $(shell command -v nvidia-smi),,--tiny)

# The documentation site, into build/site/html; it is built by a package of its own, in an environment of its own.
docs: install
	$(BIN)/python docs/make_site.py build/site
	test -x build/docs-env/bin/zensical || $(PYTHON) -m venv build/docs-env
	build/docs-env/bin/pip install --quiet --disable-pip-version-check --constraint docs/constraints.txt zensical
	cd build/site && ../docs-env/bin/zensical build --strict

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
