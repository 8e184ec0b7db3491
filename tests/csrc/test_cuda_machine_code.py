"""Reads the machine code in the library as it was built: no spills, no local memory, and on the aligned path
no load or store of matrix data narrower than 16 bytes. Needs a build with CUDA, but no GPU."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]

# Narrow accesses to device memory that an aligned kernel may have: numbers that stand alone, not matrix data.
# (loads, stores) of: the scale; biases, label; scalars of a row; table entries, sums of a group; rates.
SCALARS = {
    "rows_in_registers": (1, 0),
    "rows_read_twice": (1, 0),
    "head_in_registers": (4, 7),
    "head_backward": (8, 0),
    "chunk_sums": (8, 6),
    "project_chunks": (20, 6),
    "adamw_chunks": (24, 6),
    "patch_entropy": (0, 1),
}
# Not written for width: small sums, tables, and the twin for rows that no block can hold.
NOT_WIDE = {"add_chunk_sums", "head_sum_chunks", "head_read_twice", "write_piece", "cut_tensors"}

MEMORY = r"\b(?:(?:LDL|STL)(?:\.\w+)*|(?:LDG|STG|LD|ST)(?:\.\w+)+)"


def find_cuobjdump():
    """Beside nvcc in a whole CUDA toolkit; Triton carries one too."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if not found and triton:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    return found


@pytest.fixture(scope="module")
def library():
    """The library's file."""
    native = pytest.importorskip("dgs_kernels._native")
    if "cuda" not in native.devices.split():
        assert not shutil.which("nvcc"), "nvcc is here, but the library has no CUDA kernels: build it again"
        pytest.skip("the library was built without CUDA")
    if find_cuobjdump() is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    return native.__file__


def dump(what, library, architecture):
    command = [find_cuobjdump(), what, "--gpu-architecture", architecture, library]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def kernel_name(mangled):
    (name,) = (
        n for n in {*SCALARS, *NOT_WIDE} if re.search(f"{len(n)}{n}[IE]", mangled)
    )  # a template or not
    return name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(library, architecture):
    usage = dump("--dump-resource-usage", library, architecture)
    stacks = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage)
    assert {kernel_name(mangled) for mangled, _ in stacks} == {*SCALARS, *NOT_WIDE}
    assert not [mangled for mangled, stack in stacks if stack != "0"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_accesses(library, architecture):
    seen = Counter()
    for part in dump("--dump-sass", library, architecture).split("Function : ")[1:]:
        mangled = part.split(maxsplit=1)[0]
        name, instructions = kernel_name(mangled), Counter(re.findall(MEMORY, part))
        counts = Counter()
        for instruction, n in instructions.items():
            kind = instruction.split(".")[0]
            counts[kind, "128" in instruction] += n
        assert not any(kind in ("LDL", "STL") for kind, _ in counts), (
            f"{name} uses local memory: {instructions}"
        )
        if name in NOT_WIDE or "Lb1E" not in mangled:  # not the aligned variant
            continue
        seen[name] += 1
        # LD and ST, through generic addresses, serve matrices found in a table as well as a cluster's sums.
        loads, stores = SCALARS[name]
        narrow_loads = counts["LDG", False] + sum(n for i, n in instructions.items() if "U16" in i)
        assert narrow_loads <= loads, f"{name} loads narrowly: {instructions}"
        assert counts["STG", False] <= stores, f"{name} stores narrowly: {instructions}"
        assert counts["LDG", True] + counts["LD", True] >= 6, f"{name} has no wide loads: {instructions}"
    assert all(seen[name] >= 2 for name in SCALARS), seen  # one for each storage type
