"""Which implementation serves a call: chosen, forced, missing or broken; and the docstrings' examples."""

from __future__ import annotations

import doctest
import importlib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dgs_kernels
from dgs_kernels import backends

PACKAGE = Path(dgs_kernels.__file__).parent


def run_copy(folder: Path, code: str, **environment: str) -> str:
    """Run code in a new process against a copy of the package that holds its Python files only."""
    for source in PACKAGE.rglob("*.py"):
        target = folder / "dgs_kernels" / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    environment = {k: v for k, v in os.environ.items() if k != backends.VARIABLE} | environment
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


CALLS = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, dgs_kernels
print(dgs_kernels.__file__)
for _ in range(2):
    print(dgs_kernels.project_align(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, -1.0]), eps=1e-12))
print(dgs_kernels.explain())
"""


def test_pure_python(tmp_path):
    """Without the native library and triton everything works, and one warning says what is missing."""
    output = run_copy(tmp_path, CALLS)
    assert str(tmp_path) in output and output.count("tensor([[0., 4.]])") == 2
    assert (
        output.count("RuntimeWarning: dgs_kernels: project_align on cpu falls back to the eager backend") == 1
    )
    assert "reinstall with a C++ compiler" in output
    assert "triton is not installed" in output


def test_broken_library(tmp_path):
    library = tmp_path / "dgs_kernels" / "_native.abi3.so"
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    output = run_copy(tmp_path, CALLS)
    assert output.count("tensor([[0., 4.]])") == 2
    assert "_native.abi3.so could not be loaded: " in output


def test_forced_choice_is_an_error_where_it_is_impossible(monkeypatch):
    grad, harmful = torch.ones(2, 3), torch.ones(3)
    for name, words in (
        ("fast", "DGS_KERNELS_BACKEND=fast: expected one of cuda, triton, cpu, eager"),
        ("cuda", "DGS_KERNELS_BACKEND=cuda cannot serve project_align on cpu: it serves cuda tensors only"),
    ):
        monkeypatch.setenv(backends.VARIABLE, name)
        with pytest.raises(dgs_kernels.BackendError, match=words):
            dgs_kernels.project_align(grad, harmful)
    monkeypatch.setenv(backends.VARIABLE, "eager")
    dgs_kernels.project_align(grad, harmful)


def test_triton_serves_cpu_tensors_in_its_interpreter_only(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in backends.obstacle("triton", "project_align", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.obstacle("triton", "project_align", "cpu") is None
    assert "no mps support" in backends.obstacle("triton", "project_align", "mps")


def test_explain_names_every_backend_and_what_kernels_do_not_take(monkeypatch, capsys):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    text = dgs_kernels.explain()
    assert capsys.readouterr().out == ""
    monkeypatch.delitem(sys.modules, "dgs_kernels.__main__", raising=False)
    runpy.run_module("dgs_kernels", run_name="__main__")
    assert capsys.readouterr().out == text + "\n"
    assert text.startswith(f"dgs_kernels with torch {torch.__version__}; {backends.VARIABLE}=(not set)\n")
    assert "kernels take patches of 32 x 32 pixels, not of float64 images" in text
    for operation in backends.OPERATIONS:
        assert f"  {operation}: " in text
    assert all(f"    {name:7s}" in text for name in backends.BACKENDS)
    of_cpu = text.partition("cuda:")[0]
    assert "    eager  available\n" in of_cpu and "    cuda   it serves cuda tensors only\n" in of_cpu
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    forced = dgs_kernels.explain()
    assert "project_align: none: an error" in forced and f"; {backends.VARIABLE}=cuda\n" in forced


HOOKS = ("adamw", "features", "objectives", "parameters")


@pytest.mark.parametrize(
    "module",
    [
        *("backends", "module", *(f"hooks.{hook}" for hook in HOOKS)),
        *(f"ops.{name}" for name in backends.OPERATIONS if name != "surgery_adamw_"),
    ],
)
def test_examples(module):
    failed, tried = doctest.testmod(
        importlib.import_module(f"dgs_kernels.{module}"), optionflags=doctest.ELLIPSIS
    )
    assert tried and not failed
