"""Weighted sums of gradients, layer by layer: `dgs::combine_`, what `gramian`'s weights are applied with.

What an implementation has to do (`dgs_kernels._native.combine_`, `dgs_kernels.triton.combine_`)::

    combine_(Tensor(a!)[] grads, Tensor[] objectives, Tensor weights, int[] groups) -> ()

objectives and groups are those of `gramian`; grads are T tensors of their dtype, device and shapes,
contiguous. No two of these tensors overlap where one is written, save that grads[i] may be
objectives[k * T + i]. weights [G, K], or [K] for all groups, is contiguous, float32 (float64 for float64
tensors). It writes, adding in the order of k and rounding once,

    grads[i] = sum over k of weights[groups[i], k] * objectives[k * T + i]

One launch, no host synchronisation; K reads and 1 write. The native function alone checks all of this, and
returns whether it served the call.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dgs_kernels import backends
from dgs_kernels.ops.arguments import check_items
from dgs_kernels.ops.gramian import check_objectives, in_one_list, refuse_what_is_no_tensor
from dgs_kernels.ops.project_align_ import (
    check_list,
    common_layout,
    dense,
    in_a_row,
    number_layers,
    span,
    sums_dtype,
)

_library = torch.library.Library("dgs", "FRAGMENT")
_library.define(
    "combine_(Tensor(a!)[] grads, Tensor[] objectives, Tensor weights, int[] groups) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def combine_(
    grads: Sequence[Tensor],
    objectives: Sequence[Sequence[Tensor]],
    weights: Tensor,
    *,
    groups: Sequence[int] | None = None,
) -> None:
    """Write weighted sums of K gradients: `grads[t] = sum_k weights[g(t), k] objectives[k][t]`.

    Each list is read once, in one kernel launch whatever the number of tensors; nothing waits for the device.

    Args:
        grads: T tensors that are written, float32, float64, bfloat16 or float16. grads[t] may be
            `objectives[k][t]` itself; otherwise no two of these tensors may share memory with one that is
            written.
        objectives: K lists, 2 <= K <= 16, of T tensors of the shapes of grads, on the same device.
        weights: [G, K], the weights of each layer in order of first appearance, or [K] for all layers, on the
            same device. A weight of 0 does not hide a NaN or an infinity.
        groups: T integers, equal for tensors of one layer; None: every tensor is its own layer.

    Arithmetic is float32 (float64 if any of `grads` and `objectives` is), rounded once. No graph is recorded.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes, devices or overlaps that do not fit, saying what was
            expected.

    Example:
        >>> import torch
        >>> from dgs_kernels import combine_
        >>> first, second = [torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])]
        >>> combine_(first, [first, second], torch.tensor([0.5, 2.0]))
        >>> first
        [tensor([3.5000, 2.0000])]
    """
    flat, count = in_one_list("combine_", objectives)
    layers, num_layers = number_layers("combine_", groups, count)
    if not isinstance(weights, Tensor):
        raise TypeError(f"combine_: weights must be a tensor, got {type(weights).__name__}")
    if weights.shape not in ((num_layers, len(objectives)), (len(objectives),)):
        raise ValueError(
            f"combine_: weights must be [{num_layers}, {len(objectives)}] or [{len(objectives)}], layers and "
            f"objectives, got {tuple(weights.shape)}"
        )
    arguments = (list(grads), flat, weights, layers)
    with torch.no_grad():
        if backends.watched() or not _served_as_it_is(*arguments):
            refuse_what_is_no_tensor("combine_", flat, count)
            check_items("combine_", grads=arguments[0])
            _op(*arguments)


def _check(
    grads: list[Tensor], objectives: list[Tensor], weights: Tensor, groups: list[int]
) -> list[list[Tensor]]:
    lists = check_objectives("combine_", objectives, groups, weights.shape[-1])
    check_list("combine_", "grads", grads, "objectives[0]", lists[0], lists[0][0].device)
    if weights.device != grads[0].device:
        raise ValueError(
            f"combine_: weights must be on {grads[0].device} as the tensors are, got {weights.device}"
        )
    return lists


def _refuse_overlaps(grads: list[Tensor], lists: list[list[Tensor]]) -> None:
    """Of tensors without gaps: what is written to may be read at the same place only."""
    gapless = torch.ops.aten.is_non_overlapping_and_dense
    spans = sorted((*span(g), i) for i, g in enumerate(grads) if g.numel() and gapless(g))
    for (_, end, i), (begin, _, j) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"combine_: grads[{i}] and grads[{j}] share memory; write to distinct tensors")
    for k, tensors in enumerate(lists):
        for i, t in enumerate(tensors):
            if not t.numel() or not gapless(t):
                continue
            begin, end = span(t)
            place = bisect.bisect_left(spans, (end, 0, 0))  # spans before it begin before t ends
            if place and spans[place - 1][1] > begin and spans[place - 1] != (begin, end, i):
                raise ValueError(
                    f"combine_: grads[{spans[place - 1][2]}] and objectives[{k}][{i}] share memory; only "
                    f"grads[{i}] may be objectives[{k}][{i}], and the same tensor then"
                )


def _served_as_it_is(
    grads: list[Tensor], objectives: list[Tensor], weights: Tensor, groups: list[int]
) -> bool:
    serve = backends.implementation("combine_", weights.device.type)
    if not (backends.is_native(serve) and serve(grads, objectives, weights, groups)):
        return False
    increment_version(grads)
    return True


def _kernel(grads: list[Tensor], objectives: list[Tensor], weights: Tensor, groups: list[int]) -> None:
    if _served_as_it_is(grads, objectives, weights, groups):
        return
    if not grads and not objectives:
        return
    lists = _check(grads, objectives, weights, groups)
    _refuse_overlaps(grads, lists)
    # Kernels read one type: mixed types meet in their common type, and the results return to grads'.
    types = {t.dtype for t in (*grads, *objectives)}
    dtype = types.pop() if len(types) == 1 else sums_dtype(grads, objectives)
    like = dense(grads)
    work = [
        g if g is grad and g.dtype == dtype else torch.empty_like(g, dtype=dtype)
        for grad, g in zip(grads, like)
    ]
    laid_out = [t for tensors in lists for t in in_a_row(common_layout(dtype, tensors, like))]
    weights = backends.plain(weights.to(sums_dtype(work)).contiguous())
    serve = backends.implementation("combine_", weights.device.type)
    served = serve(in_a_row(work), laid_out, weights, groups)
    assert served is not False, "a native function takes what has been checked and laid out"
    increment_version(grads)
    for grad, combined in zip(grads, work):
        if combined is not grad:
            grad.copy_(combined)


def _fake(grads: list[Tensor], objectives: list[Tensor], weights: Tensor, groups: list[int]) -> None:
    if grads or objectives:
        _check(grads, objectives, weights, groups)


_library.impl("combine_", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dgs::combine_", _fake, lib=_library)
_op = torch.ops.dgs.combine_.default
