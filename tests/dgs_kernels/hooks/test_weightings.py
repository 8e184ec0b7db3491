"""From Gramians to weights: every method against its definition on the gradients themselves."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from qpsolvers import solve_qp

from dgs_kernels.hooks.weightings import NAMES, weigh

every_method = pytest.mark.parametrize("method", NAMES)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def combined(method: str, gradients: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    """[G, D], what the method makes of gradients [G, K, D] when it sees Gramians of `dtype`."""
    weights = weigh(method, (gradients @ gradients.mT).to(dtype), generator())
    assert weights.dtype == dtype
    return (weights.to(gradients.dtype)[:, None] @ gradients)[:, 0]


def conflicting(count: int, dim: int, seed: int) -> torch.Tensor:
    """[6, K, D], with angles on both sides of 90 degrees and lengths that differ a hundredfold."""
    draw = torch.Generator().manual_seed(seed)
    gradients = torch.randn(6, count, dim, generator=draw, dtype=torch.float64)
    return gradients * torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]


def cone_projection(vector: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The nearest vector whose inner products with the rows are not negative: the primal problem."""
    return solve_qp(np.eye(len(vector)), -vector, -rows, np.zeros(len(rows)), solver="quadprog")


def by_definition(method: str, gradients: np.ndarray) -> np.ndarray:
    """[D] of [K, D], from the papers, without a Gramian."""
    count = len(gradients)
    if method == "mean":
        return gradients.mean(0)
    if method == "pcgrad":
        orders = torch.rand(count, count, generator=generator()).fill_diagonal_(2.0).argsort(1)[:, :-1]
        total = np.zeros_like(gradients[0])
        for i, order in enumerate(orders.tolist()):
            vector = gradients[i].copy()
            for j in order:
                if vector @ gradients[j] < 0:
                    vector -= vector @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
            total += vector
        return total
    if method == "ogd":
        others = gradients[1:].T
        return gradients[0] - others @ np.linalg.lstsq(others, gradients[0], rcond=None)[0]
    if method == "gem":
        return cone_projection(gradients[0], gradients[1:])
    if method == "upgrad":
        return np.mean([cone_projection(g, gradients) for g in gradients], 0)
    weights = solve_qp(
        gradients @ gradients.T, np.zeros(count), A=np.ones((1, count)), b=np.ones(1), lb=np.zeros(count),
        solver="quadprog",
    )  # fmt: skip
    return weights @ gradients


@every_method
@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_definitions(method, count, seed):
    gradients = conflicting(count, 9, seed)
    want = torch.tensor(np.stack([by_definition(method, layer.numpy()) for layer in gradients]))
    scale = want.norm(dim=1).max().item()
    torch.testing.assert_close(combined(method, gradients), want, rtol=0, atol=1e-7 * scale)
    # What float32's rounding of the Gramian does to the direction.
    torch.testing.assert_close(combined(method, gradients, torch.float32), want, rtol=0, atol=3e-4 * scale)


def test_cases_conflict():
    """The problems above are such that every method has something to do."""
    gramians = conflicting(7, 9, 0) @ conflicting(7, 9, 0).mT
    assert all(0.2 < (layer < 0).double().mean() < 0.8 for layer in gramians)
    for method in set(NAMES) - {"mean"}:
        weights = weigh(method, gramians, generator())
        assert not torch.allclose(weights, weights[:, :1].expand_as(weights))


@pytest.mark.parametrize("method", ["gem", "mgda", "upgrad", "ogd"])
@pytest.mark.parametrize("count, dim", [(2, 1), (3, 2), (8, 3), (16, 2)])
def test_more_gradients_than_dimensions(method, count, dim):
    """Singular Gramians: the result keeps what the method promises."""
    gradients = conflicting(count, dim, 0)
    result = combined(method, gradients)
    inner = (gradients @ result[:, :, None])[:, :, 0] / gradients.norm(dim=2)
    size = gradients[:, 0].norm(dim=1, keepdim=True)
    if method == "ogd":
        assert (inner[:, 1:].abs() < 1e-9 * size).all()
    elif method == "mgda":
        assert (inner * gradients.norm(dim=2) >= result.square().sum(1, keepdim=True) - 1e-9).all()
    else:
        assert (inner[:, method == "gem" :] > -1e-7 * size).all()


