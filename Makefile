# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# a process per core, but not more than memory is sure to hold; files stay together for their fixtures
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint types docs bench clean

demo: $(INSTALLED)  ## the main job on the embedded digits: table, curves.png, results.json, results.csv in demo/
	$(BIN)/senet compare --output demo --overwrite

test: $(INSTALLED) lint types docs  ## lint, types, docs and the quick tests
	$(BIN)/pytest $(PARALLEL)

test-all: $(INSTALLED) lint types docs  ## every network × every property as well
	$(BIN)/pytest $(PARALLEL) -m "not gpu" --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED)  ## the measurements behind the README's tables; appends to benchmarks/results/ and fills the tables
	$(BIN)/python benchmarks/against_timm.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/tax.py --processes 3
	$(BIN)/python benchmarks/allocator.py
	$(BIN)/python benchmarks/tax_sweep.py
	$(BIN)/python benchmarks/convolutions.py
	$(BIN)/python benchmarks/tables.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'senet needs Python 3.11 or newer: make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# the fast CPU code is compiled at first use; without a compiler everything works, slower, but its tests would fail
	command -v g++ >/dev/null || command -v clang++ >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends g++; }
	@# the report page is tested in a real browser
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || ! command -v apt-get >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo site .mypy_cache .ruff_cache .pytest_cache .hypothesis
