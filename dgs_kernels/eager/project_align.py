"""Gradient surgery on rows in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from dgs_kernels import reference
from dgs_kernels.reference import ORDERS, RULES


def project_align(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: int,
    rule: int,
    out: Tensor,
) -> None:
    pull = alignment if scale is None else alignment * scale
    out.copy_(
        reference.project_align(
            grad, harmful, beneficial, alignment=pull, eps=eps, order=ORDERS[order], rule=RULES[rule]
        )
    )
