"""PCGrad (arXiv 2001.06782): two digits in one picture, two tasks on one trunk, a plot of the conflict."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from dgs_kernels import ObjectiveSurgery

images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
images = images.float().view(-1, 8, 8) / 16


def batch(n, first, last):
    """n pictures [n, 96] of two digits that overlap by four columns, and both labels."""
    left, right = torch.randint(first, last, (2, n))
    pictures = torch.zeros(n, 8, 12)
    pictures[:, :, :8] += images[left]
    pictures[:, :, 4:] += images[right]
    return pictures.flatten(1), (labels[left], labels[right])


def train(weighting):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(96, 64), nn.ReLU())
    heads = nn.ModuleList([nn.Linear(64, 10) for _ in "ab"])
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=2e-3)
    surgery = ObjectiveSurgery(optimizer, weighting)
    found = []
    for _ in range(300):
        x, targets = batch(64, 0, 1200)
        features = trunk(x)
        for name, head, y in zip(("left", "right"), heads, targets):
            with surgery.objective(name):
                nn.functional.cross_entropy(head(features), y).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
        # Metrics are tensors, so nothing waits for the device here.
        found.append(surgery.metrics())
    x, targets = batch(4000, 1200, len(images))
    features = trunk(x)
    right = [(head(features).argmax(1) == y).float().mean().item() for head, y in zip(heads, targets)]
    return right, [metrics.scalars() for metrics in found]


for weighting in ("mean", "pcgrad"):
    (left, right), curves = train(weighting)
    print(f"{weighting:6s}  left {left:.1%}  right {right:.1%}  ", end="")
    print(f"conflict in {np.mean([c['objectives/conflict_rate'] for c in curves]):.0%} of the steps")
for name in ("cosine/left, right", "weight/left", "weight/right"):
    plt.plot([c[f"objectives/{name}/model"] for c in curves], label=name, linewidth=0.8)
plt.xlabel("step")
plt.legend()
plt.savefig(Path(sys.argv[1]) / "objectives.png", dpi=100)
