"""Weighted sums of gradients in plain PyTorch, by its functions on lists of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_(grads: list[Tensor], objectives: list[Tensor], weights: Tensor, groups: list[int]) -> None:
    count = len(grads)
    columns = [column.expand(max(groups) + 1).unbind() for column in weights.unbind(-1)]
    sums: list[Tensor] = []
    for k, column in enumerate(columns):
        tensors = [t.to(weights.dtype) for t in objectives[k * count : (k + 1) * count]]
        of_tensors = [column[group] for group in groups]
        if k == 0:
            sums = list(torch._foreach_mul(tensors, of_tensors))
        else:
            torch._foreach_addcmul_(sums, tensors, of_tensors)
    torch._foreach_copy_(grads, sums)
