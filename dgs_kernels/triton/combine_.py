"""Weighted sums of gradients in Triton: the portable GPU kernel behind `dgs::combine_`, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.triton.project_align_ import BLOCK, _chunk, _pointer, _read, _write, lists_of


@triton.jit(do_not_specialize=["weights_ptr", "tensors", "weights_stride"])
def _kernel(
    table_ptr,
    weights_ptr,
    tensors,
    weights_stride,
    COUNT: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAILS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tensor, layer, begin, end, numel = _chunk(table_ptr, tensors, CHUNK)
    weights_ptr += layer * weights_stride
    out = _pointer(table_ptr, tensors, COUNT, tensor, TYPE, ALIGNED)
    for at in range(begin, end, BLOCK):
        total = tl.zeros((BLOCK,), ACC)
        for k in range(COUNT):
            objective = _pointer(table_ptr + k * tensors, tensors, 0, tensor, TYPE, ALIGNED)
            total += tl.load(weights_ptr + k) * _read(objective, at, numel, ACC, TAILS)
        _write(out, at, numel, total, TAILS)


def combine_(grads: list[Tensor], objectives: list[Tensor], weights: Tensor, groups: list[int]) -> None:
    tensors, count = len(grads), weights.shape[-1]
    with torch.cuda.device_of(weights):
        rows = [objectives[i : i + tensors] for i in range(0, len(objectives), tensors)]
        lists = lists_of(groups, max(groups) + 1, *rows, grads)
        if lists.chunks:
            stride = count if weights.dim() == 2 else 0
            given = (lists.table, weights, tensors, stride)
            _kernel[(lists.chunks,)](*given, COUNT=count, **lists.constants)
