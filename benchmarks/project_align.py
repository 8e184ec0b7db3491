"""project_align: three streams in, one out."""

from __future__ import annotations

import functools

import torch

import dgs_kernels
from benchmarks import harness
from dgs_kernels import reference


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    surgery = functools.partial(reference.project_align, alignment=0.2)
    # Compiled code is made for one size and one number of threads.
    torch._dynamo.reset()
    return harness.Case(
        operation="project_align",
        inputs=lambda: tuple(torch.randn(rows, dim, device=device).to(dtype) for _ in range(3)),
        bytes_moved=4 * rows * dim * dtype.itemsize,
        variants={
            **harness.per_backend(
                "project_align", device, functools.partial(dgs_kernels.project_align, alignment=0.2)
            ),
            harness.EAGER: surgery,
            harness.COMPILED: torch.compile(surgery, dynamic=False),
        },
        exact=surgery,
    )
