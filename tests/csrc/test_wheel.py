"""The wheel: one file for all Pythons and several torch versions, this one and an older one tried."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OLDER = "2.13.0"
NEEDS = ("numpy", "pytest", "hypothesis")
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
OPERATIONS = (
    "project_align",
    "project_align_",
    "gramian",
    "combine_",
    "surgery_head",
    "spectral_entropy",
    "surgery_adamw_",
)
# Every operation through the native library. Under this torch, where all other tests run the same library,
# only the file can be wrong: a few cases of accuracy. Under the older one layouts, options, schemas, errors.
FEW = "accuracy and cpu-cpu and 3-123"
SELECTED = f"cpu-cpu and not accuracy or opcheck or errors or ({FEW})"
WHAT_IS_TESTED = """
import torch, dgs_kernels
from dgs_kernels import backends
missing = [o for o in backends.OPERATIONS if backends.obstacle("cpu", o, "cpu")]
print(torch.__version__, dgs_kernels.__file__, missing)
"""


def pip(*arguments: str | Path, python: str | Path = sys.executable) -> str:
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*command, "--retries", "1", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def source_of_older_torch() -> list[str]:
    """pip's arguments that bring the older torch without CUDA's gigabytes; skips where there are none.

    Asking costs a look at indices and metadata, no download.
    """
    for source in ([], ["--extra-index-url", CPU_TORCH]):
        plan = ("--dry-run", "--ignore-installed", "--no-deps", "--report=-", f"torch=={OLDER}")
        with contextlib.suppress(AssertionError):
            (package,) = json.loads(pip("install", *plan, *source))["install"]
            if not any(need.startswith(("nvidia", "cuda")) for need in package["metadata"]["requires_dist"]):
                return source
    pytest.skip(f"pip finds no torch {OLDER} without CUDA, neither at its index nor at {CPU_TORCH}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """What `make wheel` makes, from a copy of the sources."""
    if sys.platform != "linux" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs Linux and a C++ compiler on the PATH")
    source = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so")
    )
    # The checkout's objects come from kernels that were compiled alike.
    for objects in ROOT.glob("build/temp*"):
        shutil.copytree(objects, source / "build" / objects.name)
    environment = os.environ | {"DGS_KERNELS_BUILD": "cpu"}
    # `make install` has run here already.
    bin = Path(sys.executable).parent
    command = ["make", "--directory", source, "--old-file", "install", f"BIN={bin}", "wheel"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = source.glob("dist/*.whl")
    return file


def test_contents(wheel, tmp_path):
    """The library names no Python, and torch only through libtorch.so; it loads without the package."""
    assert "-cp310-abi3-manylinux_" in wheel.name
    library = Path(zipfile.ZipFile(wheel).extract("dgs_kernels/_native.abi3.so", tmp_path))
    content = library.read_bytes()
    assert b"libtorch.so" in content
    assert not any(name in content for name in (b"libtorch_cuda", b"libc10", b"libpython"))
    spec = importlib.util.spec_from_file_location("_native", library)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    x, out = torch.eye(3), torch.ones(3, 3)
    reason = native.project_align(x, x, None, None, 1.0, 1e-6, 0, 0, out)
    assert native.devices == "cpu" and reason is None and out.abs().max().item() < 1e-5


@pytest.fixture(params=["this torch", f"torch {OLDER}"])
def installed(request, wheel, tmp_path) -> Iterator[tuple[Path, dict[str, str], str]]:
    """A Python that has the wheel and not the checkout, its environment, and its torch's version."""
    if request.param == "this torch":
        # This folder comes before the packages of this environment.
        target = tmp_path / "site"
        pip("install", "--no-deps", "--target", target, wheel)
        yield Path(sys.executable), {"PYTHONPATH": str(target)}, torch.__version__
        return
    source = source_of_older_torch()
    folder = tmp_path / "older"
    venv.create(folder)
    try:
        python = folder / "bin" / "python"
        pip("install", "--no-compile", f"torch=={OLDER}", *NEEDS, wheel, *source, python=python)
        # Nothing on the PATH but this Python: no compiler.
        yield python, {"PYTHONPATH": "", "PATH": str(python.parent), "CXX": "", "CC": ""}, OLDER
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_cpu_tests_pass(installed, tmp_path):
    python, environment, version = installed
    environment = os.environ | environment | {"OMP_NUM_THREADS": "2"}
    environment.pop("DGS_KERNELS_BACKEND", None)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))

    def run(*command: str) -> str:
        done = subprocess.run(
            [python, *command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    found, file, missing = run("-c", WHAT_IS_TESTED).split(maxsplit=2)
    assert found.startswith(version.split("+")[0]) and missing.strip() == "[]"
    assert ROOT not in Path(file).parents and "site" in file
    options = ("-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "markers=gpu\nslow")
    print(
        run(
            "-m",
            "pytest",
            *options,
            *(f"tests/dgs_kernels/ops/test_{o}.py" for o in OPERATIONS),
            "-k",
            SELECTED if version == OLDER else FEW,
        )
    )
