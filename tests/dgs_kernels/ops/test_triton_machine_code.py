"""What Triton's kernels compile to, for GPUs that are not here: no spills, 16 bytes at a time.

It comes after the suite, like test_triton_compiles.py: each compiles in processes of its own.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import triton

from dgs_kernels.triton.surgery_head import at_once
from tests.support import triton_launches

# How often a loop is written out, and with it each number here, is the compiler's to choose.
pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="counted in the code of Triton 3.8 and newer",
)


@pytest.fixture(scope="module")
def codes():
    """What machine_code.py finds, by operation and kernel: {"gramian": {"sm_90 fp32 2": {...}, ...}, ...}."""
    result = triton_launches.where_triton_compiles("tests.dgs_kernels.ops.machine_code")
    assert result.returncode == 0, result.stderr
    found = defaultdict(dict)
    for kernel in map(json.loads, result.stdout.splitlines()):
        operation, name = kernel["kernel"].split(" ", 1)
        found[operation][name] = kernel
    return found


def assert_wide(kernel, *, wide_loads, wide_stores, scalar_loads, scalar_stores=0):
    """No stack, no spills, and nothing narrower than 16 bytes save so many numbers that stand alone."""
    memory = kernel["memory"]
    assert kernel["stack"] == 0 and not any(name.startswith(("LDL", "STL")) for name in memory), kernel
    found = {(kind, wide): 0 for kind in ("LDG", "STG") for wide in (True, False)}
    for name, count in memory.items():
        found[name[:3], name.endswith(".128")] += count
    expected = {("LDG", True): wide_loads, ("LDG", False): scalar_loads}
    expected |= {("STG", True): wide_stores, ("STG", False): scalar_stores}
    assert found == expected, kernel


def test_project_align(codes):
    kernels = codes["project_align"]
    assert len(kernels) == 10
    for kernel in kernels.values():
        memory = kernel["memory"]
        assert kernel["stack"] == 0, kernel
        assert not any(name.startswith(("LDL", "STL")) for name in memory), kernel
        narrow = {name: n for name, n in memory.items() if not name.endswith(".128")}
        loads = sum(n for name, n in narrow.items() if name.startswith("LDG"))
        stores = sum(narrow.values()) - loads
        # What stands alone: the scale; two sums of a part, and those of all parts of a row, two to a thread.
        sums, parts = " sums " in kernel["kernel"], " parts " in kernel["kernel"]
        assert (loads, stores) == (1 + 4 * parts, 2 * sums), kernel
        assert memory["LDG.E.128"] >= 3 * memory.get("STG.E.128", 0) > 0 or sums, kernel


def test_surgery_head(codes):
    """Matrices and weights move 16 bytes at a time."""
    kernels = codes["surgery_head"]
    assert len(kernels) == 30
    for kernel in kernels.values():
        memory = kernel["memory"]
        assert kernel["stack"] == 0 and not any(n.startswith(("LDL", "STL")) for n in memory), kernel
        # Narrow loads are of single numbers: labels, biases, residuals, scales. None is repeated along a row.
        backward, products = ("backward" in kernel["kernel"], 8 if "long rows" in kernel["kernel"] else 0)
        loads, copies = (
            Counter({n: k for n, k in memory.items() if n.startswith(p)}) for p in ("LDG.", "LDGSTS.")
        )
        assert loads["LDG.E.128"] >= 2 and loads.total() - loads["LDG.E.128"] <= 9 + products, kernel
        # The next rows are copied to shared memory while the present ones are summed: two or three times in
        # the code, each with a label and an offset.
        wide = sum(k for n, k in copies.items() if ".128" in n)
        in_stages = " rows " in kernel["kernel"].replace("long rows", "")
        assert copies.total() - wide <= 6 and (wide >= 12 if in_stages else not copies), kernel
        # Partial sums are written once per chunk, where they fit; the result 16 bytes at a time.
        stores = {n for n in memory if n.startswith("STG")}
        assert not backward or stores == {"STG.E.128"}, kernel
        assert "expert" not in kernel["kernel"] or backward or "STG.E.128" in stores, kernel


H100 = SimpleNamespace(
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=228 << 10,
    max_threads_per_multi_processor=2048,
    multi_processor_count=132,
    warp_size=32,
)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "each"),
    [(160, 40 << 10, 4, 3), (169, 0, 4, 2), (255, 0, 16, 1), (64, 60 << 10, 8, 3), (16, 0, 8, 8)],
    ids=["registers", "in eights", "never none", "shared memory", "threads"],
)
def test_programs_that_a_device_runs_at_once(registers, shared, warps, each):
    assert at_once(registers, shared, warps, H100) == 132 * each


def test_surgery_head_keeps_a_device_busy(codes):
    """A wave of programs has at least 8 warps on each multiprocessor."""
    rows = {name: kernel for name, kernel in codes["surgery_head"].items() if name.startswith("sm_90 rows")}
    assert len(rows) == 6
    for name, kernel in rows.items():
        found = at_once(kernel["registers"], kernel["shared"], kernel["warps"], H100)
        assert found * kernel["warps"] >= 8 * 132, (name, found, kernel)


def test_project_align_(codes):
    """Alone stand: table entries, the group's sums, the scale."""
    kernels = codes["project_align_"]
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        # Each thread needs so many accesses for 8 numbers.
        rows = 2 if "fp32" in name else 1
        if "sums" in name:
            assert_wide(kernel, wide_loads=3 * rows, wide_stores=0, scalar_loads=9, scalar_stores=6)
        else:
            assert_wide(kernel, wide_loads=3 * rows, wide_stores=rows, scalar_loads=14)


def test_surgery_adamw_(codes):
    """Alone stand: entries of the tables, rates, sums, the scale."""
    kernels = codes["surgery_adamw_"]
    assert len(kernels) == 4
    for name, kernel in kernels.items():
        rows = 2 if "fp32" in name else 1
        assert_wide(kernel, wide_loads=6 * rows, wide_stores=3 * rows, scalar_loads=19)


def test_gramian(codes):
    """Alone stand: table entries and partial sums."""
    kernels = codes["gramian"]
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        # Each thread needs so many accesses for 8 numbers.
        count, rows = int(name.split()[-1]), 2 if "fp32" in name else 1
        assert_wide(
            kernel,
            wide_loads=count * rows,
            wide_stores=0,
            scalar_loads=count + 6,
            scalar_stores=count * (count + 1) // 2,
        )


def test_combine_(codes):
    """Alone stand: entries of the table, and each objective's address and weight."""
    kernels = codes["combine_"]
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        # Each thread needs so many accesses for 8 numbers.
        count, rows = int(name.split()[-1]), 2 if "fp32" in name else 1
        assert_wide(kernel, wide_loads=count * rows, wide_stores=rows, scalar_loads=8 + 2 * count)


def test_spectral_entropy(codes):
    """Planar images move 16 bytes at a time."""
    kernels = codes["spectral_entropy"]
    assert len(kernels) == 4
    for kernel in kernels.values():
        memory = kernel["memory"]
        assert kernel["stack"] == 0, kernel
        assert {n for n in memory if not n.startswith("STG")} == {"LDG.E.128"}, kernel
