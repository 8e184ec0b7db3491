"""The backward of the three branches in Triton, behind `dgs::surgery_head_backward`.

It reads no feature matrix: a row of the result is a combination of D-vectors that come from cache, and of the
row that a distillation loss has left. Where those vectors are longer than a program, a first launch of one
program makes their inner products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.reference import ORDERS
from dgs_kernels.triton.surgery_head import PROGRAMS, TILE, negative, weight

# Rows of one program: what it reads is then small beside what it writes.
PROGRAM_ROWS = 64
PROGRAM_COLUMNS = 1024


@triton.jit
def _products(
    image_weight_ptr,
    teacher_weight_ptr,
    text_weight_ptr,
    products_ptr,
    dim,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Inner products of the positive (_p) and the negative part (_n) of the text weight.

    With themselves, the image weight, min(w, 0) and min(-w, 0) of the teacher's weight w; read if known.
    """
    if products_ptr is not None:
        return (
            tl.load(products_ptr),
            tl.load(products_ptr + 1),
            tl.load(products_ptr + 2),
            tl.load(products_ptr + 3),
            tl.load(products_ptr + 4),
            tl.load(products_ptr + 5),
            tl.load(products_ptr + 6),
            tl.load(products_ptr + 7),
        )
    else:
        none = tl.zeros((BLOCK,), ACC)
        square_p, square_n, image_p, image_n = none, none, none, none
        rising_p, rising_n, falling_p, falling_n = none, none, none, none
        for start in range(0, dim, BLOCK):
            column = start + tl.arange(0, BLOCK)
            w = weight(text_weight_ptr, column, dim, ACC)
            p, n = -negative(-w), -negative(w)
            square_p += p * p
            square_n += n * n
            w = weight(image_weight_ptr, column, dim, ACC)
            image_p += p * w
            image_n += n * w
            w = weight(teacher_weight_ptr, column, dim, ACC)
            rising_p += p * negative(w)
            rising_n += n * negative(w)
            falling_p += p * negative(-w)
            falling_n += n * negative(-w)
        return (
            tl.sum(square_p, 0),
            tl.sum(square_n, 0),
            tl.sum(image_p, 0),
            tl.sum(image_n, 0),
            tl.sum(rising_p, 0),
            tl.sum(rising_n, 0),
            tl.sum(falling_p, 0),
            tl.sum(falling_n, 0),
        )


@triton.jit
def _products_kernel(
    image_weight_ptr,
    teacher_weight_ptr,
    text_weight_ptr,
    out_ptr,
    dim,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    found = _products(image_weight_ptr, teacher_weight_ptr, text_weight_ptr, None, dim, ACC, BLOCK)
    for i in tl.static_range(8):
        tl.store(out_ptr + i, found[i])


@triton.jit(do_not_specialize=["batch", "program_rows"])
def _backward_kernel(
    residuals_ptr,
    image_weight_ptr,
    teacher_weight_ptr,
    text_weight_ptr,
    image_scale_ptr,
    alignment_scale_ptr,
    differences_ptr,
    distillation_scale_ptr,
    products_ptr,
    out_ptr,
    batch,
    dim,
    program_rows,
    mean: tl.float64,
    reference_mean: tl.float64,
    eps: tl.float64,
    distillation_mean: tl.float64,
    PROJECT_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows of the features' gradient, for one block of columns."""
    one = tl.full((), 1.0, tl.float64)
    image_scale = tl.load(image_scale_ptr) * (one * mean).to(ACC)
    pull_scale = tl.load(alignment_scale_ptr) * (one * mean * reference_mean).to(ACC)
    if differences_ptr is not None:
        distillation_scale = tl.load(distillation_scale_ptr) * (one * distillation_mean).to(ACC)
    if text_weight_ptr is not None:
        square_p, square_n, image_p, image_n, rising_p, rising_n, falling_p, falling_n = _products(
            image_weight_ptr, teacher_weight_ptr, text_weight_ptr, products_ptr, dim, ACC, BLOCK
        )

    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    image_weight = weight(image_weight_ptr, column, dim, ACC)
    teacher_weight = weight(teacher_weight_ptr, column, dim, ACC)
    text_weight = weight(text_weight_ptr, column, dim, ACC)
    begin = tl.program_id(0).to(tl.int64) * program_rows
    end = tl.minimum(begin + program_rows, batch)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = row < end
        image = tl.load(residuals_ptr + row, mask, 0.0) * image_scale
        teacher_residual = tl.load(residuals_ptr + 2 * batch + row, mask, 0.0)
        rises = teacher_residual > 0
        pull = tl.abs(teacher_residual) * pull_scale
        out = image * image_weight
        out += pull * negative(tl.where(rises, teacher_weight, -teacher_weight))
        if text_weight_ptr is not None:
            text_residual = tl.load(residuals_ptr + batch + row, mask, 0.0)
            positive = text_residual > 0
            c = tl.abs(text_residual) * (one * reference_mean).to(ACC)
            k = c / (c * tl.sqrt(tl.where(positive, square_p, square_n)) + (one * eps).to(ACC))
            inner = image * tl.where(positive, image_p, image_n)
            if not PROJECT_FIRST:
                pulls = tl.where(positive, rising_p, rising_n)
                falls = tl.where(positive, falling_p, falling_n)
                inner += pull * tl.where(rises, pulls, falls)
            out += inner * k * k * negative(tl.where(positive, -text_weight, text_weight))
        if differences_ptr is not None:
            difference = tl.load(differences_ptr + row * dim + column, mask & (column < dim), 0.0)
            out += distillation_scale * difference.to(ACC)
        tl.store(out_ptr + row * dim + column, out, mask & (column < dim))


def launch_shape(dim: int) -> dict[str, int]:
    """Constants of the kernel."""
    block = min(triton.next_power_of_2(dim), PROGRAM_COLUMNS)
    return {"ROWS": min(64, TILE // block), "BLOCK": block, "num_warps": 4}


def surgery_head_backward(
    residuals: Tensor,
    image_weight: Tensor,
    teacher_weight: Tensor,
    text_weight: Tensor | None,
    image_scale: Tensor,
    alignment_scale: Tensor,
    out_dtype: torch.dtype,
    eps: float,
    order: str,
    reference_batch_size: int | None,
    differences: Tensor | None,
    distillation_scale: Tensor | None,
    distillation: float,
    out: Tensor,
) -> None:
    batch, dim = out.shape
    if not batch:
        return
    shape = launch_shape(dim)
    program_rows = min(PROGRAM_ROWS, max(1, batch // PROGRAMS))
    program_rows = triton.cdiv(program_rows, shape["ROWS"]) * shape["ROWS"]
    grid = (triton.cdiv(batch, program_rows), triton.cdiv(dim, shape["BLOCK"]))
    acc = tl.float64 if residuals.dtype == torch.float64 else tl.float32
    weights = (image_weight, teacher_weight, text_weight)
    products = None
    with torch.cuda.device_of(out):
        if grid[1] > 1 and text_weight is not None:
            products = residuals.new_empty(8)
            _products_kernel[(1,)](*weights, products, dim, ACC=acc, BLOCK=shape["BLOCK"])
        _backward_kernel[grid](
            residuals,
            *weights,
            image_scale,
            alignment_scale,
            differences,
            distillation_scale,
            products,
            out,
            batch,
            dim,
            program_rows,
            1 / batch,
            1 / (reference_batch_size or batch),
            eps,
            distillation / (dim * batch),
            PROJECT_FIRST=ORDERS.index(order),
            ACC=acc,
            **shape,
        )
