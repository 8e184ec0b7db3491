"""The three branches in Triton: the portable GPU kernels behind `dgs::surgery_head` and its backward.

A row's dot products need all of it, and its weighted sum into the head gradients needs it again: a row that
fits in registers waits there, so that the three matrices are read once. Every program takes one chunk of rows
and leaves partial sums, which a second launch adds up in a fixed order. Longer rows are read twice. The
backward reads no matrix: a row of its result is a combination of D-vectors that come from cache; where they
are longer than a program, a first launch of one program makes their inner products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a row that one program keeps in registers, for two matrices and their sums.
WIDEST_ROW = 4096
# Numbers of one matrix that a program works on at a time, 16 a thread, and how many programs share a batch:
# at about 160 registers a thread three fit a multiprocessor of the 132 that large GPUs have, all at once.
TILE = 2048
PROGRAMS = 384
CHUNK = 2048
# Rows of the backward's programs: what a program reads is then small beside what it writes.
BACKWARD_ROWS = 64
BACKWARD_COLUMNS = 1024
# Partial sums that are not head gradients: the three losses.
LOSSES = tl.constexpr(3)


@triton.jit
def _load(pointer, row, column, stride, mask, ACC: tl.constexpr):
    """A tile of a matrix, or zeros where there is none."""
    if pointer is None:
        return tl.zeros(mask.shape, ACC)
    return tl.load(pointer + row * stride + column, mask, 0.0).to(ACC)


@triton.jit
def _weight(pointer, column, dim, ACC: tl.constexpr):
    if pointer is None:
        return tl.zeros(column.shape, ACC)
    return tl.load(pointer + column, column < dim, 0.0)


@triton.jit
def _negative(x):
    # A comparison that is false for NaN keeps it, which tl.minimum would not.
    return tl.where(x > 0, 0.0, x)


@triton.jit
def _cross_entropy(logit, label):
    """Binary cross-entropy of a logit."""
    small = tl.exp(-tl.abs(logit))
    rounded = 1.0 + small
    # log(1 + small) without the loss that rounding 1 + small brings.
    log1p = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / (rounded - 1.0)))
    return tl.where(logit < 0, 0.0, logit) - logit * label + log1p


@triton.jit
def _judge(
    labels_ptr,
    image_bias_ptr,
    teacher_bias_ptr,
    text_bias_ptr,
    logits_ptr,
    residuals_ptr,
    row,
    mask,
    batch,
    image,
    teacher,
    text,
    rising,
    falling,
):
    """Logits, residuals and losses of samples from the dot products of their rows; stores the first two."""
    label = tl.load(labels_ptr + row, mask, 0.0)
    # No label, and nothing here can raise an error.
    label = tl.where((label >= 0) & (label <= 1), label, float("nan"))
    image += tl.load(image_bias_ptr)
    teacher += tl.load(teacher_bias_ptr)
    image_residual = tl.where(mask, 1.0 / (1.0 + tl.exp(-image)) - label, 0.0)
    teacher_residual = tl.where(mask, 1.0 / (1.0 + tl.exp(-teacher)) - label, 0.0)
    image_loss = tl.where(mask, _cross_entropy(image, label), 0.0)
    if text_bias_ptr is not None:
        text += tl.load(text_bias_ptr)
        text_residual = tl.where(mask, 1.0 / (1.0 + tl.exp(-text)) - label, 0.0)
        text_loss = tl.where(mask, _cross_entropy(text, label), 0.0)
    else:
        text_residual, text_loss = tl.zeros_like(image_residual), tl.zeros_like(image_loss)
    alignment = tl.where(teacher_residual > 0, rising, falling) * tl.abs(teacher_residual)
    row = row.to(tl.int64)
    tl.store(logits_ptr + row, image, mask)
    tl.store(logits_ptr + batch + row, text, mask)
    tl.store(logits_ptr + 2 * batch + row, teacher, mask)
    tl.store(residuals_ptr + row, image_residual, mask)
    tl.store(residuals_ptr + batch + row, text_residual, mask)
    tl.store(residuals_ptr + 2 * batch + row, teacher_residual, mask)
    return image_residual, text_residual, image_loss, text_loss, alignment


@triton.jit
def _row_kernel(
    features_ptr,
    teacher_ptr,
    text_ptr,
    features_stride,
    teacher_stride,
    text_stride,
    labels_ptr,
    image_weight_ptr,
    image_bias_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    text_weight_ptr,
    text_bias_ptr,
    logits_ptr,
    residuals_ptr,
    partials_ptr,
    batch,
    dim,
    chunk_rows,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything of one chunk of rows; its sums go to partials [programs, 2 (dim + 1) + 3]."""
    column = tl.arange(0, BLOCK)[None, :]
    image_weight = _weight(image_weight_ptr, column, dim, ACC)
    teacher_weight = _weight(teacher_weight_ptr, column, dim, ACC)
    text_weight = _weight(text_weight_ptr, column, dim, ACC)
    image_sum, text_sum = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    image_residuals, text_residuals = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    image_losses, text_losses = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    alignments = tl.zeros((ROWS, 1), ACC)
    begin = tl.program_id(0).to(tl.int64) * chunk_rows
    end = tl.minimum(begin + chunk_rows, batch)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (column < dim)
        f = _load(features_ptr, row, column, features_stride, mask, ACC)
        t = _load(teacher_ptr, row, column, teacher_stride, mask, ACC)
        x = _load(text_ptr, row, column, text_stride, mask, ACC)
        image_residual, text_residual, image_loss, text_loss, alignment = _judge(
            labels_ptr,
            image_bias_ptr,
            teacher_bias_ptr,
            text_bias_ptr,
            logits_ptr,
            residuals_ptr,
            row,
            row < end,
            batch,
            tl.sum(f * image_weight, 1, keep_dims=True),
            tl.sum(t * teacher_weight, 1, keep_dims=True),
            tl.sum(x * text_weight, 1, keep_dims=True),
            tl.sum(f * _negative(teacher_weight), 1, keep_dims=True),
            tl.sum(f * _negative(-teacher_weight), 1, keep_dims=True),
        )
        image_sum += tl.sum(image_residual * f, 0)
        text_sum += tl.sum(text_residual * x, 0)
        image_residuals += image_residual
        text_residuals += text_residual
        image_losses += image_loss
        text_losses += text_loss
        alignments += alignment

    partials_ptr += tl.program_id(0).to(tl.int64) * (2 * (dim + 1) + LOSSES)
    column = tl.arange(0, BLOCK)
    tl.store(partials_ptr + column, image_sum, column < dim)
    tl.store(partials_ptr + dim, tl.sum(tl.sum(image_residuals, 1), 0))
    tl.store(partials_ptr + dim + 1 + column, text_sum, column < dim)
    tl.store(partials_ptr + 2 * dim + 1, tl.sum(tl.sum(text_residuals, 1), 0))
    tl.store(partials_ptr + 2 * dim + 2, tl.sum(tl.sum(image_losses, 1), 0))
    tl.store(partials_ptr + 2 * dim + 3, tl.sum(tl.sum(text_losses, 1), 0))
    tl.store(partials_ptr + 2 * dim + 4, tl.sum(tl.sum(alignments, 1), 0))


