"""Gradient surgery on layers: `dgs::project_align_`, in place over many tensors at once.

What an implementation has to do with the operator's arguments; the schema is below.

T tensors belong to G groups (layers): `groups[i]` in 0..G-1, in any order; a group may be empty, its sums
are 0. grads, harmful and beneficial (T tensors, or none: no alignment) have one dtype and device, tensor i
has the same shape in the three lists, and all are contiguous (0 numbers are possible). With g, h, b what a
group's tensors hold, end to end, after h <- relu(h) under rule "positive" and b <- min(b, 0), both letting
NaN through, the first pass writes

    sums[G, 6] = <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b>      (the last three 0 without beneficial)

in float32 (float64 for float64 gradients), in a fixed order of summation. The second is, for every group,

    A = alignment * scale  (scale: 0-dim, of the type of sums; None is 1)
    inner = <g, h> + A <b, h>  under order "align_first",  <g, h>  under "project_first"
    inner = min(inner, 0)      under rule "conflict", letting NaN through
    k = inner / (sqrt(<h, h>) + eps) / (sqrt(<h, h>) + eps)
    g <- g + A b - k h         rounded once

`part` "all" does both (a layer that fits on chip is then read once), "sums" only the first, "apply" only the
second with the sums it is given: between the two, sharded training adds up its sums. No host
synchronisation, no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgs_kernels.arguments import check_choice, check_items
from dgs_kernels.operation import Named, Operation
from dgs_kernels.options import Surgery
from dgs_kernels.tensors import (
    check_groups,
    check_list,
    common_dtype,
    common_layout,
    dense,
    number,
    number_layers,
    refuse_shared_memory,
    sums_dtype,
)

PARTS = ("all", "sums", "apply")
SUMS = 6


def project_align_(
    grads: Sequence[Tensor],
    harmful: Sequence[Tensor],
    beneficial: Sequence[Tensor] | None = None,
    *,
    groups: Sequence[int] | None = None,
    alignment: float | Tensor = 1.0,
    eps: float = 1e-6,
    order: str = "align_first",
    rule: str = "positive",
) -> Tensor:
    """Project the harmful direction out of whole layers, and align them, in place: `project_align` on lists.

    All tensors of a layer are one vector: inner products and norms run over it. The number of kernel
    launches does not depend on the number of tensors, and nothing waits for the device.

    Args:
        grads: T tensors of any shapes, float32, float64, bfloat16 or float16, on one device; edited in place.
        harmful: T tensors of the same shapes: the directions to remove. A zero layer removes nothing.
        beneficial: T tensors of the same shapes to align with; None aligns with nothing.
        groups: T integers, equal for tensors of one layer; None: every tensor is its own layer.
        alignment, eps, order, rule: see `project_align`. A tensor `alignment` is read on the device.

    Returns:
        sums [G, 6], layers in order of first appearance, before the surgery: the inner products
        <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b> of gradient, harmful direction h (its positive part
        under "positive") and b = min(beneficial, 0); float32, float64 if any tensor is.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes, devices or options that do not fit.

    Example:
        >>> import torch
        >>> from dgs_kernels import project_align_
        >>> grads = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> sums = project_align_(grads, [torch.tensor([1.0]), torch.tensor([0.0])], groups=[0, 0], eps=1e-12)
        >>> grads
        [tensor([0.]), tensor([4.])]
    """
    lists = _lists(grads, harmful, beneficial)
    layers, count = number_layers("project_align_", groups, len(grads))
    device = grads[0].device if grads and isinstance(grads[0], Tensor) else None
    sums = torch.zeros(count, SUMS, dtype=sums_dtype(grads[:1]), device=device)
    options = (*Surgery.of(alignment, eps, order, rule), "all")
    with torch.no_grad():
        if run.past_torch((*lists, layers, sums, *options)) is None:
            sums = sums.to(sums_dtype(*lists))
            run.through_torch((*lists, layers, sums, *options))
    return sums


def _lists(grads: object, harmful: object, beneficial: object) -> tuple[list[Tensor], ...]:
    """The arguments as lists, of tensors if they are right; none of what is written has a graph behind it."""
    lists = []
    for name, tensors in (("grads", grads), ("harmful", harmful), ("beneficial", beneficial)):
        if tensors is None and name == "beneficial":
            tensors = ()
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(
                f"project_align_: {name} must be a list of tensors, got {type(tensors).__qualname__}"
            )
        lists.append(list(tensors))
    if any(getattr(x, "requires_grad", False) for x in lists[0]):
        raise ValueError(
            "project_align_: grads must not require grad, to be edited in place: pass .grad of parameters, "
            "or detach() them"
        )
    return tuple(lists)


def check_lists(caller: str, a: Named) -> None:
    """Shapes, dtypes and devices of surgery on lists; `caller` is the operator's name."""
    check_choice(caller, "part", a.part, PARTS)
    for name in ("grads", "harmful", *(["beneficial"] if a.beneficial else [])):
        check_list(caller, name, getattr(a, name), "grads", a.grads, a.sums.device)
    check_groups(caller, a.groups, len(a.grads), len(a.sums))
    if a.sums.dim() != 2 or a.sums.shape[1] != SUMS:
        raise ValueError(f"{caller}: sums must be [G, {SUMS}], got {tuple(a.sums.shape)}")


def _kinds(a: Named) -> None:
    check_items("project_align_", grads=a.grads, harmful=a.harmful, beneficial=a.beneficial)
    Surgery.among(a).check("project_align_", a.sums.device)


def _lay_out(a: Named) -> Named | None:
    if not a.grads:
        return None
    refuse_shared_memory("project_align_", "grads", a.grads)
    dtype = common_dtype(a.grads, a.harmful, a.beneficial)
    work = dense(a.grads)
    work = common_layout(dtype, work, work)
    harmful, beneficial = (common_layout(dtype, tensors, work) for tensors in (a.harmful, a.beneficial))
    scale = number(a.scale, a.sums.dtype)
    return a._replace(grads=work, harmful=harmful, beneficial=beneficial, scale=scale)


# `dgs::project_align_`, but past it where a native function takes the lists as they are.
run = Operation(
    "project_align_(Tensor(a!)[] grads, Tensor[] harmful, Tensor[] beneficial, int[] groups, "
    "Tensor(b!) sums, Tensor? scale, float alignment, float eps, str order, str rule, str part) -> ()",
    kinds=_kinds,
    check=lambda a: check_lists("project_align_", a),
    lay_out=_lay_out,
    written=lambda a: () if a.part == "sums" else a.grads,
)
