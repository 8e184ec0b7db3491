# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Both start Python many times: it keeps what it has compiled, even where the machine's settings say otherwise.
export PYTHONDONTWRITEBYTECODE :=
# CUDA kernels for the architecture whose machine code the tests read, with PTX, which later cards compile, and for this
# machine's own cards: a third of the compiler's work for all architectures, which wheels and `pip install` are built for.
CARDS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+\.[0-9]+' | sort -u)
export TORCH_CUDA_ARCH_LIST ?= 9.0+PTX $(filter-out 9.0,$(CARDS))
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test mutants gpu wheel docs install lint format clean

# Tests that follow the others: one compiles what those launched, one takes times with nothing beside it.
LAST := tests/dgs_kernels/ops/test_triton_compiles.py tests/dgs_kernels/test_speed.py

demo: install
	$(BIN)/python -m dgsnet demo --out runs/demo

# TESTS= takes further arguments of pytest.
# Two processes with two threads each: on two cores, a thread that waits must not spin where another could run.
test: lint docs
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore ,$(LAST)) $(TESTS)
	$(BIN)/python -m pytest $(LAST) $(TESTS)

# Plants faults in a copy, one at a time, and writes down which of them the tests notice; not part of `make test`.
mutants: install
	$(BIN)/python tests/mutants/run.py $(FILES)

# On a machine with a CUDA device; takes the packages of $(PYTHON), installs nothing, leaves everything in OUT.
gpu:
	PYTHON=$(PYTHON) OUT=$(or $(OUT),runs/gpu) benchmarks/gpu.sh

# The tag says which systems the wheel runs on; torch's libraries are the installed torch's own.
wheel: export TORCH_CUDA_ARCH_LIST =
wheel: install
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	    --wheel-dir dist build/wheel/*-linux_*.whl

# Without --quiet, which hides warnings from --strict too, so that nothing would fail.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The stamp is newer than every file that decides what is installed or built. Python compiles what it imports; of
# the 300 MB of source in the packages that is a small part, so pip does not compile all of it first. The library is
# compiled while pip fetches and unpacks all that it does not need.
install: $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
SOURCES := $(shell find csrc -type f 2>/dev/null)
NATIVE := setup.py pyproject.toml $(SOURCES)
$(VENV)/.installed: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel ninja "torch>=2.10"
	$(BIN)/python setup.py --quiet build_ext --inplace & library=$$!; \
	    DGS_KERNELS_BUILD=none $(PIP) --no-build-isolation --editable ".[test]"; pip=$$?; wait $$library && exit $$pip
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/actionlint -shellcheck=  # from .github/workflows; whether shellcheck is installed must not matter

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf build dist *.egg-info runs
