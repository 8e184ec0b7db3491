"""Weighted sums of gradients in Triton: the portable GPU kernel behind `dgs::combine_`, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.triton import project_align_ as lists
from dgs_kernels.triton.project_align_ import BLOCK, _chunk, _pointer, _read, _write


@triton.jit
def _kernel(
    table_ptr,
    chunks_ptr,
    weights_ptr,
    tensors,
    chunks,
    weights_stride,
    COUNT: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAILS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tensor, layer, begin, end, numel = _chunk(chunks_ptr, chunks, CHUNK)
    weights_ptr += layer * weights_stride
    out = _pointer(table_ptr, tensors, COUNT, tensor, TYPE, ALIGNED)
    for at in range(begin, end, BLOCK):
        total = tl.zeros((BLOCK,), ACC)
        for k in range(COUNT):
            objective = _pointer(table_ptr + k * tensors, tensors, 0, tensor, TYPE, ALIGNED)
            total += tl.load(weights_ptr + k) * _read(objective, at, numel, ACC, TAILS)
        _write(out, at, numel, total, TAILS)


def combine_(grads: list[Tensor], objectives: list[Tensor], weights: Tensor, groups: list[int]) -> None:
    cut = lists.plan(grads, groups)
    pointers, aligned = lists.addresses(objectives, grads)
    chunks, count = cut.chunks.shape[1], weights.shape[-1]
    with torch.cuda.device_of(weights):
        table = lists.upload(pointers, weights.device)
        if chunks:
            _kernel[(chunks,)](
                table,
                cut.chunks,
                weights,
                len(grads),
                chunks,
                count if weights.dim() == 2 else 0,
                COUNT=count,
                TYPE=lists.POINTERS[grads[0].dtype],
                ACC=tl.float64 if weights.dtype == torch.float64 else tl.float32,
                ALIGNED=aligned,
                TAILS=cut.tails,
                CHUNK=lists.CHUNK,
                num_warps=lists.WARPS,
            )
