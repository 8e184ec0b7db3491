"""surgery_head's backward by itself: three scalars of each row and three weights in, [rows, dim] out."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import harness
from dgs_kernels import reference
from dgs_kernels.ops.surgery_head_backward import run

# The gradients that arrive at the image's and at the alignment's loss.
SCALES = 1.0, 0.2


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    wide = torch.promote_types(dtype, torch.float32)

    def inputs() -> tuple[Tensor, ...]:
        weights = (torch.randn(1, dim, device=device).to(wide) / dim**0.5 for _ in range(3))
        scales = (torch.tensor(scale, dtype=wide, device=device) for scale in SCALES)
        return (torch.rand(3, rows, device=device).to(wide) - 0.5, *weights, *scales)

    def ours(*tensors: Tensor) -> Tensor:
        return run(*tensors, dtype, 1e-6, "align_first", None, None, None, 0.0)

    def closed_form(*tensors: Tensor) -> Tensor:
        return reference.surgery_head_backward(*tensors, dtype)

    torch._dynamo.reset()
    return harness.Case(
        operation="surgery_head_backward",
        inputs=inputs,
        bytes_moved=rows * dim * dtype.itemsize,
        variants={
            **harness.per_backend("surgery_head_backward", device, ours),
            harness.EAGER: closed_form,
            harness.COMPILED: torch.compile(closed_form, dynamic=False),
        },
        exact=lambda *tensors: reference.surgery_head_backward(*tensors, torch.float64),
    )
