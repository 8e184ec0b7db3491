"""Inner products of gradients in Triton: the portable GPU kernels behind `dgs::gramian`.

The first launch leaves the products of all pairs in each chunk, from one reading of the objectives; the
second adds up those of a layer in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.triton import project_align_ as lists
from dgs_kernels.triton.project_align_ import _chunk, _pointer


@triton.jit
def _read(pointer, at, numel, ACC: tl.constexpr, TAILS: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH numbers of a tensor, its end filled up with zeros."""
    index = at + tl.arange(0, WIDTH)
    if TAILS:
        if at + WIDTH <= numel:
            x = tl.load(pointer + index)
        else:
            x = tl.load(pointer + index, index < numel, 0.0)
    else:
        x = tl.load(pointer + index)
    return x.to(ACC)


@triton.jit
def _chunk_kernel(
    table_ptr,
    chunks_ptr,
    partials_ptr,
    tensors,
    chunks,
    COUNT: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAILS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Partial sums [COUNT (COUNT + 1) / 2, chunks] of the products of pairs i <= j."""
    tensor, _, begin, end, numel = _chunk(chunks_ptr, chunks, CHUNK)
    pointers = ()
    for k in tl.static_range(COUNT):
        pointers = pointers + (_pointer(table_ptr, tensors, k, tensor, TYPE, ALIGNED),)
    sums = ()
    for _ in tl.static_range(COUNT * (COUNT + 1) // 2):
        sums = sums + (tl.zeros((THREADS,), ACC),)
    for at in range(begin, end, WIDTH):
        rows = ()
        for k in tl.static_range(COUNT):
            rows = rows + (_read(pointers[k], at, numel, ACC, TAILS, WIDTH),)
        added = ()
        for i in tl.static_range(COUNT):
            for j in tl.static_range(i, COUNT):
                # Each thread adds up its own numbers, so that a sum takes one register.
                product = tl.reshape(rows[i] * rows[j], (THREADS, WIDTH // THREADS))
                added = added + (sums[i * COUNT - i * (i - 1) // 2 + j - i] + tl.sum(product, 1),)
        sums = added
    partials_ptr += tl.program_id(0)
    for n in tl.static_range(COUNT * (COUNT + 1) // 2):
        tl.store(partials_ptr + n * chunks, tl.sum(sums[n], 0))


@triton.jit
def _layer_kernel(
    partials_ptr, begins_ptr, out_ptr, chunks, COUNT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr
):
    """One pair's product in one layer from those in its chunks, which stand next to each other."""
    layer, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, j = pair // COUNT, pair % COUNT
    if i <= j:
        partials_ptr += (i * COUNT - i * (i - 1) // 2 + j - i) * chunks
        total = tl.zeros((ROWS,), ACC)
        end = tl.load(begins_ptr + layer + 1)
        for first in range(tl.load(begins_ptr + layer), end, ROWS):
            row = first + tl.arange(0, ROWS)
            total += tl.load(partials_ptr + row, row < end, 0.0)
        product = tl.sum(total, 0)
        out_ptr += layer * COUNT * COUNT
        tl.store(out_ptr + i * COUNT + j, product)
        tl.store(out_ptr + j * COUNT + i, product)


def launch_shape(count: int) -> dict[str, int]:
    """Numbers of each objective that a program holds at a time, and the threads that hold them."""
    return {"WIDTH": 2048 if count <= 8 else 1024, "THREADS": 32 * lists.WARPS}


def gramian(objectives: list[Tensor], groups: list[int], out: Tensor) -> None:
    tensors, count = len(groups), out.shape[-1]
    cut = lists.plan(objectives[:tensors], groups)
    pointers, aligned = lists.addresses(objectives)
    chunks = cut.chunks.shape[1]
    acc = tl.float64 if out.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(out):
        table = lists.upload(pointers, out.device)
        partials = out.new_empty((count * (count + 1) // 2, chunks))
        if chunks:
            _chunk_kernel[(chunks,)](
                table,
                cut.chunks,
                partials,
                tensors,
                chunks,
                COUNT=count,
                TYPE=lists.POINTERS[objectives[0].dtype],
                ACC=acc,
                ALIGNED=aligned,
                TAILS=cut.tails,
                CHUNK=lists.CHUNK,
                **launch_shape(count),
                num_warps=lists.WARPS,
            )
        _layer_kernel[(len(out), count * count)](
            partials, cut.begins, out, chunks, COUNT=count, ACC=acc, ROWS=128
        )
