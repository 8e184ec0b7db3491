"""The three branches in Triton: the portable GPU kernels behind `dgs::surgery_head`.

A row's dot products need all of it, and its weighted sum into the head gradients needs it again: a row that
fits in registers waits there, so that the three matrices are read once, the next rows while the present ones
are summed. Every program takes one chunk of rows and leaves partial sums, which a second launch adds up in a
fixed order. Longer rows are read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.triton.project_align import aligned, multiple, row_start

# Numbers of a row that one program keeps in registers, for two matrices and their sums.
WIDEST_ROW = 4096
# Numbers of one matrix that a program works on at a time, 16 a thread.
TILE = 2048
# How many programs share a batch where nothing is known of a device: three for each of 128 multiprocessors.
PROGRAMS = 384
CHUNK = 2048
# Partial sums that are not head gradients: the four losses.
LOSSES = tl.constexpr(4)
# What ALIGNED says for all of them, as in project_align.
MATRICES = (
    *("features_ptr", "teacher_ptr", "text_ptr"),
    *("features_stride", "teacher_stride", "text_stride", "dim"),
)


@triton.jit
def _load(pointer, row, column, stride, mask, ACC: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile of a matrix, or zeros where there is none."""
    # One return: Triton compiles what follows a return too, and None has no type.
    if pointer is None:
        found = tl.zeros(mask.shape, ACC)
    else:
        found = tl.load(row_start(pointer, row, stride, ALIGNED) + column, mask, 0.0).to(ACC)
    return found


@triton.jit
def weight(pointer, column, dim, ACC: tl.constexpr):
    """A part of a weight vector, or zeros where there is none."""
    if pointer is None:
        found = tl.zeros(column.shape, ACC)
    else:
        found = tl.load(pointer + column, column < dim, 0.0)
    return found


@triton.jit
def _bias(pointer, ACC: tl.constexpr):
    """A head's bias, or zero where there is no head."""
    if pointer is None:
        found = tl.full((), 0.0, ACC)
    else:
        found = tl.load(pointer)
    return found


@triton.jit
def negative(x):
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
def _subtract(f, t, differences_ptr, row, column, dim, mask):
    """f - t, which stays for the backward where somebody asked for it, else zeros."""
    if differences_ptr is None:
        difference = tl.zeros_like(f)
    else:
        difference = f - t
        tl.store(differences_ptr + row * dim + column, difference, mask)
    return difference


@triton.jit
def _judge(
    labels_ptr,
    offsets_ptr,
    image_bias,
    teacher_bias,
    text_bias,
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
    EXPERT: tl.constexpr,
    HAS_TEXT: tl.constexpr,
):
    """Logits, residuals and losses of samples from the dot products of their rows; stores the first two."""
    label = tl.load(labels_ptr + row, mask, 0.0)
    # No label, and nothing here can raise an error.
    label = tl.where((label >= 0) & (label <= 1), label, float("nan"))
    image += image_bias
    teacher += teacher_bias
    teacher_residual = tl.where(mask, 1.0 / (1.0 + tl.exp(-teacher)) - label, 0.0)
    if HAS_TEXT:
        text += text_bias
        text_residual = tl.where(mask, 1.0 / (1.0 + tl.exp(-text)) - label, 0.0)
        text_loss = tl.where(mask, _cross_entropy(text, label), 0.0)
    else:
        text_residual, text_loss = tl.zeros_like(label), tl.zeros_like(label)
    judged = image
    if EXPERT:
        judged += text
    if offsets_ptr is not None:
        judged += tl.load(offsets_ptr + row, mask, 0.0)
    image_residual = tl.where(mask, 1.0 / (1.0 + tl.exp(-judged)) - label, 0.0)
    image_loss = tl.where(mask, _cross_entropy(judged, label), 0.0)
    alignment = tl.where(teacher_residual > 0, rising, falling) * tl.abs(teacher_residual)
    row = row.to(tl.int64)
    tl.store(logits_ptr + row, image, mask)
    tl.store(logits_ptr + batch + row, text, mask)
    tl.store(logits_ptr + 2 * batch + row, teacher, mask)
    tl.store(residuals_ptr + row, image_residual, mask)
    tl.store(residuals_ptr + batch + row, text_residual, mask)
    tl.store(residuals_ptr + 2 * batch + row, teacher_residual, mask)
    return image_residual, text_residual, image_loss, text_loss, alignment


