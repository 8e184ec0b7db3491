"""The backward of the three branches: `dgs::surgery_head_backward`, the features' gradient after the surgery.

What an implementation has to do with the operator's arguments and its result `out`; the schema is below.

The formula is that of the same name in `reference.py`. It fills out [B, D], contiguous and of any of the
four storage types, from residuals [3, B], weights [1, D] and 0-dim scales of the computing type C (float64
or float32), and from differences [B, D] of out's own type, which are there if distillation_scale is. A
native function computes in the type that goes with out (float64 for float64, else float32). Without a
reference_batch_size it is the batch's own. B may be 0.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from dgs_kernels.operation import Named, Operation
from dgs_kernels.tensors import number, numbers


def _empty(a: Named) -> tuple[torch.Tensor]:
    return (a.residuals.new_empty((a.residuals.shape[1], a.image_weight.shape[1]), dtype=a.out_dtype),)


def _lay_out(a: Named) -> Named:
    dtype = a.residuals.dtype
    # Kernels compute in the type that goes with what they write, and read differences of that type.
    is_wide = dtype == torch.float64
    storage = a.out_dtype if (a.out_dtype == torch.float64) == is_wide else dtype
    lists = ("residuals", "image_weight", "teacher_weight", "text_weight")
    scales = ("image_scale", "alignment_scale", "distillation_scale")
    return a._replace(
        out_dtype=storage if a.differences is None else a.differences.dtype,
        differences=None if a.differences is None else a.differences.contiguous(),
        **{name: numbers(getattr(a, name), dtype) for name in lists},
        **{name: number(getattr(a, name), dtype) for name in scales},
    )


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("surgery_head cannot be differentiated twice: its gradient is edited, not derived")


run = Operation(
    "surgery_head_backward(Tensor residuals, Tensor image_weight, Tensor teacher_weight, "
    "Tensor? text_weight, Tensor image_scale, Tensor alignment_scale, ScalarType out_dtype, "
    "float eps, str order, int? reference_batch_size, Tensor? differences, "
    "Tensor? distillation_scale, float distillation) -> Tensor",
    lay_out=_lay_out,
    results=_empty,
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
