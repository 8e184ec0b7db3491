"""project_align_: a model's gradients in place, layer by layer: three streams in, one out.

A layer that no cache holds is read twice, once for its inner products: six streams in, one out.

`rows` x `dim` is a list of `rows` LoRA tensors of 8 x `dim` in layers of 12, as a vision tower has them; from
8192 rows on, the default, one tensor of 768 x `dim` for each 768 rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from dgs_kernels import reference
from dgs_kernels.eager.project_align_ import project_align_ as eager

TENSORS_PER_LAYER = 12


def shapes(rows: int, dim: int) -> list[tuple[int, int]]:
    return [(8, dim)] * rows if in_cache(rows) else [(768, dim)] * (rows // 768)


def numbers(rows: int, dim: int) -> int:
    return sum(a * b for a, b in shapes(rows, dim))


def in_cache(rows: int) -> bool:
    """Whether a layer fits the caches of a core or a cluster."""
    return rows < 8192


def layers(count: int) -> list[int]:
    return [i // TENSORS_PER_LAYER for i in range(count)]


def lists(tensors: tuple[Tensor, ...], kinds: int) -> list[list[Tensor]]:
    """What `inputs()` makes as one row of tensors, parted into its lists."""
    count = len(tensors) // kinds
    return [list(tensors[i * count : (i + 1) * count]) for i in range(kinds)]


def ours(*tensors: Tensor) -> None:
    grads, harmful, beneficial = lists(tensors, 3)
    dgs_kernels.project_align_(grads, harmful, beneficial, groups=layers(len(grads)), alignment=0.2)


def foreach(*tensors: Tensor) -> None:
    """The best that `torch._foreach_*` can do: the eager backend."""
    grads, harmful, beneficial = lists(tensors, 3)
    groups = layers(len(grads))
    sums = grads[0].new_zeros(groups[-1] + 1, 6, dtype=reference.compute_dtype(*grads))
    eager(grads, harmful, beneficial, groups, sums, None, 0.2, 1e-6, "align_first", "positive", "all")


def loop(*tensors: Tensor, groups: list[int] | None = None) -> None:
    """One tensor after the other, the way optimiser loops are written at first."""
    grads, harmful, beneficial = ([t.float() for t in ts] for ts in lists(tensors, 3))
    for layer in reference.layers(groups or layers(len(grads))):
        inner = square = 0.0
        for i in layer:
            grads[i] = grads[i] + 0.2 * beneficial[i].clamp(max=0)
            harmful[i] = harmful[i].clamp(min=0)
            inner = inner + (grads[i] * harmful[i]).sum()
            square = square + harmful[i].square().sum()
        norm = square.sqrt() + 1e-6
        for i in layer:
            tensors[i].copy_(grads[i] - inner / norm / norm * harmful[i])


def formula(*tensors: Tensor, groups: list[int] | None = None) -> None:
    grads, harmful, beneficial = lists(tensors, 3)
    groups = groups or layers(len(grads))
    results = reference.project_align_(grads, harmful, beneficial, groups, alignment=0.2)
    for grad, result in zip(grads, results):
        grad.copy_(result)


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    variants = {harness.EAGER: loop, "torch._foreach_*": foreach}
    streams = 4 if in_cache(rows) else 7
    return on_lists("project_align_", (rows, dim, dtype, device), streams, ours, variants, formula)


def on_lists(
    operation: str,
    of: tuple[int, int, torch.dtype, str],
    streams: int,
    ours: Callable[..., None],
    variants: dict[str, Callable[..., None]],
    formula: Callable[..., None],
    others: tuple[str, ...] = (),
) -> harness.Case:
    """A case on three of the lists that the arguments `of` a case are; the first is edited."""
    rows, dim, dtype, device = of
    sizes = shapes(rows, dim)
    torch._dynamo.reset()
    variants = {**harness.per_backend(operation, device, ours), **variants}
    # Compiling hundreds of tensors takes minutes.
    if len(sizes) <= 24:
        variants[harness.COMPILED] = torch.compile(formula, dynamic=False)
    return harness.Case(
        operation=operation,
        inputs=lambda: tuple(torch.randn(s, device=device).to(dtype) for _ in range(3) for s in sizes),
        bytes_moved=streams * numbers(rows, dim) * dtype.itemsize,
        variants=variants,
        exact=formula,
        edited=tuple(range(len(sizes))),
        others=others,
    )
