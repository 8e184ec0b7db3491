"""Inner products of gradients, layer by layer: `dgs::gramian`, every pair of K lists from one reading.

What an implementation has to do with the operator's arguments and its result `out`; the schema is below.

objectives are K lists of T tensors one after the other (objective k's tensor i is objectives[k * T + i]),
2 <= K = num_objectives <= 16, T >= 1, of one dtype and device, contiguous; tensor i has the same shape in
every list (0 numbers are possible). The tensors belong to G groups (layers): `groups[i]` in 0..G-1, in any
order; a group may be empty. With X [K, D] the tensors of a group, end to end, as they are in each list, it
writes all of

    out[G, K, K]:  out[g] = X X^T

in float32 (float64 for float64 tensors), contiguous, in a fixed order of summation, reading each list once.
No host synchronisation, no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgs_kernels.arguments import check_tensors
from dgs_kernels.operation import Named, Operation
from dgs_kernels.tensors import (
    check_list,
    common_dtype,
    common_layout,
    dense,
    number_layers,
    sums_dtype,
)

MAX_OBJECTIVES = 16


def gramian(objectives: Sequence[Sequence[Tensor]], *, groups: Sequence[int] | None = None) -> Tensor:
    """Inner products of every pair of K gradients of the same tensors, layer by layer.

    The Gramian is all that a method needs to know of gradients in whose span it stays (PCGrad, MGDA, CAGrad,
    UPGrad, GEM, ...); `combine_` then takes the weights that it decides on. All tensors of a layer are one
    vector. Each list is read once, in as many kernel launches whatever the number of tensors.

    Args:
        objectives: K lists, 2 <= K <= 16, of T tensors each: float32, float64, bfloat16 or float16, on one
            device, tensor i of the same shape in every list. Constants: no gradient flows back to them.
        groups: T integers, equal for tensors of one layer; None: every tensor is its own layer.

    Returns:
        [G, K, K], layers in order of first appearance; symmetric; float32, float64 if any tensor is. The same
        call gives the same bits. NaN and infinity stay visible in their layer.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or devices that do not fit, saying what was expected.

    Example:
        >>> import torch
        >>> from dgs_kernels import gramian
        >>> first, second = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([1.0]), torch.zeros(1)]
        >>> gramian([first, second], groups=[0, 0])
        tensor([[[25.,  3.],
                 [ 3.,  1.]]])
    """
    flat, count = in_one_list("gramian", objectives)
    layers, _ = number_layers("gramian", groups, count)
    if not count:
        return torch.zeros(0, len(objectives), len(objectives))
    with torch.no_grad():
        return _operation(flat, layers, len(objectives))


def in_one_list(caller: str, objectives: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], int]:
    """K lists of T tensors one after the other, and T."""
    if not 2 <= len(objectives) <= MAX_OBJECTIVES:
        raise ValueError(f"{caller}: objectives must be 2 to {MAX_OBJECTIVES} lists, got {len(objectives)}")
    count = len(objectives[0])
    for k, tensors in enumerate(objectives):
        if len(tensors) != count:
            raise ValueError(
                f"{caller}: objectives[{k}] must have {count} tensors as objectives[0] has, "
                f"got {len(tensors)}"
            )
    return [t for tensors in objectives for t in tensors], count


def refuse_what_is_no_tensor(caller: str, objectives: list[Tensor], count: int) -> None:
    for n, t in enumerate(objectives):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"{caller}: objectives[{n // count}][{n % count}] must be a tensor, got {type(t).__name__}; "
                "where a loss does not reach a parameter, pass zeros"
            )
        check_tensors(caller, **{f"objectives[{n // count}][{n % count}]": t})


def in_lists(
    caller: str, objectives: list[Tensor], groups: list[int], num_objectives: int
) -> list[list[Tensor]]:
    """The K lists again; raises what the docstrings promise of them."""
    count = len(groups)
    if len(objectives) != num_objectives * count or not count:
        raise ValueError(
            f"{caller}: objectives must be {num_objectives} lists of {count} tensors, got {len(objectives)}"
        )
    if min(groups) < 0:
        raise ValueError(f"{caller}: groups must not be negative")
    lists = [objectives[i : i + count] for i in range(0, len(objectives), count)]
    for k, tensors in enumerate(lists):
        check_list(caller, f"objectives[{k}]", tensors, "objectives[0]", lists[0], lists[0][0].device)
    return lists


def laid_out(objectives: list[Tensor], dtype: torch.dtype, like: list[Tensor]) -> list[Tensor]:
    """Every list with the strides of `like`."""
    return common_layout(dtype, objectives, like * (len(objectives) // len(like)))


def _lay_out(a: Named) -> Named:
    dtype = common_dtype(a.objectives)
    return a._replace(objectives=laid_out(a.objectives, dtype, dense(a.objectives[: len(a.groups)])))


def _empty(a: Named, dtype: torch.dtype) -> tuple[Tensor]:
    shape = (max(a.groups) + 1, a.num_objectives, a.num_objectives)
    return (torch.empty(shape, dtype=dtype, device=a.objectives[0].device),)


_operation = Operation(
    "gramian(Tensor[] objectives, int[] groups, int num_objectives) -> Tensor",
    kinds=lambda a: refuse_what_is_no_tensor("gramian", a.objectives, len(a.groups)),
    check=lambda a: in_lists("gramian", a.objectives, a.groups, a.num_objectives),
    lay_out=_lay_out,
    results=lambda a: _empty(a, sums_dtype(a.objectives[:1])),
    fake=lambda a: _empty(a, sums_dtype(a.objectives)),
)
