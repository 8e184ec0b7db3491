"""AdamW with gradient surgery inside its step, `dgs::surgery_adamw_`: no projected gradient is written.

What an implementation has to do with the operator's arguments; the schema is below.

grads, harmful, beneficial, groups, sums, scale, order, rule and part (not "sums") are those of
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
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dgs_kernels.operation import Named, Operation
from dgs_kernels.ops.project_align_ import check_lists
from dgs_kernels.options import Surgery
from dgs_kernels.tensors import common_dtype, common_layout, dense, number, plain


def _check(a: Named) -> None:
    name = "surgery_adamw_"
    Surgery.among(a)._replace(eps=a.surgery_eps).check(name, a.sums.device)
    check_lists(name, a)
    if a.part == "sums":
        raise ValueError(f"{name}: part must be all or apply; project_align_ makes the sums")
    shapes = [g.shape for g in a.grads]
    for what, tensors in (("params", a.params), ("exp_avgs", a.exp_avgs), ("exp_avg_sqs", a.exp_avg_sqs)):
        if [t.shape for t in tensors] != shapes:
            raise ValueError(f"{name}: {what} must have the shapes of grads")
        if {t.device for t in tensors} - {a.sums.device}:
            raise ValueError(f"{name}: {what} must be on {a.sums.device}")
    counts = (torch.float32, torch.float64)
    if len(a.steps) != len(a.grads) or any(
        s.dim() or s.device.type != "cpu" or s.dtype not in counts for s in a.steps
    ):
        raise ValueError(f"{name}: steps must be {len(a.grads)} 0-dim float tensors on the CPU")


def _results(a: Named) -> tuple:
    if a.sums.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "surgery_adamw_: steps are counted on the host, so a captured graph would repeat this one; "
            "capture OptimizerSurgery on torch.optim.AdamW(capturable=True)"
        )
    return ()


def _written(a: Named) -> itertools.chain[Tensor]:
    return itertools.chain(a.params, a.exp_avgs, a.exp_avg_sqs, a.steps)


def _lay_out(a: Named) -> Named | None:
    if not a.grads:
        if a.part == "all":
            a.sums.zero_()
        return None
    dtype = common_dtype(a.params, a.exp_avgs, a.exp_avg_sqs, a.grads, a.harmful, a.beneficial)
    params = dense(a.params)
    params = common_layout(dtype, params, params)
    lists = ("exp_avgs", "exp_avg_sqs", "grads", "harmful", "beneficial")
    return a._replace(
        params=params,
        steps=[plain(step) for step in a.steps],
        scale=number(a.scale, a.sums.dtype),
        **{name: common_layout(dtype, getattr(a, name), params) for name in lists},
    )


# `dgs::surgery_adamw_`, but past it where a native function takes the tensors as they are.
run = Operation(
    "surgery_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor[] harmful, Tensor[] beneficial, int[] groups, Tensor(e!) sums, "
    "Tensor? scale, float alignment, float surgery_eps, str order, str rule, str part, "
    "float lr, float beta1, float beta2, float weight_decay, float eps, bool maximize) -> ()",
    check=_check,
    lay_out=_lay_out,
    results=_results,
    written=_written,
)
