"""Reads the machine code in the library as it was built: no spills, no local memory, on the aligned path
no load or store of matrix data narrower than 16 bytes, and no more instructions for a row than memory leaves
time for. Needs a build with CUDA, but no GPU.

`make install` builds for one architecture and this machine's cards, `pip install` for all of them.

`python -m tests.csrc.test_cuda_machine_code` writes the tables in docs/evidence.md anew.
"""

import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]

# Narrow accesses to device memory that an aligned kernel may have: numbers that stand alone, not matrix data.
# (loads, stores) of: the scale; sums of a row's parts; biases, labels, offsets, logits; scalars of a row and
# sums of a chunk; table entries, sums of a group and of its chunks, which a loop adds four at a time; rates.
SCALARS = {
    "rows_in_registers": (1, 0),
    "sum_row_parts": (1, 3),
    "project_row_parts": (7, 0),
    "head_rows": (11, 9),
    "head_backward": (11, 0),
    "chunk_sums": (8, 6),
    "project_chunks": (46, 18),
    "adamw_chunks": (51, 12),
    "chunk_products": (24, 1),
    "combine_chunks": (8, 0),
    "patch_entropy": (0, 1),
}
# Loads through generic addresses in kernels on lists, whose tensors' addresses come from a table: only of the
# sums that the blocks of a cluster have in each other's shared memory.
LISTS = {"chunk_sums": 0, "project_chunks": 6, "adamw_chunks": 6, "chunk_products": 0, "combine_chunks": 0}
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


def find_cuobjdump():
    """Beside nvcc in a whole CUDA toolkit; Triton carries one too."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if not found and triton:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    return found


@functools.cache
def output(*command):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def dump(what, architecture):
    """What cuobjdump says of the library's kernels for an architecture; skips where there are none."""
    native = pytest.importorskip("dgs_kernels._native")
    if "cuda" not in native.devices.split():
        assert not shutil.which("nvcc"), "nvcc is here, but the library has no CUDA kernels: build it again"
        pytest.skip("the library was built without CUDA")
    if find_cuobjdump() is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    if f".{architecture}." not in output(find_cuobjdump(), "--list-elf", native.__file__):
        pytest.skip(f"the library was built without code for {architecture}")
    return output(find_cuobjdump(), what, "--gpu-architecture", architecture, native.__file__)


def functions(architecture):
    """(mangled name, code) of every kernel."""
    parts = dump("--dump-sass", architecture).split("Function : ")[1:]
    return [(part.split(maxsplit=1)[0], part) for part in parts]


def kernel_name(mangled):
    """Of a template or not."""
    (name,) = (n for n in (*SCALARS, *NOT_WIDE) if re.search(f"{len(n)}{n}[IE]", mangled))
    return name


def usage(architecture):
    """{mangled name: (registers, bytes of stack)}; what is spilled lies on the stack."""
    found = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage", architecture)
    )
    return {mangled: (int(registers), int(stack)) for mangled, registers, stack in found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(architecture):
    stacks = {mangled: stack for mangled, (_, stack) in usage(architecture).items()}
    assert {*map(kernel_name, stacks)} == {*SCALARS, *NOT_WIDE}
    assert not any(stacks.values()), stacks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_accesses(architecture):
    seen = Counter()
    for mangled, code in functions(architecture):
        name, instructions = kernel_name(mangled), Counter(re.findall(MEMORY, code))
        counts = Counter()
        for instruction, n in instructions.items():
            kind = instruction.split(".")[0]
            counts[kind, "128" in instruction] += n
        assert not any(kind in ("LDL", "STL") for kind, _ in counts), (
            f"{name} uses local memory: {instructions}"
        )
        generic = [i for i in instructions.elements() if re.match(r"(LD|ST)\.", i)]
        assert name not in LISTS or (len(generic) <= LISTS[name] and not any("128" in i for i in generic)), (
            f"{name} does not say that an address is of global memory: {instructions}"
        )
        # The names of the aligned variants have Lb1E in them.
        if name in NOT_WIDE or "Lb1E" not in mangled:
            continue
        seen[name] += 1
        loads, stores = SCALARS[name]
        narrow_loads = counts["LDG", False] + sum(n for i, n in instructions.items() if "U16" in i)
        assert narrow_loads <= loads, f"{name} loads narrowly: {instructions}"
        assert not counts["LDGSTS", False], f"{name} copies narrowly: {instructions}"
        assert counts["STG", False] <= stores, f"{name} stores narrowly: {instructions}"
        assert counts["LDG", True] >= 3, f"{name} has no wide loads: {instructions}"
    # Every kernel has a variant for each storage type.
    assert all(seen[name] >= 2 for name in SCALARS), seen


# `head_rows` with a warp for each row, and the numbers of a row that fill it.
WARP_A_ROW = "head_rowsI{}Lb1ELb1ELb1E"
ROW = {"fp32": 768, "fp64": 256, "bf16": 768, "fp16": 768}
BYTES = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}
# Bytes and clocks in a second of each of an H200's multiprocessors, at 92% of its 4.8 TB/s and with
# all at work; four instructions are issued in a clock.
BANDWIDTH, CLOCK, ISSUED = 0.92 * 4.8e12 / 132, 1.7e9, 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_for_a_row(architecture):
    """Memory decides the speed only if most of the time that it takes is left over."""
    for dtype, counts in rows_of_heads(architecture).items():
        assert counts.total() <= 0.6 * slots(dtype), (dtype, counts)


