"""A small model with losses that pull apart, in ObjectiveSurgery and by hand; tests share it."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from dgs_kernels import ObjectiveSurgery, reference
from dgs_kernels.hooks.weightings import weigh


def small_model(dtype=torch.float64) -> nn.Sequential:
    """Five parameters in three layers."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 2)
    return nn.Sequential(*layers).to(dtype)


def losses(model, step: int, count: int = 4, part: slice = slice(None)) -> list[torch.Tensor]:
    """`count` losses on one batch that pull apart; means over the rows of `part`."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64).to(dtype)[part]
    y = model(x)
    aims = torch.randn(count, 2, generator=generator, dtype=torch.float64).to(dtype)
    return [(1 + k) * (y - aim).square().mean() for k, aim in enumerate(aims)]


def gradients(model, *args, **options) -> list[list[torch.Tensor]]:
    params = list(model.parameters())
    return [
        list(torch.autograd.grad(loss, params, retain_graph=True)) for loss in losses(model, *args, **options)
    ]


def make(weighting="pcgrad", granularity="model", dtype=torch.float64, **options):
    model = small_model(dtype)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, ObjectiveSurgery(optimizer, weighting, granularity, **options)


def capture(surgery, of: list[torch.Tensor], names=None, factor=1.0) -> None:
    for loss, name in zip(of, names or itertools.repeat(None)):
        with surgery.objective(name):
            (loss * factor).backward(retain_graph=True)


def combination(objectives, weighting, layers, generator=None) -> list[torch.Tensor]:
    """The formulas: a Gramian, weights, weighted sums."""
    gramian = reference.gramian(objectives, layers)
    weights = weigh(weighting, gramian, generator or torch.Generator().manual_seed(0))
    return reference.combine_(objectives[0], objectives, weights, layers)


def assert_grads(model, want, **tolerance) -> None:
    for p, grad in zip(model.parameters(), want):
        torch.testing.assert_close(p.grad, grad, **tolerance)
