"""Small quadratic programmes in Triton: what `gem`, `mgda` and `upgrad` solve where the gradients are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of an entry that must not be negative, where gradients are of length one.
TOLERANCE = 1e-13
# A programme of 16 variables takes about 20 pivots; what rounding leads in circles ends here.
PIVOTS = 4096


@triton.jit(do_not_specialize=["count"])
def _kernel(
    matrix_ptr, linear_ptr, out_ptr, count, SIZE: tl.constexpr, TOL: tl.constexpr, MOST: tl.constexpr
):
    """One programme: principal pivots on the first index that is violated (Murty 1974), which end."""
    programme = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    there = (row < count) & (column < count)
    own = tl.where(row == column, 1.0, 0.0).to(tl.float64)
    table = tl.load(matrix_ptr + programme * count * count + row * count + column, there, 0.0)
    table = tl.where(there, table, own)
    index = tl.arange(0, SIZE)
    value = tl.load(linear_ptr + programme * count + index, index < count, 1.0)
    basic = tl.zeros((SIZE,), tl.int32)
    chosen = tl.min(tl.where(value < -TOL, index, SIZE), 0)
    pivots = 0
    while (chosen < SIZE) & (pivots < MOST):
        is_row, is_column, here = row == chosen, column == chosen, index == chosen
        pivot = tl.sum(tl.sum(tl.where(is_row & is_column, table, 0.0), 1), 0)
        of_row = tl.sum(tl.where(is_row, table, 0.0), 0) / pivot
        of_column = tl.sum(tl.where(is_column, table, 0.0), 1)
        step = -tl.sum(tl.where(here, value, 0.0), 0) / pivot
        value = tl.where(here, step, value + of_column * step)
        inner = table - of_column[:, None] * of_row[None, :]
        table = tl.where(is_row, -of_row[None, :], tl.where(is_column, of_column[:, None] / pivot, inner))
        table = tl.where(is_row & is_column, 1.0 / pivot, table)
        basic = tl.where(here, 1 - basic, basic)
        chosen = tl.min(tl.where(value < -TOL, index, SIZE), 0)
        pivots += 1
    x = tl.where(basic == 1, value, 0.0)
    tl.store(out_ptr + programme * count + index, x, index < count)


def nonnegative(matrix: Tensor, linear: Tensor) -> Tensor:
    """The x >= 0 that minimise x M x / 2 + x q: M [P, K, K], symmetric and positive definite, and q [P, K].

    float64, contiguous, K at most 16; one launch, and nothing waits for the device.
    """
    programmes, count = linear.shape
    out = torch.empty_like(linear)
    size = max(2, triton.next_power_of_2(count))
    _kernel[(programmes,)](matrix, linear, out, count, SIZE=size, TOL=TOLERANCE, MOST=PIVOTS, num_warps=1)
    return out
