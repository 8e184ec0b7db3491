"""Proofs about the CUDA kernels: `sentryward`, a verifier of PTX, is given a launch as the launcher makes it
(`launches.py`) and decides for every schedule whether barriers match and conflicting accesses are ordered.

Its input names parameters by byte offset. Which offsets a kernel reads, and with which type, is taken from
its PTX; values and memory from the recorded launch. Of several pointers into one piece of memory one is
declared, and the others become distances from it: the verifier takes declared objects not to overlap.

Kernels on lists read tables of addresses from memory, of which the verifier knows nothing. There the contents
of the tables are appended to the kernel's parameters, and the loads of them become loads of parameters: what
is proved is the compiled kernel with these very tables.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tests.csrc.launches import kernel_name

NAMESPACE = "12_GLOBAL__N_1"


@dataclass(frozen=True)
class Kernel:
    """One entry of a PTX file, with what comes before all entries."""

    name: str
    head: str
    body: list[str]


def kernels(ptx: str) -> dict[str, Kernel]:
    """All entries of a PTX file by the name that `launches.kernel_name` gives them."""
    entry = r"^(?:\t?// \.globl.*\n)?(?:\.visible |\.weak )?\.entry "
    starts = [found.start() for found in re.finditer(entry, ptx, re.M)]
    preamble = ptx[: starts[0]]
    found = {}
    for start, end in zip(starts, [*starts[1:], len(ptx)]):
        text = ptx[start:end]
        name = re.search(r"\.entry (\w+)\(", text)[1]
        body_at = text.index("\n{\n") + 1
        short = kernel_name(name)
        # The compiler makes this part of the name from the source's path.
        own = name[len("_ZN3dgs4cuda") : -len(short)]
        head, body = (t.replace(own, NAMESPACE) for t in (preamble + text[:body_at], text[body_at:]))
        head = re.sub("^//.*\n", "", head, flags=re.M)
        found[short] = Kernel(f"_ZN3dgs4cuda{NAMESPACE}{short}", head, body.splitlines())
    return found


@dataclass(frozen=True)
class Problem:
    """What the verifier is given: a kernel's PTX and a launch of it."""

    kernel: str
    head: str
    body: tuple[str, ...]
    config: dict
    # The whole launch has this many blocks.
    blocks: int

    @property
    def ptx(self) -> str:
        return "\n".join([self.head, *self.body])

    @property
    def launch(self) -> str:
        """As people write it."""
        launch = self.config["launch"]
        first, threads, cluster = (launch[f"{name}_dim"][0] for name in ("grid", "block", "cluster"))
        blocks = f"{first} of {self.blocks}" if first < self.blocks else f"{first}"
        return f"{blocks} x {threads}" + (f", clusters of {cluster}" if cluster > 1 else "")

    def fingerprint(self) -> str:
        """Of all that a proof depends on, save the verifier."""
        said = self.ptx + json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    def barriers(self) -> list[tuple[int, ...]]:
        """Lines of the body, by barrier: of a warp, a block, or a cluster where there is one."""
        found: list[tuple[int, ...]] = []
        # A cluster may wait for its arrival much later.
        arrival = 0
        for number, line in enumerate(self.body):
            if barrier := re.match(r"\s*(bar\.(warp\.)?sync|barrier\.cluster\.arrive)\b", line):
                arrival = len(found) if "cluster" in barrier[1] else arrival
                found.append((number,))
            elif re.match(r"\s*barrier\.cluster\.wait\b", line):
                found[arrival] = (*found[arrival], number)
        clusters = self.config["launch"]["cluster_dim"][0] > 1
        return [barrier for barrier in found if len(barrier) == 1 or clusters]

    def without(self, barrier: tuple[int, ...]) -> Problem:
        return replace(self, body=tuple("" if n in barrier else line for n, line in enumerate(self.body)))


# Where the parameters of kernels on lists point to tables, and the widths of the fields of a table's entries.
# A chunk's record is its tensor's, of 8 words in lists and 19 with objectives, and then its own.
CHUNKED = {words: {0: (8,) * words + (8, 4, 4), 8: (8,)} for words in (8, 19)}
CUT: dict[int, tuple[int, ...]] = {0: (8,), 16: (8,)}


