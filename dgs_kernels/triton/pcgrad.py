"""PCGrad on pairs of rows in Triton: `project_align`'s kernels with the rule that is pcgrad's."""

from __future__ import annotations

from torch import Tensor

from dgs_kernels.triton.project_align import MUTUAL, project_align


def pcgrad(first: Tensor, second: Tensor, eps: float) -> Tensor:
    return project_align(first, second, None, None, 1.0, eps, 0, MUTUAL.value)
