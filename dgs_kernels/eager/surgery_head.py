"""The three branches in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from dgs_kernels import reference


def surgery_head(
    features: Tensor,
    teacher_features: Tensor,
    text_features: Tensor | None,
    labels: Tensor,
    image_weight: Tensor,
    image_bias: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor,
    text_weight: Tensor | None,
    text_bias: Tensor | None,
    offsets: Tensor | None,
    reference_batch_size: float,
    expert: bool,
    distillation: float,
    losses: Tensor,
    logits: Tensor,
    residuals: Tensor,
    head_grads: Tensor,
    differences: Tensor,
) -> None:
    results = reference.surgery_head(
        features,
        teacher_features,
        text_features,
        labels,
        image_weight,
        image_bias,
        teacher_weight,
        teacher_bias,
        text_weight,
        text_bias,
        int(reference_batch_size) or None,
        expert,
        offsets,
        distillation,
    )
    for out, result in zip((losses, logits, residuals, head_grads, differences), results):
        out.copy_(result)
