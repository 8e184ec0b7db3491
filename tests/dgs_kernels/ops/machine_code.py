"""Compile the Triton kernels without a GPU and print, as JSON, what the machine code holds.

Run as a module, with operations' names or for all, in a process of its own, because the tests' process has
Triton in interpreter mode.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgs_kernels.triton import (
    combine_,
    gramian,
    project_align,
    project_align_,
    spectral_entropy,
    surgery_adamw_,
    surgery_head,
    surgery_head_backward,
)
from tests.support.triton_launches import CAPABILITIES, in_processes

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def machine_code(kernel, types: dict, constants: dict, capability: int, num_warps: int) -> dict:
    """Registers, bytes, warps and memory instructions of a kernel whose arguments are all aligned."""
    types = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    # What Triton itself assumes of a pointer, size or stride that is a multiple of 16, where it asks.
    unseen = {p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    unseen.add("scale_ptr")
    aligned = [n for n, t in types.items() if n not in unseen and (t == "i32" or t[0] == "*")]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        # With its data flow the listing would take half as long again.
        code = _run("nvdisasm", "-c", "-ndf", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "warps": num_warps,
        "memory": Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)\S*)", code)),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def project_align_codes(capability: int) -> Iterator[tuple[str, dict]]:
    sizes = ("rows", "dim", "part_size", "parts", "grad_stride", "harmful_stride", "beneficial_stride")
    for dtype, dim in (
        (torch.bfloat16, 768),
        (torch.float64, 8192),
        (torch.float32, 16384),
        (torch.bfloat16, 65536),
    ):
        pointer, wide = "*" + TYPES[dtype], "fp64" if dtype == torch.float64 else "fp32"
        types = dict.fromkeys(("grad_ptr", "harmful_ptr", "beneficial_ptr", "out_ptr"), pointer)
        types |= dict.fromkeys((*sizes, "order", "rule"), "i32")
        types |= dict.fromkeys(("scale_ptr", "partials_ptr"), "*" + wide)
        types |= {"alignment": "fp64", "eps": "fp64"}
        constants = {"ACC": tl.dtype(wide), "ALIGNED": True}
        if shape := project_align.launch_shape(1 << 20, dim, dtype):
            kernels = {"rows": project_align._row_kernel}
            constants |= shape[1]
        else:
            kernels = {"sums": project_align._part_sums_kernel, "parts": project_align._part_kernel}
            constants |= {"BLOCK": project_align.CHUNK, "num_warps": 8}
        warps = constants.pop("num_warps")
        for name, kernel in kernels.items():
            yield f"{name} {TYPES[dtype]} {dim}", machine_code(kernel, types, constants, capability, warps)


# Arguments of surgery_head that are None, or constants: with captions as published, without, with an expert.
HEAD_OPTIONS = {
    "captions": {"offsets_ptr": None, "differences_ptr": None, "EXPERT": False},
    "no captions": {"offsets_ptr": None, "differences_ptr": None, "EXPERT": False}
    | dict.fromkeys(("text_ptr", "text_weight_ptr", "text_bias_ptr")),
    "expert": {"EXPERT": True},
}
HEAD_CASES = (
    (torch.bfloat16, 768, HEAD_OPTIONS),
    (torch.float32, 1024, ["captions"]),
    (torch.float32, 4096, ["captions", "expert"]),
    (torch.bfloat16, 8192, HEAD_OPTIONS),
)


def surgery_head_codes(capability: int) -> Iterator[tuple[str, dict]]:
    sizes = ("batch", "dim", "chunk_rows", "features_stride", "teacher_stride", "text_stride")
    for dtype, dim, option in (
        (dtype, dim, option) for dtype, dim, options in HEAD_CASES for option in options
    ):
        types = defaultdict(lambda: "*fp32", dict.fromkeys(sizes, "i32"))
        matrices = ("features_ptr", "teacher_ptr", "text_ptr", "differences_ptr")
        types |= dict.fromkeys(matrices, "*" + TYPES[dtype])
        constants = HEAD_OPTIONS[option] | {"ACC": tl.float32, "ALIGNED": True}
        kernels = {}
        if shape := surgery_head.launch_shape(dim, dtype):
            kernels["rows"] = (surgery_head._row_kernel, shape | constants)
        else:
            long = constants | {"BLOCK": surgery_head.CHUNK}
            kernels["long rows"] = (surgery_head._long_row_kernel, long | {"num_warps": 8})
            # This kernel is the same with an expert.
            if option != "expert":
                kernels["weighted sums"] = (surgery_head._weighted_sums_kernel, long | {"num_warps": 4})
        for name, (kernel, constants) in kernels.items():
            warps = constants.pop("num_warps")
            constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
            code = machine_code(kernel, types, constants, capability, warps)
            yield f"{name} {TYPES[dtype]} {dim} {option}", code
    yield from surgery_head_backward_codes(capability)


def surgery_head_backward_codes(capability: int) -> Iterator[tuple[str, dict]]:
    types = defaultdict(lambda: "*fp32", {"batch": "i32", "dim": "i32", "program_rows": "i32", "eps": "fp64"})
    types |= dict.fromkeys(("mean", "reference_mean", "distillation_mean"), "fp64")
    types |= dict.fromkeys(("out_ptr", "differences_ptr"), "*bf16")
    for option, given in {
        "captions": {"products_ptr": None, "differences_ptr": None, "distillation_scale_ptr": None},
        "no captions": {"products_ptr": None, "text_weight_ptr": None},
        "long rows": {},
    }.items():
        constants = surgery_head_backward.launch_shape(768) | {"ACC": tl.float32, "PROJECT_FIRST": 0} | given
        warps = constants.pop("num_warps")
        code = machine_code(surgery_head_backward._backward_kernel, types, constants, capability, warps)
        yield f"backward bf16 768 {option}", code
    constants = {"ACC": tl.float32, "BLOCK": surgery_head_backward.PROGRAM_COLUMNS}
    code = machine_code(surgery_head_backward._products_kernel, types, constants, capability, 4)
    yield "products fp32", code


def layer_codes(kernels: dict, capability: int) -> Iterator[tuple[str, dict]]:
    """Kernels over lists of aligned tensors without tails; the tables hold int64 numbers."""
    for dtype in (torch.bfloat16, torch.float32):
        types = defaultdict(lambda: "fp64", dict.fromkeys(("partials_ptr", "sums_ptr", "scale_ptr"), "*fp32"))
        types |= dict.fromkeys(("tensors", "order", "rule", "maximize"), "i32") | {"table_ptr": "*i64"}
        constants = {"HAS_BENEFICIAL": True, "ALIGNED": True, "TAILS": False, "CHUNK": project_align_.CHUNK}
        constants |= {"TYPE": project_align_.POINTERS[dtype], "ACC": tl.float32}
        for name, kernel in kernels.items():
            used = {n: value for n, value in constants.items() if n in kernel.arg_names}
            code = machine_code(kernel, types, used, capability, project_align_.WARPS)
            yield f"{name} {TYPES[dtype]}", code


def project_align__codes(capability: int) -> Iterator[tuple[str, dict]]:
    kernels = {"sums": project_align_._chunk_kernel, "apply": project_align_._apply_kernel}
    yield from layer_codes(kernels, capability)


def objectives_codes(kernel, counts, shape, capability: int) -> Iterator[tuple[str, dict]]:
    for dtype, count in itertools.product((torch.bfloat16, torch.float32), counts):
        types = defaultdict(lambda: "*fp32", {"table_ptr": "*i64", "tensors": "i32"})
        types |= {"chunks": "i32", "weights_stride": "i32"}
        constants = {"COUNT": count, "ALIGNED": True, "TAILS": False, "CHUNK": project_align_.CHUNK}
        constants |= {"TYPE": project_align_.POINTERS[dtype], "ACC": tl.float32} | shape(count)
        code = machine_code(kernel, types, constants, capability, project_align_.WARPS)
        yield f"{TYPES[dtype]} {count}", code


def gramian_codes(capability: int) -> Iterator[tuple[str, dict]]:
    yield from objectives_codes(gramian._chunk_kernel, (2, 8), gramian.launch_shape, capability)


def combine__codes(capability: int) -> Iterator[tuple[str, dict]]:
    yield from objectives_codes(combine_._kernel, (2, 16), lambda count: {}, capability)


def surgery_adamw__codes(capability: int) -> Iterator[tuple[str, dict]]:
    yield from layer_codes({"step": surgery_adamw_._step_kernel}, capability)


def spectral_entropy_codes(capability: int) -> Iterator[tuple[str, dict]]:
    for dtype, scale in (("u8", 1 / 255), ("fp32", 1.0)):
        types = defaultdict(lambda: "i32", {"out_ptr": "*fp32", "images_ptr": "*" + dtype})
        constants = {"ALIGNED": True, "SCALE": scale, "PATCHES": spectral_entropy.PATCHES, "pixel_stride": 1}
        code = machine_code(spectral_entropy._kernel, types, constants, capability, spectral_entropy.WARPS)
        yield dtype, code


# The longest first, so that no process works on alone.
OPERATIONS = (
    *("surgery_head", "project_align", "gramian", "combine_", "project_align_", "surgery_adamw_"),
    "spectral_entropy",
)


def codes(task: tuple[str, int]) -> list[dict]:
    operation, capability = task
    found = globals()[f"{operation}_codes"](capability)
    return [{"kernel": f"{operation} sm_{capability} {name}", **code} for name, code in found]


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1"
    for found in in_processes(codes, itertools.product(sys.argv[1:] or OPERATIONS, CAPABILITIES)):
        for code in found:
            print(json.dumps(code))
