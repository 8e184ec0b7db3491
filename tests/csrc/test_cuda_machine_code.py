"""Compiles the CUDA kernels and reads the machine code: no spills, no local memory, and on the aligned path
no load or store of matrix data narrower than 16 bytes. Needs nvcc, but no GPU."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
SOURCES = sorted(p.name for p in CUDA.glob("*.cu"))

# Narrow accesses to device memory that an aligned kernel may have: numbers that stand alone, not matrix data.
# (loads, stores) of: scale; biases, label, offset; scalars of a row, sums of a chunk; table entries,
# sums of a group; rates.
SCALARS = {
    "rows_in_registers": (1, 0),
    "rows_read_twice": (1, 0),
    "head_rows": (5, 19),
    "head_backward": (9, 0),
    "chunk_sums": (8, 6),
    "project_chunks": (20, 6),
    "adamw_chunks": (24, 6),
    "patch_entropy": (0, 1),
}
# Not written for width: small sums, tables, and the twin for rows that no block can hold.
NOT_WIDE = {"add_chunk_sums", "head_sum_chunks", "head_read_twice", "write_piece", "cut_tensors"}

MEMORY = r"\b(?:(?:LDL|STL)(?:\.\w+)*|(?:LDG|LDGSTS|STG|LD|ST)(?:\.\w+)+)"

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")


def find_cuobjdump():
    """Beside nvcc in a whole CUDA toolkit; Triton carries one too."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if not found and triton:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    return found


def output(*command):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def compile_all():
    """{(source, architecture): (cubin, what ptxas said)}, compiled again only when a source has changed."""
    sources = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cu", ".cuh", ".h")]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    folder = ROOT / "build" / f"cubins-{key}"
    folder.mkdir(parents=True, exist_ok=True)

    def build(job):
        source, architecture = job
        cubin = folder / f"{Path(source).stem}.{architecture}.cubin"
        log = cubin.with_suffix(".log")
        if not log.exists():
            options = ["-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
            said = output(NVCC, *options, "-o", str(cubin), str(CUDA / source))
            log.with_suffix(".part").write_text(said)
            os.replace(log.with_suffix(".part"), log)
        return job, (cubin, log.read_text())

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, [(s, a) for s in SOURCES for a in ARCHITECTURES]))


@pytest.fixture(scope="module")
def compiled():
    return compile_all()


def kernels(cubin):
    """(name, whether it is the aligned variant, its memory instructions) of every kernel in a cubin."""
    names = {*SCALARS, *NOT_WIDE}
    for part in output(find_cuobjdump(), "--dump-sass", str(cubin)).split("Function : ")[1:]:
        mangled = part.split(maxsplit=1)[0]
        (name,) = (
            n for n in names if re.search(f"{len(n)}{n}[IE]", mangled)
        )  # with template arguments or not
        yield name, "Lb1E" in mangled, Counter(re.findall(MEMORY, part))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(compiled, source, architecture):
    _, said = compiled[source, architecture]
    reports = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert reports
    assert all(report == ("0", "0", "0") for report in reports), said


@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump, neither CUDA's nor Triton's")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_wide_accesses(compiled, source, architecture):
    cubin, _ = compiled[source, architecture]
    seen = 0
    for name, aligned, instructions in kernels(cubin):
        counts = Counter()
        for instruction, n in instructions.items():
            kind = instruction.split(".")[0]
            counts[kind, "128" in instruction] += n
        assert not any(kind in ("LDL", "STL") for kind, _ in counts), (
            f"{name} uses local memory: {instructions}"
        )
        if name in NOT_WIDE or not aligned:
            continue
        seen += 1
        # LD and ST, through generic addresses, serve matrices found in a table as well as a cluster's sums.
        loads, stores = SCALARS[name]
        narrow_loads = counts["LDG", False] + sum(n for i, n in instructions.items() if "U16" in i)
        assert narrow_loads <= loads, f"{name} loads narrowly: {instructions}"
        assert not counts["LDGSTS", False], f"{name} copies narrowly: {instructions}"
        assert counts["STG", False] <= stores, f"{name} stores narrowly: {instructions}"
        assert counts["LDG", True] + counts["LD", True] >= 6, f"{name} has no wide loads: {instructions}"
    assert seen >= 2 or source == "tables.cu"  # one for each storage type
