"""Gradient surgery on rows in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from dgs_kernels import reference


def project_align(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
    out: Tensor,
) -> None:
    pull = alignment if scale is None else alignment * scale
    made = reference.project_align(grad, harmful, beneficial, alignment=pull, eps=eps, order=order, rule=rule)
    out.copy_(made)
