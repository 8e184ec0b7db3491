"""`python -m benchmarks.smoke [backend ...]`: every operation once, at sizes that take each path.

On these backends of ours, or on all that serve it, against the exact result, as before a benchmark, and in
seconds. Each operation has a process of its own on each backend, as a kernel that reads where it must not
takes the whole process along. Ends with exit code 1 if anything is wrong.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks import harness
from dgs_kernels import backends

# (rows, dim) of the benchmarks' cases: rows in registers, in a cluster and in parts; lists whose layers fit a
# cluster, if it may have 12 blocks, or one block, and lists whose layers do not.
SIZES = {
    "project_align": [(65, 768), (3, 123), (2, 20000), (1, 131072), (1, 1_000_003)],
    "surgery_head": [(32, 768), (65, 123), (700, 1024), (5, 8192)],
    "project_align_": [(24, 768), (24, 5), (8448, 768)],
    "surgery_adamw_": [(24, 768), (24, 5), (8448, 768)],
    "gramian": [(24, 768), (24, 5), (8448, 768)],
    "spectral_entropy": [(256, 320)],
}


def check(operation: str, backend: str) -> bool:
    """Prints a line for each size, type and variant, ours and eager's; whether all are right."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, right = importlib.import_module(f"benchmarks.{operation}"), True
    for rows, dim in SIZES[operation]:
        for dtype in (torch.float32, torch.bfloat16):
            case = module.case(rows, dim, dtype, device)
            # Without others', and compilers that take their time.
            for name in set(case.variants) - {harness.EAGER, f"{harness.OURS} ({backend})"}:
                del case.variants[name]
            errors, faults = harness.verify(case, case.inputs())
            for name in case.variants:
                found = faults.get(name) or f"right, off by at most {errors[name]:.2g}"
                print(f"{operation:18}{rows:8} x {dim:<8}{dtype!s:16}{name:24}{found}", flush=True)
            right &= not faults
    return right


def main(wanted: list[str]) -> None:
    if len(wanted) == 2 and wanted[0] in SIZES:
        sys.exit(not check(*wanted))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    served = [
        (operation, backend)
        for backend in wanted or backends.BACKENDS
        for operation in SIZES
        if backend != "eager" and not backends.obstacle(backend, operation, device)
    ]

    def fails(pair: tuple[str, str]) -> int:
        return subprocess.run([sys.executable, "-m", "benchmarks.smoke", *pair]).returncode

    # All write here, so that what is cut leaves what it has found.
    with ThreadPoolExecutor() as pool:
        wrong = [" on ".join(pair) for pair, failed in zip(served, pool.map(fails, served)) if failed]
    if wrong or not served:
        sys.exit(f"wrong or failed: {', '.join(wrong)}" if wrong else "no backend serves any operation here")


if __name__ == "__main__":
    main(sys.argv[1:])
