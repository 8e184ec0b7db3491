"""Inner products of gradients in plain PyTorch."""

from __future__ import annotations

import itertools

from torch import Tensor

from dgs_kernels.eager.project_align_ import products


def gramian(objectives: list[Tensor], groups: list[int], num_objectives: int, out: Tensor) -> None:
    count = len(groups)
    flat = [
        [t.to(out.dtype).reshape(-1) for t in objectives[i : i + count]]
        for i in range(0, len(objectives), count)
    ]
    above = list(itertools.combinations_with_replacement(range(len(flat)), 2))
    found = products([(flat[i], flat[j]) for i, j in above], groups, len(out))
    for (i, j), column in zip(above, found.unbind(1)):
        out[:, i, j] = out[:, j, i] = column