class Parameters:
    """The bytes of a launch's parameters, its tables behind them, and what the verifier is told of them."""

    def __init__(self, kernel: Kernel, launch: dict):
        params = bytes.fromhex(launch["params"])
        self.name = f"{kernel.name}_param_0"
        self.memory, held = dict(launch["memory"]), dict(launch["tables"])
        self.end = -(-len(params) // 16) * 16
        self.data = params.ljust(self.end, b"\0")
        self.tables: dict[int, tuple[int, ...]] = {}
        self.base = self.memory.get(self.word(0), (0,))[0]
        if self.base in held:
            objectives = re.search("chunk_products|combine_chunks", kernel.name)
            self.tables = CUT if "cut_tensors" in kernel.name else CHUNKED[19 if objectives else 8]
            self.data += bytes.fromhex(held[self.base])
        words = range(0, len(self.data) - 7, 8)
        addresses = [at for at in words if self.word(at) in self.memory and at not in self.tables]
        # This says for every piece of memory where the first pointer into it is.
        self.pieces: dict[int, int] = {}
        for at in sorted(addresses, key=self.word):
            self.pieces.setdefault(self.memory[self.word(at)][0], at)
        self.objects: dict[int, str] = {}
        self.fields: dict[int, dict] = {}

    def word(self, at: int) -> int:
        return struct.unpack_from("<Q", self.data, at)[0]

    def first_of_piece(self, at: int) -> int | None:
        """Where the first pointer is into the memory that the field points to; None: it is no pointer."""
        return self.pieces[self.memory[self.word(at)][0]] if self.word(at) in self.memory else None

    def declare(self, at: int, kind: str) -> None:
        """Says what a field is: a pointer to an object or a number; nothing of a piece's other pointers."""
        size = int(kind[1:]) // 8
        if size == 8 and (first := self.first_of_piece(at)) is not None:
            if self.word(at) == self.word(first):
                piece = self.memory[self.word(at)][0]
                name = self.objects.setdefault(piece, f"memory_{len(self.objects)}")
                self.fields[at] = dict(type="pointer", space="global", object=name)
            else:
                assert at < self.end, "a table with two pointers into one piece of memory"
        elif kind == "f64":
            self.fields[at] = dict(type=kind, value=struct.unpack_from("<d", self.data, at)[0])
        else:
            value = int.from_bytes(self.data[at : at + size], "little")
            self.fields[at] = dict(type=f"u{kind[1:]}", value=value)

    def declare_tables(self) -> None:
        """A table ends where the next thing in the same piece of memory begins."""
        words = [self.word(at) for at in range(0, self.end, 8)]
        edges = sorted(word for word in words if self.memory.get(word, (0,))[0] == self.base)
        for offset, widths in self.tables.items():
            at, end = self.word(offset), edges[edges.index(self.word(offset)) + 1]
            while at < end:
                for size in widths:
                    self.declare(self.end + at - self.base, f"u{8 * size}")
                    at += size


def rewritten(kernel: Kernel, params: Parameters) -> list[str]:
    """The kernel's body with its tables among the parameters; declares every field that it reads."""
    # This says which place in the parameters a register addresses.
    addresses = {params.name: 0}
    # These registers hold addresses in tables.
    from_tables: set[str] = set()
    body = []
    for line in kernel.body:
        code = line.strip()
        if found := re.match(r"(?:mov\.[bu]64|add\.s64)\s+(%\w+), ([%\w]+)(?:, (-?\d+))?;", code):
            target, source, distance = found.groups()
            if source in addresses:
                addresses[target] = addresses[source] + int(distance or 0)
        if found := re.match(r"ld\.param\.(?:v(\d)\.)?(\w+)\s+(.*), \[([%\w]+)(?:\+(-?\d+))?\];", code):
            count, kind, target, source, distance = found.groups()
            # An address that depends on the thread is one of data.
            if source not in addresses:
                body.append(line)
                continue
            at = addresses[source] + int(distance or 0)
            if at in params.tables:
                from_tables.add(target)
                body.append(f"\tmov.b64 {target}, {params.name};")
                body.append(f"\tadd.s64 {target}, {target}, {params.end + params.word(at) - params.base};")
                continue
            for k in range(int(count or 1)):
                params.declare(at + k * int(kind[1:]) // 8, kind)
            first = params.first_of_piece(at) if kind[1:] == "64" else None
            if first is not None and at not in params.fields:
                params.declare(first, kind)
                body.append(f"\tld.param.{kind} {target}, [{params.name}+{first}];")
                body.append(f"\tadd.s64 {target}, {target}, {params.word(at) - params.word(first)};")
                continue
        elif from_tables and (found := re.match(r"([\w.]+)\s+(%\w+|\{[^}]*\}), (.*);", code)):
            operation, target, operands = found.groups()
            if from_tables & {*re.findall(r"%\w+", operands)}:
                if operation.startswith("ld."):
                    line = re.sub(r"ld\.(global\.)?", "ld.param.", line)
                elif re.match(r"mov|add|mad|selp|cvta", operation):
                    from_tables.add(target)
                    if operation.startswith("cvta"):
                        line = f"\tmov.b64 {target}, {operands};"
                else:
                    raise ValueError(f"what becomes of a table's address? {code}")
        body.append(line)
    return body


def problem(kernel: Kernel, launch: dict) -> Problem:
    params = Parameters(kernel, launch)
    body = rewritten(kernel, params)
    head = kernel.head
    if params.tables:
        params.declare_tables()
        size = len(launch["params"]) // 2
        head = head.replace(f"{params.name}[{size}]", f"{params.name}[{len(params.data)}]")
    known = [dict(parameter=params.name, offset=at) | field for at, field in params.fields.items()]
    config = {
        "schema": "spverify.kernel-input/v1",
        "entry": kernel.name,
        "launch": {
            "grid_dim": [launch.get("first", launch["grid"]), 1, 1],
            "block_dim": [launch["threads"], 1, 1],
            "cluster_dim": [launch["cluster"], 1, 1],
            "dynamic_shared_bytes": launch["shared"],
        },
        "declarations": [field for field in known if field["type"] == "pointer"],
        "arguments": [field for field in known if field["type"] != "pointer"],
    }
    return Problem(kernel.name, head, tuple(body), config, launch["grid"])


# A tensor is an object's name and the shape of the float32 numbers in it.
Tensor = tuple[str, tuple[int, ...]]


def verify(
    given: Problem, reference: str = "", inputs: dict[str, Tensor] | None = None, output: Tensor = ("", ())
):
    """What the verifier says of a launch.

    With `reference`, Python that defines a function of that name of `inputs`, also whether `output` is what
    it returns, in real arithmetic.
    """
    from sentryward import verify

    def place(tensor: Tensor) -> tuple[str, list[int], list[int]]:
        name, shape = tensor
        strides = [4 * math.prod(shape[n + 1 :]) for n in range(len(shape))]
        return f"6:global{len(name)}:{name}", list(shape), strides

    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: Path(folder, name) for name in ("kernel.ptx", "input.json", "reference.py", "binding.json")
        }
        files["kernel.ptx"].write_text(given.ptx)
        files["input.json"].write_text(json.dumps(given.config))
        more = {}
        if inputs is not None:
            layouts, arguments = {}, []
            for name, tensor in inputs.items():
                allocation, shape, strides = place(tensor)
                arguments.append(dict(name=name, allocation=allocation, shape=shape, dtype="float32"))
                layouts[allocation] = dict(
                    shape=shape, source_strides_bytes=strides, target_strides_bytes=strides, element_bytes=4
                )
            allocation, shape, strides = place(output)
            outputs = dict(kind="dense_tensor", shape=shape, element_bytes=4)
            for side in ("left", "right"):
                outputs |= {
                    f"{side}_allocation": allocation, f"{side}_strides_bytes": strides, f"{side}_offset": 0
                }  # fmt: skip
            binding = dict(
                reference=dict(arguments=arguments),
                left_inputs=dict(layouts=layouts),
                right_inputs=dict(layouts=layouts),
                outputs=outputs,
            )
            files["reference.py"].write_text(reference)
            files["binding.json"].write_text(json.dumps(binding))
            more = dict(reference=files["reference.py"], reference_binding=files["binding.json"])
        return verify(files["kernel.ptx"], input=files["input.json"], timeout_seconds=250, **more)