def slots(dtype):
    """How many instructions a multiprocessor can issue while memory brings it a row of three matrices."""
    return int(3 * ROW[dtype] * BYTES[dtype] / BANDWIDTH * CLOCK * ISSUED)


def rows_of_heads(architecture):
    """{type: what a warp issues for a row, by opcode}."""
    found = {
        name: row_instructions(code)
        for mangled, code in functions(architecture)
        for letters, name in TYPES.items()
        if WARP_A_ROW.format(letters) in mangled
    }
    assert found.keys() == {*TYPES.values()}
    return found


# What a multiprocessor of sm_90 has: registers in each of four parts, threads, blocks.
PART_REGISTERS, PARTS, MOST_THREADS, MOST_BLOCKS = 16384, 4, 2048, 32
TYPES = {"f": "fp32", "d": "fp64", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
# What a kernel that is compiled for several numbers has a number of.
NUMBERS = {"rows_in_registers": "packs a thread", "chunk_products": "objectives"}
TABLE = ROOT / "docs" / "evidence.md"
HEADING = "| kernel | fp32 | fp64 | bf16 | fp16 |"
ROW_HEADING = "| for a row | fp32 | fp64 | bf16 | fp16 |"


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


INSTRUCTION = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);"


def successors(code):
    """{address: (opcode, addresses that may come next)} of a kernel's instructions."""
    found = [
        (int(at, 16), bool(guard), name, rest) for at, guard, name, rest in re.findall(INSTRUCTION, code)
    ]
    following = {at: after[0] for (at, *_), after in itertools.pairwise(found)}
    # `meet` says by a barrier's name where threads that parted come together.
    meet, graph = {}, {}
    for at, guarded, name, rest in found:
        places = [int(place, 16) for place in re.findall(r"\b0x([0-9a-f]+)\b", rest)][-1:]
        barrier = re.search(r"\bB\d+\b", rest)
        if name.startswith("BSSY"):
            meet[barrier[0]] = places[0]
        falls = [following[at]] if at in following else []
        # Only a warp whose threads have parted takes a BRA.DIV.
        if name.startswith("BRA") and name != "BRA.DIV":
            graph[at] = name, [*places, *(falls if guarded or re.search(r"\bU?P\d", rest) else [])]
        elif name.startswith("BSYNC") and barrier:
            graph[at] = name, [meet[barrier[0]]]
        elif name.split(".")[0] in ("EXIT", "RET"):
            graph[at] = name, falls if guarded else []
        else:
            graph[at] = name, falls
    return graph


