"""Compiles every Triton kernel in every way in which the suite has launched it, for sm_80 and sm_90.

It comes after the suite, in a run of its own: what it compiles are the launches that the interpreter's tests
have left (tests/support/triton_launches.py).
"""

from __future__ import annotations

import ast
import json
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is a GPU, where kernels are compiled as they are launched", allow_module_level=True)
from tests.support import triton_launches


def launched_kernels() -> set[tuple[str, str]]:
    """Module and name of the kernels in dgs_kernels/triton that a host function launches."""
    return {
        (f"dgs_kernels.triton.{file.stem}", node.func.value.id)
        for file in triton_launches.KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.endswith("kernel")
    }


def test_every_launch_compiles():
    files = sorted(map(str, triton_launches.folder().glob("*.json")))
    assert files, "no launch of these kernels is noted: run the suite first, as `make test` does"
    result = triton_launches.where_triton_compiles("tests.support.triton_launches", *files)
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == len(files), result.stderr
    errors = [f"{o['launch']['kernel']}: {o['error']}\n  {o['launch']}" for o in outcomes if o["error"]]
    assert not errors, "\n".join(errors[:10])
    compiled = {(o["launch"]["module"], o["launch"]["kernel"]) for o in outcomes}
    missing = sorted(launched_kernels() - compiled)
    assert not missing, f"no test of the suite has launched {missing}"
