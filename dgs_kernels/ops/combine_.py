"""Weighted sums of gradients, layer by layer: `dgs::combine_`, what `gramian`'s weights are applied with.

What an implementation has to do with the operator's arguments; the schema is below.

objectives and groups are those of `gramian`; grads are T tensors of their dtype, device and shapes,
contiguous. No two of these tensors overlap where one is written, save that grads[i] may be
objectives[k * T + i]. weights [G, K], or [K] for all groups, is contiguous, float32 (float64 for float64
tensors). It writes, adding in the order of k and rounding once,

    grads[i] = sum over k of weights[groups[i], k] * objectives[k * T + i]

One launch, no host synchronisation; K reads and 1 write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgs_kernels.arguments import check_items
from dgs_kernels.operation import Named, Operation
from dgs_kernels.ops.gramian import (
    KERNEL_OBJECTIVES,
    in_lists,
    in_one_list,
    laid_out,
    refuse_what_is_no_tensor,
)
from dgs_kernels.tensors import (
    check_list,
    common_dtype,
    dense,
    number_layers,
    numbers,
    refuse_overlaps,
    sums_dtype,
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
    More than 16 lists are added up in several launches, through a sum in the type of the arithmetic.

    Args:
        grads: T tensors that are written, float32, float64, bfloat16 or float16. grads[t] may be
            `objectives[k][t]` itself; otherwise no two of these tensors may share memory with one that is
            written.
        objectives: K lists, K >= 2, of T tensors of the shapes of grads, on the same device.
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
    with torch.no_grad():
        if len(objectives) <= KERNEL_OBJECTIVES:
            _operation(list(grads), flat, weights, layers)
        else:
            _in_parts(_operation.arguments(list(grads), flat, weights, layers))


def _in_parts(a: Named) -> None:
    """More lists than a kernel takes: the first 16, then 15 at a time with the sum so far."""
    _kinds(a)
    count = len(a.groups)
    lists = [a.objectives[i : i + count] for i in range(0, len(a.objectives), count)]
    # When torch.compile traces, the calls' own checks are enough.
    if not torch.compiler.is_compiling():
        _check(a)
        refuse_overlaps("combine_", a.grads, lists)
    dtype = sums_dtype(a.grads, a.objectives)
    weights = a.weights.to(dtype)
    total = [torch.empty_like(grad, dtype=dtype) for grad in a.grads]
    first, rest = KERNEL_OBJECTIVES, KERNEL_OBJECTIVES - 1
    _operation(total, a.objectives[: first * count], weights[..., :first], a.groups)
    for k in range(first, len(lists), rest):
        its = torch.nn.functional.pad(weights[..., k : k + rest], (1, 0), value=1.0)
        _operation(total, [*total, *a.objectives[k * count : (k + rest) * count]], its, a.groups)
    for grad, value in zip(a.grads, total):
        grad.copy_(value)


def _kinds(a: Named) -> None:
    refuse_what_is_no_tensor("combine_", a.objectives, len(a.groups))
    check_items("combine_", grads=a.grads)


def _check(a: Named) -> None:
    if not (a.grads or a.objectives):
        return
    first = in_lists("combine_", a.objectives, a.groups, a.weights.shape[-1])[0]
    check_list("combine_", "grads", a.grads, "objectives[0]", first, first[0].device)
    if a.weights.device != first[0].device:
        raise ValueError(
            f"combine_: weights must be on {first[0].device} as the tensors are, got {a.weights.device}"
        )


def _lay_out(a: Named) -> Named | None:
    if not a.grads:
        return None
    count = len(a.grads)
    refuse_overlaps(
        "combine_", a.grads, [a.objectives[i : i + count] for i in range(0, len(a.objectives), count)]
    )
    dtype = common_dtype(a.grads, a.objectives)
    like = dense(a.grads)
    work = [
        g if g is grad and g.dtype == dtype else torch.empty_like(g, dtype=dtype)
        for grad, g in zip(a.grads, like)
    ]
    return a._replace(
        grads=work,
        objectives=laid_out(a.objectives, dtype, like),
        weights=numbers(a.weights, sums_dtype(work)),
    )


_operation = Operation(
    "combine_(Tensor(a!)[] grads, Tensor[] objectives, Tensor weights, int[] groups) -> ()",
    kinds=_kinds,
    check=_check,
    lay_out=_lay_out,
    written=lambda a: a.grads,
)