def row_instructions(code):
    """What a warp issues for a row, by opcode: the longest way through the loop that copies to shared memory.

    With captions and an expert. Left out is what makes the differences for a distillation loss, known by its
    wide stores.
    """
    instructions = successors(code)
    graph = nx.DiGraph([(at, after) for at, (_, next_ones) in instructions.items() for after in next_ones])
    names = {at: name for at, (name, _) in instructions.items()}
    graph = graph.subgraph({0, *nx.descendants(graph, 0)})
    loops = nx.strongly_connected_components(graph)
    loop = max((found for found in loops if any(names[at].startswith("LDGSTS") for at in found)), key=len)
    (head,) = {at for outside, at in graph.in_edges(loop) if outside not in loop}
    ends = {at for at in graph.predecessors(head) if at in loop}
    row = graph.subgraph(loop).copy()
    row.remove_edges_from([(end, head) for end in ends])
    dominator = nx.immediate_dominators(row, head)

    def always_before(at):
        return {at} if at == head else {at, *always_before(dominator[at])}

    always = set.union(*map(always_before, ends))
    stores = [at for at in loop if re.match(r"STG\S*128", names[at])]
    row.remove_nodes_from(set().union(*map(always_before, stores)) - always)
    ways = set.union(*({end, *nx.ancestors(row, end)} for end in ends)) & {head, *nx.descendants(row, head)}
    return Counter(names[at] for at in nx.dag_longest_path(row.subgraph(ways)))


def resources():
    """{(kernel, type): (registers, blocks that fit a multiprocessor, its KiB in flight)} of wide variants."""
    registers = usage("sm_90")
    threads = {
        part.split(maxsplit=1)[0]: int(re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\w+)", part)[1], 16)
        for part in dump("--dump-elf", "sm_90").split(".nv.info.")[1:]
        if "EIATTR_MAX_THREADS" in part
    }
    found = {}
    for mangled, code in functions("sm_90"):
        name, dtype, narrow = name_and_type(mangled)
        if narrow or not (in_flight := loads_in_flight(code)):
            continue
        used = -(-registers[mangled][0] // 8) * 8
        fitting = PARTS * (PART_REGISTERS // (used * 32)) // (threads[mangled] // 32)
        blocks = min(fitting, MOST_THREADS // threads[mangled], MOST_BLOCKS)
        kib = in_flight * 16 * threads[mangled] * blocks // 1024
        number = re.search(r"Lb1ELi(\d+)E", mangled)
        variant = f"`{name}`" + (f", {number[1]} {NUMBERS[name]}" if number else "")
        found[variant, dtype] = registers[mangled][0], blocks, kib
    return found


def table():
    found = resources()
    lines = [HEADING, "|---" * 5 + "|"]
    for name in sorted({name for name, _ in found}, key=lambda n: [n.split(",")[0], len(n), n]):
        cells = [found.get((name, dtype)) for dtype in TYPES.values()]
        texts = ["{} · {} · {}".format(*cell) if cell else "" for cell in cells]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def row_table():
    """Of TYPES' order, which is the heading's."""
    found = rows_of_heads("sm_90")
    sums = {
        name: sum(n for opcode, n in counts.items() if re.match("[FD](FMA|ADD|MUL)", opcode))
        for name, counts in found.items()
    }
    lines = {
        "numbers of each matrix": [ROW[name] for name in TYPES.values()],
        "instructions": [found[name].total() for name in TYPES.values()],
        "of them sums and products": [sums[name] for name in TYPES.values()],
        "slots while memory brings it": [slots(name) for name in TYPES.values()],
    }
    rows = [f"| {name} | {' | '.join(map(str, cells))} |" for name, cells in lines.items()]
    return "\n".join([ROW_HEADING, "|---" * 5 + "|", *rows])


def nvcc_version():
    return re.search(r"release ([\d.]+)", output(shutil.which("nvcc"), "--version"))[1]


def written_table(heading=HEADING):
    return re.search(re.escape(heading) + r"\n(\|.*\n)+", TABLE.read_text())[0].strip()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_documented_resources():
    made = table(), row_table()
    if f"nvcc {nvcc_version()}" not in TABLE.read_text():
        pytest.skip("the tables in docs/evidence.md were made by another release of nvcc")
    written = written_table(), written_table(ROW_HEADING)
    assert made == written, "python -m tests.csrc.test_cuda_machine_code writes them anew"


if __name__ == "__main__":
    text = TABLE.read_text().replace(written_table(), table())
    text = text.replace(written_table(ROW_HEADING), row_table())
    TABLE.write_text(re.sub(r"nvcc \d+\.\d+", f"nvcc {nvcc_version()}", text))
