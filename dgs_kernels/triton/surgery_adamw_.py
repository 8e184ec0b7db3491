"""AdamW with surgery in its step, in Triton: the portable GPU kernels behind `dgs::surgery_adamw_`.

The first two launches are those of `project_align_`; the third edits the gradient in registers and steps with
it: 3 reads for the sums, 6 reads and 3 writes for the step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.triton import project_align_ as layers
from dgs_kernels.triton.project_align import _direction, _strength, places
from dgs_kernels.triton.project_align_ import (
    ADDRESSES,
    BLOCK,
    _chunk,
    _negative,
    _pointer,
    _read,
    _share,
    _write,
)
from dgs_kernels.triton.rounding import divide, root


@triton.jit(do_not_specialize=["tensors", "order", "rule", "maximize"])
def _step_kernel(
    table_ptr,
    sums_ptr,
    scale_ptr,
    tensors,
    alignment: tl.float64,
    surgery_eps: tl.float64,
    decay: tl.float64,
    lerp: tl.float64,
    beta2: tl.float64,
    rest2: tl.float64,
    order,
    rule,
    maximize,
    HAS_BENEFICIAL: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAILS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tensor, layer, begin, end, numel = _chunk(table_ptr, tensors, CHUNK)
    one = tl.full((), 1.0, tl.float64)
    # Behind the addresses, as float64: with c = sqrt(1 - beta2^step) of each tensor, its
    # -lr / (1 - beta1^step) * c and eps * c, so that one division does for the two of the formula.
    rates_ptr = table_ptr + (ADDRESSES + (6 if HAS_BENEFICIAL else 5)) * tensors + tensor
    step_size = tl.load(rates_ptr).to(tl.float64, bitcast=True).to(ACC)
    eps = tl.load(rates_ptr + tensors).to(tl.float64, bitcast=True).to(ACC)
    decay, lerp = (one * decay).to(ACC), (one * lerp).to(ACC)
    beta2, rest2 = (one * beta2).to(ACC), (one * rest2).to(ACC)

    grad = _pointer(table_ptr, tensors, 0, tensor, TYPE, ALIGNED)
    harmful = _pointer(table_ptr, tensors, 1, tensor, TYPE, ALIGNED)
    beneficial = _pointer(table_ptr, tensors, 2, tensor, TYPE, ALIGNED) if HAS_BENEFICIAL else harmful
    FIRST: tl.constexpr = 3 if HAS_BENEFICIAL else 2
    param = _pointer(table_ptr, tensors, FIRST, tensor, TYPE, ALIGNED)
    exp_avg = _pointer(table_ptr, tensors, FIRST + 1, tensor, TYPE, ALIGNED)
    exp_avg_sq = _pointer(table_ptr, tensors, FIRST + 2, tensor, TYPE, ALIGNED)
    strength = _strength(alignment, scale_ptr, ACC)
    share = _share(sums_ptr, layer, strength, surgery_eps, order, rule, ACC)
    for at in range(begin, end, BLOCK):
        g = _read(grad, at, numel, ACC, TAILS)
        h = _direction(_read(harmful, at, numel, ACC, TAILS), rule)
        if HAS_BENEFICIAL:
            g += strength * _negative(_read(beneficial, at, numel, ACC, TAILS))
        g -= share * h
        g = tl.where(maximize != 0, -g, g)
        m = _read(exp_avg, at, numel, ACC, TAILS)
        v = _read(exp_avg_sq, at, numel, ACC, TAILS)
        m += lerp * (g - m)
        v = v * beta2 + rest2 * g * g
        p = _read(param, at, numel, ACC, TAILS) * decay
        p += divide(step_size * m, root(v) + eps)
        _write(exp_avg, at, numel, m, TAILS)
        _write(exp_avg_sq, at, numel, v, TAILS)
        _write(param, at, numel, p, TAILS)


def surgery_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    scale: Tensor | None,
    alignment: float,
    surgery_eps: float,
    order: str,
    rule: str,
    part: str,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    torch._foreach_add_(steps, 1)
    counts = [step.item() for step in steps]
    corrections = [(1 - beta2**n) ** 0.5 for n in counts]
    rates = (
        [-lr / (1 - beta1**n) * correction for n, correction in zip(counts, corrections)],
        [eps * correction for correction in corrections],
    )
    as_integers = torch.tensor(rates, dtype=torch.float64).view(torch.int64).tolist()
    directions = [grads, harmful, *([beneficial] if beneficial else [])]
    with torch.cuda.device_of(sums):
        lists = layers.lists_of(
            groups, len(sums), *directions, params, exp_avgs, exp_avg_sqs, extra=as_integers
        )
        if part != "apply":
            layers.layer_sums(lists, sums, rule, bool(beneficial))
        if lists.chunks:
            hyper = (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2)
            options = (alignment, surgery_eps, *hyper, *places(order, rule), int(maximize))
            given = (lists.table, sums, scale, lists.tensors, *options)
            _step_kernel[(lists.chunks,)](*given, HAS_BENEFICIAL=bool(beneficial), **lists.constants)
