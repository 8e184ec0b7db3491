"""surgery_head's forward by itself, without autograd: three [rows, dim] matrices in, scalars of each row out.

A whole step (benchmarks/surgery_head.py) has autograd's small kernels in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from benchmarks.surgery_head import inputs
from dgs_kernels import reference


def forward(surgery_head: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """Called without gradients; returns the first result, the losses or the image's."""

    def run(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return surgery_head(*tensors)[0]

    return run


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    def closed_form(*tensors: Tensor) -> tuple[Tensor, ...]:
        # The first of the losses is the image's.
        return reference.surgery_head(*tensors)[0]

    torch._dynamo.reset()
    return harness.Case(
        operation="surgery_head_forward",
        inputs=lambda: inputs(rows, dim, dtype, device),
        bytes_moved=3 * rows * dim * dtype.itemsize,
        variants={
            **harness.per_backend("surgery_head", device, forward(dgs_kernels.surgery_head)),
            harness.EAGER: forward(closed_form),
            harness.COMPILED: forward(torch.compile(closed_form, fullgraph=True, dynamic=False)),
        },
        exact=forward(closed_form),
    )
