"""TorchJD's weightings in ObjectiveSurgery, as they are: the same gradients as TorchJD's own aggregators."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torchjd import aggregation
from torchjd.aggregation import CRMOGMWeighting, GramianWeightedAggregator
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from dgs_kernels import ObjectiveSurgery

OBJECTIVES, STEPS = 4, 3
# This weighting stands around another.
SMOOTHED = "CR-MOGM of UPGrad"
# Arguments that have no default.
ARGUMENTS = {"CAGrad": {"c": 0.5}, "FairGrad": {"alpha": 1.0}, "Krum": {"n_byzantine": 1}}
AGGREGATORS = {
    name: aggregator
    for name, aggregator in inspect.getmembers(aggregation, inspect.isclass)
    if issubclass(aggregator, GramianWeightedAggregator) and aggregator is not GramianWeightedAggregator
}


def make(name: str) -> GramianWeightedAggregator:
    if name == SMOOTHED:
        return GramianWeightedAggregator(CRMOGMWeighting(make("UPGrad").gramian_weighting))
    return AGGREGATORS[name](**ARGUMENTS.get(name, {}))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(OBJECTIVES))
        self.double()

    def losses(self, step: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features, and a loss for each head."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        aims = torch.randn(OBJECTIVES, generator=generator, dtype=torch.float64)
        features = self.trunk(x)
        return features, [(head(features) - aim).square().mean() for head, aim in zip(self.heads, aims)]


def test_the_list_is_whole():
    assert len(AGGREGATORS) >= 11 and AGGREGATORS.keys() > ARGUMENTS.keys()


@pytest.mark.parametrize("name", [*AGGREGATORS, SMOOTHED])
def test_gramian_weightings(name):
    """Several steps, as some weightings remember; the random ones draw the same numbers."""
    weighting, aggregator = make(name).gramian_weighting, make(name)
    model, plain = TwoHeads(), TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    surgery = ObjectiveSurgery(optimizer, weighting=weighting)
    for step in range(STEPS):
        for loss in model.losses(step)[1]:
            with surgery.objective():
                loss.backward(retain_graph=True)
        torch.manual_seed(step)
        optimizer.step()
        optimizer.zero_grad()

        backward(plain.losses(step)[1])
        torch.manual_seed(step)
        jac_to_grad(plain.parameters(), aggregator)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    for a, b in zip(model.parameters(), plain.parameters()):
        # Solvers stop at tolerances of their own, and Gramians added up in another order differ in rounding.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    start = zip(model.parameters(), TwoHeads().parameters())
    assert any((a - s).abs().max() > 1e-2 for a, s in start)


def test_a_weighting_that_remembers_needs_one_for_each_layer():
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match="GradVacWeighting remembers"):
        ObjectiveSurgery(optimizer, make("GradVac").gramian_weighting, "layer")
    ObjectiveSurgery(optimizer, [make("GradVac").gramian_weighting for _ in range(1 + OBJECTIVES)], "layer")


def test_heads_outside_are_as_with_mtl_backward():
    """Heads with an optimiser of their own: TorchJD's weights come from the shared parameters alone."""
    model, plain = TwoHeads(), TwoHeads()
    optimizer = torch.optim.SGD(model.trunk.parameters())
    surgery = ObjectiveSurgery(optimizer, make("UPGrad").gramian_weighting)
    for loss in model.losses(0)[1]:
        with surgery.objective():
            loss.backward(retain_graph=True)
    surgery.combine()
    features, losses = plain.losses(0)
    mtl_backward(losses, features=features)
    jac_to_grad(plain.trunk.parameters(), make("UPGrad"))
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
