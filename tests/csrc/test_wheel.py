"""One wheel file serves several torch versions: its CPU tests pass under this torch and an older one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
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
# Every operation through the native library: layouts, options, schemas, errors, and a few cases of accuracy.
SELECTED = "cpu-cpu and not accuracy or opcheck or errors or (accuracy and cpu-cpu and 3-123)"
WHAT_IS_TESTED = """
import torch, dgs_kernels
from dgs_kernels import backends
missing = [o for o in backends.OPERATIONS if backends.obstacle("cpu", o, "cpu")]
print(torch.__version__, dgs_kernels.__file__, missing)
"""


def pip(*arguments: str | Path, python: str | Path = sys.executable) -> subprocess.CompletedProcess:
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def source_of_older_torch() -> list[str]:
    """pip's arguments that bring the older torch without CUDA's gigabytes; skips where there are none.

    Asking costs a look at indices and metadata, no download.
    """
    for source in ([], ["--extra-index-url", CPU_TORCH]):
        plan = ("--dry-run", "--ignore-installed", "--report=-", f"torch=={OLDER}", *NEEDS)
        asked = pip("install", *plan, *source)
        if asked.returncode == 0:
            names = [package["metadata"]["name"] for package in json.loads(asked.stdout)["install"]]
            if not any(name.startswith(("nvidia", "cuda")) for name in names):
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
    environment = os.environ | {"DGS_KERNELS_BUILD": "cpu"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--wheel-dir", source.parent, source], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = source.parent.glob("*.whl")
    return file


@pytest.fixture(params=["this torch", f"torch {OLDER}"])
def installed(request, wheel, tmp_path) -> tuple[Path, dict[str, str], str]:
    """A Python that has the wheel and not the checkout, its environment, and its torch's version."""
    if request.param == "this torch":  # in a folder that comes before this environment's packages
        target = tmp_path / "site"
        done = pip("install", "--no-deps", "--target", target, wheel)
        assert done.returncode == 0, done.stderr
        yield Path(sys.executable), {"PYTHONPATH": str(target)}, torch.__version__
        return
    source = source_of_older_torch()
    folder = tmp_path / "older"
    venv.create(folder, with_pip=True)
    try:
        python = folder / "bin" / "python"
        done = pip("install", "--no-compile", f"torch=={OLDER}", *NEEDS, *source, python=python)
        assert done.returncode == 0, done.stderr
        done = pip("install", "--no-deps", wheel, python=python)
        assert done.returncode == 0, done.stderr
        yield python, {"PYTHONPATH": ""}, OLDER
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
            SELECTED,
        )
    )
