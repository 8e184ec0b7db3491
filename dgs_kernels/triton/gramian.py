"""Inner products of gradients in Triton: the portable GPU kernels behind `dgs::gramian`.

The first launch leaves the products of all pairs in each chunk, from one reading of the objectives; the
second adds up those of a layer in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.triton.project_align_ import WARPS, _chunk, _pointer, _read, lists_of


@triton.jit(do_not_specialize=["tensors", "chunks"])
def _chunk_kernel(
    table_ptr,
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
    tensor, _, begin, end, numel = _chunk(table_ptr, tensors, CHUNK)
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


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["begins_ptr"])
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
    return {"WIDTH": 2048 if count <= 8 else 1024, "THREADS": 32 * WARPS}


def gramian(objectives: list[Tensor], groups: list[int], num_objectives: int, out: Tensor) -> None:
    tensors, count = len(groups), num_objectives
    with torch.cuda.device_of(out):
        rows = [objectives[i : i + tensors] for i in range(0, len(objectives), tensors)]
        lists = lists_of(groups, len(out), *rows)
        partials = out.new_empty((count * (count + 1) // 2, lists.chunks))
        if lists.chunks:
            _chunk_kernel[(lists.chunks,)](
                lists.table,
                partials,
                tensors,
                lists.chunks,
                COUNT=count,
                **launch_shape(count),
                **lists.constants,
            )
        _layer_kernel[(len(out), count * count)](
            partials, lists.begins, out, lists.chunks, COUNT=count, ACC=lists.constants["ACC"], ROWS=128
        )