@triton.jit(do_not_specialize=[*MATRICES, "batch", "chunk_rows"])
def _row_kernel(
    features_ptr,
    teacher_ptr,
    text_ptr,
    features_stride,
    teacher_stride,
    text_stride,
    labels_ptr,
    offsets_ptr,
    image_weight_ptr,
    image_bias_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    text_weight_ptr,
    text_bias_ptr,
    logits_ptr,
    residuals_ptr,
    differences_ptr,
    partials_ptr,
    batch,
    dim,
    chunk_rows,
    EXPERT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Everything of one chunk of rows; its sums go to partials [programs, 2 (dim + 1) + 4]."""
    dim = multiple(dim, ALIGNED)
    column = tl.arange(0, BLOCK)[None, :]
    image_weight = weight(image_weight_ptr, column, dim, ACC)
    teacher_weight = weight(teacher_weight_ptr, column, dim, ACC)
    text_weight = weight(text_weight_ptr, column, dim, ACC)
    image_bias, teacher_bias = _bias(image_bias_ptr, ACC), _bias(teacher_bias_ptr, ACC)
    text_bias = _bias(text_bias_ptr, ACC)
    image_sum, text_sum = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    image_residuals, text_residuals = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    image_losses, text_losses = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    alignments, distances = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    begin = tl.program_id(0).to(tl.int64) * chunk_rows
    end = tl.minimum(begin + chunk_rows, batch)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (column < dim)
        f = _load(features_ptr, row, column, features_stride, mask, ACC, ALIGNED)
        t = _load(teacher_ptr, row, column, teacher_stride, mask, ACC, ALIGNED)
        x = _load(text_ptr, row, column, text_stride, mask, ACC, ALIGNED)
        difference = _subtract(f, t, differences_ptr, row, column, dim, mask)
        distances += tl.sum(difference * difference, 1, keep_dims=True)
        image_residual, text_residual, image_loss, text_loss, alignment = _judge(
            labels_ptr,
            offsets_ptr,
            image_bias,
            teacher_bias,
            text_bias,
            logits_ptr,
            residuals_ptr,
            row,
            row < end,
            batch,
            tl.sum(f * image_weight, 1, keep_dims=True),
            tl.sum(t * teacher_weight, 1, keep_dims=True),
            tl.sum(x * text_weight, 1, keep_dims=True),
            tl.sum(f * negative(teacher_weight), 1, keep_dims=True),
            tl.sum(f * negative(-teacher_weight), 1, keep_dims=True),
            EXPERT,
            text_bias_ptr is not None,
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
    tl.store(partials_ptr + 2 * dim + 5, tl.sum(tl.sum(distances, 1), 0))


@triton.jit(do_not_specialize=[*MATRICES, "batch", "chunk_rows"])
def _long_row_kernel(
    features_ptr,
    teacher_ptr,
    text_ptr,
    features_stride,
    teacher_stride,
    text_stride,
    labels_ptr,
    offsets_ptr,
    image_weight_ptr,
    image_bias_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    text_weight_ptr,
    text_bias_ptr,
    logits_ptr,
    residuals_ptr,
    differences_ptr,
    partials_ptr,
    batch,
    dim,
    chunk_rows,
    EXPERT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scalars of one chunk of long rows: logits, residuals, and all sums but the weighted ones."""
    dim = multiple(dim, ALIGNED)
    image_bias, teacher_bias = _bias(image_bias_ptr, ACC), _bias(teacher_bias_ptr, ACC)
    text_bias = _bias(text_bias_ptr, ACC)
    image_residuals, text_residuals = tl.zeros((1,), ACC), tl.zeros((1,), ACC)
    image_losses, text_losses, alignments = tl.zeros((1,), ACC), tl.zeros((1,), ACC), tl.zeros((1,), ACC)
    distances = tl.zeros((BLOCK,), ACC)
    begin = tl.program_id(0).to(tl.int64) * chunk_rows
    end = tl.minimum(begin + chunk_rows, batch)
    for row in range(begin, end):
        image, teacher, text = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
        rising, falling = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
        for start in range(0, dim, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < dim
            f = _load(features_ptr, row, column, features_stride, mask, ACC, ALIGNED)
            teacher_weight = weight(teacher_weight_ptr, column, dim, ACC)
            image += f * weight(image_weight_ptr, column, dim, ACC)
            rising += f * negative(teacher_weight)
            falling += f * negative(-teacher_weight)
            t = _load(teacher_ptr, row, column, teacher_stride, mask, ACC, ALIGNED)
            teacher += t * teacher_weight
            difference = _subtract(f, t, differences_ptr, row, column, dim, mask)
            distances += difference * difference
            x = _load(text_ptr, row, column, text_stride, mask, ACC, ALIGNED)
            text += x * weight(text_weight_ptr, column, dim, ACC)
        one = row + tl.arange(0, 1)
        image_residual, text_residual, image_loss, text_loss, alignment = _judge(
            labels_ptr,
            offsets_ptr,
            image_bias,
            teacher_bias,
            text_bias,
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
            EXPERT,
            text_bias_ptr is not None,
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
    tl.store(at + 2 * dim + 5, tl.sum(distances, 0, keep_dims=True))


@triton.jit(do_not_specialize=[*MATRICES, "batch", "chunk_rows"])
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
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted sums of one chunk of long rows, for one block of columns."""
    dim = multiple(dim, ALIGNED)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < dim
    image_sum, text_sum = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    begin = tl.program_id(0).to(tl.int64) * chunk_rows
    for row in range(begin, tl.minimum(begin + chunk_rows, batch)):
        f = _load(features_ptr, row, column, features_stride, mask, ACC, ALIGNED)
        x = _load(text_ptr, row, column, text_stride, mask, ACC, ALIGNED)
        image_sum += tl.load(residuals_ptr + row) * f
        text_sum += tl.load(residuals_ptr + batch + row) * x
    partials_ptr += tl.program_id(0).to(tl.int64) * (2 * (dim + 1) + LOSSES)
    tl.store(partials_ptr + column, image_sum, mask)
    tl.store(partials_ptr + dim + 1 + column, text_sum, mask)


@triton.jit(do_not_specialize=["programs", "dim"])
def _sum_kernel(
    partials_ptr,
    head_grads_ptr,
    losses_ptr,
    programs,
    dim,
    mean: tl.float64,
    alignment_mean: tl.float64,
    distillation_mean: tl.float64,
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
    loss = column - (width - LOSSES)
    scale = tl.where(loss == 2, one * alignment_mean, one * mean)
    scale = tl.where(loss == 3, one * distillation_mean, scale).to(ACC)
    found = tl.sum(total, 0) * scale
    tl.store(head_grads_ptr + column, found, loss < 0)
    tl.store(losses_ptr + loss, found, (loss >= 0) & (column < width))


def launch_shape(dim: int, dtype: torch.dtype) -> dict[str, int] | None:
    """Constants of the forward's row kernel; None for rows too long for it.

    Of all but one of its stages the rows are on their way: as many bytes in every type.
    """
    block, width = triton.next_power_of_2(dim), 2 if dtype == torch.float64 else 1
    if block * width > WIDEST_ROW:
        return None
    rows = max(1, min(64, TILE // width // block))
    stages = 3 if dtype.itemsize == 2 else 2
    return {"ROWS": rows, "BLOCK": block, "STAGES": stages, "num_warps": max(4, rows * block * width // 512)}


def at_once(registers: int, shared: int, warps: int, device) -> int:
    """Programs of a kernel that a device runs at once, as its registers, shared memory and threads allow.

    `registers` are a thread's, `shared` a program's bytes; `device` is what torch says of one.
    """
    # Warps come to a multiprocessor's four parts in turn, and registers in portions of eight a thread.
    of_a_part = device.regs_per_multiprocessor // 4 // (-(-registers // 8) * 8 * device.warp_size)
    fitting = (
        4 * of_a_part // warps,
        # The driver keeps a kilobyte of each program's for itself.
        device.shared_memory_per_multiprocessor // (shared + 1024),
        device.max_threads_per_multi_processor // (device.warp_size * warps),
    )
    return device.multi_processor_count * max(1, min(fitting))


def programs_for(batch: int, arguments: tuple, options: dict) -> int:
    """How many programs of the row kernel share a batch: all that run at once, and no second wave of few.

    The compiled kernel says how many fit. A batch of which each multiprocessor has one program's rows at most
    is shared alike whatever the answer, so nobody is asked.
    """
    device = arguments[0].device
    if device.type != "cuda" or torch.version.hip:
        return PROGRAMS
    limits = torch.cuda.get_device_properties(device)
    if batch <= options["ROWS"] * limits.multi_processor_count:
        return limits.multi_processor_count
    kernel = _row_kernel.warmup(*arguments, grid=(1,), **options)
    # Only a kernel that is loaded knows its registers.
    kernel._init_handles()
    return at_once(kernel.n_regs, kernel.metadata.shared, kernel.metadata.num_warps, limits)


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
    eps: float,
    order: str,
    reference_batch_size: int | None,
    text: str,
    offsets: Tensor | None,
    distillation: float,
    losses: Tensor,
    logits: Tensor,
    residuals: Tensor,
    head_grads: Tensor,
    differences: Tensor,
) -> None:
    batch, dim = features.shape
    expert = text != "project"
    shape = launch_shape(dim, features.dtype)
    strides = (
        features.stride(0),
        teacher_features.stride(0),
        0 if text_features is None else text_features.stride(0),
    )
    heads = (image_weight, image_bias, teacher_weight, teacher_bias, text_weight, text_bias)
    matrices = (features, teacher_features, text_features, *strides)
    results = (logits, residuals, differences if distillation else None)
    acc = tl.float64 if labels.dtype == torch.float64 else tl.float32
    constants = {"ACC": acc, "ALIGNED": aligned(dim, features, teacher_features, text_features)}
    given = (*matrices, labels, offsets, *heads, *results)
    rows, most = 1, PROGRAMS
    with torch.cuda.device_of(features):
        if shape is not None:
            options, rows = {"EXPERT": expert, **constants, **shape}, shape["ROWS"]
            most = programs_for(batch, (*given, losses, batch, dim, rows), options)
        chunk_rows = triton.cdiv(triton.cdiv(batch, most), rows) * rows
        programs = triton.cdiv(batch, chunk_rows) if batch else 0
        partials = labels.new_empty((programs, 2 * (dim + 1) + LOSSES.value))
        sizes = (partials, batch, dim, chunk_rows)
        arguments = (*given, *sizes)
        if batch and shape is not None:
            _row_kernel[(programs,)](*arguments, **options)
        elif batch:
            _long_row_kernel[(programs,)](*arguments, EXPERT=expert, **constants, BLOCK=CHUNK, num_warps=8)
            _weighted_sums_kernel[(programs, triton.cdiv(dim, CHUNK))](
                features, text_features, strides[0], strides[2], residuals, *sizes, **constants, BLOCK=CHUNK
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
            mean * distillation / (2 * dim),
            ACC=acc,
            ROWS=32,
            BLOCK=64,
        )
