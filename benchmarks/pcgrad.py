"""pcgrad on `rows` pairs of gradients of `dim` numbers: 2 streams in and 1 out.

Many short rows are gradients of features, sample by sample, which TorchJD takes pair after pair: where that
takes seconds, it is left out. One row of millions of numbers is a model's gradients. The compiler gets the
formula as it is written, and once more by hand as a weighted sum, whose weights come from one inner product
and two norms.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from dgs_kernels import reference

TORCHJD, WEIGHTED = "TorchJD PCGrad", "torch.compile, weighted sum"
EPS = 1e-6
MOST_CALLS = 512


def weighted_sum(first: Tensor, second: Tensor) -> Tensor:
    dtype = reference.compute_dtype(first, second)
    x, y = first.to(dtype), second.to(dtype)
    conflict = (x * y).sum(-1, keepdim=True).clamp(max=0)
    of_first, of_second = (1 - conflict / (g.norm(dim=-1, keepdim=True) + EPS).square() for g in (x, y))
    return (of_first * x + of_second * y).to(first.dtype)


def torchjd() -> dict[str, Callable[..., Tensor]]:
    """The peer, where it is installed."""
    if not importlib.util.find_spec("torchjd"):
        return {}
    from torchjd.aggregation import PCGrad

    aggregate = PCGrad()
    return {TORCHJD: lambda *pairs: torch.stack([aggregate(pair) for pair in torch.stack(pairs, 1)])}


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    def inputs() -> tuple[Tensor, ...]:
        first, second = (torch.randn(rows, dim, device=device) for _ in range(2))
        return first.to(dtype), (second - 0.3 * first).to(dtype)

    torch._dynamo.reset()
    return harness.Case(
        operation="pcgrad",
        inputs=inputs,
        bytes_moved=3 * rows * dim * dtype.itemsize,
        variants={
            **harness.per_backend("pcgrad", device, dgs_kernels.pcgrad),
            harness.EAGER: reference.pcgrad,
            harness.COMPILED: torch.compile(reference.pcgrad, dynamic=False),
            WEIGHTED: torch.compile(weighted_sum, dynamic=False),
            **(torchjd() if rows <= MOST_CALLS else {}),
        },
        exact=reference.pcgrad,
        others=(TORCHJD,),
    )
