"""Surgery on the gradient of features, row by row, in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgs_kernels import reference
from dgs_kernels.arguments import refuse_forward_mode
from dgs_kernels.ops.project_align import check_kinds, check_shapes, project_align
from dgs_kernels.options import Surgery


def gradient_surgery(
    features: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None = None,
    *,
    eps: float = 1e-6,
    order: str = "align_first",
    rule: str = "positive",
) -> tuple[Tensor, Tensor]:
    """Edit the gradient that flows back into `features`: align it, and project the harmful direction out.

    The identity on `features`. The alignment loss is a real loss value to add, weighted, to your own: the
    gradient that arrives at it carries the weight, a loss scale and any accumulation factor, so the surgery
    composes with GradScaler, schedules, accumulation, DDP and FSDP2 without being told. Nothing is aligned
    where that loss is not part of what is differentiated.

    Args:
        features: [..., D]; the leading axes are rows.
        harmful: reference gradient whose direction is removed, broadcastable to features' shape. A constant.
        beneficial: reference gradient whose negative part b attracts, likewise; None: no alignment.
        eps, order, rule: see `project_align`.

    Returns:
        (features, alignment_loss): the same values, to be used from here on, and the 0-dim mean over the rows
        of <features, b> in float32 (float64 for float64 inputs); 0 without rows or without `beneficial`.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit, saying what was expected.

    Example:
        >>> import torch, dgs_kernels
        >>> f = torch.ones(1, 2, requires_grad=True)
        >>> seen, alignment_loss = dgs_kernels.gradient_surgery(f, torch.tensor([1.0, 0.0]))
        >>> (seen.sum() + 0.2 * alignment_loss).backward()
        >>> f.grad.round(decimals=4)
        tensor([[0., 1.]])
    """
    surgery = Surgery.of(1.0, eps, order, rule)
    check_kinds(features, harmful, beneficial, surgery, "gradient_surgery", "features")
    check_shapes(features, harmful, beneficial, "gradient_surgery", "features")
    refuse_forward_mode("gradient_surgery", features)
    return _GradientSurgery.apply(features, harmful, beneficial, surgery)


class _GradientSurgery(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor, harmful: Tensor, beneficial: Tensor | None, surgery: Surgery
    ) -> tuple[Tensor, Tensor]:
        # A copy, because torch lets no in-place layer change a view that an edited gradient flows through.
        return features.clone(), reference.alignment_loss(features, beneficial)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        features, harmful, beneficial, ctx.surgery = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(harmful, beneficial)
        ctx.shape, ctx.dtype, ctx.device = features.shape, features.dtype, features.device

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, loss_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        harmful, beneficial = ctx.saved_tensors
        nothing = (None,) * 3
        if grad is None and (loss_grad is None or beneficial is None):
            return None, *nothing
        if grad is None:
            grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        alignment: float | Tensor = 0.0
        if loss_grad is None:
            beneficial = None
        elif beneficial is not None:
            alignment = loss_grad / max(1, ctx.shape[:-1].numel())
        _, _, eps, order, rule = ctx.surgery
        options = {"alignment": alignment, "eps": eps, "order": order, "rule": rule}
        return project_align(grad, harmful, beneficial, **options), *nothing
