"""AdamW with surgery in its step in plain PyTorch: the surgery, then PyTorch's own step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from dgs_kernels.eager.project_align_ import project_align_


def surgery_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *surgery_and_adamw: Any,
) -> None:
    *surgery, lr, beta1, beta2, weight_decay, eps, maximize = surgery_and_adamw
    edited = [g.clone() for g in grads]
    project_align_(edited, *surgery)
    options = {"beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": weight_decay, "eps": eps}
    options |= {"foreach": True, "amsgrad": False, "maximize": maximize}
    adamw(params, edited, exp_avgs, exp_avg_sqs, [], steps, **options)
