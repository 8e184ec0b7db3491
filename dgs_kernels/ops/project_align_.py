"""Gradient surgery on layers: `dgs::project_align_`, in place over many tensors at once.

What an implementation has to do (`dgs_kernels._native.project_align_`, `dgs_kernels.triton.project_align_`)::

    project_align_(Tensor(a!)[] grads, Tensor[] harmful, Tensor[] beneficial, int[] groups, Tensor(b!) sums,
                   Tensor? scale, float alignment, float eps, int order, int rule, int part) -> ()

T tensors belong to G groups (layers): `groups[i]` in 0..G-1, in any order; a group may be empty, its sums
are 0. grads, harmful and beneficial (T tensors, or none: no alignment) have one dtype and device, tensor i
has the same shape in the three lists, and all are contiguous (0 numbers are possible). With g, h, b what a
group's tensors hold, end to end, after h <- relu(h) under rule 0 (positive) and b <- min(b, 0), both letting
NaN through, the first pass writes

    sums[G, 6] = <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b>      (the last three 0 without beneficial)

in float32 (float64 for float64 gradients), in a fixed order of summation. The second is, for every group,

    A = alignment * scale  (scale: 0-dim, of the type of sums; None is 1)
    inner = <g, h> + A <b, h>  under order 0 (align_first),  <g, h>  under order 1 (project_first)
    inner = min(inner, 0)      under rule 2 (conflict), letting NaN through
    k = inner / (sqrt(<h, h>) + eps) / (sqrt(<h, h>) + eps)
    g <- g + A b - k h         rounded once

`part` 0 does both (a layer that fits on chip is then read once), 1 only the first, 2 only the second with
the sums it is given: between the two, sharded training adds up its sums. No host synchronisation, no atomics.

The native function alone checks all of this, and returns whether it served the call; so the usual one passes
through Python, and past torch's dispatcher, without any tensor being looked at.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgs_kernels import backends
from dgs_kernels.ops.project_align import DTYPES, code, number
from dgs_kernels.reference import ORDERS, RULES

PARTS = ("all", "sums", "apply")
SUMS = 6
_KIND = operator.attrgetter("device", "dtype", "layout")

_library = torch.library.Library("dgs", "FRAGMENT")
_library.define(
    "project_align_(Tensor(a!)[] grads, Tensor[] harmful, Tensor[] beneficial, int[] groups, "
    "Tensor(b!) sums, Tensor? scale, float alignment, float eps, str order, str rule, str part) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    strength, scale = (1.0, alignment) if isinstance(alignment, Tensor) else (alignment, None)
    layers, count = number_layers(groups, len(grads))
    device = grads[0].device if len(grads) else None
    sums = torch.zeros(count, SUMS, dtype=sums_dtype(grads[:1]), device=device)
    lists = (list(grads), list(harmful), list(beneficial or ()))
    options = (scale, strength, eps, order, rule, "all")
    with torch.no_grad():
        if not _served_past_torch(*lists, layers, sums, *options):
            sums = sums.to(sums_dtype(*lists))
            _op(*lists, layers, sums, *options)
    return sums


def run(
    grads: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
    part: str,
) -> None:
    """`dgs::project_align_`, but past it where a native function takes the lists as they are."""
    arguments = (grads, harmful, beneficial, groups, sums, scale, alignment, eps, order, rule, part)
    if not _served_past_torch(*arguments):
        _op(*arguments)


def sums_dtype(*lists: Sequence[Tensor]) -> torch.dtype:
    """float64 if any tensor is, else float32: of the tensors that `check` lets through their common type."""
    types = {getattr(t, "dtype", None) for tensors in lists for t in tensors}
    return torch.float64 if torch.float64 in types else torch.float32


def number_layers(groups: Sequence[int] | None, count: int) -> tuple[list[int], int]:
    """Layer numbers 0..G-1 in order of first appearance, and G."""
    if groups is None:
        return list(range(count)), count
    if len(groups) != count:
        raise ValueError(f"project_align_: groups must name the layer of {count} tensors, got {len(groups)}")
    numbers: dict[int, int] = {}
    layers = [numbers.setdefault(group, len(numbers)) for group in groups]
    return layers, len(numbers)


def check(
    name: str,
    grads: Sequence[Tensor],
    harmful: Sequence[Tensor],
    beneficial: Sequence[Tensor],
    groups: Sequence[int],
    sums: Tensor,
    scale: Tensor | None,
    eps: float,
    order: str,
    rule: str,
    part: str,
) -> None:
    """Shapes, dtypes, devices and options; `name` is the operator's, for the messages."""
    if order not in ORDERS:
        raise ValueError(f"{name}: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if rule not in RULES:
        raise ValueError(f"{name}: rule must be one of {', '.join(RULES)}, got {rule!r}")
    if part not in PARTS:
        raise ValueError(f"{name}: part must be one of {', '.join(PARTS)}, got {part!r}")
    if not eps > 0:
        raise ValueError(f"{name}: eps must be > 0, got {eps}")
    lists = [("grads", grads), ("harmful", harmful)] + ([("beneficial", beneficial)] if beneficial else [])
    for what, tensors in lists:
        if len(tensors) != len(grads):
            raise ValueError(
                f"{name}: {what} must have {len(grads)} tensors as grads has, got {len(tensors)}"
            )
        if not all(map(Tensor.is_same_size, tensors, grads)):
            i = next(i for i, (t, g) in enumerate(zip(tensors, grads)) if t.shape != g.shape)
            raise ValueError(
                f"{name}: {what}[{i}] must have shape {tuple(grads[i].shape)} as grads[{i}], "
                f"got {tuple(tensors[i].shape)}"
            )
        for device, dtype, layout in set(map(_KIND, tensors)):
            if device != sums.device:
                raise ValueError(f"{name}: {what} has a tensor on {device}; all must be on {sums.device}")
            if dtype not in DTYPES:
                raise TypeError(f"{name}: {what} must be of {', '.join(map(str, DTYPES))}, got {dtype}")
            if layout != torch.strided:
                raise TypeError(f"{name}: {what} must be dense tensors, not sparse ones")
    if len(groups) != len(grads) or (groups and not 0 <= min(groups) <= max(groups) < len(sums)):
        raise ValueError(f"{name}: groups must hold a number in 0..{len(sums) - 1} for each of the tensors")
    if sums.dim() != 2 or sums.shape[1] != SUMS:
        raise ValueError(f"{name}: sums must be [G, {SUMS}], got {tuple(sums.shape)}")
    if scale is not None and (scale.dim() != 0 or scale.device != sums.device):
        raise ValueError(
            f"{name}: alignment must be a number or a 0-dim tensor on {sums.device}, "
            f"got shape {tuple(scale.shape)} on {scale.device}"
        )


def common_layout(dtype: torch.dtype, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` in one dtype and with the strides of `like`, copied only where they are not."""
    return [
        t
        if t.dtype == dtype and ((t.is_contiguous() and g.is_contiguous()) or t.stride() == g.stride())
        else torch.empty_like(g, dtype=dtype).copy_(t)
        for t, g in zip(tensors, like)
    ]


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` without holes or overlaps, each copied only where it has some."""
    has_none = torch.ops.aten.is_non_overlapping_and_dense
    return [t if t.is_contiguous() or has_none(t) else t.contiguous() for t in tensors]


def codes(order: str, rule: str, part: str) -> tuple[int, ...]:
    """The options as numbers, -1 for one that does not exist."""
    return code(ORDERS, order), code(RULES, rule), code(PARTS, part)


def in_a_row(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Dense tensors as contiguous ones of no subclass: their numbers as they follow each other in memory."""
    plain = map(backends.plain, tensors)
    return [t if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in plain]


def _served_past_torch(*arguments: Any) -> bool:
    return not backends.watched() and _served_as_it_is(*arguments)


def _served_as_it_is(*arguments: Any) -> bool:
    *lists, sums, scale, alignment, eps, order, rule, part = arguments
    if not lists[0]:  # of no device either, which a backend could be chosen for
        return False
    serve = backends.implementation("project_align_", sums.device.type)
    scale = number(scale, sums.dtype)
    options = (alignment, eps, *codes(order, rule, part))
    return backends.is_native(serve) and serve(*lists, sums, scale, *options)


def _kernel(
    grads: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
    part: str,
) -> None:
    if _served_as_it_is(grads, harmful, beneficial, groups, sums, scale, alignment, eps, order, rule, part):
        return
    check("project_align_", grads, harmful, beneficial, groups, sums, scale, eps, order, rule, part)
    if not grads:
        return
    # Kernels read one type: mixed types meet in their common type, and the results return to grads'.
    types = {t.dtype for tensors in (grads, harmful, beneficial) for t in tensors}
    dtype = types.pop() if len(types) == 1 else sums.dtype
    work = dense(grads)
    work = common_layout(dtype, work, work)
    lists = (work, common_layout(dtype, harmful, work), common_layout(dtype, beneficial, work))
    scale = number(scale, sums.dtype)
    serve = backends.implementation("project_align_", sums.device.type)
    options = (alignment, eps, *codes(order, rule, part))
    served = serve(*map(in_a_row, lists), groups, sums, scale, *options)
    assert served is not False, "a native function takes what has been checked and laid out"
    if part != "sums":
        for grad, edited in zip(grads, work):
            if edited is not grad:
                grad.copy_(edited)


def _fake(
    grads: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
    part: str,
) -> None:
    check("project_align_", grads, harmful, beneficial, groups, sums, scale, eps, order, rule, part)


_library.impl("project_align_", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dgs::project_align_", _fake, lib=_library)
_op = torch.ops.dgs.project_align_.default
