"""Compiles every Triton kernel in every way in which the suite has launched it, for sm_80 and sm_90.

It comes after the suite, in a run of its own: what it compiles are the launches that the interpreter's tests
have left (tests/support/triton_launches.py), of each kernel one, and all that are not on record.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

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
    noted = triton_launches.noted_files()
    assert noted, "no launch of these kernels is noted: run the suite first, as `make test` does"
    one_of_each, recorded = {}, triton_launches.recorded()
    for file in noted:
        launch = json.loads(Path(file).read_text())
        one_of_each.setdefault((launch["module"], launch["kernel"]), file)
    missing = sorted(launched_kernels() - one_of_each.keys())
    assert not missing, f"no test of the suite has launched {missing}"

    files = sorted({*one_of_each.values(), *(f for f in noted if Path(f).stem not in recorded)})
    result = triton_launches.where_triton_compiles("tests.support.triton_launches", *files)
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == len(files), result.stderr
    errors = [f"{o['launch']['kernel']}: {o['error']}\n  {o['launch']}" for o in outcomes if o["error"]]
    assert not errors, "\n".join(errors[:10])


@pytest.mark.parametrize("other", ["kernels", "capabilities", "triton", "python"])
def test_the_record_is_of_these_kernels_and_this_compiler(monkeypatch, other):
    record = json.loads(triton_launches.RECORD.read_text())
    monkeypatch.setattr(triton_launches, "made_with", lambda: record["made_with"])
    assert triton_launches.recorded() == set(record["launches"]) != set()
    monkeypatch.setattr(triton_launches, "made_with", lambda: record["made_with"] | {other: "another"})
    assert triton_launches.recorded() == set()


def test_another_kernel_is_told_and_another_launcher_is_not():
    source = (triton_launches.KERNELS / "gramian.py").read_text()
    kernel, launcher = (
        source.replace(before, after)
        for before, after in (("total += ", "total -= "), ("with torch.cuda.device_of(out)", "if True"))
    )
    assert len({source, kernel, launcher}) == 3
    hash_of, hash_of_kernel, hash_of_launcher = (
        triton_launches.hash_of({"gramian": text}) for text in (source, kernel, launcher)
    )
    assert hash_of_kernel != hash_of == hash_of_launcher
