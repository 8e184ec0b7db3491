"""Margins of "gem" and of the rule "conflict", against slow solvers of the problem itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qpsolvers import solve_qp

from dgs_kernels import ObjectiveSurgery, OptimizerSurgery
from dgs_kernels.hooks.weightings import weigh
from tests.dgs_kernels.hooks.steps import LAYERS, both, grads_of, make, small_model, surgery_step


def stepped(gradients: torch.Tensor, margin: float, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """[D] of [K, D]: what SGD was given, and whether the margin was met."""
    w = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=dtype))
    optimizer = torch.optim.SGD([w], lr=1.0)
    surgery = ObjectiveSurgery(optimizer, "gem", margin=margin)
    for gradient in gradients.to(dtype):
        with surgery.objective():
            (w * gradient).sum().backward()
    optimizer.step()
    return -w.detach(), surgery.metrics().margin_met


def drawn(count: int, dim: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.rand(count, 1, generator=draw, dtype=torch.float64) * 3 + 0.05
    return (
        torch.nn.functional.normalize(torch.randn(count, dim, generator=draw, dtype=torch.float64)) * lengths
    )


def largest_margin(gradients: np.ndarray) -> float:
    """Of the unit ball: the shortest vector with inner products of 1 or more with all directions says it."""
    units = gradients[1:] / np.linalg.norm(gradients[1:], axis=1, keepdims=True)
    try:
        shortest = solve_qp(
            np.eye(units.shape[1]), np.zeros(units.shape[1]), -units, -np.ones(len(units)), solver="quadprog"
        )
    except ValueError:
        return 0.0
    return 0.0 if shortest is None else 1 / float(np.linalg.norm(shortest))


def nearest(gradients: np.ndarray, margin: float) -> np.ndarray:
    """The primal problem without the ball, or where that binds, with it."""
    norms = np.linalg.norm(gradients, axis=1)
    bounds = -margin * norms[0] * norms[1:]
    found = solve_qp(np.eye(gradients.shape[1]), -gradients[0], -gradients[1:], bounds, solver="quadprog")
    # Rounding leaves no solution where the cone is the origin alone.
    if found is None:
        return np.zeros_like(gradients[0])
    within = np.linalg.norm(found) <= norms.sum()
    return found if within else by_alternating_projections(gradients, margin)


def by_alternating_projections(gradients: np.ndarray, margin: float, rounds: int = 20000) -> np.ndarray:
    """Dykstra's algorithm: the point of half-spaces and a ball that is nearest to the first gradient."""
    norms = np.linalg.norm(gradients, axis=1)
    x, corrections = gradients[0].copy(), np.zeros((len(gradients), gradients.shape[1]))
    for _ in range(rounds):
        start = x.copy()
        for k in range(len(gradients)):
            y = x + corrections[k]
            if k:
                unit = gradients[k] / norms[k]
                x = y + max(margin * norms[0] - y @ unit, 0.0) * unit
            else:
                x = y * min(1.0, norms.sum() / np.linalg.norm(y))
            corrections[k] = y - x
        if np.abs(x - start).max() < 1e-13 * norms[0]:
            break
    return x


@pytest.mark.parametrize("count, dim", [(2, 4), (3, 6), (5, 9), (3, 2), (4, 2), (6, 3)])
@pytest.mark.parametrize("margin", [0.2, 0.9])
def test_the_nearest_gradient_with_the_margin(count, dim, margin):
    """Or with the largest common one, where the vectors within the sum of the lengths have none so large."""
    kinds = set()
    for seed in range(12):
        gradients = drawn(count, dim, seed)
        g = gradients.numpy()
        norms = np.linalg.norm(g, axis=1)
        largest = largest_margin(g) * norms.sum() / norms[0]
        found, met = stepped(gradients, margin)
        if 0.97 * largest < margin < 1.03 * largest:
            continue
        if margin < largest:
            kinds.add("met")
            assert met.all()
            np.testing.assert_allclose(found, nearest(g, margin), atol=3e-5 * norms.sum())
        elif largest < 1e-3:
            kinds.add("none")
            want = nearest(g, 0.0)
            np.testing.assert_allclose(found, want, atol=3e-5 * norms.sum())
            assert not met.any()
        else:
            kinds.add("less")
            assert not met.any()
            inner = (g[1:] @ found.numpy()) / norms[1:] / norms[0]
            np.testing.assert_allclose(inner.min(), largest, rtol=1e-4)
            assert np.linalg.norm(found) == pytest.approx(norms.sum(), rel=1e-6)
    assert "met" in kinds and ("none" in kinds) == (count > dim + 1)


