"""Inner products of gradients in Triton: the portable GPU kernels behind `dgs::gramian`.

The first launch leaves the products of all pairs in each chunk, from one reading of the objectives; the second
adds up those of a layer in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.triton import project_align_ as lists
from dgs_kernels.triton.project_align_ import _chunk, _pointer

# Numbers of each objective that a program holds at a time, in all: 8 in each of 256 threads.
HELD = 2048


@triton.jit
def _read_all(
    table_ptr, tensors, tensor, at, numel, FIRST: tl.constexpr, COUNT: tl.constexpr, constants: tl.constexpr
):
    pass