@triton.jit
def _long_row_kernel(
    features_ptr,
    teacher_ptr,
    text_ptr,
    features_stride,
    teacher_stride,
    text_stride,
    labels_ptr,
    image_weight_ptr,
    image_bias_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    text_weight_ptr,
    text_bias_ptr,
    logits_ptr,
    residuals_ptr,
    partials_ptr,
    batch,
    dim,
    chunk_rows,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scalars of one chunk of long rows: logits, residuals, and all sums but the weighted ones."""
    image_residuals, text_residuals = tl.zeros((1,), ACC), tl.zeros((1,), ACC)
    image_losses, text_losses, alignments = tl.zeros((1,), ACC), tl.zeros((1,), ACC), tl.zeros((1,), ACC)
    begin = tl.program_id(0).to(tl.int64) * chunk_rows
    end = tl.minimum(begin + chunk_rows, batch)
    for row in range(begin, end):
        image, teacher, text = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
        rising, falling = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
        for start in range(0, dim, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < dim
            f = _load(features_ptr, row, column, features_stride, mask, ACC)
            teacher_weight = _weight(teacher_weight_ptr, column, dim, ACC)
            image += f * _weight(image_weight_ptr, column, dim, ACC)
            rising += f * _negative(teacher_weight)
            falling += f * _negative(-teacher_weight)
            teacher += _load(teacher_ptr, row, column, teacher_stride, mask, ACC) * teacher_weight
            x = _load(text_ptr, row, column, text_stride, mask, ACC)
            text += x * _weight(text_weight_ptr, column, dim, ACC)
        one = row + tl.arange(0, 1)
        image_residual, text_residual, image_loss, text_loss, alignment = _judge(
            labels_ptr,
            image_bias_ptr,
            teacher_bias_ptr,
            text_bias_ptr,
            logits_ptr,
            residuals_ptr,
            one,
            one < end,
            batch,
            tl.sum(image, 0, keep_dims=True),
            tl.sum(teacher, 0, keep_dims=True),
            tl.sum(text, 0, keep_dims=True),
            tl.sum(rising, 0, keep_dims=True),
            tl.sum(falling, 0, keep_dims=True),
        )
        image_residuals += image_residual
        text_residuals += text_residual
        image_losses += image_loss
        text_losses += text_loss
        alignments += alignment
    at = partials_ptr + tl.program_id(0).to(tl.int64) * (2 * (dim + 1) + LOSSES) + tl.arange(0, 1)
    tl.store(at + dim, image_residuals)
    tl.store(at + 2 * dim + 1, text_residuals)
    tl.store(at + 2 * dim + 2, image_losses)
    tl.store(at + 2 * dim + 3, text_losses)
    tl.store(at + 2 * dim + 4, alignments)


@triton.jit
def _weighted_sums_kernel(
    features_ptr,
    text_ptr,
    features_stride,
    text_stride,
    residuals_ptr,
    partials_ptr,
    batch,
    dim,
    chunk_rows,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted sums of one chunk of long rows, for one block of columns."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < dim
    image_sum, text_sum = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    begin = tl.program_id(0).to(tl.int64) * chunk_rows
    for row in range(begin, tl.minimum(begin + chunk_rows, batch)):
        f = _load(features_ptr, row, column, features_stride, mask, ACC)
        x = _load(text_ptr, row, column, text_stride, mask, ACC)
        image_sum += tl.load(residuals_ptr + row) * f
        text_sum += tl.load(residuals_ptr + batch + row) * x
    partials_ptr += tl.program_id(0).to(tl.int64) * (2 * (dim + 1) + LOSSES)
    tl.store(partials_ptr + column, image_sum, mask)
    tl.store(partials_ptr + dim + 1 + column, text_sum, mask)


@triton.jit
def _sum_kernel(
    partials_ptr,
    head_grads_ptr,
    losses_ptr,
    programs,
    dim,
    mean: tl.float64,
    alignment_mean: tl.float64,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the chunks' partial sums, in a fixed order, for one block of columns."""
    width = 2 * (dim + 1) + LOSSES
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < programs) & (column < width)[None, :]
        total += tl.load(partials_ptr + row.to(tl.int64) * width + column[None, :], mask, 0.0)
    one = tl.full((), 1.0, tl.float64)
    scale = tl.where(column == width - 1, one * alignment_mean, one * mean).to(ACC)
    found = tl.sum(total, 0) * scale
    loss = column - (width - LOSSES)
    tl.store(head_grads_ptr + column, found, loss < 0)
    tl.store(losses_ptr + loss, found, (loss >= 0) & (column < width))


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
            w = _weight(text_weight_ptr, column, dim, ACC)
            p, n = -_negative(-w), -_negative(w)
            square_p += p * p
            square_n += n * n
            w = _weight(image_weight_ptr, column, dim, ACC)
            image_p += p * w
            image_n += n * w
            w = _weight(teacher_weight_ptr, column, dim, ACC)
            rising_p += p * _negative(w)
            rising_n += n * _negative(w)
            falling_p += p * _negative(-w)
            falling_n += n * _negative(-w)
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


