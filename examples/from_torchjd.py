"""A TorchJD user's loop, before and after: the same weighting, the same losses, any optimiser and wrapper."""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torchjd.aggregation import AlignedMTL, AlignedMTLWeighting
from torchjd.autojac import backward, jac_to_grad

from dgs_kernels import ObjectiveSurgery

x, y = (torch.tensor(a).float() for a in load_diabetes(return_X_y=True))
x, y = x / x.std(0), (y - y.mean()) / y.std()


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def losses(model):
    """Progression of the disease, whether it is above average, and its size: three tasks, one output each."""
    first, second, third = model(x).unbind(1)
    above = nn.functional.binary_cross_entropy_with_logits(second, (y > 0).float())
    return [(first - y).square().mean(), above, (third - y.abs()).square().mean()]


def before():
    model, optimizer = make()
    aggregator = AlignedMTL()
    for _ in range(100):
        backward(losses(model))
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()
    return losses(model)


def after():
    model, optimizer = make()
    surgery = ObjectiveSurgery(optimizer, weighting=AlignedMTLWeighting())
    for _ in range(100):
        for loss in losses(model):
            with surgery.objective():
                loss.backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    return losses(model)


for old, new in zip(before(), after()):
    print(f"before {old.item():.6f}  after {new.item():.6f}")
