"""The build: setup.py where compilers or torch are missing, and the native library it makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import pytest
import setuptools
import torch

from dgs_kernels import backends, reference

ROOT = Path(__file__).resolve().parents[2]
COMPILER = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
needs_compiler = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs Linux and a C++ compiler on the PATH"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a build reads, without what an earlier build left."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("csrc", "dgs_kernels", "python"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def build(source: Path, *python: str, **environment: str) -> subprocess.CompletedProcess:
    """Build a wheel into source/dist."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "CUDACXX", "CUDA_HOME")}
    return subprocess.run(
        [*(python or [sys.executable]), "setup.py", "-q", "bdist_wheel"],
        cwd=source,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def said(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("dgs-kernels: ")]


def assert_pure(source: Path) -> None:
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dgs_kernels/reference.py" in names and "dgsnet/config.py" in names
    assert not any(name.endswith(".so") for name in names)


def test_asked_for_pure_python(source):
    result = build(source, DGS_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert said(result) == ["dgs-kernels: pure Python: DGS_KERNELS_BUILD=none"]
    assert_pure(source)


def test_no_compiler(source, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    result = build(source, PATH=str(empty), DGS_KERNELS_BUILD="auto")
    assert result.returncode == 0, result.stderr
    (line,) = said(result)
    assert "pure Python: no C++ compiler on the PATH" in line
    assert_pure(source)
    result = build(source, PATH=str(empty), DGS_KERNELS_BUILD="cpu")
    assert result.returncode and result.stderr.strip().splitlines()[-1].startswith(
        "dgs-kernels: DGS_KERNELS_BUILD=cpu: no C++ compiler on the PATH"
    )


def test_no_torch(source, tmp_path):
    """An interpreter that sees setuptools and nothing else."""
    (packages := tmp_path / "packages").mkdir()
    site = Path(setuptools.__file__).parent.parent
    for package in [*site.glob("setuptools*"), *site.glob("wheel*"), *site.glob("_distutils_hack")]:
        (packages / package.name).symlink_to(package)
    result = build(source, sys.executable, "-S", PYTHONPATH=str(packages), DGS_KERNELS_BUILD="auto")
    assert result.returncode == 0, result.stderr
    (line,) = said(result)
    assert "pure Python: no torch 2.10 or newer" in line
    assert_pure(source)


def test_no_python_headers(source):
    code = """
import runpy, sys, sysconfig
paths = sysconfig.get_paths
sysconfig.get_paths = lambda *a, **k: paths(*a, **k) | {"include": "/nowhere"}
del sys.argv[0]
runpy.run_path("setup.py", run_name="__main__")
"""
    result = build(source, sys.executable, "-c", code, DGS_KERNELS_BUILD="auto")
    assert result.returncode == 0, result.stderr
    (line,) = said(result)
    assert "pure Python: no Python.h in /nowhere (install python3-dev)" in line
    assert_pure(source)


def test_unknown_mode(source):
    result = build(source, DGS_KERNELS_BUILD="gpu")
    assert result.returncode and "Traceback" not in result.stderr
    assert said(result) == ["dgs-kernels: DGS_KERNELS_BUILD=gpu: expected auto, cpu, cuda or none"]


@needs_compiler
def test_broken_compiler(source):
    """In auto mode the installation succeeds all the same, and says what went wrong."""
    (source / "csrc" / "torch" / "module.cpp").write_text("#error broken on purpose\n")
    for kernel in [*source.glob("csrc/cpu/*.cpp"), *source.glob("csrc/cuda/*.cu")]:
        kernel.unlink()
    result = build(source, DGS_KERNELS_BUILD="auto")
    assert result.returncode == 0, result.stderr
    assert "broken on purpose" in result.stderr
    assert build(source, DGS_KERNELS_BUILD="cpu").returncode


# The library of this checkout


@pytest.fixture(scope="module")
def native():
    if reason := backends.obstacle("cpu", "project_align", "cpu"):
        assert COMPILER is None or sys.platform != "linux", f"a compiler is here, and yet: {reason}"
        pytest.skip(reason)
    serve = backends.implementation("project_align", "cpu")

    def native(grad, *inputs):
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        assert serve(grad, *inputs, out) is None
        return out

    return native


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_reference(native, dtype):
    for order, rule, aligned in product(reference.ORDERS, reference.RULES, (True, False)):
        grad, harmful, beneficial = draw(3, 9, 515, dtype=dtype)
        inputs = grad, harmful, beneficial if aligned else None
        out = native(*inputs, None, 0.3, 1e-6, order, rule)
        options = {"alignment": 0.3, "order": order, "rule": rule}
        exact = reference.project_align(*(t if t is None else t.double() for t in inputs), **options)
        eager = reference.project_align(*inputs, **options)
        assert out.dtype == dtype
        error, eager_error = ((t.double() - exact).abs().max() for t in (out, eager))
        # float64 is compared with itself: then a rounding of values up to 4 is all there is
        assert error <= 2 * eager_error + 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_survives(native, dtype):
    """All 65536 bit patterns in; where nothing is projected, all finite ones come out unchanged."""
    x = torch.arange(65536).to(torch.int16).view(dtype)[:, None]
    out = native(x, torch.zeros_like(x), None, None, 1.0, 1e-6, "align_first", "full")
    finite = x.isfinite()
    assert torch.equal(out[finite], x[finite]) and out[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(native, dtype):
    """Every float of a fine grid rounds as torch rounds it, from subnormals to beyond the largest."""
    ones = torch.full((1, 4001), -1.0, dtype=dtype)
    for scale in torch.logspace(-9, 5.5, 400).tolist():
        scale_tensor = torch.tensor(scale)
        out = native(
            torch.zeros_like(ones),
            torch.zeros_like(ones),
            ones,
            scale_tensor,
            1.0,
            1e-6,
            "project_first",
            "full",
        )
        assert torch.equal(out[0, 0], (-scale_tensor).to(dtype)) and torch.equal(
            out, out[0, 0].expand_as(out)
        )


def test_few_long_rows_do_not_depend_on_threads(native):
    """Threads share the blocks of a row there; the sums are those of one thread."""
    inputs = draw(3, 2, 100_003)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(*inputs, None, 0.3, 1e-6, "align_first", "positive"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    # ... nor on how many rows there are
    many = [t.repeat(4, 1) for t in inputs]
    assert torch.equal(native(*many, None, 0.3, 1e-6, "align_first", "positive")[:2], results[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_not_finite_stays_visible(native, bad, dtype):
    inputs = draw(3, 4, 100, dtype=dtype)
    inputs[0, 2, 77] = bad
    out = native(*inputs, None, 0.3, 1e-6, "align_first", "positive")
    assert out[[0, 1, 3]].isfinite().all() and not out[2, 77].isfinite()


def test_what_does_not_fit_is_left_alone(native):
    """The caller words the errors."""
    serve, x, options = (
        backends.implementation("project_align", "cpu"),
        draw(2, 3),
        (1.0, 1e-6, "align_first", "full"),
    )
    for change in (
        {"grad": x.int(), "harmful": x.int()},
        {"harmful": x[:, :2]},
        {"harmful": x[None]},
        {"harmful": [1.0, 2.0, 3.0]},
        {"beneficial": x.double()},
        {"beneficial": x.to("meta")},
        {"scale": torch.tensor(1)},
        {"out": torch.zeros(3, 2).T},
        {"eps": "small"},
    ):
        out = torch.zeros(2, 3)
        names = ("grad", "harmful", "beneficial", "scale", "alignment", "eps", "order", "rule", "out")
        arguments = dict(zip(names, (x, x, None, None, *options, out))) | change
        reason = serve(*arguments.values())
        assert reason.startswith(next(iter(change))), (change, reason)
        assert not out.any()
    with pytest.raises(TypeError, match="expected 9 arguments, got 1"):
        serve(x)