@triton.jit
def _backward_kernel(
    residuals_ptr,
    image_weight_ptr,
    teacher_weight_ptr,
    text_weight_ptr,
    image_scale_ptr,
    alignment_scale_ptr,
    products_ptr,
    out_ptr,
    batch,
    dim,
    program_rows,
    mean: tl.float64,
    reference_mean: tl.float64,
    eps: tl.float64,
    PROJECT_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows of the features' gradient, for one block of columns."""
    one = tl.full((), 1.0, tl.float64)
    image_scale = tl.load(image_scale_ptr) * (one * mean).to(ACC)
    pull_scale = tl.load(alignment_scale_ptr) * (one * mean * reference_mean).to(ACC)
    if text_weight_ptr is not None:
        square_p, square_n, image_p, image_n, rising_p, rising_n, falling_p, falling_n = _products(
            image_weight_ptr, teacher_weight_ptr, text_weight_ptr, products_ptr, dim, ACC, BLOCK
        )

    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    image_weight = _weight(image_weight_ptr, column, dim, ACC)
    teacher_weight = _weight(teacher_weight_ptr, column, dim, ACC)
    text_weight = _weight(text_weight_ptr, column, dim, ACC)
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
        out += pull * _negative(tl.where(rises, teacher_weight, -teacher_weight))
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
            out += inner * k * k * _negative(tl.where(positive, -text_weight, text_weight))
        tl.store(out_ptr + row * dim + column, out, mask & (column < dim))


def launch_shape(dim: int, dtype: torch.dtype) -> dict[str, int] | None:
    """Constants of the forward's row kernel; None for rows too long for it."""
    block, width = triton.next_power_of_2(dim), 2 if dtype == torch.float64 else 1
    if block * width > WIDEST_ROW:
        return None
    rows = max(1, min(64, TILE // width // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, rows * block * width // 512)}


def backward_shape(dim: int) -> dict[str, int]:
    """Constants of the backward's kernel."""
    block = min(triton.next_power_of_2(dim), BACKWARD_COLUMNS)
    return {"ROWS": min(64, TILE // block), "BLOCK": block, "num_warps": 4}


def surgery_head(
    features: Tensor,
    teacher_features: Tensor,
    text_features: Tensor | None,
    labels: Tensor,
    image_weight: Tensor,
    image_bias: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor,
    text_weight: Tensor | None,
    text_bias: Tensor | None,
    reference_batch_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, dim = features.shape
    logits, residuals = (labels.new_empty((3, batch)) for _ in range(2))
    losses, head_grads = labels.new_empty(3), labels.new_empty((2, dim + 1))
    shape = launch_shape(dim, features.dtype)
    rows = 1 if shape is None else shape["ROWS"]
    chunk_rows = triton.cdiv(triton.cdiv(batch, PROGRAMS), rows) * rows
    programs = triton.cdiv(batch, chunk_rows) if batch else 0
    partials = labels.new_empty((programs, 2 * (dim + 1) + LOSSES.value))
    strides = (
        features.stride(0),
        teacher_features.stride(0),
        0 if text_features is None else text_features.stride(0),
    )
    heads = (image_weight, image_bias, teacher_weight, teacher_bias, text_weight, text_bias)
    arguments = (features, teacher_features, text_features, *strides, labels, *heads, logits, residuals)
    acc = tl.float64 if labels.dtype == torch.float64 else tl.float32
    sizes = (partials, batch, dim, chunk_rows)
    with torch.cuda.device_of(features):
        if shape is not None and batch:
            _row_kernel[(programs,)](*arguments, *sizes, ACC=acc, **shape)
        elif batch:
            _long_row_kernel[(programs,)](*arguments, *sizes, ACC=acc, BLOCK=CHUNK, num_warps=8)
            _weighted_sums_kernel[(programs, triton.cdiv(dim, CHUNK))](
                features, text_features, strides[0], strides[2], residuals, *sizes, ACC=acc, BLOCK=CHUNK
            )
        mean = 1 / max(batch, 1)
        _sum_kernel[(triton.cdiv(partials.shape[1], 64),)](
            partials,
            head_grads,
            losses,
            programs,
            dim,
            mean,
            mean / (reference_batch_size or max(batch, 1)),
            ACC=acc,
            ROWS=32,
            BLOCK=64,
        )
    return losses, logits, residuals, head_grads


def surgery_head_backward(
    residuals: Tensor,
    image_weight: Tensor,
    teacher_weight: Tensor,
    text_weight: Tensor | None,
    image_scale: Tensor,
    alignment_scale: Tensor,
    out: Tensor,
    eps: float,
    order: int,
    reference_batch_size: int | None,
) -> None:
    batch, dim = out.shape
    if not batch:
        return
    shape = backward_shape(dim)
    program_rows = min(BACKWARD_ROWS, max(1, batch // PROGRAMS))
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
            products,
            out,
            batch,
            dim,
            program_rows,
            1 / batch,
            1 / (reference_batch_size or batch),
            eps,
            PROJECT_FIRST=order,
            ACC=acc,
            **shape,
        )
