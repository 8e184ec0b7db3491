"""The `eager` backend: `reference.py` behind the arguments that kernels take."""

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
) -> Tensor:
    if scale is not None:
        alignment = alignment * scale
    out = reference.project_align(
        grad, harmful, beneficial, alignment=alignment, eps=eps, order=ORDERS[order], rule=RULES[rule]
    )
    return out.contiguous()
