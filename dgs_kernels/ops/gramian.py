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

import itertools
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

# Most lists that one call of a kernel takes.
KERNEL_OBJECTIVES = 16
# Most objectives of one step of ObjectiveSurgery.
MAX_OBJECTIVES = 64


def gramian(objectives: Sequence[Sequence[Tensor]], *, groups: Sequence[int] | None = None) -> Tensor:
    """Inner products of every pair of K gradients of the same tensors, layer by layer.

    The Gramian is all that a method needs to know of gradients in whose span it stays (PCGrad, MGDA, CAGrad,
    UPGrad, GEM, ...); `combine_` then takes the weights that it decides on. All tensors of a layer are one
    vector. Each list is read once, in as many kernel launches whatever the number of tensors; of more than 16
    lists every two of ceil(K / 8) parts are read together.

    Args:
        objectives: K lists, K >= 2, of T tensors each: float32, float64, bfloat16 or float16, on one device,
            tensor i of the same shape in every list. Constants: no gradient flows back to them.
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
        if len(objectives) <= KERNEL_OBJECTIVES:
            return _operation(flat, layers, len(objectives))
        return _in_parts(flat, layers, len(objectives))


def _in_parts(flat: list[Tensor], layers: list[int], num_objectives: int) -> Tensor:
    """The Gramian of more lists than a kernel takes, from those of every two of their parts."""
    refuse_what_is_no_tensor("gramian", flat, len(layers))
    # When torch.compile traces, the parts' own checks are enough.
    if not torch.compiler.is_compiling():
        in_lists("gramian", flat, layers, num_objectives)
    dtype, count = common_dtype(flat), len(layers)
    lists = [[t.to(dtype) for t in flat[i : i + count]] for i in range(0, len(flat), count)]
    shape = (max(layers) + 1, num_objectives, num_objectives)
    out = torch.empty(shape, dtype=sums_dtype(flat), device=flat[0].device)
    half = KERNEL_OBJECTIVES // 2
    parts = [range(i, min(i + half, num_objectives)) for i in range(0, num_objectives, half)]
    for one, other in itertools.combinations(parts, 2):
        both = [*one, *other]
        found = _operation([t for k in both for t in lists[k]], layers, len(both))
        places = torch.tensor(both, device=out.device)
        out[:, places[:, None], places] = found
    return out


def in_one_list(caller: str, objectives: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], int]:
    """K lists of T tensors one after the other, and T."""
    if len(objectives) < 2:
        raise ValueError(f"{caller}: objectives must be at least 2 lists, got {len(objectives)}")
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
