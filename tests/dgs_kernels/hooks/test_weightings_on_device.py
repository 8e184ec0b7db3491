"""Quadratic programmes where the gradients are, in Triton's interpreter: as the host solves them."""

from __future__ import annotations

import pytest
import torch

from dgs_kernels import backends
from dgs_kernels.hooks.weightings import weigh

pytest.importorskip("triton")
every_method = pytest.mark.parametrize("method", ["gem", "mgda", "upgrad"])


@pytest.fixture
def both(monkeypatch):
    """Weights of a method, by the host and by the kernel."""

    def found(method, gramian):
        draw = torch.Generator()
        monkeypatch.delenv(backends.VARIABLE, raising=False)
        monkeypatch.setitem(backends.PREFERENCE, "cpu", ("cpu", "eager"))
        on_host = weigh(method, gramian, draw)
        monkeypatch.setitem(backends.PREFERENCE, "cpu", ("triton", "eager"))
        # A call on the host would fail now.
        monkeypatch.setattr("scipy.optimize.nnls", None)
        on_device = weigh(method, gramian, draw)
        monkeypatch.undo()
        return on_host, on_device

    return found


def conflicting(count, dim, layers=2):
    draw = torch.Generator().manual_seed(count * dim)
    gradients = torch.randn(layers, count, dim, generator=draw, dtype=torch.float64)
    return gradients * torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]


@every_method
@pytest.mark.parametrize(
    ("count", "dim"), [(3, 9), (5, 9), (3, 2), (6, 3), pytest.param(16, 12, marks=pytest.mark.slow)]
)
def test_the_same_gradient_as_by_the_host(both, method, count, dim):
    """Weights of dependent gradients are not unique; what they make of the gradients is."""
    gradients = conflicting(count, dim)
    products = gradients @ gradients.mT
    for dtype, error in ((torch.float64, 1e-6), (torch.float32, 4e-2 if count > dim else 4e-4)):
        made = [(w.double()[:, None] @ gradients)[:, 0] for w in both(method, products.to(dtype))]
        size = gradients.norm(dim=2).amax(1)
        assert ((made[0] - made[1]).norm(dim=1) < error * size).all()
        longest = gradients.norm(dim=2).sum(1) if method == "gem" else size
        assert (made[1].norm(dim=1) <= (1 + 1e-3) * longest).all()


@every_method
def test_zeros_and_what_is_not_finite(both, method):
    gradients = conflicting(4, 6, layers=3)
    gradients[1, 2] = 0
    products = gradients @ gradients.mT
    products[2, 0, 1] = products[2, 1, 0] = torch.nan
    on_host, on_device = both(method, products)
    torch.testing.assert_close(on_device, on_host, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert on_device[2].isnan().all() and on_device[:2].isfinite().all()
    zeros = torch.zeros(1, 3, 3)
    torch.testing.assert_close(*both(method, zeros))


@every_method
def test_what_the_kernel_does_not_take_goes_to_the_host(monkeypatch, method):
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("triton", "eager"))
    gradients = conflicting(17, 20)
    weights = weigh(method, gradients @ gradients.mT, torch.Generator())
    assert weights.isfinite().all()
    monkeypatch.setenv(backends.VARIABLE, "eager")
    assert torch.equal(weights, weigh(method, gradients @ gradients.mT, torch.Generator()))
