"""AdamW with surgery in its step in plain PyTorch: the surgery, then PyTorch's own step."""

from __future__ import annotations

from torch import Tensor
from torch.optim.adamw import adamw

from dgs_kernels.eager.project_align_ import project_align_


def surgery_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    scale: Tensor | None,
    alignment: float,
    surgery_eps: float,
    order: int,
    rule: int,
    part: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    edited = [g.clone() for g in grads]
    project_align_(
        edited, harmful, beneficial, groups, sums, scale, alignment, surgery_eps, order, rule, part
    )
    adamw(
        params,
        edited,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )
