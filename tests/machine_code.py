"""Compile the Triton kernels without a GPU and print, as JSON, what the machine code holds.

Run as a script in a process of its own, because the tests' process has Triton in interpreter mode.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgs_kernels.triton import project_align

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def machine_code(kernel, types: dict, constants: dict, capability: int, num_warps: int) -> dict:
    """Registers, stack bytes and memory instructions of a kernel whose arguments are all aligned."""
    types = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    # What Triton itself assumes of a pointer, size or stride that is a multiple of 16.
    aligned = [
        n for n, t in types.items() if n != "rows" and (t == "i32" or (t[0] == "*" and n != "scale_ptr"))
    ]
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
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "memory": Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)\S*)", code)),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def project_align_code(dtype: torch.dtype, dim: int, order: int, rule: int, capability: int) -> dict:
    pointer, double = "*" + TYPES[dtype], dtype == torch.float64
    types = dict.fromkeys(("grad_ptr", "harmful_ptr", "beneficial_ptr", "out_ptr"), pointer)
    types |= dict.fromkeys(("rows", "dim", "grad_stride", "harmful_stride", "beneficial_stride"), "i32")
    types |= {"scale_ptr": "*fp64" if double else "*fp32", "alignment": "fp64", "eps": "fp64"}
    constants = {"ORDER": order, "RULE": rule, "ACC": tl.float64 if double else tl.float32}
    if (shape := project_align.launch_shape(1 << 20, dim, dtype)) is None:
        kernel, constants, warps = (
            project_align._long_row_kernel,
            constants | {"DIM": dim, "BLOCK": project_align.CHUNK},
            8,
        )
    else:
        kernel, constants = project_align._row_kernel, constants | shape[1]
        warps = constants.pop("num_warps")
    return machine_code(kernel, types, constants, capability, warps)


def main() -> None:
    cases = [
        (torch.bfloat16, 768, 0, 0),
        (torch.float64, 8192, 1, 2),
        (torch.float32, 16384, 1, 0),
        (torch.bfloat16, 65536, 0, 2),
    ]
    for capability in (80, 90):
        for dtype, dim, order, rule in cases:
            code = project_align_code(dtype, dim, order, rule, capability)
            name = f"project_align sm_{capability} {TYPES[dtype]} {dim} order {order} rule {rule}"
            print(json.dumps({"kernel": name, **code}))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1"
    main()
