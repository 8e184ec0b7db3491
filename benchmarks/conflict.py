"""PCGrad on `rows` pairs of gradients of `dim` numbers: those that conflict are projected, then added.

One row of millions of numbers is a model's gradients. Many short rows are gradients of features, sample by
sample, which TorchJD takes pair after pair. TorchJD and the compiler need 5 streams, as both projections
share one inner product; our two calls and a sum need 9, which counts where gradients do not fit a cache.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from dgs_kernels import reference

TORCHJD = "TorchJD PCGrad"


def pcgrad(project_align, pairs: Tensor) -> Tensor:
    first, second = pairs.unbind(1)
    out = project_align(first, second, rule="conflict")
    return out.add_(project_align(second, first, rule="conflict"))


def torchjd() -> dict[str, Callable[[Tensor], Tensor]]:
    """The peer, where it is installed."""
    if not importlib.util.find_spec("torchjd"):
        return {}
    from torchjd.aggregation import PCGrad

    aggregate = PCGrad()
    return {TORCHJD: lambda pairs: torch.stack([aggregate(pair) for pair in pairs])}


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    def inputs() -> tuple[Tensor]:
        pairs = torch.randn(rows, 2, dim, device=device)
        pairs[:, 1] -= 0.3 * pairs[:, 0]
        return (pairs.to(dtype),)

    torch._dynamo.reset()
    eager = functools.partial(pcgrad, reference.project_align)
    return harness.Case(
        operation="conflict",
        inputs=inputs,
        bytes_moved=3 * rows * dim * dtype.itemsize,
        variants={
            **harness.per_backend(
                "project_align", device, functools.partial(pcgrad, dgs_kernels.project_align)
            ),
            harness.EAGER: eager,
            harness.COMPILED: torch.compile(eager, dynamic=False),
            **torchjd(),
        },
        exact=eager,
        others=(TORCHJD,),
    )
