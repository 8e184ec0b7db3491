"""Gradient surgery on rows in Triton: the portable GPU kernels behind `dgs::project_align`.

A row that fits in registers is read once and written once: 3 reads and 1 write of rows x D, or 1 and 1 with
broadcast directions, whose rows stay in cache. A longer row is cut into parts, one program's each, and read
twice: a first launch leaves the parts' sums, and a second, every program of which adds up those of its row,
edits it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.reference import ORDERS, RULES
from dgs_kernels.triton.rounding import divide, root

# Widest row, in bytes of the computing type, that one program keeps in registers: 16 warps, 128 bytes a
# thread for each of two rows at a time. Twice that spills.
WIDEST_ROW = 65536
# Elements per program below which several short rows share one, and how many it has of each row at least.
TILE = 1024
NARROWEST_BLOCK = 64
# Numbers of a longer row that a program works on at a time, and the most parts of a row: enough for every
# multiprocessor to have several, and few enough for each program to add up all sums of its row.
CHUNK = 4096
MOST_PARTS = tl.constexpr(512)

# Its place in reference.ORDERS.
PROJECT_FIRST = tl.constexpr(1)
# Their places in reference.RULES.
POSITIVE = tl.constexpr(0)
CONFLICT = tl.constexpr(2)
# A row has the sums <x, h> and <h, h>.
SUMS = tl.constexpr(2)
# Triton would ask of each of these whether it divides by 16, and compile a kernel for every combination of
# answers: ALIGNED is one answer for all.
MATRICES = (
    *("grad_ptr", "harmful_ptr", "beneficial_ptr"),
    *("grad_stride", "harmful_stride", "beneficial_stride", "dim"),
)


def aligned(dim: int, *matrices: Tensor | None) -> bool:
    """Whether addresses, strides and the length of rows all divide by 16."""
    given = (m for m in matrices if m is not None)
    return not any(n % 16 for n in (dim, *(n for m in given for n in (m.data_ptr(), m.stride(0)))))


@triton.jit
def multiple(number, ALIGNED: tl.constexpr):
    """A number that divides by 16 if ALIGNED, in a form from which the compiler sees it.

    It is no mere hint, so that in the interpreter too a result is wrong where ALIGNED is.
    """
    return number // 16 * 16 if ALIGNED else number


@triton.jit
def row_start(pointer, row, stride, ALIGNED: tl.constexpr):
    """Where one row begins, or each of some."""
    if ALIGNED:
        pointer = tl.multiple_of(multiple(pointer.to(tl.int64), ALIGNED).to(pointer.dtype), 16)
    return pointer + row * multiple(stride, ALIGNED)


@triton.jit
def _direction(harmful, rule):
    # Comparisons that are false for NaN keep it, which tl.maximum would not.
    return tl.where((rule == POSITIVE) & (harmful < 0), 0.0, harmful)


@triton.jit
def _strength(alignment, scale_ptr, ACC: tl.constexpr):
    strength = tl.full((), 1.0, tl.float64) * alignment
    if scale_ptr is not None:
        strength = strength * tl.load(scale_ptr)
    return strength.to(ACC)


@triton.jit
def _coefficient(inner, square, eps, rule, ACC: tl.constexpr):
    """What to subtract of the row h, from <x, h> and <h, h>: <x, u> / (||h|| + eps)."""
    norm = root(square) + (tl.full((), 1.0, tl.float64) * eps).to(ACC)
    inner = tl.where((rule == CONFLICT) & (inner > 0), 0.0, inner)
    return divide(divide(inner, norm), norm)


# Options and counts are no constants: each would multiply the number of kernels that are compiled, and a
# comparison in a register costs nothing beside a memory access.
@triton.jit(do_not_specialize=[*MATRICES, "rows", "order", "rule"])
def _row_kernel(
    grad_ptr,
    harmful_ptr,
    beneficial_ptr,
    scale_ptr,
    out_ptr,
    rows,
    dim,
    grad_stride,
    harmful_stride,
    beneficial_stride,
    alignment: tl.float64,
    eps: tl.float64,
    order,
    rule,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dim = multiple(dim, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < dim)

    x = tl.load(row_start(grad_ptr, row, grad_stride, ALIGNED) + column, mask, 0.0).to(ACC)
    h = tl.load(row_start(harmful_ptr, row, harmful_stride, ALIGNED) + column, mask, 0.0).to(ACC)
    h = _direction(h, rule)
    moved = x
    if beneficial_ptr is not None:
        b = tl.load(row_start(beneficial_ptr, row, beneficial_stride, ALIGNED) + column, mask, 0.0).to(ACC)
        moved += _strength(alignment, scale_ptr, ACC) * tl.where(b > 0, 0.0, b)
        x = tl.where(order == PROJECT_FIRST, x, moved)
    inner, square = tl.sum(x * h, 1, keep_dims=True), tl.sum(h * h, 1, keep_dims=True)
    moved -= _coefficient(inner, square, eps, rule, ACC) * h
    tl.store(out_ptr + row * dim + column, moved, mask)


@triton.jit(do_not_specialize=[*MATRICES, "parts", "order", "rule"])
def _part_sums_kernel(
    grad_ptr,
    harmful_ptr,
    beneficial_ptr,
    scale_ptr,
    partials_ptr,
    dim,
    part_size,
    parts,
    grad_stride,
    harmful_stride,
    beneficial_stride,
    alignment: tl.float64,
    order,
    rule,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of a part of a row, to partials [rows, parts, SUMS]."""
    dim = multiple(dim, ALIGNED)
    row, begin = tl.program_id(0).to(tl.int64) // parts, (tl.program_id(0) % parts).to(tl.int64) * part_size
    grad_ptr = row_start(grad_ptr, row, grad_stride, ALIGNED)
    harmful_ptr = row_start(harmful_ptr, row, harmful_stride, ALIGNED)
    if beneficial_ptr is not None:
        beneficial_ptr = row_start(beneficial_ptr, row, beneficial_stride, ALIGNED)
        strength = _strength(alignment, scale_ptr, ACC)
    inner, square = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for start in range(begin, tl.minimum(begin + part_size, dim), BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < dim
        x = tl.load(grad_ptr + column, mask, 0.0).to(ACC)
        h = _direction(tl.load(harmful_ptr + column, mask, 0.0).to(ACC), rule)
        # The first is a constant, the second none: joined by "and", neither would be.
        if beneficial_ptr is not None:  # noqa: SIM102
            if order != PROJECT_FIRST:
                b = tl.load(beneficial_ptr + column, mask, 0.0).to(ACC)
                x += strength * tl.where(b > 0, 0.0, b)
        inner += x * h
        square += h * h
    partials_ptr += tl.program_id(0).to(tl.int64) * SUMS
    tl.store(partials_ptr, tl.sum(inner, 0))
    tl.store(partials_ptr + 1, tl.sum(square, 0))


@triton.jit(do_not_specialize=[*MATRICES, "parts", "rule"])
def _part_kernel(
    grad_ptr,
    harmful_ptr,
    beneficial_ptr,
    scale_ptr,
    partials_ptr,
    out_ptr,
    dim,
    part_size,
    parts,
    grad_stride,
    harmful_stride,
    beneficial_stride,
    alignment: tl.float64,
    eps: tl.float64,
    rule,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dim = multiple(dim, ALIGNED)
    row, begin = tl.program_id(0).to(tl.int64) // parts, (tl.program_id(0) % parts).to(tl.int64) * part_size
    grad_ptr = row_start(grad_ptr, row, grad_stride, ALIGNED)
    harmful_ptr = row_start(harmful_ptr, row, harmful_stride, ALIGNED)
    if beneficial_ptr is not None:
        beneficial_ptr = row_start(beneficial_ptr, row, beneficial_stride, ALIGNED)
        strength = _strength(alignment, scale_ptr, ACC)
    part = tl.arange(0, MOST_PARTS)
    partials_ptr += (row * parts + part) * SUMS
    inner = tl.sum(tl.load(partials_ptr, part < parts, 0.0), 0)
    square = tl.sum(tl.load(partials_ptr + 1, part < parts, 0.0), 0)
    coefficient = _coefficient(inner, square, eps, rule, ACC)
    for start in range(begin, tl.minimum(begin + part_size, dim), BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < dim
        x = tl.load(grad_ptr + column, mask, 0.0).to(ACC)
        h = _direction(tl.load(harmful_ptr + column, mask, 0.0).to(ACC), rule)
        x -= coefficient * h
        if beneficial_ptr is not None:
            b = tl.load(beneficial_ptr + column, mask, 0.0).to(ACC)
            x += strength * tl.where(b > 0, 0.0, b)
        tl.store(out_ptr + row * dim + column, x, mask)


def places(order: str, rule: str) -> tuple[int, int]:
    return ORDERS.index(order), RULES.index(rule)


def launch_shape(rows: int, dim: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, int]] | None:
    """Grid and constants of the row kernel; None for rows too long for it."""
    block = max(NARROWEST_BLOCK, triton.next_power_of_2(dim))
    if block * (8 if dtype == torch.float64 else 4) > WIDEST_ROW:
        return None
    tile = max(1, TILE // block)
    warps = min(16, max(4, block // 512))
    return (triton.cdiv(rows, tile),), {"ROWS": tile, "BLOCK": block, "num_warps": warps}


def cut(dim: int) -> tuple[int, int]:
    """Size and number of a long row's parts."""
    size = triton.cdiv(triton.cdiv(dim, MOST_PARTS.value), CHUNK) * CHUNK
    return size, triton.cdiv(dim, size)


def project_align(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
    out: Tensor,
) -> None:
    rows, dim = grad.shape
    if rows == 0:
        return
    given = (grad, harmful, beneficial, None if beneficial is None else scale)
    strides = (grad.stride(0), harmful.stride(0), 0 if beneficial is None else beneficial.stride(0))
    acc, wide = (tl.float64, torch.float64) if grad.dtype == torch.float64 else (tl.float32, torch.float32)
    constants = {"ACC": acc, "ALIGNED": aligned(dim, grad, harmful, beneficial, out)}
    with torch.cuda.device_of(grad):
        if shape := launch_shape(rows, dim, grad.dtype):
            grid, block = shape
            options = (alignment, eps, *places(order, rule))
            _row_kernel[grid](*given, out, rows, dim, *strides, *options, **constants, **block)
            return
        part_size, parts = cut(dim)
        partials = torch.empty((rows, parts, SUMS.value), dtype=wide, device=grad.device)
        sizes = (dim, part_size, parts, *strides, alignment)
        order_place, rule_place = places(order, rule)
        constants |= {"BLOCK": CHUNK, "num_warps": 8}
        _part_sums_kernel[(rows * parts,)](*given, partials, *sizes, order_place, rule_place, **constants)
        _part_kernel[(rows * parts,)](*given, partials, out, *sizes, eps, rule_place, **constants)
