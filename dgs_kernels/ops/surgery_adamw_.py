"""AdamW with gradient surgery inside its step, `dgs::surgery_adamw_`: no projected gradient is written.

What an implementation has to do (`dgs_kernels._native.surgery_adamw_`, `dgs_kernels.triton.surgery_adamw_`)::

    surgery_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
                   Tensor(d!)[] steps, Tensor[] harmful, Tensor[] beneficial, int[] groups, Tensor(e!) sums,
                   Tensor? scale, float alignment, float surgery_eps, int order, int rule, int part,
                   float lr, float beta1, float beta2, float weight_decay, float eps, bool maximize) -> ()

grads, harmful, beneficial, groups, sums, scale, order, rule and part (0 or 2, not 1) are those of
`project_align_`, save that grads are only read; params, exp_avgs and exp_avg_sqs have their dtype and shapes,
and are contiguous too. steps are 0-dim float32 or float64 tensors on the CPU, one per tensor; each is
incremented first and then counts from 1. With the surgered gradient g kept in the computing type::

    g <- -g if maximize
    param <- param * (1 - lr * weight_decay)
    exp_avg <- exp_avg + (1 - beta1) * (g - exp_avg)
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g * g
    param <- param - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)

12 streams: 6 read (5 without alignment, or 3 more in a first pass where a layer does not stay on chip), 3
written. Scalars are made in float64 and used in the computing type. float32 results are meant to equal those
of `project_align_` and `torch.optim.AdamW(foreach=True)` to the last bit or two.

The native function checks all of this and returns whether it served the call, as `project_align_` does.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dgs_kernels import backends
from dgs_kernels.ops.project_align import number
from dgs_kernels.ops.project_align_ import check, codes, common_layout, dense, in_a_row

_library = torch.library.Library("dgs", "FRAGMENT")
_library.define(
    "surgery_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor[] harmful, Tensor[] beneficial, int[] groups, Tensor(e!) sums, "
    "Tensor? scale, float alignment, float surgery_eps, str order, str rule, str part, "
    "float lr, float beta1, float beta2, float weight_decay, float eps, bool maximize) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    *rest: Any,
) -> None:
    scale, alignment, surgery_eps, order, rule, part, *_ = rest
    name = "surgery_adamw_"
    lists = (grads, harmful, beneficial, groups)
    check(name, *lists, sums, scale, alignment, surgery_eps, order, rule, part)
    if part == "sums":
        raise ValueError(f"{name}: part must be all or apply; project_align_ makes the sums")
    shapes = [g.shape for g in grads]
    for what, tensors in (("params", params), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if [t.shape for t in tensors] != shapes:
            raise ValueError(f"{name}: {what} must have the shapes of grads")
        if {t.device for t in tensors} - {sums.device}:
            raise ValueError(f"{name}: {what} must be on {sums.device}")
    counts = (torch.float32, torch.float64)
    if len(steps) != len(grads) or any(
        s.dim() or s.device.type != "cpu" or s.dtype not in counts for s in steps
    ):
        raise ValueError(f"{name}: steps must be {len(grads)} 0-dim float tensors on the CPU")


def run(*arguments: Any) -> None:
    """`dgs::surgery_adamw_`, but past it where a native function takes the tensors as they are."""
    if backends.watched() or not _served_as_it_is(*arguments):
        _op(*arguments)


def _served_as_it_is(*arguments: Any) -> bool:
    *lists, sums, scale, alignment, surgery_eps, order, rule, part = arguments[:15]
    if not lists[0]:  # of no device either, which a backend could be chosen for
        return False
    if sums.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "surgery_adamw_: steps are counted on the host, so a captured graph would repeat this one; "
            "capture OptimizerSurgery on torch.optim.AdamW(capturable=True)"
        )
    serve = backends.implementation("surgery_adamw_", sums.device.type)
    scale = number(scale, sums.dtype)
    options = (alignment, surgery_eps, *codes(order, rule, part), *arguments[15:])
    if not (backends.is_native(serve) and serve(*lists, sums, scale, *options)):
        return False
    params, _, exp_avgs, exp_avg_sqs, steps, *_ = lists
    increment_version(itertools.chain(params, exp_avgs, exp_avg_sqs, steps))
    return True


def _kernel(*arguments: Any) -> None:
    if _served_as_it_is(*arguments):
        return
    _check(*arguments)
    params, grads, exp_avgs, exp_avg_sqs, steps, harmful, beneficial, groups, sums, *rest = arguments
    scale, alignment, surgery_eps, order, rule, part, *hyper = rest
    if not grads:
        if part == "all":
            sums.zero_()
        return
    lists = (params, exp_avgs, exp_avg_sqs, steps)
    types = {
        t.dtype for tensors in (params, exp_avgs, exp_avg_sqs, grads, harmful, beneficial) for t in tensors
    }
    dtype = types.pop() if len(types) == 1 else sums.dtype
    work = dense(params)
    work = common_layout(dtype, work, work)
    counts = [backends.plain(step) for step in steps]
    averages, squares = (common_layout(dtype, tensors, work) for tensors in (exp_avgs, exp_avg_sqs))
    read = [common_layout(dtype, tensors, work) for tensors in (grads, harmful, beneficial)]
    params_, averages_, squares_, grads_, harmful_, beneficial_ = map(
        in_a_row, (work, averages, squares, *read)
    )
    scale = number(scale, sums.dtype)
    ready = (params_, grads_, averages_, squares_, counts, harmful_, beneficial_, groups, sums, scale)
    options = (alignment, surgery_eps, *codes(order, rule, part), *hyper)
    served = backends.implementation("surgery_adamw_", sums.device.type)(*ready, *options)
    assert served is not False, "a native function takes what has been checked and laid out"
    increment_version(itertools.chain(*lists))
    for tensors, results in zip(lists, (work, averages, squares, counts)):
        for tensor, result in zip(tensors, results):
            if result is not tensor:
                tensor.copy_(result)


_library.impl("surgery_adamw_", _kernel, "CompositeExplicitAutograd")
_library.impl(
    "surgery_adamw_", torch.library.fallthrough_kernel, "Negative"
)  # the kernel sees to negated views
torch.library.register_fake("dgs::surgery_adamw_", _check, lib=_library)
_op = torch.ops.dgs.surgery_adamw_.default
