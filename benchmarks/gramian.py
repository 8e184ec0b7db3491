"""gramian and combine_: PCGrad of a model's two gradients: two streams in, then two in and one out.

`rows` x `dim` is the list of `benchmarks/project_align_.py`: from 8192 rows on, the default, one tensor of
768 x `dim` for each 768 rows, in layers of 12 tensors; below, `rows` LoRA tensors of 8 x `dim`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from benchmarks.project_align_ import layers, lists, on_lists
from dgs_kernels import reference
from dgs_kernels.eager.combine_ import combine_ as eager_combine_
from dgs_kernels.eager.gramian import gramian as eager_gramian


def pcgrad_weights(products: Tensor) -> Tensor:
    """The sum of both gradients, each without its conflict with the other: from [G, 2, 2] to [G, 2]."""
    return 1 - products[:, 0, 1:].clamp(max=0) / products.diagonal(dim1=1, dim2=2)


def ours(*tensors: Tensor) -> None:
    grads, first, second = lists(tensors, 3)
    groups = layers(len(grads))
    products = dgs_kernels.gramian([first, second], groups=groups)
    dgs_kernels.combine_(grads, [first, second], pcgrad_weights(products), groups=groups)


def foreach(*tensors: Tensor) -> None:
    """The best that `torch._foreach_*` can do: the eager backend."""
    grads, first, second = lists(tensors, 3)
    groups, count = layers(len(grads)), len(grads)
    products = torch.empty(
        groups[-1] + 1, 2, 2, dtype=reference.compute_dtype(*grads), device=grads[0].device
    )
    eager_gramian(first + second, groups, 2, products)
    eager_combine_(grads, list(tensors[count:]), pcgrad_weights(products), groups)


def formula(*tensors: Tensor) -> None:
    grads, first, second = lists(tensors, 3)
    dtype = reference.compute_dtype(*tensors)
    for layer in reference.layers(layers(len(grads))):
        pairs = [(first[i].to(dtype), second[i].to(dtype)) for i in layer]
        conflict = sum((x * y).sum() for x, y in pairs).clamp(max=0)
        of_first = 1 - conflict / sum((x * x).sum() for x, _ in pairs)
        of_second = 1 - conflict / sum((y * y).sum() for _, y in pairs)
        for i, (x, y) in zip(layer, pairs):
            grads[i].copy_(of_first * x + of_second * y)


def torchjd() -> dict[str, Callable[..., None]]:
    """The peer, where it is installed: it takes one matrix, with a row for each objective."""
    if not importlib.util.find_spec("torchjd"):
        return {}
    from torchjd.aggregation import PCGrad

    aggregate = PCGrad()

    def call(*tensors: Tensor) -> None:
        grads, *objectives = lists(tensors, 3)
        for layer in reference.layers(layers(len(grads))):
            rows = [torch.cat([x[i].reshape(-1) for i in layer]) for x in objectives]
            parts = aggregate(torch.stack(rows)).split([grads[i].numel() for i in layer])
            for i, part in zip(layer, parts):
                grads[i].copy_(part.view_as(grads[i]))

    return {"TorchJD PCGrad": call}


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    variants = {harness.EAGER: formula, "torch._foreach_*": foreach, **torchjd()}
    of = (rows, dim, dtype, device)
    return on_lists("gramian", of, 5, ours, variants, formula, others=("TorchJD PCGrad",))
