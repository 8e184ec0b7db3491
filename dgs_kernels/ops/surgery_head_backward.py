"""The backward of the three branches: `dgs::surgery_head_backward`, the features' gradient after the surgery.

What an implementation has to do::

    surgery_head_backward(Tensor residuals, Tensor image_weight, Tensor teacher_weight, Tensor? text_weight,
                          Tensor image_scale, Tensor alignment_scale, Tensor? differences,
                          Tensor? distillation_scale, float eps, int order, float reference_batch_size,
                          float distillation, Tensor(a!) out) -> ()

The formula is that of the same name in `reference.py`. It fills out [B, D], contiguous and of any of the
four storage types, from residuals [3, B], weights [1, D] and 0-dim scales of the computing type C (float64
or float32), and from differences [B, D] of out's own type, which are there if distillation_scale is. A
native function computes in the type that goes with out (float64 for float64, else float32). order is the
place in `reference.ORDERS`; a reference_batch_size of 0 is the batch's own. B may be 0.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from dgs_kernels.operation import Called, Named, Operation
from dgs_kernels.reference import ORDERS
from dgs_kernels.tensors import number, numbers


def _empty(a: Named, dtype: torch.dtype) -> torch.Tensor:
    return a.residuals.new_empty((a.residuals.shape[1], a.image_weight.shape[1]), dtype=dtype)


def _call(a: Named) -> Called:
    out = _empty(a, a.out_dtype)
    weights = (a.image_weight, a.teacher_weight, a.text_weight)
    scales = (a.image_scale, a.alignment_scale)
    pull = (a.differences, a.distillation_scale)
    batch = float(a.reference_batch_size or 0)
    options = (float(a.eps), ORDERS.index(a.order), batch, float(a.distillation))
    return (a.residuals, *weights, *scales, *pull, *options, out), out


def _lay_out(a: Named) -> tuple[Called, tuple]:
    dtype = a.residuals.dtype
    # Kernels compute in the type that goes with what they write, and read differences of that type.
    is_wide = dtype == torch.float64
    storage = a.out_dtype if (a.out_dtype == torch.float64) == is_wide else dtype
    ready = a._replace(
        residuals=numbers(a.residuals, dtype),
        image_weight=numbers(a.image_weight, dtype),
        teacher_weight=numbers(a.teacher_weight, dtype),
        text_weight=numbers(a.text_weight, dtype),
        image_scale=number(a.image_scale, dtype),
        alignment_scale=number(a.alignment_scale, dtype),
        out_dtype=storage if a.differences is None else a.differences.dtype,
        differences=None if a.differences is None else a.differences.contiguous(),
        distillation_scale=number(a.distillation_scale, dtype),
    )
    return _call(ready), ()


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("surgery_head cannot be differentiated twice: its gradient is edited, not derived")


run = Operation(
    "surgery_head_backward(Tensor residuals, Tensor image_weight, Tensor teacher_weight, "
    "Tensor? text_weight, Tensor image_scale, Tensor alignment_scale, ScalarType out_dtype, "
    "float eps, str order, int? reference_batch_size, Tensor? differences, "
    "Tensor? distillation_scale, float distillation) -> Tensor",
    check=lambda a: None,
    call=_call,
    lay_out=_lay_out,
    fake=lambda a: _empty(a, a.out_dtype),
    finish=lambda a, out: out.to(a.out_dtype),
    gradient=(lambda ctx, a, output: None, _refuse),
    differentiable=(
        "residuals",
        "image_weight",
        "teacher_weight",
        "text_weight",
        "image_scale",
        "alignment_scale",
    ),
)
