"""surgery_head with its backward: three [rows, dim] matrices in, one gradient out."""

from __future__ import annotations

import torch
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from dgs_kernels import reference

HEADS = ("image", "teacher", "text")


def step(surgery_head):
    """One forward and backward, as in training; returns the gradient of the features."""

    def run(features: Tensor, teacher: Tensor, text: Tensor, labels: Tensor, *heads: Tensor) -> Tensor:
        leaf = features.detach().requires_grad_()
        heads = tuple(h.detach().requires_grad_(i not in (2, 3)) for i, h in enumerate(heads))
        out = surgery_head(leaf, teacher, text, labels, *heads)
        (out[0] + out[1] + 0.2 * out[2]).backward()
        return leaf.grad

    return run


def upcast(surgery_head):
    """The published graph knows one dtype: features are widened to the heads' type first."""

    def run(features: Tensor, teacher: Tensor, text: Tensor, labels: Tensor, *heads: Tensor):
        wide = (x.to(heads[0].dtype) for x in (features, teacher, text))
        return surgery_head(*wide, labels, *heads)

    return run


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    wide = torch.promote_types(dtype, torch.float32)

    def inputs() -> tuple[Tensor, ...]:
        features = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(3))
        labels = torch.randint(0, 2, (rows,), device=device).to(wide)
        heads = (
            torch.randn(shape, device=device).to(wide) / dim**0.5 for _ in HEADS for shape in ((1, dim), (1,))
        )
        return (*features, labels, *heads)

    torch._dynamo.reset()
    official = upcast(reference.official_graph)
    return harness.Case(
        operation="surgery_head",
        inputs=inputs,
        bytes_moved=4 * rows * dim * dtype.itemsize,
        variants={
            **harness.per_backend("surgery_head", device, step(dgs_kernels.surgery_head)),
            harness.EAGER: step(official),
            "closed form, eager": harness.through("eager", step(dgs_kernels.surgery_head)),
        },
        exact=step(official),
    )
