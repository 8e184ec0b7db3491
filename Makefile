# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Both start Python many times: it keeps what it has compiled, even where the machine's settings say otherwise.
export PYTHONDONTWRITEBYTECODE :=
# CUDA kernels for the architecture whose machine code the tests read, with PTX, which later cards compile, and for this
# machine's own cards: a third of the compiler's work for all architectures, which wheels and `pip install` are built for.
CARDS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+\.[0-9]+' | sort -u)
export TORCH_CUDA_ARCH_LIST ?= 9.0+PTX $(filter-out 9.0,$(CARDS))
# Two targets at a time: the library is compiled while the lint reads.
MAKEFLAGS += --jobs=2
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test fuzz mutants gpu wheel docs install lint format clean

# Tests that follow the others: two compile in processes of their own, one of them what the others launched, and one
# takes times with nothing beside it.
LAST := $(addprefix tests/dgs_kernels/,ops/test_triton_compiles.py ops/test_triton_machine_code.py test_speed.py)

demo: install
	$(BIN)/python -m dgsnet demo --out runs/demo

# TESTS= takes further arguments of pytest.
# Two processes with two threads each: on two cores, a thread that waits must not spin where another could run.
test: lint docs install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore ,$(LAST)) $(TESTS)
	$(BIN)/python -m pytest $(LAST) $(TESTS)

# What strangers could send, changed at random, for FUZZ= seconds; `make test` does so for ten.
fuzz: install
	$(BIN)/python -m tests.fuzz --seconds $(or $(FUZZ),60) $(if $(SEED),--seed $(SEED))

# Plants a sample of faults in copies, two at a time, and counts those that the tests notice; not part of `make test`.
# FILES= takes words, of which a path must have one.
mutants: install
	@$(BIN)/python -m tests.mutants --sample $(or $(SAMPLE),80) --seed $(or $(SEED),0) --files "$(FILES)"

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
docs: $(VENV)/.packages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The stamps are newer than every file that decides what is installed or built. uv installs what pip would in a fifth
# of the time; it has settings of its own, so pip's index and constraints are handed on. The library needs only torch:
# it is compiled while the other packages come and are put to use.
install: $(VENV)/.packages $(VENV)/.library
SOURCES := $(shell find csrc -type f 2>/dev/null)
PIP_SETTING = $(shell $(PYTHON) -m pip config list 2>/dev/null | sed -n "s/^.*\.$(1)='\(.*\)'/\1/p" | head -1)
$(VENV)/.torch $(VENV)/.packages: export UV_DEFAULT_INDEX ?= $(call PIP_SETTING,index-url)
$(VENV)/.torch $(VENV)/.packages: export UV_CONSTRAINT ?= $(call PIP_SETTING,constraint)
$(VENV)/.torch $(VENV)/.packages: export UV_HTTP_TIMEOUT ?= 300
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) "setuptools>=77" wheel ninja "torch>=2.10"
	touch $@

$(VENV)/.packages: $(VENV)/.torch pyproject.toml setup.py tests/pinned.txt
	DGS_KERNELS_BUILD=none $(UV) --no-build-isolation --editable ".[test]"
	UV_CONSTRAINT= $(UV) --no-deps --require-hashes --requirement tests/pinned.txt
	touch $@

$(VENV)/.library: $(VENV)/.torch setup.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

lint: $(VENV)/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/actionlint -shellcheck=  # from .github/workflows; whether shellcheck is installed must not matter

format: $(VENV)/.packages
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf build dist *.egg-info runs
