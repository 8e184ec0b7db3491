# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test gpu wheel install lint format clean

demo: install
	$(BIN)/python -m dgsnet demo --out runs/demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/dgs_kernels/test_speed.py
	$(BIN)/python -m pytest tests/dgs_kernels/test_speed.py  # times, with nothing beside them

# On a machine with a CUDA device; takes the packages of $(PYTHON), installs nothing, leaves everything in OUT.
gpu:
	PYTHON=$(PYTHON) OUT=$(or $(OUT),runs/gpu) benchmarks/gpu.sh

wheel: install
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# The stamp is newer than every file that decides what is installed or built.
install: $(VENV)/.installed
SOURCES := $(shell find csrc -type f 2>/dev/null)
NATIVE := setup.py pyproject.toml $(SOURCES)
$(VENV)/.installed: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja "torch>=2.10"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf build dist *.egg-info runs
