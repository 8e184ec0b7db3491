"""A small model, stepped with surgery on its parameters and by hand. Shared by the tests of such steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dgs_kernels import OptimizerSurgery, SurgeryAdamW, reference

# By granularity, the layer of each parameter.
LAYERS = {"tensor": range(5), "layer": [0, 0, 1, 2, 2], "model": [0] * 5}


def small_model(dtype=torch.float64, seed=0) -> nn.Sequential:
    """Five parameters in three layers."""
    torch.manual_seed(seed)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4, bias=False), nn.Tanh(), nn.Linear(4, 1)
    return nn.Sequential(*layers).to(dtype)


def batch(seed, dtype=torch.float64, n=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), x.square().sum(1, keepdim=True).sin().to(dtype)


def loss_on(model, seed, scale=1.0, **options):
    x, y = batch(seed, next(model.parameters()).dtype, **options)
    return (model(x) - y).square().mean() * scale


def grads_of(model, seed, **options):
    return list(torch.autograd.grad(loss_on(model, seed, **options), list(model.parameters())))


def plain_step(model, optimizer, step, granularity="tensor", beneficial=True, **options) -> None:
    """The step done by hand: three gradients, the reference formula, the plain optimiser."""
    params = list(model.parameters())
    g, h, b = (grads_of(model, 3 * step + i) for i in range(3))
    edited = reference.project_align_(g, h, b if beneficial else None, LAYERS[granularity], **options)
    for p, e in zip(params, edited):
        p.grad = e
    optimizer.step()
    optimizer.zero_grad()


def surgery_step(model, optimizer, surgery, step, beneficial=True) -> None:
    with surgery.harmful():
        loss_on(model, 3 * step + 1).backward()
    if beneficial:
        with surgery.beneficial():
            loss_on(model, 3 * step + 2).backward()
    loss_on(model, 3 * step).backward()
    optimizer.step()
    optimizer.zero_grad()


def make(kind, model, lr=0.05, weight_decay=0.1, **options):
    """(optimizer, surgery) of one of the two kinds."""
    named = model.named_parameters()
    if kind == "SurgeryAdamW":
        optimizer = SurgeryAdamW(named, lr=lr, weight_decay=weight_decay, **options)
        return optimizer, optimizer
    optimizer = torch.optim.AdamW(named, lr=lr, weight_decay=weight_decay, foreach=True)
    return optimizer, OptimizerSurgery(optimizer, **options)


both = pytest.mark.parametrize("kind", ["OptimizerSurgery", "SurgeryAdamW"])


def assert_same_weights(model, other, tolerance=1e-9):
    """AdamW divides by the gradient's size: where surgery leaves only rounding, that is what it magnifies."""
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