@pytest.mark.parametrize("method, error", [("gem", 2e-2), ("mgda", 1e-5), ("upgrad", 2e-2)])
@pytest.mark.parametrize("count, dim", [(3, 2), (8, 3), (16, 2), (5, 4)])
def test_singular_gramians_that_are_rounded(method, error, count, dim):
    """float32 makes dependent gradients look independent: what it adds must not count as a direction.

    The errors are those of large weights, which the ridge keeps small.
    """
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        gradients = torch.randn(1, count, dim, generator=draw, dtype=torch.float64)
        want = combined(method, gradients)
        size = gradients.norm(dim=2).max()
        assert (combined(method, gradients, torch.float32) - want).norm() < error * size


@every_method
@pytest.mark.parametrize("count", [2, 3])
def test_a_norm_that_underflows(method, count):
    """Squared, a tiny gradient is zero where its products with others are not: it gets no say."""
    gramian = torch.eye(count)[None]
    gramian[0, 1, 1] = 0
    gramian[0, 0, 1] = gramian[0, 1, 0] = -1e-30
    assert (weigh(method, gramian, generator()).abs() <= 1).all()


@every_method
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_in_its_layer(method, count, bad):
    gramian = conflicting(count, 4, 0) @ conflicting(count, 4, 0).mT
    clean = weigh(method, gramian, generator())
    gramian[4, 0, 1] = gramian[4, 1, 0] = bad
    weights = weigh(method, gramian, generator())
    others = [0, 1, 2, 3, 5]
    assert weights[4].isnan().all() and torch.equal(weights[others], clean[others])


@every_method
@pytest.mark.parametrize("count", [2, 3])
def test_zero_gradients(method, count):
    zero = torch.zeros(1, count, 4, dtype=torch.float64)
    assert torch.equal(combined(method, zero), zero[:, 0])
    # The last is zero: the others go on as without it, but under the two means and MGDA.
    gradients = conflicting(count + 1, 4, 1)
    gradients[:, -1] = 0
    want = combined(method, gradients[:, :-1])
    if method == "mgda":
        want = want * 0
    elif method in ("mean", "upgrad"):
        want = want * count / (count + 1)
    elif method == "pcgrad":
        # Other orders are drawn; test_definitions covers the projections.
        return
    torch.testing.assert_close(combined(method, gradients), want)


@pytest.mark.parametrize(
    "method, opposite, same",
    [("mean", 0, 1), ("pcgrad", 0, 2), ("ogd", 0, 0), ("gem", 0, 1), ("mgda", 0, 1), ("upgrad", 0, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_and_equal_gradients(method, opposite, same, dtype):
    g = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
    for other, factor in ((-g, opposite), (g, same)):
        torch.testing.assert_close(combined(method, torch.stack([g, other])[None], dtype)[0], factor * g)


def test_orders_are_random_and_seeded():
    gramian = conflicting(5, 9, 0) @ conflicting(5, 9, 0).mT
    draw = generator()
    first, second = (weigh("pcgrad", gramian, draw) for _ in range(2))
    assert torch.equal(weigh("pcgrad", gramian, generator()), first) and not torch.equal(first, second)


@every_method
def test_layers_do_not_mix(method):
    gramian = conflicting(4, 9, 0) @ conflicting(4, 9, 0).mT
    both = weigh(method, gramian, generator())
    torch.testing.assert_close(both[1:], weigh(method, gramian[1:], generator()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["gem", "mgda", "upgrad"])
def test_without_scipy(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    gramian = torch.eye(3)[None]
    weigh(method, gramian[:, :2, :2], generator())
    with pytest.raises(ImportError, match="pip install scipy"):
        weigh(method, gramian, generator())


def test_callables():
    gramian = torch.eye(2).repeat(3, 1, 1)
    weights = weigh(lambda layer: layer.double().sum(1).requires_grad_(), gramian, generator())
    assert torch.equal(weights, torch.ones(3, 2)) and not weights.requires_grad
    for wrong in (lambda layer: layer, lambda layer: [1.0, 1.0]):
        with pytest.raises(ValueError, match=r"must return a tensor \[2\]"):
            weigh(wrong, gramian, generator())
