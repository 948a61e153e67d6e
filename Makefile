# make install    venv with torch, the compiled operators and all extras
# make demo       train, evaluate and predict in a few minutes
# make check      lint and the tests of operators, layers and losses: for the inner loop
# make test       the tests that are not marked slow
# make test-slow  the others
# make test-all   both
# make coverage   `make test` with a coverage report
# make lint       ruff and mypy
# make docs       the documentation site, in site/
# make clean      remove what was built
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.yolov9_fast_installed
SOURCES := pyproject.toml setup.py MANIFEST.in $(shell find csrc -type f -name '*.[ch]*' -o -path 'csrc/*.py')

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
CHECKED := tests/test_architecture.py tests/ops tests/nn tests/losses tests/metrics

export MPLBACKEND ?= Agg

.PHONY: install demo check test test-slow test-all coverage lint docs clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the compiled operators are built against it (--no-build-isolation), and its version stays the one asked for.
$(STAMP): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77' wheel '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[all,dev]' '$(TORCH)'
	# Type checkers do not run import hooks; a path in a .pth file they follow.
	echo '$(CURDIR)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/yolov9_fast_source.pth"
	touch $@

demo: install
	$(BIN)/yolov9-fast demo

check: lint
	$(PYTEST) -m "not slow" $(CHECKED)

test: install
	$(PYTEST) -m "not slow"

test-slow: install
	$(PYTEST) -m slow

test-all: install
	$(PYTEST)

coverage: install
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered --cov-report=html

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' --no-build-isolation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage htmlcov site $(STAMP)
	find yolov9_fast -name '_C_*.so' -delete
	find yolov9_fast -name '_build_info.json' -delete
