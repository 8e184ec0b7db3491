"""Quotients and roots rounded to nearest: Triton's own of float32 are fast ones, up to two units off."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    # float64 has no other rounding.
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.math.div_rn(x, y)


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.math.sqrt_rn(x)
