"""Compiles the CUDA kernels and reads the machine code: no spills, no local memory, and on the aligned path
no load or store of matrix data narrower than 16 bytes. Needs nvcc, but no GPU.

`python -m tests.csrc.test_cuda_machine_code` writes the table in docs/kernels.md anew.
"""

import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
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
# (loads, stores) of: the scale; sums of a row's parts; biases, label, offset; scalars of a row and sums of a
# chunk; table entries, sums of a group; rates.
SCALARS = {
    "rows_in_registers": (1, 0),
    "sum_row_parts": (1, 2),
    "project_row_parts": (5, 0),
    "head_rows": (5, 19),
    "head_backward": (9, 0),
    "chunk_sums": (8, 6),
    "project_chunks": (20, 6),
    "adamw_chunks": (24, 6),
    "chunk_products": (24, 1),
    "combine_chunks": (8, 0),
    "patch_entropy": (0, 1),
}
# Not written for width: small sums, tables, and the twin for rows that no block can hold.
NOT_WIDE = {
    "add_chunk_sums",
    "add_chunk_products",
    "head_sum_chunks",
    "head_read_twice",
    "write_piece",
    "cut_tensors",
}

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


def compile_all(architectures=tuple(ARCHITECTURES)):
    """{(source, architecture): (cubin, what ptxas said)}, compiled again only when a source has changed.

    Beside the cubin lies its PTX. Of two processes that want the same, one compiles it.
    """
    sources = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cu", ".cuh", ".h")]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    folder = ROOT / "build" / f"cubins-{key}"
    folder.mkdir(parents=True, exist_ok=True)

    def build(job):
        source, architecture = job
        cubin = folder / f"{Path(source).stem}.{architecture}.cubin"
        log = cubin.with_suffix(".log")
        with open(cubin.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not log.exists():
                options = ["-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
                with tempfile.TemporaryDirectory() as kept:
                    options += ["--keep", "--keep-dir", kept]
                    said = output(NVCC, *options, "-o", str(cubin), str(CUDA / source))
                    shutil.move(Path(kept, source).with_suffix(".ptx"), cubin.with_suffix(".ptx"))
                log.with_suffix(".part").write_text(said)
                log.with_suffix(".part").replace(log)
        return job, (cubin, log.read_text())

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, [(s, a) for s in SOURCES for a in architectures]))


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
        assert counts["LDG", True] + counts["LD", True] >= 4, f"{name} has no wide loads: {instructions}"
    assert seen >= 2 or source == "tables.cu"  # one for each storage type


# What a multiprocessor of sm_90 has: registers in each of four parts, threads, blocks.
PART_REGISTERS, PARTS, MOST_THREADS, MOST_BLOCKS = 16384, 4, 2048, 32
TYPES = {"f": "fp32", "d": "fp64", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
TABLE = ROOT / "docs" / "kernels.md"
HEADING = "| kernel | fp32 | fp64 | bf16 | fp16 |"


def name_and_type(mangled):
    """The kernel's name, its storage type if it has one, and whether it is the variant of narrow accesses."""
    rest = mangled.removeprefix("_ZN")
    while match := re.match(r"\d+", rest):
        length = int(match[0])
        name, rest = rest[match.end() :][:length], rest[match.end() + length :]
    argument = re.match(r"I(f|d|13__nv_bfloat16|6__half)", rest)
    return name, TYPES[argument[1]] if argument else "", "Lb0E" in rest


def loads_in_flight(code):
    """The most 16-byte loads of a thread under way at once, in the order of the code.

    One is under way from where it is issued to the first instruction that touches a register of it; an
    asynchronous copy, to the wait for its group.
    """
    most, pending, groups = 0, [], [0]
    for line in code.splitlines():
        if not (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*?);", line)):
            continue
        touched = {int(r) for r in re.findall(r"\bR(\d+)", found[2])}
        pending = [registers for registers in pending if not registers & touched]
        if re.match(r"(LDG|LD)\.E\S*128", found[1]):
            first = int(re.match(r"\s*R(\d+)", found[2])[1])
            pending.append(set(range(first, first + 4)))
        elif found[1].startswith("LDGSTS"):
            groups[-1] += 1
        elif found[1] == "LDGDEPBAR":
            groups.append(0)
        elif found[1].startswith("DEPBAR") and (prior := re.search(r"SB0, 0x(\w+)", found[2])):
            groups = groups[-1 - int(prior[1], 16) :]
        most = max(most, len(pending) + sum(groups))
    return most


def resources(cubin, said):
    """{(kernel, type): (registers, blocks that fit a multiprocessor, its KiB in flight)} of wide variants."""
    registers = dict(re.findall(r"Function properties for (\S+)\n.*\n.*Used (\d+) registers", said))
    elf, sass = (output(find_cuobjdump(), flag, str(cubin)) for flag in ("--dump-elf", "--dump-sass"))
    threads = {
        part.split(maxsplit=1)[0]: int(re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\w+)", part)[1], 16)
        for part in elf.split(".nv.info.")[1:]
        if "EIATTR_MAX_THREADS" in part
    }
    found = {}
    for part in sass.split("Function : ")[1:]:
        mangled = part.split(maxsplit=1)[0]
        name, dtype, narrow = name_and_type(mangled)
        if narrow or not (in_flight := loads_in_flight(part)):
            continue
        used = -(-int(registers[mangled]) // 8) * 8
        warps = threads[mangled] // 32
        fitting = PARTS * (PART_REGISTERS // (used * 32)) // warps
        blocks = min(fitting, MOST_THREADS // threads[mangled], MOST_BLOCKS)
        found[name, dtype] = (
            int(registers[mangled]),
            blocks,
            in_flight * 16 * threads[mangled] * blocks // 1024,
        )
    return found


def table(compiled):
    found = {}
    for (_, architecture), (cubin, said) in compiled.items():
        if architecture == "sm_90":
            found |= resources(cubin, said)
    lines = [HEADING, "|---" * 5 + "|"]
    for name in sorted({name for name, _ in found}):
        cells = [found.get((name, dtype)) for dtype in TYPES.values()]
        if any(cells):
            texts = ["{} · {} · {}".format(*cell) if cell else "" for cell in cells]
            lines.append(f"| `{name}` | {' | '.join(texts)} |")
    return "\n".join(lines)


def nvcc_version():
    return re.search(r"release ([\d.]+)", output(NVCC, "--version"))[1]


def written_table():
    text = TABLE.read_text()
    return re.search(re.escape(HEADING) + r"\n(\|.*\n)+", text)[0].strip(), f"nvcc {nvcc_version()}" in text


@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump, neither CUDA's nor Triton's")
def test_documented_resources(compiled):
    written, same_compiler = written_table()
    if not same_compiler:
        pytest.skip("the table in docs/kernels.md was made by another release of nvcc")
    assert table(compiled) == written, "python -m tests.csrc.test_cuda_machine_code writes it anew"


if __name__ == "__main__":
    written, _ = written_table()
    text = TABLE.read_text().replace(written, table(compile_all(["sm_90"])))
    TABLE.write_text(re.sub(r"nvcc \d+\.\d+", f"nvcc {nvcc_version()}", text))
