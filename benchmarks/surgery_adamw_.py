"""surgery_adamw_: gradient surgery inside AdamW's step: six streams in, three out; nine in for large layers.

The lists are those of benchmarks/project_align_.py.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import dgs_kernels
from benchmarks import harness
from benchmarks.project_align_ import formula, in_cache, layers, lists, loop, numbers, shapes
from dgs_kernels import backends, reference
from dgs_kernels.ops.surgery_adamw_ import run

LR, BETA1, BETA2, DECAY, EPS = 1e-4, 0.9, 0.999, 0.01, 1e-8
# Among millions of numbers, roots of smaller ones would blow up the rounding of some gradient a thousandfold.
SMALLEST_SQUARE = 0.01
OPTIONS = {
    "amsgrad": False,
    "beta1": BETA1,
    "beta2": BETA2,
    "lr": LR,
    "weight_decay": DECAY,
    "eps": EPS,
    "maximize": False,
}


def ours(*tensors: Tensor) -> None:
    params, grads, averages, squares, harmful, beneficial = lists(tensors, 6)
    groups = layers(len(grads))
    sums = grads[0].new_zeros(groups[-1] + 1, 6, dtype=reference.compute_dtype(*grads))
    state = (params, grads, averages, squares, steps(len(grads)))
    surgery = (groups, sums, None, 0.2, 1e-6, "align_first", "positive", "all")
    run(*state, harmful, beneficial, *surgery, LR, BETA1, BETA2, DECAY, EPS, False)


@functools.cache
def _steps(count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    numbers = torch.empty(count)
    return numbers, numbers.unbind()


def steps(count: int) -> list[Tensor]:
    """0-dim tensors that say 9, without the time that making them takes: an optimiser has them."""
    numbers, each = _steps(count)
    numbers.fill_(9.0)
    return list(each)


def after(surgery, tensors: tuple[Tensor, ...], device_steps: bool = False, **kind: bool) -> None:
    """The surgery by itself, in place, then PyTorch's AdamW."""
    params, grads, averages, squares, harmful, beneficial = lists(tensors, 6)
    surgery(*grads, *harmful, *beneficial)
    counts = steps(len(grads))
    if device_steps:
        counts = [s.to(params[0].device) for s in counts]
    adamw(params, grads, averages, squares, [], counts, **kind, **OPTIONS)


def in_place(*tensors: Tensor) -> None:
    grads, harmful, beneficial = lists(tensors, 3)
    dgs_kernels.project_align_(grads, harmful, beneficial, groups=layers(len(grads)), alignment=0.2)


def with_best_surgery(**kind: bool):
    def call(*tensors: Tensor) -> None:
        os.environ.pop(backends.VARIABLE, None)
        after(in_place, tensors, **kind)

    return call


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    sizes = shapes(rows, dim)

    def inputs() -> tuple[Tensor, ...]:
        made = [torch.randn(s, device=device) for _ in range(6) for s in sizes]
        for square in made[3 * len(sizes) : 4 * len(sizes)]:
            square.square_().add_(SMALLEST_SQUARE)
        return tuple(t.to(dtype) for t in made)

    count = len(sizes)
    return harness.Case(
        operation="surgery_adamw_",
        inputs=inputs,
        bytes_moved=(9 if in_cache(rows) else 12) * numbers(rows, dim) * dtype.itemsize,
        variants={
            **harness.per_backend("surgery_adamw_", device, ours),
            harness.EAGER: lambda *tensors: after(loop, tensors, foreach=False),
            "project_align_ + AdamW foreach": with_best_surgery(foreach=True),
            "project_align_ + AdamW fused": with_best_surgery(fused=True, foreach=False, device_steps=True),
        },
        exact=lambda *tensors: after(formula, tensors, foreach=False),
        edited=(*range(count), *range(2 * count, 4 * count)),
    )
