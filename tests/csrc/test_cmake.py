"""The CMake build: the kernels' own tests, and dgs_numpy, the kernels on NumPy arrays without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """The folder of a build that knows no Python. It compiles in half the time: other tests are of -O3."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    build = tmp_path_factory.mktemp("cmake")
    flags = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")
    run("cmake", "-G", "Ninja", "-S", HERE.parents[1], "-B", build, *flags)
    return build


@pytest.mark.slow
def test_kernels(build):
    run("cmake", "--build", build)
    run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")


@pytest.fixture(scope="module")
def folder(build) -> Path:
    """The same folder, where dgs_numpy is then built as docs/numpy.md says."""
    pytest.importorskip("pybind11")
    run(
        "cmake",
        "-S",
        HERE.parents[1],
        "-B",
        build,
        "-DDGS_PYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    run("cmake", "--build", build, "--target", "dgs_numpy")
    return build


@pytest.mark.slow
def test_against_numpy(folder):
    pytest.importorskip("ml_dtypes")
    scripts = (HERE / "numpy_module.py", HERE / "numpy_module_errors.py")
    command = (
        sys.executable,
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-q",
        "-o",
        "addopts=",
    )
    assert " passed" in run(*command, *scripts, PYTHONPATH=str(folder), OMP_NUM_THREADS="1")


def test_docstring_examples(folder):
    run(
        "ctest", "--test-dir", folder, "-R", "dgs_numpy_docstrings", "--output-on-failure", "--no-tests=error"
    )


def test_example_of_the_documentation(folder):
    page = (HERE.parents[1] / "docs" / "numpy.md").read_text()
    (code,) = re.findall(r"<<'END'\n(.*?)END\n", page, flags=re.DOTALL)
    assert run(sys.executable, "-c", code, PYTHONPATH=str(folder)).splitlines() == ["True", "(1, 300)"]
