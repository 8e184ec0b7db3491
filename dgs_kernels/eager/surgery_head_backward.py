"""The backward of the three branches in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from dgs_kernels import reference
from dgs_kernels.reference import ORDERS


def surgery_head_backward(
    residuals: Tensor,
    image_weight: Tensor,
    teacher_weight: Tensor,
    text_weight: Tensor | None,
    image_scale: Tensor,
    alignment_scale: Tensor,
    differences: Tensor | None,
    distillation_scale: Tensor | None,
    eps: float,
    order: int,
    reference_batch_size: float,
    distillation: float,
    out: Tensor,
) -> None:
    heads = (image_weight, teacher_weight, text_weight)
    out.copy_(
        reference.surgery_head_backward(
            residuals,
            *heads,
            image_scale,
            alignment_scale,
            out.dtype,
            eps,
            ORDERS[order],
            int(reference_batch_size) or None,
            differences,
            distillation_scale,
            distillation,
        )
    )