def test_the_ball_binds_where_a_reference_is_short():
    """At a margin of 1 the nearest vector would be longer than both gradients together."""
    gradients = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.01, 0.0]], dtype=torch.float64)
    for g in (gradients, torch.cat([gradients, torch.tensor([[0.0, 0.0, 1e-3]]).double()])):
        margin = 1.0 if len(g) == 2 else 0.6
        found, met = stepped(g, margin)
        assert met.all() and found.norm() == pytest.approx(float(g.norm(dim=1).sum()), rel=1e-5)
        np.testing.assert_allclose(found, by_alternating_projections(g.numpy(), margin), atol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_margin_nothing_changes_to_the_bit(count, dtype):
    gradients = drawn(count, 7, 3)
    gramian = (gradients @ gradients.T)[None].to(dtype)
    plain = weigh("gem", gramian, torch.Generator())
    assert torch.equal(weigh("gem", gramian, torch.Generator(), 0.0), plain)
    assert stepped(gradients, 0.0, dtype)[1].all()
    # Where the margin is there already, the gradient stays what it is.
    alike = torch.cat([gradients[:1], gradients[:1] + 0.01 * gradients[1:]])
    torch.testing.assert_close(stepped(alike, 0.3, dtype)[0], alike[0].to(dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_margin_in_short_types(count, dtype):
    gradients = drawn(count, 12, 5).to(dtype)
    found, met = stepped(gradients, 0.4, dtype)
    want, _ = stepped(gradients.double(), 0.4)
    tolerance = {torch.float32: 2e-3, torch.bfloat16: 2e-2}[dtype] * gradients.double().norm(dim=1).sum()
    torch.testing.assert_close(found.double(), want, rtol=0, atol=float(tolerance))
    assert met.all()


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_zero_gradients_ask_for_nothing(zero):
    gradients = drawn(3, 5, 2)
    gradients[zero] = 0
    found, met = stepped(gradients, 0.5)
    assert met.all()
    others = gradients[[k for k in range(3) if k != zero]]
    want = stepped(others, 0.5)[0] if zero else torch.zeros(5)
    torch.testing.assert_close(found, want.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_what_is_not_finite_stays_visible(count):
    gramian = torch.eye(count).repeat(2, 1, 1)
    gramian[1, 0, 1] = torch.nan
    weights = weigh("gem", gramian, torch.Generator(), 0.3)
    assert weights[0].isfinite().all() and weights[1].isnan().all()


# The rule "conflict" ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("order", ["align_first", "project_first"])
def test_conflict(kind, order):
    """The gradient that the optimiser is given is the nearest with the margin, layer by layer."""
    margin, strength = 0.35, 0.3
    model, twin = small_model(), small_model()
    options = {"granularity": "layer", "rule": "conflict", "order": order, "alignment": strength}
    eps = {"surgery_eps" if kind == "SurgeryAdamW" else "eps": 1e-12}
    optimizer, surgery = make(kind, model, margin=margin, **options, **eps)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    bound = 0
    for step in (9, 4):
        g, h, b = (grads_of(twin, 3 * step + i) for i in range(3))
        removed = []
        for layer in range(3):
            at = [i for i, number in enumerate(LAYERS["layer"]) if number == layer]
            task, harmful, pull = (torch.cat([x[i].flatten() for i in at]) for x in (g, h, b))
            pull = strength * pull.clamp(max=0)
            x = task + pull if order == "align_first" else task
            unit = harmful / harmful.norm()
            lack = (margin * x.norm() - x @ unit).clamp(min=0)
            bound += bool(lack > 0)
            left = x + lack * unit
            removed.append(1 - left.square().sum() / x.square().sum())
            left = left if order == "align_first" else left + pull
            for i, some in zip(at, left.split([g[i].numel() for i in at])):
                g[i] = some.view_as(g[i])
        for p, grad in zip(twin.parameters(), g):
            p.grad = grad
        plain.step()
        surgery_step(model, optimizer, surgery, step)
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        metrics = surgery.metrics()
        torch.testing.assert_close(metrics.removed, torch.stack(removed), rtol=1e-8, atol=1e-9)
        assert metrics.margin_met.all()
    assert 2 <= bound <= 5


def test_a_large_eps_misses_the_margin():
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([w], lr=1.0)
    surgery = OptimizerSurgery(optimizer, rule="conflict", margin=0.5, eps=1.0)
    for harmful, met in ((1.0, False), (1e6, True), (0.0, True)):
        with surgery.harmful():
            (harmful * w[0]).backward()
        w[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        assert surgery.metrics().margin_met.tolist() == [met]


@pytest.mark.parametrize("margin, error", [(-0.1, ValueError), (float("nan"), ValueError), ("1", TypeError)])
def test_margins_that_are_none(margin, error):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    for hook, options in ((ObjectiveSurgery, {"weighting": "gem"}), (OptimizerSurgery, {"rule": "conflict"})):
        with pytest.raises(error, match=f"{hook.__name__}: margin must be"):
            hook(optimizer, margin=margin, **options)


def test_margins_of_what_has_none():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(ValueError, match='a margin needs weighting="gem"'):
        ObjectiveSurgery(optimizer, "pcgrad", margin=0.1)
    with pytest.raises(ValueError, match='a margin needs weighting="gem"'):
        ObjectiveSurgery(optimizer, ["mean"], margin=0.1)
    with pytest.raises(ValueError, match='a margin needs rule="conflict"'):
        OptimizerSurgery(optimizer, rule="full", margin=0.1)
