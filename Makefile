# On a fresh machine, `make demo` and `make test` install everything they need.
# For a read-only checkout: make VENV=/tmp/venv DEMO=/tmp/demo demo
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
$(if $(filter-out 1,$(words $(VENV))),$(error senet: VENV="$(VENV)" contains a space, which make does not support; choose another path))
BIN := $(VENV)/bin
COMPILE = $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
	--custom-compile-command "make lock"
# One process per core, but no more than memory safely allows. Tests of a file run together, to share its fixtures.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
INSTALLED := $(VENV)/.installed
TRAINS := $(VENV)/.trains
COMPILER := command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null
BROWSER := command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null
EVERY = not gpu$$({ $(BROWSER); } || echo " and not browser")
QUICK = $(EVERY) and not slow
# $(call debian,test,package,message): installs the package if the test fails. If that fails too, it prints the message,
# which is an error in CI.
debian = @{ $(1); } || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	&& { apt-get update -qq && apt-get install -qq -y --no-install-recommends $(2); } >/dev/null 2>&1; } \
	|| { echo "senet: $(3)" >&2; test -z "$$CI"; }

FUZZ_SECONDS ?= 60

.PHONY: demo test test-all test-latest test-oldest fuzz sanitize compiler browser lint types docs bench lock clean

demo: $(TRAINS) compiler  ## compare on the bundled digits: table, curves.png, results.json, results.csv in demo/
	$(BIN)/senet compare --output "$(DEMO)" --overwrite

test: $(INSTALLED) compiler browser lint types docs  ## lint, types, docs, and the quick tests
	$(BIN)/pytest $(PARALLEL) -m "$(QUICK)"

test-all: $(INSTALLED) compiler browser lint types docs  ## the slow tests too: every network × every property
	$(BIN)/pytest $(PARALLEL) -m "$(EVERY)" --durations=10

test-latest: compiler browser  ## the quick tests with the newest releases, ignoring the lock
	sh requirements/install.sh "$(PYTHON)" .venv-latest dev
	.venv-latest/bin/pytest $(PARALLEL) -m "$(QUICK)"

test-oldest: compiler browser  ## the quick tests with the lower bounds in pyproject.toml; python3.11 has wheels for all of them
	sh requirements/install.sh python3.11 .venv-oldest dev requirements/oldest.lock
	.venv-oldest/bin/pytest $(PARALLEL) -m "$(QUICK)"

fuzz: $(INSTALLED) compiler  ## damaged files of every kind, FUZZ_SECONDS each; failures are kept in fuzz-failures/
	SENET_FUZZ_SECONDS=$(FUZZ_SECONDS) SENET_FUZZ_SEED=$${SEED:-$$(date +%s)} $(BIN)/pytest tests/fuzz -k mutants

# Compiles the C++ code with sanitizers and preloads their libraries, which Python itself does not link. AddressSanitizer
# aborts when an allocation fails, so tests of such failures are deselected, as are those of compilers and processes.
LIBRARY = $$(g++ -print-file-name=$(1))
sanitize: $(INSTALLED) compiler  ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer; needs g++, minutes
	CXX="$(CURDIR)/tests/ops/csrc/sanitized-g++" SENET_CACHE="$(CURDIR)/.sanitized" SENET_NATIVE=build OMP_NUM_THREADS=2 \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libubsan.so) $(call LIBRARY,libstdc++.so)" \
		$(BIN)/pytest -x --capture=sys -k "not failure and not process and not compile and not narrower and not library" \
		tests/ops/csrc/test_calls.py tests/ops/tail/test_native.py tests/ops/conv/test_native_convolutions.py \
		tests/ops/test_border.py tests/ops/tail/test_autograd.py tests/acceleration/test_executor.py

lock: $(INSTALLED)  ## pin again after a change to pyproject.toml; UPGRADE=--upgrade takes the newest releases
	$(BIN)/python -m pip install --quiet "uv>=0.9"
	$(COMPILE) $(UPGRADE) --extra dev pyproject.toml --output-file requirements/dev.lock
	$(COMPILE) --upgrade --extra train --extra report --constraint requirements/dev.lock pyproject.toml \
		--output-file requirements/train.lock
	$(COMPILE) --extra dev --resolution lowest-direct pyproject.toml --output-file requirements/oldest.lock
	$(COMPILE) $(UPGRADE) --group release --output-file requirements/release.lock
	printf '%s\n' pip "hatchling>=1.27" editables | $(COMPILE) $(UPGRADE) - --output-file requirements/build.lock

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED)  ## the measurements behind the tables; appends to benchmarks/results/ and updates the tables
	$(BIN)/python benchmarks/against_timm.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/tax.py --processes 3
	$(BIN)/python benchmarks/allocator.py
	$(BIN)/python benchmarks/tax_sweep.py
	$(BIN)/python benchmarks/convolutions.py
	$(BIN)/python benchmarks/tables.py

$(INSTALLED): pyproject.toml requirements/dev.lock requirements/build.lock
	@sh requirements/install.sh "$(PYTHON)" "$(VENV)" dev requirements/dev.lock
	@touch $(INSTALLED) $(TRAINS)

$(TRAINS): pyproject.toml requirements/train.lock requirements/build.lock
	@sh requirements/install.sh "$(PYTHON)" "$(VENV)" train requirements/train.lock
	@touch $(TRAINS)

compiler:  # the CPU kernels are compiled at first use; without a compiler, everything works, but slower
	$(call debian,$(COMPILER),g++,no C++ compiler: the CPU kernels cannot be built and are not tested; install g++ or clang++)

browser:  # the report page is tested in a real browser
	$(call debian,$(BROWSER),chromium,no Chromium: the report page is not tested in a browser; install chromium)

# ---- Release (packaging/release.py). test-all needs the cross-compilers for the same tests.
.PHONY: wheel sbom release-check cross
RELEASE := .venv-release

wheel: $(INSTALLED) $(RELEASE)/.installed cross  ## dist/: wheels with prebuilt kernels for x86-64 and aarch64, checked and tested
	$(RELEASE)/bin/python packaging/release.py wheels
	SENET_DIST="$$PWD/dist" $(BIN)/pytest tests/test_wheel.py -m slow

sbom: $(RELEASE)/.installed  ## dist/: the bill of materials (CycloneDX)
	$(RELEASE)/bin/python packaging/release.py sbom

release-check: wheel  ## builds and checks all of dist/; version, tag, and changelog must agree
	$(RELEASE)/bin/python packaging/release.py sdist sbom version

$(RELEASE)/.installed: pyproject.toml requirements/release.lock
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(RELEASE)/bin/python -m pip install --quiet --constraint requirements/release.lock --group release
	touch $@

test-all: cross
cross:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v x86_64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
		&& apt-get install -qq -y --no-install-recommends g++ g++-aarch64-linux-gnu qemu-user; } >/dev/null 2>&1 \
		|| echo "senet: cannot build and test the aarch64 wheel; install g++-aarch64-linux-gnu and qemu-user" >&2

clean:
	rm -rf "$(VENV)" .venv-latest .venv-oldest .venv-release .sanitized "$(DEMO)" dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
