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
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dgs_kernels import backends
from dgs_kernels.ops.arguments import check_choice, check_items, check_options, refuse_forward_mode
from dgs_kernels.ops.project_align import DTYPES, code, number
from dgs_kernels.reference import ORDERS, RULES

PARTS = ("all", "sums", "apply")
SUMS = 6
_GAPLESS = torch.ops.aten.is_non_overlapping_and_dense
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
    lists = _lists(grads, harmful, beneficial)
    strength, scale = (1.0, alignment) if isinstance(alignment, Tensor) else (alignment, None)
    layers, count = number_layers("project_align_", groups, len(grads))
    device = grads[0].device if grads and isinstance(grads[0], Tensor) else None
    sums = torch.zeros(count, SUMS, dtype=sums_dtype(grads[:1]), device=device)
    options = (scale, strength, eps, order, rule, "all")
    refuse_forward_mode("project_align_", *grads)
    with torch.no_grad():
        if not _served_past_torch(*lists, layers, sums, *options):
            check_items("project_align_", grads=lists[0], harmful=lists[1], beneficial=lists[2])
            check_options("project_align_", device, alignment, eps, order, rule)
            sums = sums.to(sums_dtype(*lists))
            _op(*lists, layers, sums, *options)
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


def number_layers(name: str, groups: Sequence[int] | None, count: int) -> tuple[list[int], int]:
    """Layer numbers 0..G-1 in order of first appearance, and G; `name` is the operator's, for the message."""
    if groups is None:
        return list(range(count)), count
    if len(groups) != count:
        raise ValueError(f"{name}: groups must name the layer of {count} tensors, got {len(groups)}")
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
    alignment: float,
    eps: float,
    order: str,
    rule: str,
    part: str,
) -> None:
    """Shapes, dtypes, devices and options; `name` is the operator's, for the messages."""
    check_choice(name, "part", part, PARTS)
    check_options(name, sums.device, alignment if scale is None else scale, eps, order, rule)
    lists = [("grads", grads), ("harmful", harmful)] + ([("beneficial", beneficial)] if beneficial else [])
    for what, tensors in lists:
        check_list(name, what, tensors, "grads", grads, sums.device)
    check_groups(name, groups, len(grads), len(sums))
    if sums.dim() != 2 or sums.shape[1] != SUMS:
        raise ValueError(f"{name}: sums must be [G, {SUMS}], got {tuple(sums.shape)}")


def _refuse_shared_memory(grads: Sequence[Tensor]) -> None:
    """Raise where an edit of one number would be one of another."""
    spans = sorted((*span(x), i) for i, x in enumerate(grads) if x.numel())
    together: list[int] = []  # whose spans cross one another; single numbers are looked at only there
    reached = 0
    for begin, end, i in [*spans, (sys.maxsize, sys.maxsize, -1)]:
        if begin >= reached:
            if len(together) > 1 or not all(map(_GAPLESS, (grads[j] for j in together))):
                places = torch.cat([_places(grads[j]) for j in together])
                if len(places.unique()) < len(places):
                    names = [f"grads[{j}]" for j in sorted(together)]
                    if len(names) > 3:
                        names[2:] = [f"{len(names) - 2} more"]
                    raise ValueError(
                        f"project_align_: numbers of {' and '.join(names)} share memory: clone what overlaps"
                    )
            together = []
        together.append(i)
        reached = max(reached, end)


def span(x: Tensor) -> tuple[int, int]:
    """The first address of a tensor's numbers, and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _places(x: Tensor) -> Tensor:
    """The addresses at which the numbers of a tensor begin; a CPU tensor."""
    places = torch.tensor(0)
    for size, stride in zip(x.shape, x.stride()):
        places = places[..., None] + torch.arange(size) * stride
    return places.flatten() * x.element_size() + x.data_ptr()


def check_list(
    name: str,
    what: str,
    tensors: Sequence[Tensor],
    model_name: str,
    model: Sequence[Tensor],
    device: torch.device,
) -> None:
    """Tensors of the model's shapes, dense, on this device, of types that kernels read."""
    if len(tensors) != len(model):
        raise ValueError(
            f"{name}: {what} must have {len(model)} tensors as {model_name} has, got {len(tensors)}"
        )
    if not all(map(Tensor.is_same_size, tensors, model)):
        i = next(i for i, (t, m) in enumerate(zip(tensors, model)) if t.shape != m.shape)
        raise ValueError(
            f"{name}: {what}[{i}] must have shape {tuple(model[i].shape)} as {model_name}[{i}], "
            f"got {tuple(tensors[i].shape)}"
        )
    for its_device, dtype, layout in set(map(_KIND, tensors)):
        if its_device != device:
            raise ValueError(f"{name}: {what} has a tensor on {its_device}; all must be on {device}")
        if dtype not in DTYPES:
            raise TypeError(f"{name}: {what} must be of {', '.join(map(str, DTYPES))}, got {dtype}")
        if layout != torch.strided:
            raise TypeError(f"{name}: {what} must be dense tensors, not sparse ones")


def check_groups(name: str, groups: Sequence[int], count: int, num_groups: int) -> None:
    if len(groups) != count or (groups and not 0 <= min(groups) <= max(groups) < num_groups):
        raise ValueError(f"{name}: groups must hold a number in 0..{num_groups - 1} for each of the tensors")


def common_layout(dtype: torch.dtype, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` in one dtype and with the strides of `like`, copied only where they are not."""
    return [
        t
        if t.dtype == dtype
        and ((t.is_contiguous() and g.is_contiguous()) or t.stride() == g.stride())
        and not t.is_neg()
        else torch.empty_like(g, dtype=dtype).copy_(t)
        for t, g in zip(tensors, like)
    ]


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` without holes, overlaps or changed signs, each copied only where it has some."""
    has_none = torch.ops.aten.is_non_overlapping_and_dense
    return [(t if t.is_contiguous() or has_none(t) else t.contiguous()).resolve_neg() for t in tensors]


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
    if not (backends.is_native(serve) and serve(*lists, sums, scale, *options)):
        return False
    if part != "sums":
        increment_version(lists[0])
    return True


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
    check(
        "project_align_", grads, harmful, beneficial, groups, sums, scale, alignment, eps, order, rule, part
    )
    if not grads:
        return
    _refuse_shared_memory(grads)
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
        increment_version(grads)
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
    check(
        "project_align_", grads, harmful, beneficial, groups, sums, scale, alignment, eps, order, rule, part
    )


_library.impl("project_align_", _kernel, "CompositeExplicitAutograd")
_library.impl(
    "project_align_", torch.library.fallthrough_kernel, "Negative"
)  # the kernel sees to negated views
torch.library.register_fake("dgs::project_align_", _fake, lib=_library)
_op = torch.ops.dgs.project_align_.default
