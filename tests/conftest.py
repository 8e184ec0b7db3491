"""What every test shares: few threads, where there is no GPU a skip that says so, and poisoned memory."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter

import pytest
import torch

NEEDS_GPU = "needs a CUDA device"

if not torch.cuda.is_available():
    # Triton reads this when it is first imported: its kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Where OMP_NUM_THREADS says one thread, it stays one.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first: the last file should not be one that a single process works on alone.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    files = Counter(report.nodeid.split("::")[0] for report in skipped if NEEDS_GPU in str(report.longrepr))
    if files:
        terminalreporter.section(f"not run: {files.total()} tests that need a CUDA device")
        for file, count in sorted(files.items()):
            terminalreporter.line(f"{count:5} {file}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """After an illegal access every call to the device fails: another process takes the later tests."""
    done = yield
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        from benchmarks import harness

        if not harness.answers("cuda"):
            os._exit(1)
    return done


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """What training and torch.compile keep on disk is of this run alone; its processes share the latter."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "inductor"))
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Triton's: what it runs is noted, for test_triton_compiles.py to compile."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from tests.support import triton_interpreter, triton_launches

    with triton_launches.noted(), triton_interpreter.patched_once():
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its settings for the whole process: a test must not train with another one's."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture
def nan_filled():
    """Fill what torch allocates uninitialised with NaN, so that an element no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve every operation by the backend of an `on_backends` parameter; returns the device to use."""
    from dgs_kernels import backends

    name, device, operation = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(NEEDS_GPU)
    if reason := backends.obstacle(name, operation, device):
        pytest.skip(f"{name} on {device}: {reason}")
    monkeypatch.setenv(backends.VARIABLE, name)
    return device


def interpreted() -> bool:
    """Whether Triton's interpreter serves the operations, with milliseconds for each program of a kernel."""
    from dgs_kernels import backends

    return os.environ.get(backends.VARIABLE) == "triton" and not torch.cuda.is_available()


def on_backends(operation: str) -> pytest.MarkDecorator:
    """Run a test of one operation on every backend and device; GPU ones are marked so."""
    pairs = [("eager", "cpu"), ("cpu", "cpu"), ("triton", "cpu"), ("triton", "cuda"), ("cuda", "cuda")]
    marks = {"cuda": [pytest.mark.gpu], "cpu": []}
    return pytest.mark.parametrize(
        "backend",
        [pytest.param((b, d, operation), marks=marks[d], id=f"{b}-{d}") for b, d in pairs],
        indirect=True,
    )
