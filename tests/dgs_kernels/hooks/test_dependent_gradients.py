"""Gradients that depend on each other, or nearly: what is stepped with stays short and keeps its promises."""

from __future__ import annotations

import pytest
import torch

from dgs_kernels import ObjectiveSurgery

DIM = 50
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def of_rank(count: int, rank: int, draw: torch.Generator) -> torch.Tensor:
    return torch.randn(count, rank, generator=draw, dtype=torch.float64)


def strictly_weak(count: int, rank: int, draw: torch.Generator) -> torch.Tensor:
    """Rows of which a combination with positive weights is zero: no direction increases all of them."""
    rows = of_rank(count, rank, draw)
    share = torch.rand(count, generator=draw, dtype=torch.float64) + 0.1
    return rows - (share @ rows / share.sum())


def opposed(count: int, rank: int, draw: torch.Generator) -> torch.Tensor:
    """The rows after the first `rank` point against one of those."""
    rows = of_rank(count, rank, draw)
    for k in range(rank, count):
        against = int(torch.randint(rank, (), generator=draw))
        rows[k] = -torch.rand((), generator=draw, dtype=torch.float64) * rows[against]
    return rows


def chained(count: int, rank: int, draw: torch.Generator) -> torch.Tensor:
    """The rows after the first `rank` are multiples of any before them, of either sign."""
    rows = of_rank(count, rank, draw)
    for k in range(rank, count):
        before = int(torch.randint(k, (), generator=draw))
        rows[k] = torch.randn((), generator=draw, dtype=torch.float64) * rows[before]
    return rows


SAMPLERS = (of_rank, strictly_weak, opposed, chained)


def gradients(sampler, count: int, rank: int, nearly: float, seed: int) -> torch.Tensor:
    """[K, DIM] of this rank but for noise of `nearly`, with lengths that differ up to a hundredfold.

    None is the sum of the others, which a surgery would take for a loss that was captured twice.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = sampler(count, rank, draw) @ torch.randn(rank, DIM, generator=draw, dtype=torch.float64)
    noise = torch.randn(count, DIM, generator=draw, dtype=torch.float64)
    rows = rows + nearly * rows.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)
    order = torch.randperm(count, generator=draw)
    rows = rows * torch.logspace(0, seed % 3, count, dtype=torch.float64)[order, None]
    apart = (rows.sum(0) - 2 * rows).square().sum(1)
    if apart.min() > 1e-3 * rows.square().sum():
        return rows
    return gradients(sampler, count, rank, nearly, seed + 1000)


def stepped(weighting: str, rows: torch.Tensor) -> torch.Tensor:
    """What the optimiser gets, of losses whose gradients are these rows."""
    parameter = torch.nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    surgery = ObjectiveSurgery(optimizer, weighting)
    for row in rows:
        with surgery.objective():
            (parameter * row).sum().backward()
    optimizer.step()
    return parameter.grad


@pytest.mark.parametrize("weighting", ["gem", "mgda", "upgrad"])
@pytest.mark.parametrize("count", range(2, 17))
def test_the_step_is_short_and_in_conflict_with_no_constraint(weighting, count):
    for rank in sorted({1, 2, count // 2, count - 1, count}):
        for case, sampler in enumerate(SAMPLERS):
            for place, dtype in enumerate(DTYPES):
                nearly = (0.0, 1e-7, 1e-6, 1e-4)[(case + place + rank + count) % 4]
                rows = gradients(sampler, count, rank, nearly, seed=7 * count + rank).to(dtype)
                step = stepped(weighting, rows).double()
                lengths = rows.double().norm(dim=1)
                longest = lengths.sum() if weighting == "gem" else lengths.max()
                # The numbers of the step are rounded.
                rounding = 2 * torch.finfo(dtype).eps
                assert step.norm() <= longest * (1 + rounding), (rank, sampler.__name__, dtype, nearly)
                inner = rows.double() @ step / lengths
                constraints = inner[1:] if weighting == "gem" else inner
                assert constraints.min() >= -1e-3 * lengths.sum(), (rank, sampler.__name__, dtype, nearly)


@pytest.mark.parametrize("weighting", ["gem", "upgrad"])
def test_a_gradient_and_its_opposite_forbid_their_line_alone(weighting):
    """The third is free to act on all that is orthogonal to the two, and does."""
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        one, free = torch.randn(2, DIM, generator=draw)
        rows = torch.stack([free, one, -0.3 * one])
        step = stepped(weighting, rows)
        across = free - (free @ one) / (one @ one) * one
        expected = across if weighting == "gem" else across / 3
        torch.testing.assert_close(step, expected, rtol=0, atol=2e-5 * float(free.norm() + one.norm()))
