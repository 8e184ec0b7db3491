"""Inner products of gradients, layer by layer: `dgs::gramian`, every pair of K lists from one reading.

What an implementation has to do (`dgs_kernels._native.gramian`, `dgs_kernels.triton.gramian`)::

    gramian(Tensor[] objectives, int[] groups, Tensor(a!) out) -> ()

objectives are K lists of T tensors one after the other (objective k's tensor i is objectives[k * T + i]),
2 <= K <= 16, T >= 1, of one dtype and device, contiguous; tensor i has the same shape in every list (0
numbers are possible). The tensors belong to G groups (layers): `groups[i]` in 0..G-1, in any order; a group
may be empty. With X [K, D] the tensors of a group, end to end, as they are in each list, it writes all of

    out[G, K, K]:  out[g] = X X^T

in float32 (float64 for float64 tensors), contiguous, in a fixed order of summation, reading each list once.
No host synchronisation, no atomics.

The native function alone checks all of this, and returns whether it served the call; so the usual one passes
through Python, and past torch's dispatcher, without any tensor being looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgs_kernels import backends
from dgs_kernels.ops.project_align_ import (
    check_list,
    common_layout,
    dense,
    in_a_row,
    number_layers,
    sums_dtype,
)

MAX_OBJECTIVES = 16

_library = torch.library.Library("dgs", "FRAGMENT")
_library.define(
    "gramian(Tensor[] objectives, int[] groups, int num_objectives) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
        if not backends.watched():
            out = _served_as_it_is(flat, layers, len(objectives))
            if out is not None:
                return out
        refuse_what_is_no_tensor("gramian", flat, count)
        return _op(flat, layers, len(objectives))


def in_one_list(name: str, objectives: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], int]:
    """K lists of T tensors one after the other, and T."""
    if not 2 <= len(objectives) <= MAX_OBJECTIVES:
        raise ValueError(f"{name}: objectives must be 2 to {MAX_OBJECTIVES} lists, got {len(objectives)}")
    count = len(objectives[0])
    for k, tensors in enumerate(objectives):
        if len(tensors) != count:
            raise ValueError(
                f"{name}: objectives[{k}] must have {count} tensors as objectives[0] has, got {len(tensors)}"
            )
    return [t for tensors in objectives for t in tensors], count


def refuse_what_is_no_tensor(name: str, objectives: list[Tensor], count: int) -> None:
    for n, t in enumerate(objectives):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"{name}: objectives[{n // count}][{n % count}] must be a tensor, got {type(t).__name__}; "
                "where a loss does not reach a parameter, pass zeros"
            )


def check_objectives(
    name: str, objectives: list[Tensor], groups: list[int], num_objectives: int
) -> list[list[Tensor]]:
    """Raise what the docstrings promise; returns the K lists."""
    count = len(groups)
    if len(objectives) != num_objectives * count or not count:
        raise ValueError(
            f"{name}: objectives must be {num_objectives} lists of {count} tensors, got {len(objectives)}"
        )
    if min(groups) < 0:
        raise ValueError(f"{name}: groups must not be negative")
    lists = [objectives[i : i + count] for i in range(0, len(objectives), count)]
    for k, tensors in enumerate(lists):
        check_list(name, f"objectives[{k}]", tensors, "objectives[0]", lists[0], lists[0][0].device)
    return lists


def _empty(objectives: list[Tensor], groups: list[int], num_objectives: int) -> Tensor:
    """Room for the result, of the type that the first tensor asks for."""
    shape = (max(groups) + 1, num_objectives, num_objectives)
    return torch.empty(shape, dtype=sums_dtype(objectives[:1]), device=objectives[0].device)


def _served_as_it_is(objectives: list[Tensor], groups: list[int], num_objectives: int) -> Tensor | None:
    """The result of a native function; None if there is none or it does not take these tensors."""
    if not isinstance(objectives[0], Tensor):
        return None
    serve = backends.implementation("gramian", objectives[0].device.type)
    if not backends.is_native(serve):
        return None
    out = _empty(objectives, groups, num_objectives)
    return out if serve(objectives, groups, out) else None


def _kernel(objectives: list[Tensor], groups: list[int], num_objectives: int) -> Tensor:
    out = _served_as_it_is(objectives, groups, num_objectives)
    if out is not None:
        return out
    lists = check_objectives("gramian", objectives, groups, num_objectives)
    # Kernels read one type: mixed types meet in their common type.
    types = {t.dtype for t in objectives}
    dtype = types.pop() if len(types) == 1 else sums_dtype(objectives)
    like = dense(lists[0])
    laid_out = [t for tensors in lists for t in in_a_row(common_layout(dtype, tensors, like))]
    out = _empty(laid_out, groups, num_objectives)
    served = backends.implementation("gramian", out.device.type)(laid_out, groups, out)
    assert served is not False, "a native function takes what has been checked and laid out"
    return out


def _fake(objectives: list[Tensor], groups: list[int], num_objectives: int) -> Tensor:
    check_objectives("gramian", objectives, groups, num_objectives)
    return _empty(objectives, groups, num_objectives).to(sums_dtype(objectives))


_library.impl("gramian", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dgs::gramian", _fake, lib=_library)
_op = torch.ops.dgs.gramian.default
